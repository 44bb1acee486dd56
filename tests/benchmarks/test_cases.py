"""The cases: shapes, goals, floating-point operations, and what a run of all takes."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks import gate, generation_cost, test_generation, timing
from benchmarks.cases import CASES, COMPILED, REFERENCE_GEMM, row
from lct_backbones.mmdit import MMDiT
from tests.benchmarks.contenders import GPU, TINY


def test_the_hopper_cases_are_those_that_were_set():
    goals = {
        "A1": "16200 H24 D128 660/540",
        "A2": "65000 H24 D128 640/530",
        "A3": "264600 H24 D128 690/580",
        "A4": "67500 H32 D64 490/460",
        "B1": "16200 H24 D128 590/470",
        "B2": "67500 H24 D128 650/550",
        "B3": "264600 H24 D128 685/575",
        "B4": "57600 H16 D128 600/480",
        "B5": "67500 H32 D64 460/440",
        "C1": "1800:16200 H24 D128 610",
        "C2": "29400:264600 H24 D128 690",
        "C3": "29400:588000 H16 D128 690",
        "C4": "1500:300000 H16 D128 580",
    }
    for name, said in goals.items():
        cases = [case for case in GPU if case.name.split("-")[1] == name]
        assert [c.direction for c in cases] == ["forward", "backward"][: 1 if name[0] == "C" else 2]
        size = f"{cases[0].plan.queries}:" * cases[0].last_shot + str(cases[0].plan.keys)
        of = cases[0]
        assert f"{size} H{of.heads} D{of.head_dim} {'/'.join(str(c.tflops) for c in cases)}" == said
        assert {c.pattern for c in cases} == {"bidirectional" if name[0] == "A" else "context_causal"}
        assert all(c.published and c.dtype is torch.bfloat16 and c.kv_heads == c.heads for c in cases)
    assert len(GPU) == 2 * 9 + 4
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(a.flops <= b.flops for a, b in pairwise(GPU))


def test_without_fa3_the_librarys_own_kernel_has_goals():
    for case in GPU:
        own = [g for g in case.goals if g.subject == "triton"]
        assert all(g.without == "flash3" for g in own)
        if "-B" in case.name:
            least = {"forward": 450, "backward": 320}[case.direction]
            assert [round(REFERENCE_GEMM * g.least) for g in own if g.peer == "gemm"] == [least]
        assert ({"flex"} == {g.peer for g in own if g.most == 1}) == ("-B2-" in case.name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_gate_is_small_and_of_the_same_kind(case):
    gate = case.gate
    for what in ("pattern", "heads", "kv_heads", "head_dim", "dtype", "direction", "last_shot", "device"):
        assert getattr(gate, what) == getattr(case, what)
    assert gate.layout.tokens <= 2000
    assert len(gate.layout.scenes) == len(case.layout.scenes)
    assert gate.plan.form == case.plan.form
    sizes = {shot.tokens for shot in gate.layout.shots}
    assert len(sizes) == min(gate.layout.num_shots, 9)  # ragged


@pytest.mark.parametrize("pattern", ["bidirectional", "context_causal"])
@pytest.mark.parametrize("last_shot", [False, True])
def test_flops_are_of_attended_pairs_alone(pattern, last_shot):
    case = replace(TINY, layout=row([40, 25], [63, 7]), pattern=pattern, last_shot=last_shot)
    pairs = int(case.plan.dense().sum())
    forward = 4 * case.head_dim * case.heads * pairs
    assert case.flops == forward
    assert replace(case, direction="backward").flops == 2.5 * forward
    assert replace(case, direction="forward+backward").flops == 3.5 * forward


@pytest.mark.parametrize(("peer", "own"), [("raw-flash3", {"dense", "packed"}), ("raw-cudnn", {"dense"})])
def test_a_raw_peer_is_asked_for_as_many_pairs(peer, own):
    for case in GPU:
        asked = gate.case_for(case, peer)
        assert asked.plan.form in own
        assert asked.plan.pairs == pytest.approx(case.plan.pairs, rel=0.02)
        assert (asked == case) == (case.plan.form in own)
        assert gate.case_for(case, "sdpa") == case


def test_all_of_a_gpu_fits_its_nine_minutes():
    """By the model of benchmarks/README.md: an estimate, not a measurement."""
    tests, start, kernels, rate, plan, compile_flex, rotations = 60, 3, 6, 400e12, 0.4, 15, 6
    total, plans = tests + 3 * rotations, set()
    for case in GPU:
        passes = 1 if case.direction == "forward" else 2
        forward = case.cost(case.plan.pairs) / (1 if passes == 1 else 2.5) / rate
        once = forward * (1 if passes == 1 else 2.5)
        compiled = sum(goal.peer in COMPILED for goal in case.goals if not goal.without)
        contenders = sum(g.peer.startswith("raw-") for g in case.goals) + (len(case.kernels) or kernels) + compiled
        rounds = max(timing.FEWEST_ROUNDS, min(case.rounds, int(case.budget / (contenders * once))))
        total += start + contenders * ((rounds + 1) * once + (passes - 1) * forward)
        total += 2 * compile_flex * passes * compiled
        kind = case.direction, case.heads, case.head_dim
        for one in (case, case.gate):
            seen = [(s.queries.size, s.num_keys) for s in one.plan.segments]
            plans |= {(*kind, i, *shape) for shape in (*seen, (one.plan.pairs,)) for i in range(passes)}
    size = test_generation.SIZES["cuda"]
    with torch.device("meta"):
        model = MMDiT(**size.config)
    flops = sum(
        generation_cost.cost(model, modes(generation_cost.scene_of(size.shot, n), size.steps)).total
        for n in size.counts
        for mode, modes in generation_cost.MODES.items()
        if mode != "recomputed" or n <= size.recomputed
    )
    total += plan * len(plans) + (1 + size.rounds) * flops / rate
    assert total < 9 * 60
