"""Attention over plans: every registered kernel that serves a case, against the peers of its goals."""

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import harness, provenance
from benchmarks.cases import CASES, Case

RUN_AGAIN = 75  # the exit code: what is left goes on in a new process


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.gpu] if c.device == "cuda" else []) for c in CASES]
)
def test_attention(
    case: Case, quick: bool, fresh: bool, benchmark: BenchmarkFixture, publish: Callable[[dict[str, Any]], None]
) -> None:
    case, folder = (case.quick, harness.QUICK_RESULTS) if quick else (case, harness.RESULTS)
    begun = None if fresh else provenance.standing(case, folder)
    lost = begun["lost"] if begun else {}
    try:
        measurement = benchmark.pedantic(harness.measure, (case,), {"lost": lost}, rounds=1)
    except harness.DeviceLost as error:
        provenance.write(error.record, folder)
        pytest.exit(str(error), returncode=RUN_AGAIN)
    publish(measurement)
    assert not measurement["lost"], "not timed, and the record says so"
