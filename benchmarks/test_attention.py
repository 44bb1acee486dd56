"""Attention over plans: every registered kernel that serves a case, against the peers of its goals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import harness
from benchmarks.cases import CASES, Case


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.gpu] if c.device == "cuda" else []) for c in CASES]
)
def test_attention(
    case: Case, quick: bool, benchmark: BenchmarkFixture, publish: Callable[[dict[str, Any]], None]
) -> None:
    if quick:
        case = case.scaled(case.layout.tokens // 16)
    gates = {kernel: harness.check(case, kernel) for kernel in harness.serving(case)}
    torch.compiler.reset()  # so that what is compiled is compiled for this shape, not for any
    auto, contenders = harness.attention_contenders(case)
    seconds = harness.interleave(contenders, warmup=case.warmup, rounds=case.rounds, device=case.device)

    def run(prepared: harness.Run) -> None:
        prepared()
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=lambda: ((contenders[auto].prepare(),), {}), rounds=max(1, case.rounds // 3))
    publish(
        harness.record(
            case.name,
            device=case.device,
            shape={
                "scenes": [[shot.tokens for shot in scene] for scene in case.layout.scenes],
                "queries": case.plan.queries,
                "keys": case.plan.keys,
                "pairs": case.plan.pairs,
                "pattern": case.pattern,
                "heads": case.heads,
                "kv_heads": case.kv_heads,
                "head_dim": case.head_dim,
                "dtype": str(case.dtype).removeprefix("torch."),
                "direction": case.direction,
            },
            warmup=case.warmup,
            rounds=case.rounds,
            times=harness.measured(seconds, contenders),
            comparisons=[harness.against(goal, auto, seconds, contenders) for goal in case.goals],
            auto=auto,
            gates=gates,
        )
    )
