import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st

from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, own_shot
from lct_core.plan import AttentionPlan, Segment
from lct_core.rectangles import Rectangle, by_segment, log_depth
from lct_core.testing.strategies import layouts


@st.composite
def plans(draw):
    """Every kind of plan: LCT's patterns, cached rows, histories with gaps, and segments that see anything."""
    if draw(st.booleans()):
        layout = draw(layouts())
        plan = draw(st.sampled_from([bidirectional, context_causal, own_shot]))(layout)
        if draw(st.booleans()):
            plan = plan.rows(draw(st.sampled_from(plan.segments)).queries)
        return plan
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    keys = draw(st.integers(1, 12))
    segments, end = [], 0
    for size in sizes:
        ranges = draw(st.lists(st.tuples(st.integers(0, keys - 1), st.integers(1, keys)), min_size=1, max_size=3))
        ranges = [Range(a, min(a + n, keys)) for a, n in ranges]
        segments.append(Segment(Range(end, end + size), tuple(ranges)))
        end += size
    return AttentionPlan(end, keys, tuple(segments))


@given(plans(), st.sampled_from([by_segment, log_depth]))
def test_every_pair_is_in_one_rectangle_and_no_other(plan, schedule):
    counts = torch.zeros(plan.queries, plan.keys, dtype=torch.int64)
    for rectangles in schedule(plan):
        for queries, keys in rectangles:
            counts[queries.slice, keys.slice] += 1
    assert torch.equal(counts, plan.dense().long())
    assert sum(r.pairs for rectangles in schedule(plan) for r in rectangles) == plan.pairs


@given(plans(), st.sampled_from([by_segment, log_depth]))
def test_rectangles_of_a_round_are_disjoint_and_ordered(plan, schedule):
    for rectangles in schedule(plan):
        assert rectangles
        for a, b in pairwise(rectangles):
            assert a.queries.start < a.queries.stop <= b.queries.start
            assert a.keys.start < a.keys.stop <= b.keys.start


@pytest.mark.parametrize("scenes", [1, 3])
def test_context_causal_scenes_take_logarithmically_many_rounds(scenes):
    for n in range(1, 41):
        plan = context_causal(Layout([[Shot(1, (1, 1, 2))] * n] * scenes))
        assert len(log_depth(plan)) == 1 + math.ceil(math.log2(n))
        assert len(by_segment(plan)) == n


@given(layouts())
def test_what_does_not_overlap_is_one_round(layout):
    for pattern in (bidirectional, own_shot):
        plan = pattern(layout)
        rectangles = tuple(Rectangle(queries, keys) for queries, (keys,) in plan.segments)
        assert by_segment(plan) == log_depth(plan) == [rectangles]


def test_eight_shots_written_out():
    plan = context_causal(Layout([[Shot(0, (1, 1, 1))] * 8]))
    rounds = [[(tuple(q), tuple(k)) for q, k in rectangles] for rectangles in log_depth(plan)]
    assert rounds == [
        [((4, 8), (1, 5))],
        [((0, 8), (0, 1))],
        [((2, 4), (1, 3)), ((6, 8), (5, 7))],
        [((1, 2), (1, 2)), ((3, 4), (3, 4)), ((5, 6), (5, 6)), ((7, 8), (7, 8))],
    ]


def test_scenes_share_rounds():
    plan = context_causal(Layout([[Shot(0, (1, 1, n))] * 4 for n in (3, 5, 7)]))
    assert [len(rectangles) for rectangles in log_depth(plan)] == [3, 3, 6]
    assert [len(rectangles) for rectangles in by_segment(plan)] == [3, 3, 3, 3]
