"""Rotation fused with filling the row: in torch, bit for bit."""

from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, strategies as st

import lct_core.rope as rope
from lct_backbones.mmdit import MMDiTBackbone, tiny
from lct_core import KVCache, Layout, Shot, ShotInput, rotate
from lct_core.rope import RowParts, rotate_into
from lct_core.testing.tolerances import BOUNDS, error
from lct_plugins import triton_rotary
from tests.rotations import (
    LENGTHS,
    PAIRINGS,
    ROW,
    draw,
    engine,
    flat,
    inside,
    levels_of,
    same,
    scenes_of,
    shots_of,
    turn,
)
from tests.toys import CROSS, TOYS, toy

pytestmark = pytest.mark.internals

HALF = (torch.float16, torch.bfloat16)


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
def test_filling_equals_join_rotate_cast(monkeypatch, pairing, dtype, piece):
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


MODELS = {"MMDiT": lambda: MMDiTBackbone(tiny()), **{name: partial(toy, **config) for name, config in TOYS.items()}}
ROTATED = {name: make for name, make in MODELS.items() if make().traits.pairing is not None}
MODEL = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in ROTATED.items()])


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
        stored.append([x for site in cache._holdings[0].sites.values() for x in (site.row.k, site.row.v)])
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
    slots = {site.row.k.untyped_storage().data_ptr() for site in cache._holdings[0].sites.values()}
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
    monkeypatch.setattr("lct_core.engine.joining.rotate_into", lambda *a, **o: (calls.append(o), rotate_into(*a, **o)))
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
