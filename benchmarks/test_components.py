"""What is made once for a batch: coordinates, rows of scenes, a block mask. Absolute times, on one CPU."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import provenance, timing
from benchmarks.cases import ragged, row
from lct_core import Layout, Shot, context_causal, coordinates, plan_rows

Publish = Callable[[dict[str, Any]], None]

#: Prints by how many kB a process grows, at its largest, while it builds a mask of that many tokens. A first mask
#: brings in what is not a mask's own: imports and the code of the operators.
PEAK_OF_BLOCK_MASK = """
import gc, pathlib, re, sys
from benchmarks.cases import ragged, row
from lct_core import context_causal

def kilobytes(what):
    return int(re.search(what + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

plan = context_causal(row(ragged(int(sys.argv[1]))))
plan.block_mask()
gc.collect()
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far
before = kilobytes("VmRSS")
plan.block_mask()
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.parametrize("scheme", ["paper", "anchored"])
def test_coordinates(scheme: str, quick: bool, benchmark: BenchmarkFixture, publish: Publish) -> None:
    scene = [Shot(text=576, grid=(21, 30, 52))] * 9
    layout = Layout([scene] * (1 if quick else 2))
    places = coordinates(layout, scheme=scheme)
    assert places.shape == (layout.tokens, 3)
    assert places[: layout.spans[0].stop].max() < places[layout.spans[1].slice].max()
    _measure(
        f"coordinates-{scheme}",
        lambda: coordinates(layout, scheme=scheme),
        benchmark,
        publish,
        shape={"tokens": layout.tokens, "shots": layout.num_shots},
        seconds=0.05,
        rounds=20,
    )


def test_planner(quick: bool, benchmark: BenchmarkFixture, publish: Publish) -> None:
    rng = random.Random(0)
    count, budget = (10_000 if quick else 100_000), 300_000
    scenes = [[rng.randint(1_500, 29_000) for _ in range(rng.randint(1, 9))] for _ in range(count)]
    plan = lambda: plan_rows(scenes, budget=budget, generator=torch.Generator().manual_seed(0))  # noqa: E731
    rows = plan()
    assert sorted(i for planned in rows for i in planned) == list(range(count))
    assert max(sum(sum(scenes[i]) for i in planned) for planned in rows) <= budget
    filled = sum(map(sum, scenes)) / (len(rows) * budget)
    _measure(
        "planner",
        plan,
        benchmark,
        publish,
        seconds=0.5,
        rounds=10,
        shape={"scenes": count, "budget": budget, "rows": len(rows), "filled": filled},
    )


def test_block_mask(quick: bool, benchmark: BenchmarkFixture, publish: Publish) -> None:
    small = context_causal(row(ragged(1000)))
    q, k = torch.meshgrid(torch.arange(1000), torch.arange(1000), indexing="ij")
    assert torch.equal(small.block_mask().mask_mod(0, 0, q, k), small.dense())

    tokens = 10_000 if quick else 100_000
    plan = context_causal(row(ragged(tokens)))
    peak = subprocess.run(
        [sys.executable, "-c", PEAK_OF_BLOCK_MASK, str(tokens)],
        cwd=provenance.ROOT,
        env=os.environ
        | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back, and is counted when taken again
        check=True,
        capture_output=True,
        text=True,
    )
    megabytes = int(peak.stdout) * 1024 / 1e6
    _measure(
        "block-mask",
        plan.block_mask,
        benchmark,
        publish,
        shape={"tokens": tokens, "shots": 9},
        seconds=1.0,
        rounds=10,
        more=[timing.Comparison("megabytes at the peak", timing.estimate([megabytes]), most=50.0)],
    )


def _measure(
    name: str,
    run: timing.Run,
    benchmark: BenchmarkFixture,
    publish: Publish,
    *,
    shape: dict[str, Any],
    seconds: float,
    rounds: int,
    more: list[timing.Comparison] | None = None,
) -> None:
    warmup = 2
    contenders = {name: timing.Contender(lambda: run)}
    times = timing.interleave(contenders, warmup=warmup, rounds=rounds)
    benchmark.pedantic(run, rounds=rounds)
    publish(
        provenance.record(
            name,
            device="cpu",
            shape=shape,
            warmup=warmup,
            rounds=rounds,
            times=timing.measured(times, contenders),
            comparisons=[timing.Comparison("seconds", timing.estimate(times[name]), most=seconds), *(more or [])],
        )
    )
