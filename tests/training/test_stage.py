"""Stages: the paper's settings, and which kind of step comes when."""

from dataclasses import asdict, replace
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from lct_core.training import (
    Stage,
    paper_stages,
)


def test_the_defaults_are_the_papers():
    stage = Stage(name="any", steps=1)
    assert (stage.scene_share, stage.max_shots, stage.single_frame) == (0.5, 9, 0.1)
    assert (stage.learning_rate, stage.ema) == (1e-4, 0.996)
    assert (stage.level_mean, stage.level_std) == (0, 1)


def test_the_papers_stages():
    single, bidirectional, causal = paper_stages("paper")
    assert paper_stages("anchored") == (bidirectional, causal)
    assert [s.name for s in (single, bidirectional, causal)] == ["single_shot", "bidirectional", "causal"]
    assert [s.scene_share for s in (single, bidirectional, causal)] == [0, 0.5, 0.5]
    assert (bidirectional.steps, causal.steps) == (135_000, 9_000)
    assert [s.pattern for s in (single, bidirectional, causal)] == ["own_shot", "bidirectional", "context_causal"]
    with pytest.raises(ValueError, match="scheme"):
        paper_stages("other")


NAN, INF = float("nan"), float("inf")
BAD = {
    "name": ["", "a/b", "a.pt", "..", "a b", None],
    "steps": [-1, 1.5, True, "1"],
    "pattern": ["causal", "", None],
    "scene_share": [-0.1, 1.1, NAN, "1"],
    "single_shot_batch": [0, -1, 1.0, True],
    "scene_batch": [0, -1, 1.0],
    "max_shots": [0, -1, 9.0],
    "learning_rate": [0, -1e-4, NAN, INF, "1e-4"],
    "warm_up": [-0.1, 1.1, NAN],
    "clip": [0, -1.0, NAN, INF],
    "ema": [-0.1, 1.1, NAN],
    "single_frame": [-0.1, 1.1, NAN],
    "text_dropout": [-0.1, 1.1, NAN],
    "storyline_dropout": [-0.1, 1.1, NAN],
    "level_mean": [NAN, INF, -INF, None],
    "level_std": [0, -1.0, NAN, INF],
    "precision": ["fp16", "", None],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_stage_refuses_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: got .*expected"):
        Stage(**{"name": "any", "steps": 1, field: value})


def test_every_field_of_a_stage_has_a_bad_value():
    assert BAD.keys() == asdict(Stage(name="any", steps=0)).keys()


@given(n=st.integers(1, 64), k=st.integers(0, 64), rounds=st.integers(1, 5))
def test_scene_steps_have_exactly_their_share(n, k, rounds):
    """As many as whole numbers allow after any step, and spread evenly: floor or ceiling in every window."""
    share = Fraction(min(n, k), n)
    stage = Stage(name="any", steps=1, scene_share=float(share))
    steps = [stage.is_scene_step(step) for step in range(n * rounds)]
    for done in range(1, len(steps) + 1):
        assert abs(sum(steps[:done]) - done * share) <= 1
    if n & (n - 1) == 0:  # a share that floating point has exactly
        assert sum(steps) == rounds * min(n, k)


def test_scenes_and_single_shots_alternate_by_default():
    stage = Stage(name="any", steps=1)
    assert [stage.is_scene_step(step) for step in range(100)] == [False, True] * 50
    assert not any(replace(stage, scene_share=0.0).is_scene_step(step) for step in range(100))
    assert all(replace(stage, scene_share=1.0).is_scene_step(step) for step in range(100))
