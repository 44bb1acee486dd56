"""Shots selected from a cache, and moved to other places."""

from functools import partial
from itertools import accumulate

import pytest
import torch

from lct_backbones.mmdit import MMDiTBackbone, tiny
from lct_core import KVCache, retrofit
from lct_core.testing.tolerances import BOUNDS, error
from tests.cache.caches import FIVE, SIXTH, Watched, call, draw, fill, scene_model, stored

FLOAT32 = BOUNDS[torch.float32]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("scheme", ["anchored", "paper"])
@pytest.mark.parametrize("chosen", [(0, 3), (3, 0), (4,), (2, 1, 4), ()])
@pytest.mark.parametrize("reposition", [True, False])
@torch.no_grad()
def test_a_sixth_shot_behind_some_of_five(scheme, chosen, reposition):
    """The same keys and values as were written, the keys turned anew at their new places, and plain attention."""
    adapter, written = MMDiTBackbone(tiny()), []
    qkv = adapter.qkv
    adapter.qkv = lambda block, site, state: (written.append(qkv(block, site, state)), written[-1])[1]
    model = retrofit(adapter.model, scheme=scheme, backbone=adapter)
    cache = fill(KVCache(), FIVE, model=model)
    parts = [written[3 * i : 3 * i + 3] for i in range(5)]  # by shot, then block
    places = {i: entry.origin for i, entry in enumerate(cache.shots)}
    extents = {i: entry.extent for i, entry in enumerate(cache.shots)}
    if reposition:
        places = dict(zip(chosen, accumulate([extents[i] for i in chosen], initial=0), strict=False))
    end = max((places[i] + extents[i] for i in chosen), default=0)
    (shot,), t = draw(SIXTH, seed=9), torch.tensor([0.7])
    cache.select(chosen, reposition=reposition)
    (got,) = model([shot], t, pattern="context_causal", cache=cache)

    def turned(x, count, origin):
        return freshly_turned(x, adapter.rope(coordinates(count, origin, scheme)))

    state = adapter.encode(shot, 1000 * t)
    for block, index in zip(adapter.blocks, range(3), strict=True):
        q, k, v, aux = qkv(block, None, state)
        keys = [turned(parts[i][index].k, FIVE[i], places[i]) for i in chosen] + [turned(k, SIXTH, end)]
        values = torch.cat([parts[i][index].v for i in chosen] + [v], dim=1)
        out = exact_attention(turned(q, SIXTH, end), torch.cat(keys, dim=1), values)
        state.streams.update(adapter.finish(block, None, state, out, aux))
    expected = adapter.unpatchify(adapter.head(state), SIXTH)
    assert error(got, expected) <= FLOAT32["cached"].absolute


def coordinates(shot, origin, scheme):
    start = origin + (shot.text if scheme == "paper" else 0)
    text = [[origin + (i if scheme == "paper" else 0)] * 3 for i in range(shot.text)]
    frames, height, width = shot.grid
    video = [[start + f, start + y, start + x] for f in range(frames) for y in range(height) for x in range(width)]
    return torch.tensor(text + video, dtype=torch.float64)


def freshly_turned(x, angles):
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)


def exact_attention(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).float()


@torch.no_grad()
def test_selection_order_is_the_order_on_the_diagonal():
    (shot,) = draw(SIXTH)
    outputs = {}
    for chosen in [(0, 3), (3, 0), (0,), (3,)]:
        cache = fill(KVCache(), FIVE)
        cache.select(chosen)
        assert tuple(entry.id for entry in cache.shots) == chosen
        assert [entry.origin for entry in cache.shots] == [0, 3][: len(chosen)]
        assert set(cache.ids) == set(range(5))
        assert cache.end == 3 * len(chosen)
        outputs[chosen] = call(scene_model(), shot, cache)
    for a in outputs:
        for b in outputs:
            assert (error(outputs[a], outputs[b]) < 1e-4) == (a == b)


@torch.no_grad()
def test_parked_shots_come_back():
    cache, untouched = (fill(KVCache(), FIVE) for _ in range(2))
    (shot,) = draw(SIXTH)
    size = cache.nbytes
    cache.select([3])
    assert cache.nbytes > size  # nothing is thrown away
    call(scene_model(), shot, cache)
    cache.append("new")
    cache.select([])
    assert (cache.shots, cache.end) == ((), 0)
    cache.select(range(5))
    assert cache.shots == untouched.shots
    assert torch.equal(call(scene_model(), shot, cache), call(scene_model(), shot, untouched))  # to the last bit
    cache.select(["new", 0])
    assert [(e.id, e.written, e.origin) for e in cache.shots] == [("new", 3, 0), (0, 0, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_moves_are_exact_and_do_not_add_up(dtype):
    model = retrofit(tiny().to(dtype))
    cache = Watched()
    raw = []
    qkv = model.adapter.qkv
    model.adapter.qkv = lambda *args: (raw.append(qkv(*args)), raw[-1])[1]
    for i, shot in enumerate(draw(*FIVE[:3], dtype=dtype)):
        call(model, shot, cache)
        cache.append(i)
    before = [x.clone() for x in stored(cache)]
    extents = [entry.extent for entry in cache.shots]
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        origins = torch.randint(-50, 500, (3,), generator=generator).tolist()
        cache.reposition(origins)
        assert [entry.origin for entry in cache.shots] == origins
        assert cache.end == max(o + e for o, e in zip(origins, extents, strict=True))
    unit = torch.ones(1, 3, dtype=torch.float64)
    steps = [o - e.written for o, e in zip(origins, cache.shots, strict=True)]
    moves = torch.cat(
        [model.adapter.rope(n * unit).expand(shot.tokens, -1, -1) for n, shot in zip(steps, FIVE, strict=False)]
    )
    places = torch.cat([coordinates(shot, origin, "anchored") for shot, origin in zip(FIVE, origins, strict=False)])
    call(model, draw(SIXTH, dtype=dtype)[0], cache)  # which shows it
    history = sum(shot.tokens for shot in FIVE[:3])
    for block, (k, v) in enumerate(cache.views.values()):
        bound = BOUNDS[dtype]["moved keys"].absolute
        k, v = k[:, :history], v[:, :history]
        assert error(k, freshly_turned(before[2 * block], moves)) <= bound  # one move from where it was written
        if dtype == torch.float32:  # in bfloat16 that was a rounding of its own
            unturned = torch.cat([raw[3 * i + block].k for i in range(3)], dim=1)
            assert error(k, freshly_turned(unturned, model.adapter.rope(places))) <= bound
        assert torch.equal(v, before[2 * block + 1])
    assert not torch.equal(cache.views[0, "self"][0], before[0])
    cache.reposition()
    call(model, draw(SIXTH, dtype=dtype)[0], cache)
    assert all(torch.equal(x[:, :history], old) for x, old in zip(stored(cache), before, strict=True))
    assert [entry.origin for entry in cache.shots] == [entry.written for entry in cache.shots]


@torch.no_grad()
def test_moving_the_whole_scene_changes_nothing():
    cache = fill(KVCache(), FIVE)
    (shot,) = draw(SIXTH)
    expected = call(scene_model(), shot, cache)
    cache.reposition([entry.origin + 1000 for entry in cache.shots])
    assert error(call(scene_model(), shot, cache), expected) <= FLOAT32["shifted"].absolute
    cache.reposition([entry.origin * 2 for entry in cache.shots])
    assert error(call(scene_model(), shot, cache), expected) > 1e-3


def test_what_no_shot_can_be_asked_is_refused():
    cache = fill(KVCache(), FIVE[:2])
    for change, message in (
        (partial(cache.reorder, [0]), r"^ids: got \[0\], expected the selected shots, \[0, 1\], in another order"),
        (partial(cache.move, 0, tier="attic"), r'^tier: got \'attic\', expected "device", "host" or "disk"'),
    ):
        with pytest.raises(ValueError, match=message):
            change()
        assert cache.ids == (0, 1)
    call(scene_model(), draw(FIVE[2])[0], cache)
    with pytest.raises(ValueError, match=r"^prompts: got \['a', 'b'\], expected 1, one for each id, or none"):
        cache.append(2, prompts=["a", "b"])
    assert (cache.ids, cache.staged is None) == ((0, 1), False)
