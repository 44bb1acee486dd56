"""Benchmarks from a source tree, and what make does after a loss."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions, entry_points, version
from pathlib import Path

import pytest

from benchmarks import harness, report, source_tree

ROOT = Path(__file__).parents[2]


def test_a_source_tree_tells_what_an_installation_would(tmp_path):
    source_tree.main(tmp_path)
    (told,) = distributions(path=[str(tmp_path)])
    assert (told.name, told.version) == ("lct-core", version("lct-core"))
    ours = {(e.name, e.value) for e in entry_points(group="lct") if e.dist and e.dist.name == "lct-core"}
    assert {(e.name, e.value) for e in told.entry_points} == ours


def test_the_suite_runs_a_quick_case_without_what_draws(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    of_cache = [f"benchmarks/test_cache_{what}.py" for what in ("step", "tiers", "operations")]
    cases = ["benchmarks/test_attention.py::test_attention[cpu-cached-16k-fp32-forward]", *of_cache]
    quick = [sys.executable, "-m", "pytest", *cases, "-m", "not gpu", "--quick", "-q", "-p", "no:cacheprovider"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of no xdist worker
    done = subprocess.run(quick, cwd=ROOT, env=alone | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"rate / dense +[\d.]+ \(", done.stdout)
    record = json.loads((harness.QUICK_RESULTS / "cpu-cached-16k-fp32-forward.json").read_text())
    assert record["shape"]["keys"] == 1024
    assert math.isfinite(record["times"]["sdpa"]["seconds"])
    for name in ("cache-step-9", "cache-step-20", "sparse-step-20", "cache-tiers", "cache-operations"):
        assert report.read(harness.QUICK_RESULTS / f"{name}-cpu.json")["comparisons"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("ends", "runs"), [([75, 75, 1], 3), ([0], 1), ([75] * 99, 4)], ids=["losses", "none", "for ever"]
)
def test_make_goes_on_after_a_loss_and_always_reports(tmp_path, ends, runs):
    """On a Python that only notes what it is told; ``figure1`` fails."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "runs" / "site").mkdir(parents=True)
    (tmp_path / "ends").write_text("\n".join(map(str, ends)) + "\n")
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/sh
echo "$PYTHONPATH $@" >> told
case "$@" in
    *test_attention*) end=$(head -n 1 ends); sed -i 1d ends; exit $end;;
    *figure1*) exit 1;;
esac
"""
    )
    python.chmod(0o755)
    given = [f"RUN={python}", "ARGS=--quick --fresh", "RESTARTS=3"]
    done = subprocess.run(
        ["make", "bench-gpu", *given], cwd=tmp_path, env=os.environ | {"PYTHONPATH": "mine"}, capture_output=True
    )
    assert done.returncode
    told = [line.split() for line in (tmp_path / "told").read_text().splitlines()]
    assert all(line[0].split(":")[-2:] == [f"{tmp_path}/runs/site", "mine"] for line in told)
    cases = [line[1:] for line in told if "benchmarks/test_attention.py" in line]
    assert ["--fresh" in line for line in cases] == [True] + [False] * (runs - 1)
    assert all("--quick" in line for line in cases)
    assert told[-1][1:] == ["-m", "benchmarks.report"]
