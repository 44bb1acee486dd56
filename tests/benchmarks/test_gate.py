"""A case from end to end: what is wrong or breaks is not timed."""

import json
import re
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch

from benchmarks import gate, harness, provenance, timing
from benchmarks.cases import Goal, row
from lct_core import attend
from lct_core.plugins.torch_kernels import sdpa
from lct_plugins import flash, varlen_naive
from tests.benchmarks.contenders import TINY, announce, crash, mortal, spec


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_a_case_from_end_to_end(kernels, tmp_path, direction):
    measurement = harness.measure(replace(TINY, direction=direction))
    wrong = {"off", "nan"} | ({"half"} if direction != "forward" else set())
    assert measurement["lost"].keys() == wrong | {"broken"}
    assert all(measurement["lost"][name].startswith("wrong: the error of") for name in wrong)
    assert measurement["lost"]["broken"] == "RuntimeError: no such engine"
    assert measurement["refusals"] == {"picky": ["not today"]}
    right = {"sdpa", "good"} | ({"half"} if direction == "forward" else set())
    assert measurement["times"].keys() == right | {"dense", "masked", "gemm", "copy"}
    assert measurement["gates"].keys() == right
    assert all(0 < gate["error"] <= gate["bound"] for gate in measurement["gates"].values())
    assert ["difference" in measurement["gates"][name] for name in sorted(right)] == [True] * (len(right) - 1) + [False]
    assert measurement["auto"] == "sdpa"
    for name, t in measurement["times"].items():
        assert 0 < t["low"] <= t["seconds"] <= t["high"]
        assert t["first"] > 0
        assert t["gflops_per_second"] == pytest.approx(t["flops"] / t["seconds"] / 1e9)
        if name in right:
            assert t["flops"] == replace(TINY, direction=direction).flops
    found = {c["what"]: c for c in measurement["comparisons"]}
    assert found.keys() == {"rate / dense", "rate / masked", "time / good", "auto / best kernel"}
    assert found["rate / dense"]["met"] is found["time / good"]["met"] is True
    assert found["rate / masked"]["met"] is None
    assert found["auto / best kernel"]["most"] == 1.03
    assert measurement["roofline"].keys() == {"gemm_gflops_per_second", "copy_gigabytes_per_second"}
    assert min(measurement["roofline"].values()) > 0
    assert measurement["rounds"] == 3
    assert measurement["versions"]["lct-core"] == version("lct-core")
    provenance.write(measurement, tmp_path)
    assert json.loads((tmp_path / "tiny.json").read_text()) == json.loads(json.dumps(measurement))


def test_a_kernel_that_would_take_all_the_time_is_not_timed(kernels):
    measurement = harness.measure(replace(TINY, budget=1e-9), kernels=["sdpa"])
    assert measurement["times"].keys() == {"gemm", "copy"}
    assert re.match(r"TimeoutError: its first call took .* s, more than 4e-09", measurement["lost"]["sdpa"])
    assert harness.measure(replace(TINY, budget=100.0, rounds=4), kernels=["sdpa"])["rounds"] == 4


def test_kernels_by_name_are_all_that_takes_part(kernels):
    measurement = harness.measure(TINY, kernels=["auto", "half", "picky"])
    assert measurement["times"].keys() == {"sdpa", "half", "gemm", "copy"}
    assert not measurement["lost"]
    with pytest.raises(ValueError, match="kernel: got 'nothing', expected"):
        harness.measure(TINY, kernels=["nothing"])


def test_what_compiles_takes_part_where_a_goal_names_it(kernels, monkeypatch):
    monkeypatch.setattr(harness, "COMPILED", ("good",))
    assert "good" in harness.serving(TINY)[1]
    assert "good" not in harness.serving(replace(TINY, goals=()))[1]
    assert harness.serving(replace(TINY, goals=(), kernels=("half",)))[1] == ["sdpa", "half"]


def test_a_goal_without_a_kernel_holds_in_its_absence_alone(kernels):
    goals = (Goal(peer="dense", subject="half", least=0.1, without="good"),)
    case = replace(TINY, goals=goals, kernels=("half",))
    assert harness.measure(case)["comparisons"][0]["what"] == "half: rate / dense"
    names = [c["what"] for c in harness.measure(replace(case, kernels=("half", "good")))["comparisons"]]
    assert names == ["auto / best kernel"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("by", [1e-2, torch.nan])
def test_a_kernel_that_is_right_on_the_gate_alone_is_not_timed(kernels, direction, by):
    """As one whose tiles of long rows are wrong."""

    def late(q, k, v, plan, scale):
        out = sdpa(q, k, v, plan, scale)
        return out if plan == TINY.gate.plan else out * (1 + by)

    announce(kernels, spec("late", late))
    measurement = harness.measure(replace(TINY, direction=direction), kernels=["good", "late", "sdpa"])
    what = {"forward": "out", "backward": "dq"}[direction]
    assert re.match(
        rf"wrong: at full size {what} differs from that of sdpa by .*, more than", measurement["lost"]["late"]
    )
    assert measurement["times"].keys() == {"good", "sdpa", "gemm", "copy"}
    assert measurement["gates"]["good"]["difference"] == 0


def test_a_kernel_that_loses_the_gpu_is_left_out_next_time(kernels, monkeypatch, tmp_path):
    alive = harness.alive
    monkeypatch.setattr(harness, "alive", mortal(1))
    with pytest.raises(harness.DeviceLost, match="tiny: the GPU is lost") as caught:
        harness.measure(TINY)
    monkeypatch.setattr(harness, "alive", alive)
    provenance.write(caught.value.record, tmp_path)
    begun = provenance.standing(TINY, tmp_path)
    assert begun["times"] == {}
    assert begun["lost"] == {"broken": "RuntimeError: no such engine"}
    assert harness.measure(TINY, lost=begun["lost"])["lost"]["broken"] == "RuntimeError: no such engine"


def test_a_kernel_that_loses_the_gpu_while_timed_is_named(kernels, monkeypatch):
    calls = iter(range(9))

    def late(*args):
        return crash() if next(calls) == 2 else sdpa(*args)  # the gate, the first call, and then

    announce(kernels, spec("late", late))
    with pytest.raises(timing.Failed, match="late"):
        harness.measure(TINY, kernels=["sdpa", "late", "good"])
    calls = iter(range(9))
    gate._check.cache_clear()
    monkeypatch.setattr(harness, "alive", mortal(1))
    with pytest.raises(harness.DeviceLost) as caught:
        harness.measure(TINY, kernels=["sdpa", "late", "good"])
    assert caught.value.record["lost"] == {"late": "RuntimeError: no such engine"}


def test_a_gpu_lost_before_the_run_blames_no_kernel(kernels, monkeypatch):
    monkeypatch.setattr(harness, "alive", mortal(0))
    with pytest.raises(harness.DeviceLost) as caught:
        harness.measure(TINY)
    assert caught.value.record["lost"] == {}


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize(
    ("scenes", "pattern", "packed"),
    [
        ([[40, 25, 63]], "bidirectional", False),
        ([[40, 25], [63], [7, 90]], "bidirectional", True),
        ([[40, 25, 63]], "context_causal", False),
    ],
)
def test_raw_fa3_is_its_own_functions(kernels, monkeypatch, direction, scenes, pattern, packed):
    """On readable ones: the sequences of a call are the scenes, or there are none; it knows no autograd."""
    asked = []

    def noted(function):
        def call(*args):
            asked.append(args[-2])
            assert not any(x.requires_grad for x in args[:3])
            return function(*args)

        return call

    monkeypatch.setattr(flash, "forward3", noted(varlen_naive.forward))
    monkeypatch.setattr(flash, "backward3", noted(varlen_naive.backward))
    announce(kernels, spec("flash3", sdpa))
    goals = (Goal(peer="raw-flash3", least=1e-9),)
    case = replace(TINY, layout=row(*scenes), pattern=pattern, direction=direction, goals=goals, kernels=("flash3",))
    measurement = harness.measure(case)
    assert not measurement["lost"]
    assert "raw-flash3" in measurement["times"]
    assert measurement["comparisons"][0]["what"] == "rate / raw-flash3"
    assert ("difference" in measurement["gates"]["raw-flash3"]) == (pattern == "bidirectional")
    assert {s is not None for s in asked} == {packed}
    if packed:
        assert [0, 65, 128, 225] in [s.cu_seqlens_k.tolist() for s in asked]
        assert {s.seqused_k for s in asked} == {None}


def test_the_gate_measures_grouped_heads_against_the_definition(kernels):
    """By hand: the error that the gate reports is that of the kernel."""
    small = TINY.gate
    q, k, v = gate.attention_tensors(small)
    exact = attend(q.double(), k.double(), v.double(), small.plan, kernel="reference")
    error = (attend(q, k, v, small.plan, kernel="good") - exact).abs().max() / exact.abs().max()
    assert gate.check(TINY, "good")["error"] == pytest.approx(error.item())
