"""What all benchmarks share: the ``--quick`` option, where results go, and the summary of goals."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import harness, provenance
from benchmarks.cases import Case
from benchmarks.report import goal

PUBLISHED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="a fraction of every size, to see that it runs; results go to runs/benchmarks",
    )
    parser.addoption(
        "--fresh",
        action="store_true",
        help="measure attention cases again whose results stand: same machine, versions and source",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PUBLISHED] = []


def pytest_collection_modifyitems(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    again = config.getoption("--quick") or config.getoption("--fresh")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif not again and isinstance(case := _case(item), Case):
            found = provenance.standing(case, harness.RESULTS)
            if found and found["times"]:
                losses = f", with losses: {', '.join(found['lost'])}" if found["lost"] else ""
                item.add_marker(pytest.mark.skip(reason=f"its result stands{losses}; --fresh measures it again"))


def _case(item: pytest.Item) -> object:
    return item.callspec.params.get("case") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def fresh(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--fresh")


@pytest.fixture
def publish(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture, quick: bool
) -> Callable[[dict[str, Any]], None]:
    """Keep a record: in its file, beside pytest-benchmark's own numbers, and in the summary."""

    def keep(measurement: dict[str, Any]) -> None:
        provenance.write(measurement, harness.QUICK_RESULTS if quick else harness.RESULTS)
        benchmark.extra_info.update({key: measurement[key] for key in ("shape", "times", "comparisons")})
        request.config.stash[PUBLISHED].append(measurement)

    return keep


# The name is in quotes since pytest 8.3 does not export it.
def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter", config: pytest.Config) -> None:
    if published := config.stash[PUBLISHED]:
        terminalreporter.section("goals")
    for measurement in published:
        terminalreporter.line(measurement["name"])
        for c in measurement["comparisons"]:
            verdict = {True: "met", False: "NOT MET", None: ""}[c["met"]]
            spread = f"({c['low']:.3g} to {c['high']:.3g})"
            terminalreporter.line(f"  {c['what']:44} {c['median']:9.3g} {spread:24} {goal(c):8} {verdict}")
