"""The engine against the dense definition: shots, scenes and caches, on layouts of every kind."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st

from lct_backbones.mmdit import tiny
from lct_core import KVCache, Layout, Shot, retrofit
from lct_core.testing.conformance import conformance
from lct_core.testing.definition import definition
from lct_core.testing.strategies import levels, shots
from lct_core.testing.tolerances import BOUNDS, error
from tests.engine.scenes import (
    ADAPTERS,
    PATTERNS,
    WITH_GLOBALS,
    alone_too,
    draw,
    flat,
    random_levels,
    retrofitted,
    scope,
    shot_by_shot,
    small,
    suited,
    with_zeros,
    worst,
)
from tests.toys import TOYS, toy

FLOAT32 = BOUNDS[torch.float32]
SCHEMES = ("anchored", "paper")
one_scene = partial(small, max_scenes=1, max_shots=4)


# The invariants, on layouts of every kind.


@given(shot=shots(max_grid=(3, 3, 3)), seed=st.integers(0, 99), t=st.floats(0, 1, width=32))
@torch.no_grad()
def test_one_shot_is_the_base_model_to_the_last_bit(shot, seed, t):
    base, model = tiny(), retrofit(tiny())
    (scene,) = draw(model.adapter, Layout([[shot]]), batch=2, seed=seed)
    t = torch.tensor([t])
    (out,) = model(scene, t)
    assert torch.equal(out, base(scene[0].latents, (1000 * t).expand(2), scene[0].text))


@given(data=st.data(), layout=small(), pattern=st.sampled_from(PATTERNS))
@torch.no_grad()
def test_equals_the_definition(model, data, layout, pattern):
    t, scenes = data.draw(levels(layout)), draw(model.adapter, layout)
    got = flat(model(scenes, t, pattern=pattern))
    truth = definition(model.adapter, with_zeros(scenes), t, scheme=model.scheme, pattern=pattern)
    expected = [None if shot.role == "global" else x for shot, x in zip(layout.shots, truth, strict=True)]
    if all(x is None for x in expected):
        return
    assert worst(got, expected) <= FLOAT32["definition"].absolute
    for shot, out in zip(flat(scenes), got, strict=True):
        assert out is None if shot.role == "global" else out.shape == shot.latents.shape


@given(data=st.data(), layout=one_scene())
@torch.no_grad()
def test_a_shot_does_not_depend_on_later_shots(model, data, layout):
    first = 1 + (layout.shots[0].role == "global")
    keep = data.draw(st.integers(first, layout.num_shots))
    t, (scene,) = random_levels(layout), draw(model.adapter, layout)
    full = model(scene, t, pattern="context_causal")
    (others,) = draw(model.adapter, layout, seed=1)
    changed = model(scene[:keep] + others[keep:], t, pattern="context_causal")
    absent = model(scene[:keep], t[:, :keep], pattern="context_causal")
    assert worst([*changed[:keep], *absent], [*full[:keep], *full[:keep]]) == FLOAT32["causal"].absolute == 0


@given(data=st.data(), layout=one_scene(with_global=False))
@torch.no_grad()
def test_cached_equals_uncached(model, data, layout):
    cuts = data.draw(st.lists(st.booleans(), min_size=layout.num_shots - 1, max_size=layout.num_shots - 1))
    ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [layout.num_shots]
    sizes = [stop - start for start, stop in pairwise([0, *ends])]
    t, (scene,) = random_levels(layout, batch=2), draw(model.adapter, layout, batch=2)
    full = model(scene, t, pattern="context_causal")
    assert worst(shot_by_shot(model, scene, t, sizes=sizes), full) <= FLOAT32["cached"].absolute


@given(layout=small(), pattern=st.sampled_from(PATTERNS))
@torch.no_grad()
def test_packing_changes_no_scene(model, layout, pattern):
    t, scenes = random_levels(layout), draw(model.adapter, layout)
    row = model(scenes, t, pattern=pattern)
    assert [len(out) for out in row] == [len(scene) for scene in scenes]
    for scene, places, together in zip(scenes, layout.scene_shots, row, strict=True):
        alone = model(scene, t[:, list(places)], pattern=pattern)
        assert worst(together, alone) == FLOAT32["packed"].absolute == 0


@given(layout=small(), pattern=st.sampled_from(PATTERNS), steps=st.integers(-1000, 100_000))
@torch.no_grad()
def test_moving_a_whole_scene_changes_nothing(model, layout, pattern, steps):
    moved = copy.copy(model.adapter)
    moved.rope = lambda coords: model.adapter.rope(coords + steps)
    t, scenes = random_levels(layout), draw(model.adapter, layout)
    got, expected = (flat(m(scenes, t, pattern=pattern)) for m in (retrofitted(moved, scheme=model.scheme), model))
    assert worst(got, expected) <= FLOAT32["shifted"].absolute


# Adapters of other kinds.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in TOYS.items()])
def test_toys_conform(config, scheme, dtype):
    broken = [
        finding
        for finding in conformance(partial(toy, **config), schemes=[scheme], dtypes=[dtype])
        if not finding.holds
    ]
    assert not broken


@ADAPTERS
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_scenes_with_global_shots_equal_the_definition(make, scheme, pattern):
    adapter = make()
    layout = suited(adapter, WITH_GLOBALS)
    t, scenes = random_levels(layout, batch=2), draw(adapter, layout, batch=2)
    got = flat(retrofitted(adapter, scheme=scheme)(scenes, t, pattern=pattern))
    truth = definition(adapter, with_zeros(scenes), t, scheme=scheme, pattern=pattern, text=scope(adapter))
    assert [out is None for out in got] == [shot.role == "global" for shot in layout.shots]
    bound = FLOAT32["definition"].absolute
    assert max(error(out, x) for out, x in zip(got, truth, strict=True) if out is not None) <= bound


@ADAPTERS
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_cached_global_shot_equals_an_uncached_one(make, scheme):
    adapter = make()
    model = retrofitted(adapter, scheme=scheme)
    layout = suited(adapter, Layout(WITH_GLOBALS.scenes[:1]))
    t, (scene,) = random_levels(layout), alone_too(adapter, draw(adapter, layout))
    full = model(scene, t, pattern="context_causal")
    assert worst(shot_by_shot(model, scene, t), full) <= FLOAT32["cached"].absolute


@ADAPTERS
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_cached_history_moves_in_the_adapters_own_units(make, scheme):
    """Moved as one with the shot that follows, it changes nothing; moved against it, it does, where there is RoPE."""
    adapter = make()
    model = retrofitted(adapter, scheme=scheme)
    layout = Layout([[Shot(2, (2, 2, 2)), Shot(1, (1, 1, 3)), Shot(3, (1, 2, 2))]])
    (scene,), t, cache = draw(adapter, layout), random_levels(layout), KVCache()
    shot_by_shot(model, scene[:2], t, cache=cache)
    (before,) = model(scene[2:], t[:, 2:], cache=cache)
    cache.reposition([entry.origin + 100 for entry in cache.shots])
    (after,) = model(scene[2:], t[:, 2:], cache=cache)
    assert error(after, before) <= FLOAT32["shifted"].absolute
    cache.reposition([entry.origin + 7 * i for i, entry in enumerate(reversed(cache.shots))])
    (apart,) = model(scene[2:], t[:, 2:], cache=cache)
    assert (error(apart, before) > 1e-4) == (adapter.traits.pairing is not None)
