"""Shots of equal shape that run as one batch."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st

from lct_backbones.mmdit import tiny
from lct_core import KVCache, Layout, Shot, retrofit
from lct_core.testing.strategies import levels
from lct_core.testing.tolerances import BOUNDS, error
from tests.engine.scenes import (
    ADAPTERS,
    PATTERNS,
    alone_too,
    draw,
    flat,
    gradients,
    random_levels,
    retrofitted,
    shot_by_shot,
    small,
    suited,
    worst,
)

FLOAT32 = BOUNDS[torch.float32]
SCHEMES = ("anchored", "paper")
TWINS = Layout(
    [
        [
            Shot(4, (1, 2, 2), role="global"),
            Shot(4, (1, 2, 2)),  # as long as its global shot
            Shot(2, (2, 2, 3)),
            Shot(4, (2, 1, 2)),  # as many tokens on another grid
            Shot(2, (2, 2, 3)),
        ],
        [Shot(2, (2, 2, 3)), Shot(8, (2, 2, 3)), Shot(3, (1, 1, 1))],
        [Shot(4, (1, 1, 2), role="global"), Shot(4, (1, 1, 2)), Shot(2, (3, 2, 2))],
    ]
)
UNEQUAL = Layout([[Shot(2, (1, 2, 2)), Shot(3, (1, 2, 2))], [Shot(2, (2, 1, 1)), Shot(1, (1, 1, 1))]])


def alike(layout):
    """Shots with as many text and video tokens, by their indices in the row."""
    groups = {}
    for i, shot in enumerate(layout.shots):
        groups.setdefault((shot.text, shot.video), []).append(i)
    return list(groups.values())


def both_ways(make, **options):
    """The same model twice: its shots one by one, and in batches."""
    return [
        retrofitted(adapter, batch_shots=batched, **options) for adapter, batched in ((make(), False), (make(), True))
    ]


@ADAPTERS
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_a_batch_of_shots_equals_them_one_by_one(make, scheme, pattern):
    one_by_one, batched = both_ways(make, scheme=scheme)
    layout = suited(batched.adapter, TWINS)
    t, scenes = random_levels(layout, batch=2), draw(batched.adapter, layout, batch=2)
    got, expected = (model(scenes, t, pattern=pattern) for model in (batched, one_by_one))
    assert [len(outs) for outs in got] == [len(outs) for outs in expected] == [len(scene) for scene in layout.scenes]
    assert worst(flat(got), flat(expected)) <= FLOAT32["batched"].absolute
    for shot, out in zip(flat(scenes), flat(got), strict=True):
        assert out is None if shot.role == "global" else out.shape == shot.latents.shape


@given(data=st.data(), layout=small(), pattern=st.sampled_from(PATTERNS))
@torch.no_grad()
def test_any_row_in_batches_equals_it_one_by_one(model, data, layout, pattern):
    batched = retrofit(model.backbone, scheme=model.scheme, batch_shots=True)
    t, scenes = data.draw(levels(layout)), draw(model.adapter, layout)
    got, expected = (flat(m(scenes, t, pattern=pattern)) for m in (batched, model))
    if all(out is None for out in expected):
        return
    assert worst(got, expected) <= FLOAT32["batched"].absolute
    if len(alike(layout)) == layout.num_shots:
        assert worst(got, expected) == 0


@ADAPTERS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_batch_of_shots(make, checkpointing):
    one_by_one, batched = both_ways(make)
    batched.gradient_checkpointing = checkpointing
    layout = suited(batched.adapter, TWINS)
    t, scenes = random_levels(layout, batch=2), draw(batched.adapter, layout, batch=2)
    expected, got = (gradients(model, scenes, t, "context_causal") for model in (one_by_one, batched))
    assert got.keys() == expected.keys()
    together = [torch.cat([gradient.flatten() for gradient in of.values()]) for of in (got, expected)]
    assert error(*together) <= FLOAT32["batched"].absolute  # alone, those that should be 0 have no size to compare to


@ADAPTERS
@pytest.mark.parametrize("ends", [[1, 2, 3, 4], [2], [1], [3, 4]])
@torch.no_grad()
def test_a_batch_of_shots_with_a_cache(make, ends):
    """Equal shots in one call or in several, the same is written into the cache and read from it."""
    one_by_one, batched = both_ways(make)
    layout = suited(batched.adapter, Layout(TWINS.scenes[:1]))
    t, (scene,) = random_levels(layout, batch=2), alone_too(batched.adapter, draw(batched.adapter, layout, batch=2))
    sizes = [stop - start for start, stop in pairwise(sorted({0, *ends, len(scene)}))]
    full = one_by_one(scene, t, pattern="context_causal")
    caches = KVCache(), KVCache()
    expected, got = (
        shot_by_shot(model, scene, t, cache=cache, sizes=sizes)
        for model, cache in zip((one_by_one, batched), caches, strict=True)
    )
    assert worst(got, expected) <= FLOAT32["batched"].absolute
    assert worst(got, full) <= FLOAT32["batched"].absolute
    assert caches[0].nbytes == caches[1].nbytes
    assert [entry.origin for entry in caches[0].shots] == [entry.origin for entry in caches[1].shots]


@ADAPTERS
@torch.no_grad()
def test_one_shot_in_batches_is_the_base_model(make):
    base, (_, model) = make(), both_ways(make)
    for shot in (Shot(3, (2, 2, 3)), Shot(1, (1, 1, 1))):
        t, (scene,) = torch.tensor([0.3]), draw(base, Layout([[shot]]), batch=2)
        expected = base.single_shot(scene[0], base.traits.timestep(t).expand(2))
        assert torch.equal(model(scene, t)[0], expected)
        assert torch.equal(model([scene], t)[0][0], expected)


@ADAPTERS
@torch.no_grad()
def test_unlike_shots_run_one_by_one(make):
    one_by_one, batched = both_ways(make)
    t, scenes = random_levels(UNEQUAL, batch=2), draw(batched.adapter, UNEQUAL, batch=2)
    got, expected = (flat(model(scenes, t)) for model in (batched, one_by_one))
    assert worst(got, expected) == 0


@ADAPTERS
@pytest.mark.parametrize("layout", [TWINS, UNEQUAL, Layout(TWINS.scenes[1:2])])
@torch.no_grad()
def test_a_block_is_run_once_for_all_shots_that_are_alike(make, layout):
    def watched(calls, name, run):
        def call(block, site, state, *rest):
            calls.append((name, block, site.name, len(next(iter(state.streams.values())))))
            return run(block, site, state, *rest)

        return call

    for model in both_ways(make):
        calls, adapter = [], model.adapter
        layout = suited(adapter, layout)
        for name in ("qkv", "finish"):
            setattr(adapter, name, watched(calls, name, getattr(adapter, name)))
        model(draw(adapter, layout, batch=2), random_levels(layout, batch=2))
        groups = alike(layout) if model.batch_shots else [[i] for i in range(layout.num_shots)]
        assert calls == [
            (name, block, site.name, 2 * len(group))
            for block in adapter.blocks
            for site in adapter.sites(block)
            for name in ("qkv", "finish")
            for group in groups
        ]
    assert len(alike(TWINS)) == 5
    assert len(alike(UNEQUAL)) == UNEQUAL.num_shots


def test_shots_run_one_by_one_by_default():
    assert not retrofit(tiny()).batch_shots
