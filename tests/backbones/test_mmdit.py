import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st

import lct_core as lct
from lct_backbones.mmdit import PAPER_3B, MMDiT, MMDiTBackbone, tiny
from lct_core import Shot, ShotInput, retrofit
from lct_core.testing.conformance import conformance
from lct_core.testing.strategies import shots
from lct_core.testing.tolerances import BOUNDS, error

FLOAT32 = BOUNDS[torch.float32]


def make(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MMDiT(**{"channels": 4, "text_width": 16, "width": 48, "depth": 2, "heads": 2, **options})


def randomized(model):
    """The zero-initialised gates opened."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def draw(model, shot, *, batch=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    given = MMDiTBackbone(model).example(shot, batch=batch, generator=generator, dtype=dtype)
    return given.latents, 1000 * torch.rand(batch, generator=generator), given.text


def test_the_papers_size():
    with torch.device("meta"):
        model = MMDiT(**PAPER_3B)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert abs(count / 3e9 - 1) <= 0.01
    width, depth, tokens = PAPER_3B["width"], PAPER_3B["depth"], PAPER_3B["channels"] * 4
    linear = lambda i, o: (i + 1) * o  # noqa: E731
    norms = 2 * width // PAPER_3B["heads"]
    read_only = linear(width, 2 * width) + linear(width, 2 * width) + norms // 2  # keys and values alone
    stream = linear(width, 6 * width) + linear(width, 3 * width) + norms
    stream += linear(width, width) + linear(width, 4 * width) + linear(4 * width, width)
    ends = linear(tokens, width) + linear(PAPER_3B["text_width"], width) + linear(256, width) + linear(width, width)
    ends += linear(width, 2 * width) + linear(width, tokens)
    assert count == (2 * depth - 1) * stream + read_only + ends


@given(shot=shots(max_grid=(4, 4, 4)), patch=st.tuples(*[st.integers(1, 2)] * 3), batch=st.integers(1, 2))
@torch.no_grad()
def test_any_grid_and_aspect_ratio(shot, patch, batch):
    model = randomized(make(patch=patch))
    latents, t, text = draw(model, shot, batch=batch)
    out = model(latents, t, text)
    assert latents.shape == (batch, 4, *(n * p for n, p in zip(shot.grid, patch, strict=True)))
    assert (out.shape, out.dtype) == (latents.shape, latents.dtype)
    assert out.isfinite().all()


@given(shot=shots(max_grid=(3, 3, 3)), patch=st.tuples(*[st.integers(1, 2)] * 3))
def test_patches_go_back_where_they_came_from(shot, patch):
    """Every token holds one patch: embedded with the identity and taken apart again, the latents are the same."""
    model = make(channels=2, patch=patch, width=48, text_width=48)
    size = 2 * patch[0] * patch[1] * patch[2]
    latents = draw(model, shot)[0]
    with torch.no_grad():
        model.video_in.weight.copy_(torch.eye(48, size))
        model.video_in.bias.zero_()
        _, video, _ = model.embed(latents, torch.zeros(2), torch.zeros(2, 0, 48))
    assert torch.equal(model.unpatchify(video[..., :size], shot.grid), latents)
    t, h, w = patch
    for token, (f, y, x) in enumerate(
        (f, y, x) for f in range(shot.grid[0]) for y in range(shot.grid[1]) for x in range(shot.grid[2])
    ):
        own = latents[:, :, f * t : f * t + t, y * h : y * h + h, x * w : x * w + w]
        assert torch.equal(video[:, token, :size], own.flatten(1))


def test_every_parameter_gets_a_gradient():
    model = tiny()
    latents, t, text = draw(model, Shot(3, (2, 2, 3)))
    model(latents, t, text).square().mean().backward()
    for name, parameter in model.named_parameters():
        rows = parameter.grad.reshape(len(parameter), -1)
        assert rows.any(1).all(), name  # all of them: a third of a fused projection could be dead


def test_a_fresh_model_predicts_zero_and_can_learn():
    model = make()
    inputs = draw(model, Shot(3, (2, 2, 3)))
    out = model(*inputs)
    assert torch.equal(out, torch.zeros_like(out))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(*inputs) - inputs[0]).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


@torch.no_grad()
def test_a_fresh_block_is_the_identity():
    model = make()
    text, video, condition = model.embed(*draw(model, Shot(3, (1, 2, 2))))
    by = lct.rotation(model.angles(torch.zeros(7, 3)), pairing="interleaved")
    for block in model.blocks:
        after = block(text, video, condition, by)
        assert torch.equal(after[0], text)
        assert torch.equal(after[1], video)


@torch.no_grad()
def test_without_text():
    model = tiny()
    latents, t, text = draw(model, Shot(0, (2, 2, 2)))
    assert text.shape[1] == 0
    out = model(latents, t, text)
    assert out.isfinite().all()
    assert out.any()


@pytest.mark.parametrize("change", ["latents", "text", "timestep"])
@torch.no_grad()
def test_everything_given_matters(change):
    model = tiny()
    latents, t, text = draw(model, Shot(3, (2, 2, 2)))
    before = model(latents, t, text)
    if change == "latents":
        latents = latents.roll(1, dims=2)
    elif change == "text":
        text = text + 1
    else:
        t = t / 2
    assert error(model(latents, t, text), before) > 1e-3


@torch.no_grad()
def test_timesteps_are_scaled_by_a_thousand():
    model = tiny()
    latents, _, text = draw(model, Shot(3, (1, 1, 1)), batch=1)
    outs = [model(latents, torch.tensor([t]), text) for t in (0.0, 1.0, 500.0, 501.0, 999.0, 1000.0)]
    assert min(error(a, b) for i, a in enumerate(outs) for b in outs[:i]) > 1e-5
    assert MMDiTBackbone(model).traits.timesteps == (0.0, 1000.0)


@torch.no_grad()
def test_entries_of_a_batch_do_not_mix():
    model = tiny()
    latents, t, text = draw(model, Shot(3, (2, 2, 2)), batch=3)
    together = model(latents, t, text)
    for i in range(3):
        assert (
            error(together[i, None], model(latents[i, None], t[i, None], text[i, None]))
            <= FLOAT32["definition"].absolute
        )


@torch.no_grad()
def test_only_the_order_of_video_matters():
    """Text has no RoPE in the single-shot model (paper, 3.1), video has one on all three axes."""
    model = tiny()
    latents, t, text = draw(model, Shot(4, (3, 3, 3)))
    out = model(latents, t, text)
    assert error(model(latents, t, text.flip(1)), out) <= FLOAT32["definition"].absolute
    patches = latents.unflatten(4, (3, 2)).unflatten(3, (3, 2))  # batch, channels, frames, rows, 2, columns, 2
    for axis in (2, 3, 5):
        swapped = patches.index_select(axis, torch.tensor([0, 2, 1])).flatten(5, 6).flatten(3, 4)
        undone = model(swapped, t, text).unflatten(4, (3, 2)).unflatten(3, (3, 2))
        undone = undone.index_select(axis, torch.tensor([0, 2, 1])).flatten(5, 6).flatten(3, 4)
        assert error(undone, out) > 1e-3


def test_angles():
    model = make()  # 24 channels to a head, 8 to each axis
    coords = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 10.0, 0.0], [0.0, 0.0, 100.0]], dtype=torch.float64)
    angles = model.angles(coords)[:, 0]
    assert angles.dtype == torch.float64
    periods = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    expected = torch.zeros(4, 12, dtype=torch.float64)
    expected[1, :4], expected[2, 4:8], expected[3, 8:] = periods, 10 * periods, 100 * periods
    torch.testing.assert_close(angles, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("width", "heads", "axes"), [(48, 2, (8, 8, 8)), (40, 2, (8, 6, 6)), (12, 2, (2, 2, 2)), (2048, 16, (44, 42, 42))]
)
def test_every_channel_of_a_head_turns(width, heads, axes):
    model = make(width=width, heads=heads, depth=1)
    angles = model.angles(torch.eye(3, dtype=torch.float64))[:, 0]
    assert tuple(2 * int((row != 0).sum()) for row in angles) == axes
    assert sum(axes) == width // heads


@pytest.mark.parametrize(("width", "heads"), [(50, 4), (44, 4), (6, 2), (7, 1)])
def test_refuses_a_width_that_heads_do_not_divide(width, heads):
    with pytest.raises(
        ValueError, match=rf"^width: got {width}, expected a multiple of {2 * heads}: {heads} heads of an even size"
    ):
        make(width=width, heads=heads)


def test_takes_no_unknown_or_positional_options():
    with pytest.raises(TypeError):
        make(rope=True)
    with pytest.raises(TypeError):
        MMDiT(4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes(dtype):
    exact, model = tiny().double(), tiny().to(dtype)
    latents, t, text = draw(model, Shot(3, (2, 2, 2)))
    out = model(latents.to(dtype), t, text.to(dtype))
    assert out.dtype == dtype
    assert error(out, exact(latents.double(), t.double(), text.double())) <= (0.05 if dtype == torch.bfloat16 else 1e-6)


def test_tiny_is_what_it_says():
    model = tiny()
    state = torch.random.get_rng_state()
    twin = tiny()
    assert torch.equal(state, torch.random.get_rng_state())
    assert f"{sum(p.numel() for p in model.parameters()) // 1000}K weights" in tiny.__doc__
    assert all(bool(p.all()) for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_built_by_name():
    model = lct.registry().build("mmdit", channels=4, text_width=16, width=48, depth=2, heads=2)
    assert type(model) is MMDiT
    assert len(model.blocks) == 2
    assert isinstance(lct.registry().adapter(model), MMDiTBackbone)
    with pytest.raises(ValueError, match=r"^width: got 50"):
        lct.registry().build("mmdit", width=50)


def test_traits_are_those_of_the_model():
    traits = MMDiTBackbone(make(channels=5, text_width=7, width=24, heads=2, patch=(2, 1, 3))).traits
    assert (traits.latent_channels, traits.text_width, traits.patch) == (5, 7, (2, 1, 3))
    assert (traits.heads, traits.kv_heads, traits.head_dim) == (2, 2, 12)
    assert (traits.text, traits.text_first, traits.pairing, traits.unit) == (
        "joint",
        True,
        "interleaved",
        (1.0, 1.0, 1.0),
    )


def test_the_model_knows_nothing_of_scenes():
    """Its forward runs where the engine cannot even be made."""
    program = """
import lct_core.engine.call as engine
from lct_core import SceneModel
def never(*args, **kwargs):
    raise AssertionError("the engine ran")
SceneModel.__init__ = engine.Call.__init__ = engine.BlockCall.__init__ = never
import torch
from lct_backbones.mmdit import tiny
out = tiny()(torch.ones(1, 4, 1, 2, 2), torch.tensor([500.0]), torch.ones(1, 2, 16))
assert out.shape == (1, 4, 1, 2, 2) and out.any()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    model = tiny()
    assert "forward" not in vars(model)
    assert not any("forward" in vars(block) for block in model.blocks)


@torch.no_grad()
def test_the_adapter_splits_the_models_own_forward():
    """Encoded, block by block with plain attention, and finished: bit for bit the model."""
    model = tiny()
    adapter = MMDiTBackbone(model)
    latents, t, text = draw(model, Shot(3, (2, 2, 2)))
    inputs = ShotInput(latents=latents, text=text)
    shot = adapter.shot(inputs)
    state = adapter.encode(inputs, t)
    by = lct.rotation(adapter.rope(adapter.coordinates(inputs, shot)), pairing=adapter.traits.pairing)
    for block in adapter.blocks:
        (site,) = adapter.sites(block)
        assert site.joint == "joined"
        q, k, v, aux = adapter.qkv(block, site, state)
        q, k, v = (x.transpose(1, 2) for x in (lct.rotate(q, by), lct.rotate(k, by), v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        state.streams.update(adapter.finish(block, site, state, out, aux))
    assert torch.equal(adapter.unpatchify(adapter.head(state), shot), model(latents, t, text))
    assert torch.equal(adapter.single_shot(inputs, t), model(latents, t, text))


@pytest.mark.parametrize("which", ["qkv", "finish", "head"])
@torch.no_grad()
def test_the_adapter_acts_on_every_token_by_itself(which):
    """A change of one video token changes nothing at the others."""
    model = tiny()
    adapter = MMDiTBackbone(model)
    latents, t, text = draw(model, Shot(3, (2, 2, 2)))
    state, other = (adapter.encode(ShotInput(latents=latents, text=text), t) for _ in range(2))
    other.streams["video"][:, 5] += 1
    block, attended = model.blocks[0], torch.ones(2, 11, 2, 24)
    results = []
    for s in (state, other):
        q, k, v, aux = adapter.qkv(block, None, s)
        if which == "qkv":
            results.append(torch.cat([q, k, v], dim=-1))
        elif which == "finish":
            streams = adapter.finish(block, None, s, attended, aux)
            results.append(torch.cat([streams["text"], streams["video"]], dim=1))
        else:
            results.append(adapter.head(s))
    changed = (results[0] != results[1]).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
    assert changed == [5 if which == "head" else 8]


# The embedding of places.


def placed():
    """The tiny model with the embedding."""
    model = make(depth=3, position_embedding=True)
    model.load_state_dict(tiny().state_dict())
    return model


def embedding(grid, width, theta=10_000.0):
    """By definition: of every axis cosines, then of every axis sines, of a third of the width each; frames the rest."""
    side = 2 * (width // 6)
    rows = []
    for cell in ((f, y, x) for f in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])):
        angles = [
            place * theta ** (-2 * i / channels)
            for place, channels in zip(cell, (width - 2 * side, side, side), strict=True)
            for i in range(channels // 2)
        ]
        rows.append([f(a) for f in (math.cos, math.sin) for a in angles])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("width", [48, 40, 24, 20])
@pytest.mark.parametrize("theta", [10_000.0, 100.0])
@torch.no_grad()
def test_the_embedding_of_places_is_its_definition(width, theta):
    options = {"width": width, "heads": 2, "patch": (1, 2, 1), "theta": theta}
    plain, model = make(**options), make(position_embedding=True, **options)
    latents, t, text = draw(model, Shot(3, (3, 2, 4)))
    (words, video, condition), (same_words, without, same_condition) = (
        m.double().embed(latents.double(), t.double(), text.double()) for m in (model, plain)
    )
    expected = embedding((3, 2, 4), width, theta)
    assert torch.equal(words, same_words)
    assert torch.equal(condition, same_condition)
    torch.testing.assert_close(video - without, expected.expand(2, -1, -1), rtol=0, atol=1e-14)
    assert len(expected.unique(dim=0)) == 24  # every place has another


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_embedding_is_rounded_once_and_keeps_the_dtype(dtype):
    model = placed().to(dtype)
    model.video_in.weight.zero_()
    model.video_in.bias.zero_()
    latents, t, text = draw(model, Shot(3, (3, 2, 4)), dtype=dtype)
    _, video, _ = model.embed(latents, t, text)
    assert torch.equal(video, embedding((3, 2, 4), 48).to(dtype).expand(2, -1, -1))
    assert model(latents, t, text).dtype == dtype


def test_the_embedding_adds_no_weight():
    plain, model = tiny(), placed()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in plain.named_parameters()]
    assert [*model.named_buffers()] == []
    assert not plain.position_embedding
    inputs = draw(plain, Shot(3, (2, 2, 2)))
    with torch.no_grad():
        assert error(model(*inputs), plain(*inputs)) > 1e-3


@torch.no_grad()
def test_with_the_embedding_a_model_knows_where_it_is():
    """A still, flat picture gives one token everywhere; with RoPE alone, attention can't tell the places apart."""
    generator = torch.Generator().manual_seed(0)
    for model, knows in ((tiny(), False), (placed(), True)):
        _, t, text = draw(model, Shot(3, (3, 2, 2)))
        colour = torch.randn(2, 4, 1, 1, 1, generator=generator).expand(2, 4, 3, 4, 4)
        tokens = model.embed(colour, t, text)[1]
        assert (error(tokens, tokens[:, :1].expand_as(tokens)) > 1e-3) == knows


@pytest.mark.parametrize("axis", [2, 3, 4])
@torch.no_grad()
def test_moving_content_changes_more_than_its_place(axis):
    """On every axis; without attention, so that RoPE has no part in it, a plain model only moves its output."""
    for model, moves_alone in ((tiny(), True), (placed(), False)):
        for block in model.blocks:
            block.video.proj.weight.zero_()
            block.video.proj.bias.zero_()
        latents, t, text = draw(model, Shot(3, (3, 3, 3)))
        by = model.patch[axis - 2]
        moved = model(latents.roll(by, dims=axis), t, text).roll(-by, dims=axis)
        difference = error(moved, model(latents, t, text))
        assert difference <= FLOAT32["definition"].absolute if moves_alone else difference > 1e-3


@given(shot=shots(max_grid=(3, 3, 3)))
@torch.no_grad()
def test_one_shot_is_the_model_with_the_embedding(shot):
    base, model = placed(), retrofit(placed())
    latents, t, text = draw(base, shot)
    (out,) = model([ShotInput(latents=latents, text=text)], t[:, None] / 1000)
    assert torch.equal(out, base(latents, 1000 * (t[:, None] / 1000)[:, 0], text))


@torch.no_grad()
def test_every_shot_counts_places_from_its_own_start():
    """Two shots of one content that see only themselves are the same, wherever they stand."""
    model = retrofit(placed())
    latents, _, text = draw(model.backbone, Shot(3, (2, 2, 2)))
    shot = ShotInput(latents=latents, text=text)
    first, second, third = model([shot] * 3, torch.full((3,), 0.5), pattern="own_shot")
    assert error(second, first) <= FLOAT32["shifted"].absolute
    assert error(third, first) <= FLOAT32["shifted"].absolute


def test_a_model_with_the_embedding_conforms():
    findings = list(conformance(placed, schemes=["anchored"], dtypes=[torch.float32]))
    assert {finding.invariant for finding in findings} == set(range(1, 10))
    assert not [finding for finding in findings if not finding.holds]
