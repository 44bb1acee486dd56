"""One attention case, measured: the gate first, then interleaved rounds, then a record of all that it depends on."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import BEHIND, COMPILED, Case, Goal
from benchmarks.gate import Wrong, case_for, check, check_difference, inputs, passes_of
from benchmarks.provenance import ROOT, machine, record
from benchmarks.timing import (
    Comparison,
    Contender,
    Failed,
    Run,
    Running,
    estimate,
    first_call,
    interleave,
    measured,
    ratio,
    synchronize,
    warm_up,
)
from lct_core import KernelRequest, PluginError, registry

RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "runs" / "benchmarks"

#: The roofline: sides of the square matrices that are multiplied, and bytes that are copied, many times any cache.
MULTIPLIED = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 2**28, "cuda": 2**31}

PATIENCE = 4  # budgets that a first call may take


class DeviceLost(Exception):
    """The GPU is unusable to this process; ``record`` is what is known of the case, with the culprit if it is known."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(f"{record['name']}: the GPU is lost to this process; kernels that failed: {record['lost']}")
        self.record = record


def measure(case: Case, *, kernels: Sequence[str] = (), lost: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Benchmarks kernels that pass correctness, beside baselines.

    A kernel that is wrong, or raises, is left out of the timing, and the record says why. Wrong is also one whose first
    result at full size is farther from the first contender's than the bounds of both gates together.

    Args:
        case: What to measure; its goals name the baselines.
        kernels: The kernels that take part, where it is not for the case to say; there are then no baselines but a
            matrix product and a copy.
        lost: Kernels that are left out from the start, with the reason.

    Returns:
        The case's record.

    Raises:
        DeviceLost: where nothing runs on the GPU in this process, from the start or after a kernel's error.
    """
    machine(case.device)  # asked while the GPU answers: what is asked once is known
    lost = dict(lost or {})
    auto, names, refusals = serving(case, kernels)
    peers = [] if kernels else _peers(case)
    if "raw-flash3" in peers and ("flash3" in refusals or "flash3" not in registry().kernels):
        peers.remove("raw-flash3")
    publish = partial(
        record, case.name, device=case.device, shape=case.shape, warmup=case.warmup, auto=auto, refusals=refusals
    )

    def check_alive(cause: BaseException | None = None) -> None:
        if not alive(case.device):
            raise DeviceLost(publish(rounds=0, times={}, comparisons=[], lost=lost, gates={})) from cause

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        try:
            value = call()
            synchronize(case.device)
            return value
        except Wrong as error:
            lost[name] = f"wrong: {error}"
        except Exception as error:
            lost[name] = in_words(error)
            check_alive(error)
        return None

    check_alive()  # what ended it before this case is none of its kernels
    gated = [name for name in [*names, *peers] if name not in (*lost, "dense", "masked")]
    gates = {name: dict(gate) for name in gated if (gate := attempt(name, partial(check, case, name)))}
    torch.compiler.reset()  # so that what is compiled is compiled for this shape, not for any
    tensors, first, standards = cache(inputs), {}, {}

    def begin(name: str) -> Contender:
        asked = case_for(case, name)
        contender = _contender(asked, name, tensors)
        first[name], results = first_call(contender, case.device)
        if case.budget is not None and name not in COMPILED and first[name] > PATIENCE * case.budget:
            raise TimeoutError(f"its first call took {first[name]:.3g} s, more than {PATIENCE * case.budget:.3g}")
        if name in gates:
            standard, expected = standards.setdefault(asked, (name, results))
            if standard != name:
                gates[name]["difference"] = check_difference(asked, (name, results), (standard, expected))
        return contender

    order = sorted([*names, *peers], key=lambda name: name != "sdpa")  # by which, if it takes part, others are checked
    contenders = {
        name: contender for name in order if name not in lost and (contender := attempt(name, partial(begin, name)))
    }
    standards.clear()
    for name, contender in (("gemm", _gemm(case)), ("copy", _copy(case))):
        contenders[name] = contender
        first[name], _ = first_call(contender, case.device)
    try:
        with Running(case.device) as running:
            if case.device == "cuda":
                warm_up(contenders)
            seconds = interleave(
                contenders, warmup=case.warmup, rounds=case.rounds, device=case.device, budget=case.budget
            )
    except Failed as failure:
        lost[str(failure)] = in_words(failure.__cause__)
        check_alive(failure)
        raise
    times = measured(seconds, contenders)
    return publish(
        rounds=len(seconds["gemm"]),
        times={name: t | {"first": first[name]} for name, t in times.items()},
        comparisons=_comparisons(case, auto, names, seconds, contenders),
        lost=lost,
        gates={name: gate for name, gate in gates.items() if name not in lost},
        roofline={
            "gemm_gflops_per_second": times["gemm"]["gflops_per_second"],
            "copy_gigabytes_per_second": 2 * COPIED[case.device] / times["copy"]["seconds"] / 1e9,
        },
        running=running.estimates(),
    )


def serving(case: Case, kernels: Sequence[str] = ()) -> tuple[str, list[str], dict[str, list[str]]]:
    """Which kernels run a case.

    Returns:
        The one that ``attend`` picks; all that take part, this one first; and why others refuse.
    """
    plan, grad = case.plan, case.direction != "forward"
    request = KernelRequest(plan, torch.device(case.device), case.dtype, case.heads, case.kv_heads, case.head_dim, grad)
    ranks = registry().ranks(request)
    reasons = {name: _reasons(name, request) for name in ranks}
    able = [name for name, refusals in reasons.items() if not refusals]
    auto = next(name for name in able if ranks[name] is not None)
    holding = [goal for goal in case.goals if goal.without not in able]
    named = {auto, *(name for goal in holding for name in (goal.peer, goal.subject))}
    if kernels:
        chosen = {registry().check_kernel(name) for name in kernels}
        chosen = {auto if name == "auto" else name for name in chosen}
    else:
        chosen = named | (set(case.kernels) or {name for name in able if name not in (*COMPILED, "reference")})
    names = sorted((name for name in able if name in chosen), key=lambda name: name != auto)
    return auto, names, {name: refusals for name, refusals in reasons.items() if refusals}


def _reasons(name: str, request: KernelRequest) -> list[str]:
    try:
        return registry().refusals(name, request)
    except PluginError as error:
        return [str(error)]


def _peers(case: Case) -> list[str]:
    """What a case's goals name that is no kernel."""
    known = {*registry().kernels, "gemm"}
    return [peer for peer in dict.fromkeys(goal.peer for goal in case.goals) if peer not in known]


def _comparisons(
    case: Case,
    auto: str,
    names: Sequence[str],
    seconds: Mapping[str, list[float]],
    contenders: Mapping[str, Contender],
) -> list[Comparison]:
    """The case's goals, where both sides were measured, and how far its pick is behind the best kernel."""
    found = []
    for goal in case.goals:
        subject = auto if goal.subject == "auto" else goal.subject
        if goal.without not in contenders and {subject, goal.peer} <= set(contenders):
            found.append(against(goal, subject, seconds, contenders))
    kernels = [name for name in names if name in contenders]
    if len(kernels) > 1 and auto in kernels:
        best = min(kernels, key=lambda name: estimate(seconds[name]).median)
        found.append(Comparison("auto / best kernel", ratio(seconds[auto], seconds[best]), most=BEHIND))
    return found


def against(
    goal: Goal, subject: str, seconds: Mapping[str, list[float]], contenders: Mapping[str, Contender]
) -> Comparison:
    """A goal, and what was measured: the ratio of times where it has a most, else of rates."""
    who = "" if goal.subject == "auto" else f"{goal.subject}: "
    if goal.most is not None:
        return Comparison(f"{who}time / {goal.peer}", ratio(seconds[subject], seconds[goal.peer]), most=goal.most)
    work = contenders[subject].flops / contenders[goal.peer].flops
    rates = ratio(seconds[goal.peer], seconds[subject], work)
    return Comparison(f"{who}rate / {goal.peer}", rates, least=goal.least)


def _contender(case: Case, name: str, given: Callable[[Case], tuple[Sequence[Tensor], Tensor | None]]) -> Contender:
    """Backward, the forward pass is kept, but not of what is compiled, which gives away what it saved."""
    flops = case.cost(case.plan.queries * case.plan.keys) if name == "dense" else case.flops
    keep = case.direction == "backward" and name not in COMPILED
    passes, (tensors, dout), kept = passes_of(case, name, keep=keep), given(case), []

    def forward() -> tuple[Tensor, ...]:
        saved = kept[0] if kept else passes.forward(*tensors)
        if keep and not kept:
            kept.append(saved)
        return saved

    def backward() -> Run:
        saved = forward()
        return lambda: passes.backward(saved, tensors, dout)

    runs: dict[str, Callable[[], Run]] = {
        "forward": lambda: lambda: forward()[:1],
        "backward": backward,
        "forward+backward": lambda: lambda: backward()(),
    }
    return Contender(runs[case.direction], flops)


def _gemm(case: Case) -> Contender:
    size = MULTIPLIED[case.device]
    a, b = (torch.randn(size, size, dtype=case.dtype, device=case.device) for _ in range(2))
    return Contender(lambda: lambda: a @ b, 2 * size**3)


def _copy(case: Case) -> Contender:
    original = torch.randn(COPIED[case.device] // 4, device=case.device)
    copy = torch.empty_like(original)
    return Contender(lambda: lambda: copy.copy_(original))


def alive(device: str) -> bool:
    """Whether the device still answers; an illegal memory access ends all use of a GPU by its process."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def in_words(error: BaseException | None) -> str:
    """A class and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
