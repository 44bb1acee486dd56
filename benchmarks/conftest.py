"""What all benchmarks share: the ``--quick`` option, where results go, and the summary of goals."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import harness
from benchmarks.report import goal

PUBLISHED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="a fraction of every size, to see that it runs; results go to runs/benchmarks",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PUBLISHED] = []


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def publish(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture, quick: bool
) -> Callable[[dict[str, Any]], None]:
    """Keep a record: in its file, beside pytest-benchmark's own numbers, and in the summary."""

    def keep(measurement: dict[str, Any]) -> None:
        harness.write(measurement, harness.QUICK_RESULTS if quick else harness.RESULTS)
        benchmark.extra_info.update({key: measurement[key] for key in ("shape", "times", "comparisons")})
        request.config.stash[PUBLISHED].append(measurement)

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if published := config.stash[PUBLISHED]:
        terminalreporter.section("goals")
    for measurement in published:
        terminalreporter.line(measurement["name"])
        for c in measurement["comparisons"]:
            verdict = {True: "met", False: "NOT MET", None: ""}[c["met"]]
            spread = f"({c['low']:.3g} to {c['high']:.3g})"
            terminalreporter.line(f"  {c['what']:44} {c['median']:9.3g} {spread:24} {goal(c):8} {verdict}")
