"""Rotation fused with what stands beside it: in torch bit for bit, and in Triton."""

import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from itertools import chain, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import lct_core.rope as rope
from lct_backbones.mmdit import MMDiTBackbone, tiny
from lct_core import KVCache, Layout, Rotation, Shot, ShotInput, retrofit, rotate, rotation
from lct_core.rope import RowParts, rotate_into
from lct_core.testing.tolerances import BOUNDS, error
from lct_plugins import triton_rotary
from lct_plugins.triton_rotary import naive_norm_rotate, norm_rotate
from tests.toys import CROSS, TOYS, toy

pytestmark = pytest.mark.internals

PAIRINGS = ("interleaved", "half", "half_per_axis")
HALF = (torch.float16, torch.bfloat16)
LENGTHS = (3, 0, 1, 4)
EXACT = BOUNDS[torch.float32]["definition"].absolute
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def draw(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def turn(pairing, tokens, *, heads=1, pairs=9, dtype=torch.float32, device="cpu"):
    return rotation(
        100 * draw(tokens, heads, pairs, seed=7, dtype=torch.float64, device=device), pairing=pairing, dtype=dtype
    )


def shots_of(lengths=LENGTHS, *, heads=2, head_dim=22, dtype=torch.float32):
    """What some shots' projections give: views, of which no token is contiguous."""
    return [draw(2, n, heads, 3, head_dim, seed=i, dtype=dtype).select(3, 1) for i, n in enumerate(lengths)]


def inside(tokens, *shape, dtype, device="cpu"):
    """A place for some tokens in a larger buffer of NaNs, and the buffer without it."""
    batch, heads, head_dim = shape
    buffer = torch.full((batch, tokens + 5, heads + 1, head_dim + 2), float("nan"), dtype=dtype, device=device)
    place = (slice(None), slice(2, 2 + tokens), slice(heads), slice(head_dim))

    def beside():
        rest = buffer.clone()
        rest[place] = float("nan")
        return rest

    return buffer[place], beside


def plainly(parts, by, dtype):
    """Join, rotate, cast: one pass after the other, in code of its own."""
    x = torch.cat(list(parts), dim=1)
    pairs = by.cos.shape[-1]
    wide = x[..., : 2 * pairs].to(torch.promote_types(x.dtype, by.cos.dtype))
    out = wide.clone()
    for i in range(pairs):
        a, b = {
            "interleaved": (2 * i, 2 * i + 1),
            "half": (i, i + pairs),
            "half_per_axis": (i + i // 3 * 3, i + i // 3 * 3 + 3),
        }[by.pairing]
        out[..., a] = wide[..., a] * by.cos[..., i] - wide[..., b] * by.sin[..., i]
        out[..., b] = wide[..., a] * by.sin[..., i] + wide[..., b] * by.cos[..., i]
    return torch.cat([out.to(x.dtype), x[..., 2 * pairs :]], dim=-1).to(dtype)


# In torch: bit for bit.


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("piece", [1, 100, 2**18])
def test_rows_are_filled_as_join_then_rotate_then_cast_gives(monkeypatch, pairing, dtype, piece):
    """Heads with angles of their own and without, wholly and partly turned, and cast to any dtype (as by autocast)."""
    monkeypatch.setattr(rope, "_PIECE", piece)
    for heads, head_dim, target in product([1, 2], [18, 22], {dtype, *HALF}):
        parts, by = shots_of(head_dim=head_dim, dtype=dtype), turn(pairing, sum(LENGTHS), heads=heads)
        expected = plainly(parts, by, target)
        whole = torch.cat(parts, dim=1)
        assert torch.equal(rotate(whole, by).to(target), expected)
        assert torch.equal(rotate(whole.requires_grad_(), by).to(target), expected)
        row = RowParts(parts, by, target)
        assert torch.equal(row.joined(), expected)
        out, beside = inside(sum(LENGTHS), *expected.shape[::2], head_dim, dtype=target)
        row.into(out)
        assert torch.equal(out, expected)
        assert bool(beside().isnan().all())
        assert (row.shape, row.device, row.requires_grad) == (expected.shape, expected.device, False)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 200), st.sampled_from(PAIRINGS))
def test_rows_of_any_shots_in_pieces_of_any_size(lengths, piece, pairing):
    parts, by = shots_of(lengths), turn(pairing, sum(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope, "_PIECE", piece)
        assert torch.equal(RowParts(parts, by, torch.float32).joined(), plainly(parts, by, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("piece", [1, 2**18])
def test_gradients_are_autograds_own_to_the_last_bit(monkeypatch, dtype, piece):
    monkeypatch.setattr(rope, "_PIECE", piece)
    for pairing in PAIRINGS:
        for target in (dtype, torch.bfloat16):
            parts, by = [x.requires_grad_() for x in shots_of(dtype=dtype)], turn(pairing, sum(LENGTHS), heads=2)
            row = RowParts(parts, by, target)
            assert row.requires_grad
            gradient = draw(*row.shape, seed=9, dtype=target)
            got, expected = (
                torch.autograd.grad(out, parts, gradient) for out in (row.joined(), plainly(parts, by, target))
            )
            for a, b, part in zip(got, expected, parts, strict=True):
                assert (a.dtype, a.shape) == (part.dtype, part.shape)
                assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("by", "out", "message"),
    [
        (turn("half", 4), (2, 3, 2, 22), r"^x, by, out: got \[2, 3, 2, 22\], a rotation \[4, 1, 9\]"),
        (turn("half", 3, heads=3), (2, 3, 2, 22), r"^x, by, out: got \[2, 3, 2, 22\], a rotation \[3, 3, 9\]"),
        (
            turn("half", 3),
            (2, 4, 2, 22),
            r"^x, by, out: got .* and \[2, 4, 2, 22\], expected x and out \[batch",
        ),
        (turn("half", 3, pairs=12), (2, 3, 2, 22), r"^by: the rotation turns 24 channels, but the heads of x have 22"),
    ],
)
@pytest.mark.parametrize("function", [rotate_into, triton_rotary.rotate_into])
def test_refuses_what_does_not_fit(by, out, message, function):
    with pytest.raises(ValueError, match=message):
        function(shots_of((3,))[0], by, torch.empty(out))


# In the engine.

ROW = Layout(
    [
        [Shot(2, (2, 2, 3)), Shot(2, (2, 2, 3)), Shot(1, (1, 1, 1))],
        [Shot(3, (1, 2, 2)), Shot(1, (1, 1, 1))],
    ]
)
MODELS = {"MMDiT": lambda: MMDiTBackbone(tiny()), **{name: partial(toy, **config) for name, config in TOYS.items()}}
ROTATED = {name: make for name, make in MODELS.items() if make().traits.pairing is not None}
MODEL = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in ROTATED.items()])


def scenes_of(adapter, layout=ROW, *, batch=1):
    generator = torch.Generator().manual_seed(0)
    return [
        [adapter.example(shot, batch=batch, generator=generator, dtype=torch.float32) for shot in scene]
        for scene in layout.scenes
    ]


def levels_of(layout=ROW):
    return torch.rand(layout.num_shots, generator=torch.Generator().manual_seed(1))


def engine(adapter, **options):
    return retrofit(adapter.model, backbone=adapter, text=getattr(adapter, "scope", "own"), **options)


def flat(scenes):
    return list(chain.from_iterable(scenes))


def same(got, expected):
    assert len(got) == len(expected) > 0
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@MODEL
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@torch.no_grad()
def test_a_fused_pass_changes_no_bit(make, autocast, batched):
    adapter, t = make(), levels_of()
    scenes = scenes_of(adapter, batch=2)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        got, expected = (
            engine(adapter, batch_shots=batched, rotary=rotary)(scenes, t, pattern="context_causal")
            for rotary in (rotate_into, None)
        )
    assert same(flat(got), flat(expected))


@MODEL
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_a_fused_pass_with_a_cache_changes_no_bit(make, autocast):
    adapter, t = make(), levels_of()
    outputs, stored = [], []
    for rotary in (rotate_into, None):
        model, cache, (scene, _) = engine(adapter, rotary=rotary), KVCache(), scenes_of(adapter)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            outputs.append(model(scene[:2], t[:2], cache=cache))
            cache.append(0, 1)
            outputs[-1] += model(scene[2:], t[2:3], cache=cache)
        stored.append([x for site in cache._own.sites.values() for x in (site.row.k, site.row.v)])
    assert same(*outputs)
    assert same(*stored)
    assert {x.dtype for x in stored[0]} == {torch.bfloat16 if autocast else torch.float32}


@MODEL
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_fused_pass(make, checkpointing):
    gradients = []
    for rotary in (rotate_into, None):
        adapter = make()
        model = engine(adapter, rotary=rotary, gradient_checkpointing=checkpointing)
        outs = model(scenes_of(adapter), levels_of(), pattern="context_causal")
        sum(out.square().sum() for out in flat(outs)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapter.model.parameters() if p.grad is not None]))
    assert error(*gradients) <= BOUNDS[torch.float32]["checkpointed"].absolute


@torch.no_grad()
def test_keys_are_rotated_in_their_slot_of_the_cache():
    places = []

    def watched(x, by, out):
        places.append(out)
        rotate_into(x, by, out)

    adapter, cache = MMDiTBackbone(tiny()), KVCache(capacity=100)
    model, (scene, _) = engine(adapter, rotary=watched), scenes_of(adapter)
    model(scene[:1], levels_of()[:1], cache=cache)
    cache.append(0)
    places.clear()
    model(scene[1:], levels_of()[1:3], cache=cache)
    slots = {site.row.k.untyped_storage().data_ptr() for site in cache._own.sites.values()}
    assert len(slots) == len(adapter.blocks)
    keys = [out for out in places if out.untyped_storage().data_ptr() in slots]
    assert len(keys) == len(places) // 2 == len(adapter.blocks) * 2  # two shots; the other half are queries
    assert {out.storage_offset() // out.stride(1) for out in keys} == {scene[0].text.shape[1] + 12, 2 * (2 + 12)}


@torch.no_grad()
def test_prompts_without_video_are_rotated_too():
    layout = Layout([[Shot(3, (0, 0, 0), role="global"), Shot(1, (1, 2, 2)), Shot(2, (1, 1, 1))]])
    t, outputs = torch.tensor([0.0, 0.5, 0.25]), []
    for rotary in (rotate_into, None):
        adapter, cache = toy(**CROSS, scope="all"), KVCache()
        ((prompt, *scene),) = scenes_of(adapter, layout)
        scene, model = [ShotInput(text=prompt.text, role="global"), *scene], engine(adapter, rotary=rotary)
        outputs.append(model(scene, t)[1:] + model(scene[:1], t[:1], cache=cache)[1:])
        cache.append("prompt")
        outputs[-1] += model(scene[1:], t[1:], cache=cache)
    assert same(*outputs)


@pytest.mark.parametrize("grad", [False, True])
def test_large_rows_are_rotated_in_pieces_and_change_no_bit(monkeypatch, grad):
    """By default, and whatever a piece's size."""
    adapter, t, calls = MMDiTBackbone(tiny()), levels_of(), []
    model = engine(adapter)
    scenes = scenes_of(adapter)
    monkeypatch.setattr("lct_core.scene_model.rotate_into", lambda *a, **o: (calls.append(o), rotate_into(*a, **o)))
    with torch.set_grad_enabled(grad):
        expected = model(scenes, t)
        assert not calls  # too small to pay
        monkeypatch.setattr(rope, "_LARGE", 0)
        monkeypatch.setattr(rope, "_PIECE", 64)
        got = model(scenes, t)
    assert len(calls) == 2 * ROW.num_shots * len(adapter.blocks)
    assert same(flat(got), flat(expected))


class InItsOwnWay(MMDiTBackbone):
    def rotate(self, x, by):
        return 2 * super().rotate(x, by)


class Learned(MMDiTBackbone):
    def __init__(self, model):
        super().__init__(model)
        self.speed = torch.ones((), dtype=torch.float64, requires_grad=True)

    def rope(self, coords):
        return self.speed * super().rope(coords)


def test_an_adapters_own_rotation_is_honoured(monkeypatch):
    monkeypatch.setattr(rope, "_LARGE", 0)
    plain, own = (engine(cls(tiny()))(scenes_of(cls(tiny())), levels_of()) for cls in (MMDiTBackbone, InItsOwnWay))
    assert not same(flat(plain), flat(own))
    adapter = MMDiTBackbone(tiny())
    adapter.rotate = InItsOwnWay(tiny()).rotate  # on the instance
    assert same(flat(engine(adapter)(scenes_of(adapter), levels_of())), flat(own))
    for refused in (adapter, InItsOwnWay(tiny())):
        with pytest.raises(ValueError, match=r"^rotary: got one, but this MMDiT rotates in a way of its own; expected"):
            engine(refused, rotary=rotate_into)


def test_a_model_without_rope_refuses_a_rotary():
    with pytest.raises(ValueError, match=r"^rotary: got one, but this Toy has no RoPE; expected None, the default"):
        engine(toy(pairing=None), rotary=rotate_into)


def test_learned_angles_get_their_gradient(monkeypatch):
    monkeypatch.setattr(rope, "_LARGE", 0)
    adapter = Learned(tiny())
    scenes, t = scenes_of(adapter), levels_of()
    sum(out.sum() for out in flat(engine(adapter)(scenes, t))).backward()
    assert adapter.speed.grad.abs() > 0
    refuses = engine(adapter, rotary=rotate_into)
    with pytest.raises(ValueError, match=r"^rotary: the angles of this MMDiT are learned, and a rotary has no grad"):
        refuses(scenes, t)
    with torch.no_grad():
        assert same(flat(refuses(scenes, t)), flat(engine(adapter)(scenes, t)))


# In Triton, under its interpreter, which is right in float32 and float16 (its casts to bfloat16 cut).


@pytest.fixture(scope="module")
def interpreted():
    """Triton reads the environment when a kernel is defined: so too its own sum, which ours calls.

    Its sum made anew as a kernel would leave Triton's language interpreted for all that is compiled later.
    """
    tl = pytest.importorskip("triton.language")
    name = "lct_plugins._triton_rotary"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        add = tl.standard._sum_combine
        patch.setattr(tl, "sum", lambda x, axis, keep_dims: tl.reduce(x, axis, add, keep_dims=keep_dims))
        patch.delitem(sys.modules, name, raising=False)
        yield "cpu"
        sys.modules.pop(name, None)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lct_plugins._triton_rotary import turn

def compiled(dtype, *, norm, pairs, distance, heads=24, head_dim=128):
    strides = {"x": 4, "cos": 3, "sin": 3, "weight": 2, "out": 4}
    types = {name: "*fp32" if name in ("cos", "sin") else f"*{dtype}" for name in strides}
    types |= {f"{name}_strides": ("i32",) * count for name, count in strides.items()} | {"eps": "fp32"}
    constants = {
        "HEADS": heads, "HEAD_DIM": head_dim, "PAIRS": pairs, "DISTANCE": distance, "ROWS": 32, "COLUMNS": 128,
        "NORM": norm, "WEIGHT": norm, "ACROSS": norm, "EXACT": triton.language.float32,
    }
    types |= dict.fromkeys(constants, "constexpr")
    indices = {(turn.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=turn, signature={name: types[name] for name in turn.arg_names}, constexprs=indices)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]

assert compiled("bf16", norm=False, pairs=64, distance=1)
assert compiled("bf16", norm=True, pairs=60, distance=20)
"""


def test_triton_compiles_for_hopper():
    """In a process of its own, where Triton is not the interpreter."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-W", "error", "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=on_gpu)])
def device(request):
    return request.getfixturevalue("interpreted") if request.param == "interpreted" else "cuda"


def on(device, *dtypes):
    """The dtypes to test: on a GPU, bfloat16 too."""
    return dtypes if device == "cpu" else (*dtypes, torch.bfloat16)


def alike(got, expected):
    """To the last bit under the interpreter; on a GPU, to one rounding."""
    return torch.equal(got, expected) or (got.is_cuda and error(got, expected) <= torch.finfo(got.dtype).eps)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("head_dim", [18, 23])
def test_triton_rotates_every_channel_into_its_place(device, pairing, heads, head_dim):
    for dtype in on(device, torch.float32, torch.float16, torch.float64):
        for target in {dtype, torch.float16, torch.float32}:
            (x,) = shots_of((4,), heads=3, head_dim=head_dim, dtype=dtype)
            x, by = x.to(device), turn(pairing, 4, heads=heads, device=device)
            out, beside = inside(4, 2, 3, head_dim, dtype=target, device=device)
            triton_rotary.rotate_into(x, by, out)
            assert alike(out, rotate(x, by).to(target))
            assert bool(beside().isnan().all())


def test_triton_takes_tensors_of_any_strides(device):
    by = turn("interleaved", 4, dtype=torch.float64, device=device)
    by = by._replace(cos=by.cos.repeat_interleave(2, -1)[..., ::2], sin=by.sin.mT.contiguous().mT)
    x = draw(3, 22, 2, 4, device=device).permute(2, 3, 0, 1)
    out = torch.full((4, 3, 22, 2), float("nan"), device=device).permute(3, 0, 1, 2)
    triton_rotary.rotate_into(x, by, out)
    assert alike(out, rotate(x, by))


def test_triton_in_the_engine(interpreted):
    """With gradients, and with a cache."""
    results = []
    for rotary in (triton_rotary.rotate_into, None):
        adapter, cache = MMDiTBackbone(tiny()), KVCache()
        model, scenes, t = engine(adapter, rotary=rotary), scenes_of(adapter), levels_of()
        outs = flat(model(scenes, t, pattern="context_causal"))
        sum(out.square().sum() for out in outs).backward()
        gradients = torch.cat([p.grad.flatten() for p in adapter.model.parameters() if p.grad is not None])
        with torch.no_grad():
            model(scenes[0][:1], t[:1], cache=cache)
            cache.append(0)
            outs += model(scenes[0][1:2], t[1:2], cache=cache)
        results.append((outs, gradients))
    (got, of_got), (expected, of_expected) = results
    assert same(got, expected)
    assert error(of_got, of_expected) <= BOUNDS[torch.float32]["checkpointed"].absolute


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("weights", [None, (23,), (3, 23)])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_triton_norms_and_rotates(device, pairing, weights, across_heads):
    by = turn(pairing, 4, heads=3 if across_heads else 1, dtype=torch.float64, device=device)
    for dtype in on(device, torch.float32, torch.float16, torch.float64):
        (x,) = shots_of((4,), heads=3, head_dim=23, dtype=dtype)
        x, weight = x.to(device), None if weights is None else draw(*weights, seed=3, dtype=dtype, device=device)
        options = {"eps": 1e-3, "across_heads": across_heads}
        exact = dtype == torch.float64
        by_of_x = by if exact else Rotation(by.cos.float(), by.sin.float(), pairing)
        wanted = [tensor for tensor in (x, weight) if tensor is not None]
        gradient, outputs = draw(2, 4, 3, 23, seed=5, dtype=dtype, device=device), []
        for function, to in ((norm_rotate, dtype), (naive_norm_rotate, dtype), (naive_norm_rotate, torch.float64)):
            given = [tensor.to(to).requires_grad_() for tensor in wanted]
            out = function(given[0], by if to == torch.float64 else by_of_x, *given[1:], **options)
            outputs.append([out, *torch.autograd.grad(out, given, gradient.to(to))])
        for got, plain, truth, like in zip(*outputs, [x, *wanted], strict=True):
            assert (got.dtype, got.shape) == (like.dtype, like.shape)
            assert error(got, truth) <= (1e-14 if exact else max(EXACT, 2 * error(plain, truth)))


def test_the_definition_of_the_norm_is_torchs():
    (x,), weight = shots_of((4,), heads=3), draw(22, seed=1)
    got = naive_norm_rotate(x, turn("half", 4), weight, eps=1e-3)
    assert error(got, rotate(F.rms_norm(x, (22,), weight, 1e-3), turn("half", 4))) <= EXACT
    weight = draw(3, 22, seed=1)
    got = naive_norm_rotate(x, turn("half", 4), weight, eps=1e-3, across_heads=True)
    expected = F.rms_norm(x.flatten(2), (66,), weight.flatten(), 1e-3).unflatten(2, (3, 22))
    assert error(got, rotate(expected, turn("half", 4))) <= EXACT


def test_norm_rotate_refuses(interpreted):
    (x,), by = shots_of((3,)), turn("half", 3)
    with pytest.raises(ValueError, match=r"^weight: got \[44\], expected \[22\], or \[2, 22\] where every head"):
        norm_rotate(x, by, torch.ones(44), eps=1e-6)
    with pytest.raises(ValueError, match=r"^by: its angles want gradients, which there are none for; detach them"):
        norm_rotate(x, by._replace(cos=by.cos.requires_grad_()), eps=1e-6)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (x,) = shots_of((3,))
    with pytest.raises(ValueError, match=r"^x: got a tensor on cpu, expected one on cuda, or Triton's interpreter"):
        triton_rotary.rotate_into(x, turn("half", 3), torch.empty_like(x))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^rotary: there is no triton; .* install it, or leave this out"):
        triton_rotary.rotate_into(x, turn("half", 3), torch.empty_like(x))
