"""Rounds: who is timed when, for how long, and what the GPU did meanwhile."""

import re
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import provenance, timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands, but for what runs on it."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def contender(seconds, log=None, name=None):
        def run():
            now[0] += seconds
            if log is not None:
                log.append(name)

        return timing.Contender(lambda: run, flops=1e9)

    return contender


def test_rounds_take_turns(clock):
    log = []
    contenders = {name: clock(seconds, log, name) for name, seconds in (("a", 1.0), ("b", 2.0))}
    assert timing.interleave(contenders, warmup=1, rounds=3) == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(log) == "abbaabba"


@pytest.mark.parametrize(("budget", "rounds"), [(1, 2), (30, 10), (1000, 20)])
def test_rounds_keep_to_a_budget_but_for_two(clock, budget, rounds):
    contenders = {"a": clock(1.0), "b": clock(2.0)}
    assert [*map(len, timing.interleave(contenders, warmup=2, rounds=20, budget=budget).values())] == [rounds] * 2


def test_ratios_are_taken_within_a_round():
    drifting = [1.0, 2.0, 4.0, 8.0]
    assert timing.ratio([2 * t for t in drifting], drifting) == (2, 2, 2)
    times = timing.measured({"a": [1.0, 2.0, 3.0]}, {"a": timing.Contender(lambda: lambda: None, 8e9)})
    assert times["a"]["gflops_per_second"] == 4


def test_a_contender_that_fails_late_is_named(clock):
    def crash():
        raise ZeroDivisionError

    contenders = {"a": clock(1.0), "b": timing.Contender(lambda: crash)}
    with pytest.raises(timing.Failed, match=r"^b$"):
        timing.interleave(contenders, warmup=0, rounds=1)


@pytest.fixture
def gpu(monkeypatch):
    """What torch tells of a GPU, where there is none."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="some-uuid"))


def driver(monkeypatch, tmp_path, script):
    """An ``nvidia-smi``, which notes what it was asked."""
    command = tmp_path / "nvidia-smi"
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{script}')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "asked"


def test_clock_and_power_are_sampled(gpu, monkeypatch, tmp_path):
    lines = r"1700, 650.5\n1500, 640.5\n1600, [N/A]\n17"  # the last is cut off
    asked = driver(monkeypatch, tmp_path, f"printf '{lines}'; touch {tmp_path}/told; exec sleep 60")
    with timing.Running("cuda") as running:
        while not (tmp_path / "told").exists():
            time.sleep(0.01)
    estimates = running.estimates()
    assert estimates["sm_clock_megahertz"]["median"] == 1600
    assert estimates["power_watts"]["median"] == 645.5
    assert re.search("--id=GPU-some-uuid --query-gpu=clocks.sm,power.draw .*--loop-ms=200", asked.read_text())
    assert len(asked.read_text().splitlines()) == 1
    with timing.Running("cpu") as running:
        pass
    assert running.estimates() == {}


def test_a_gpu_without_its_driver_s_tool_is_recorded_without(gpu, monkeypatch, tmp_path):
    driver(monkeypatch, tmp_path, "echo 570.1")
    assert provenance._gpu.__wrapped__() == {"gpu": "Some GPU", "driver": "570.1", "cuda": str(torch.version.cuda)}
    driver(monkeypatch, tmp_path, "exit 6")  # as for a part of a GPU, which has another id
    assert provenance._gpu.__wrapped__()["driver"] == "unknown"
    monkeypatch.setenv("PATH", "")
    assert provenance._gpu.__wrapped__()["driver"] == "unknown"
    with timing.Running("cuda") as running:
        pass
    assert running.estimates() == {}
