"""What the pictures of a scene show."""

import itertools

import pytest
import torch
from hypothesis import given, strategies as st

from lct_core.cli.shots import EXAMPLE, parse_shots
from lct_core.patterns import context_causal
from lct_core.pictures import attention, packing, style
from tests.cli.arguments import NINE


@pytest.mark.parametrize("text_first", [True, False])
def test_plan_picture_has_every_attended_pair_and_no_other(text_first):
    layout = parse_shots(EXAMPLE, text_first=text_first)
    plan = context_causal(layout)
    (axes,) = attention.plan_figure(layout, plan, pattern="context_causal").axes
    tiles, blocks = (axes.collections[k].get_paths() for k in (0, 1))
    for paths in (tiles, blocks):
        drawn = torch.zeros(plan.queries, plan.keys, dtype=torch.int64)
        for path in paths:
            (x0, y0), (x1, y1) = path.vertices.min(0).astype(int), path.vertices.max(0).astype(int)
            drawn[y0:y1, x0:x1] += 1
        assert torch.equal(drawn, plan.dense().long())


def test_packing_picture_has_every_token_once():
    layout = parse_shots(EXAMPLE)
    (axes,) = packing.packing_figure(layout, [[1, 2], [0]], budget=500).axes
    assert sum(bar.get_width() for bar in axes.patches) == 1000
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [117, 78, 82, 223, 50, 168, 75, 156, 42, 9]


@given(
    centres=st.lists(st.floats(0, 100), min_size=1, max_size=20).map(sorted),
    gap=st.floats(0.01, 10),
)
def test_spread_labels(centres, gap):
    last = centres[-1] + gap
    places = style.spread(centres, gap, last=last)
    assert len(places) == len(centres)
    assert all(b - a > gap - 1e-9 for a, b in itertools.pairwise(places))
    assert places[-1] <= last + 1e-9
    if all(b - a >= gap for a, b in itertools.pairwise(centres)):
        assert places == pytest.approx(centres)


def test_the_palette_has_a_colour_for_each_of_nine_shots():
    assert len({*style.shot_colours(parse_shots(NINE))}) == 10
