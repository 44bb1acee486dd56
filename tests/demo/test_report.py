"""The demo's report: goals that are met, missed, or cannot be told."""

from math import inf, nan

import pytest

from lct_core.demo.report import GOALS, verdicts

pytest.importorskip("av")


ALL_MET = {
    "independent_error": 6.0,
    "joint_error": 1.0,
    "conditional_error": 2.0,
    "ar_bidirectional_error": 2.0,
    "ar_causal_error": 2.5,
    "ar_causal_error_before": 2.6,
    "independent_adherence": 1.0,
    **{f"{mode}_adherence": 0.9 for mode in ("joint", "conditional", "ar_bidirectional", "ar_causal")},
    "single_shot_loss_before": 1.0,
    "single_shot_loss_after": 1.05,
    "parameters_added": 0,
}


def test_all_goals_are_met():
    found = [*verdicts(ALL_MET)]
    assert all(met is True for *_, met in found)
    assert [(value, goal) for _, value, goal, _ in found] == [
        (pytest.approx(6), ">= 5"),
        (pytest.approx(3), ">= 3"),
        (pytest.approx(3), ">= 3"),
        (pytest.approx(1.25), "<= 1.25"),
        (pytest.approx(2.5 / 2.6), "< 1"),
        *[(pytest.approx(0.9), ">= 0.9")] * 4,
        (pytest.approx(1.05), "<= 1.05"),
        (0, "0"),
    ]
    assert [*GOALS] == ["joint", "conditional", "ar_bidirectional"]


@pytest.mark.parametrize(
    ("name", "value", "missed"),
    [
        ("joint_error", 1.21, {"joint: appearance error, times below independent": 6 / 1.21}),
        ("conditional_error", 2.01, {"conditional: appearance error, times below independent": 6 / 2.01}),
        (
            "ar_bidirectional_error",
            2.01,
            {"AR, bidirectional: appearance error, times below independent": 6 / 2.01},
        ),
        ("ar_bidirectional_error", 1.99, {"AR causal over AR bidirectional": 2.5 / 1.99}),
        ("ar_causal_error_before", 2.5, {"AR causal over the same before its tuning": 1.0}),
        ("joint_adherence", 0.89, {"joint: adherence, share of independent's": 0.89}),
        ("conditional_adherence", 0.89, {"conditional: adherence, share of independent's": 0.89}),
        (
            "ar_bidirectional_adherence",
            0.89,
            {"AR, bidirectional: adherence, share of independent's": 0.89},
        ),
        ("ar_causal_adherence", 0.89, {"AR, causal, KV cache: adherence, share of independent's": 0.89}),
        ("single_shot_loss_after", 1.06, {"single-shot loss after tuning over before": 1.06}),
        ("parameters_added", 1, {"parameters added": 1}),
        # no error at all is infinitely less, and an error over none infinitely more
        ("joint_error", 0.0, {}),
        ("ar_bidirectional_error", 0.0, {"AR causal over AR bidirectional": inf}),
        ("ar_causal_error_before", 0.0, {"AR causal over the same before its tuning": inf}),
        ("single_shot_loss_before", 0.0, {"single-shot loss after tuning over before": inf}),
        ("independent_adherence", 0.0, {}),
    ],
)
def test_a_goal_that_is_missed(name, value, missed):
    found = [*verdicts({**ALL_MET, name: value})]
    assert {what: number for what, number, _, met in found if not met} == pytest.approx(missed)
    assert len(found) == 11


def test_nothing_over_nothing_meets_no_goal():
    nothing = dict.fromkeys(ALL_MET, 0.0)
    *ratios, added = verdicts(nothing)
    assert [value for _, value, _, _ in ratios] == pytest.approx([nan] * 10, nan_ok=True)
    assert not any(met for *_, met in ratios)
    assert added == ("parameters added", 0.0, "0", True)
