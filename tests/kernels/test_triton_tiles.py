"""The tiles of the Triton kernel, and its specification."""

from itertools import pairwise

import torch
from hypothesis import given, strategies as st

from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, own_shot
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins.torch_kernels import reference
from lct_core.testing import kernels
from lct_core.testing.strategies import layouts
from lct_plugins import triton_attention, triton_naive
from lct_plugins.triton_attention import key_tiles, query_tiles
from tests.kernels.triton_plans import draw, lse_of


@st.composite
def interval_plans(draw):
    """Plans of one key interval for each query: LCT's, and any other."""
    if draw(st.booleans()):
        layout = draw(layouts(with_global=False))
        plan = draw(st.sampled_from([bidirectional, context_causal, own_shot]))(layout)
        start = draw(st.integers(0, plan.queries - 1))
        return plan.rows(Range(start, draw(st.integers(start + 1, plan.queries))))
    keys = draw(st.integers(1, 60))
    segments, end = [], 0
    for size in draw(st.lists(st.integers(1, 20), min_size=1, max_size=5)):
        first = draw(st.integers(0, keys - 1))
        segments.append(Segment(Range(end, end := end + size), (Range(first, draw(st.integers(first + 1, keys))),)))
    return AttentionPlan(end, keys, tuple(segments))


tile_sizes = st.tuples(st.sampled_from([1, 4, 7, 16]), st.sampled_from([2, 4, 8, 16]))


# the tables


def bounds(visible):
    """The first and the last place where a vector is true."""
    places = visible.nonzero().flatten().tolist()
    return Range(places[0], places[-1] + 1) if places else Range(0, 0)


def longest_run(visible):
    best = run = 0
    for one in visible.tolist():
        run = run + 1 if one else 0
        best = max(best, run)
    return best


def check_tiles(tiles, visible, rows, columns):
    assert [i for tile in sorted(tiles) for i in range(*tile.own)] == list(range(len(visible)))
    assert all(a.seen.size >= b.seen.size for a, b in pairwise(tiles))
    alone = ~visible.any(1)
    joined = (visible[1:] & visible[:-1]).any(1) | (alone[1:] & alone[:-1])  # two neighbours, by what they see
    for own, seen, full in tiles:
        assert 0 < own.size <= rows
        assert joined[own.start : own.stop - 1].all()
        assert own.size == rows or own.stop == len(visible) or not joined[own.stop - 1]
        assert seen == bounds(visible[own.slice].any(0))
        assert seen.start <= full.start <= full.stop <= seen.stop
        assert visible[own.slice, full.slice].all()
        assert (full.start - seen.start) % columns == full.size % columns == 0
        unmasked = longest_run(visible[own.slice].all(0))
        assert full.size > unmasked - 2 * columns  # what rounding to chunks costs, and no more
        if visible[own.slice, seen.slice].all():
            assert full.size > seen.size - columns


@given(interval_plans(), tile_sizes)
def test_a_query_tile_visits_the_keys_its_rows_see(plan, sizes):
    tiles = query_tiles(plan, *sizes)
    check_tiles(tiles, plan.dense(), *sizes)
    assert all(plan.dense()[own.slice, seen.slice].any(0).all() for own, seen, _ in tiles)  # no gap is read


@given(interval_plans(), tile_sizes)
def test_a_key_tile_visits_the_rows_that_see_it(plan, sizes):
    check_tiles(key_tiles(plan, *sizes), plan.dense().T, *sizes)


@given(interval_plans(), tile_sizes)
def test_chunks_cover_what_a_tile_sees_once(plan, sizes):
    for tile in (*query_tiles(plan, *sizes), *key_tiles(plan, *sizes)):
        walked = [(place, masked) for chunk, masked in triton_naive.chunks(tile, sizes[1]) for place in range(*chunk)]
        assert [place for place, _ in walked] == list(range(*tile.seen))
        assert [place for place, masked in walked if not masked] == list(range(*tile.full))


@given(interval_plans())
def test_the_intervals_are_the_plan(plan):
    start, stop = triton_attention.intervals(plan, torch.device("cpu"))
    key = torch.arange(plan.keys)
    assert torch.equal((key >= start[:, None]) & (key < stop[:, None]), plan.dense())
    assert start.dtype == stop.dtype == torch.int32
    assert start.data_ptr() % 16 == stop.data_ptr() % 16 == 0


def test_tiles_are_cut_per_scene():
    plan = context_causal(Layout([[Shot(0, (1, 1, 10))] * 3, [Shot(0, (1, 1, 10))] * 3]))
    for tiles in (query_tiles(plan, 16, 8), key_tiles(plan, 16, 8)):
        assert sorted(tile.own for tile in tiles) == [(0, 16), (16, 30), (30, 46), (46, 60)]
    assert max(query_tiles(plan, 16, 8)) == ((46, 60), (30, 60), (30, 46))
    assert max(key_tiles(plan, 16, 8)) == ((46, 60), (40, 60), (40, 40))


# the specification


@given(interval_plans(), tile_sizes, st.sampled_from([(1, 1), (4, 2)]), st.sampled_from([0.0, 0.4, -0.3]))
def test_the_specification_is_the_reference_in_float64(plan, sizes, heads, scale):
    q, k, v, dout = draw(plan, *heads, 4, dtype=torch.float64)
    rows, columns = sizes
    out, lse = triton_naive.forward(q, k, v, plan, scale, rows=rows, columns=columns)
    got = triton_naive.backward(q, k, v, out, lse, dout, plan, scale, rows=rows, columns=columns)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = kernels._run(lambda *x: reference(*x, plan, scale), inputs, dout)
    for g, e in zip((out, *got), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, lse_of(q, k, plan, scale), rtol=0, atol=1e-12)
