"""How it is measured: interleaved rounds, ratios within a round, a correctness gate first, and a record of the rest."""

import hashlib
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any, NamedTuple

import cpuinfo
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import BEHIND, COMPILED, Case, Goal, row
from lct_core import KernelRequest, PluginError, attend, registry

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "runs" / "benchmarks"

#: What a result depends on: where any of it changes, the case is measured again.
SOURCES = (
    "lct_core/*.py",
    "lct_core/cache/*.py",
    "lct_core/cost/*.py",
    "lct_core/generation/*.py",
    "plugins/lct_plugins/*.py",
    "benchmarks/cases.py",
    "benchmarks/harness.py",
)

#: Distributions whose versions are recorded where they are installed.
PACKAGES = (
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
    "magi-attention",
    "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl",
)

#: The roofline: sides of the square matrices that are multiplied, and bytes that are copied, many times any cache.
MULTIPLIED = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 2**28, "cuda": 2**31}

FEWEST_ROUNDS = 2  # both orders
PATIENCE = 4  # budgets that a first call may take
WARM = 0.5  # seconds of a GPU's work before the first round

Run = Callable[[], object]


class Contender(NamedTuple):
    """Something to time.

    Args:
        prepare: Does what is not timed, and returns what is.
        flops: Floating point operations of one run; 0 where its rate says nothing.
    """

    prepare: Callable[[], Run]
    flops: float = 0


class Estimate(NamedTuple):
    """The median of some rounds, and the quintiles between which the middle three fifths of them lie."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One measured number and what it should be; without a bound it is information."""

    what: str
    value: Estimate
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the goal."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.value.median >= self.least) and (
            self.most is None or self.value.median <= self.most
        )

    def as_dict(self) -> dict[str, Any]:
        """The comparison, as it is recorded."""
        return {"what": self.what, **self.value._asdict(), "least": self.least, "most": self.most, "met": self.met}


class Wrong(Exception):
    """A kernel's error is above its bound."""


class Failed(Exception):
    """A contender, by its name, has raised while it was timed."""


class DeviceLost(Exception):
    """The GPU is unusable to this process; ``record`` is what is known of the case, with the culprit if it is known."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(f"{record['name']}: the GPU is lost to this process; kernels that failed: {record['lost']}")
        self.record = record


class Passes(NamedTuple):
    """An attention: ``forward(q, k, v)`` gives the output, first, and what else its backward pass takes.

    ``backward(saved, (q, k, v), dout)``, with what that gave, is the three gradients.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., Sequence[Tensor]]


def interleave(
    contenders: Mapping[str, Contender], *, warmup: int, rounds: int, device: str = "cpu", budget: float | None = None
) -> dict[str, list[float]]:
    """The seconds of every contender in every round; all run in each, every other round in reverse order.

    What drifts, the clock or a neighbour's load, so meets all of them alike, and cancels in ratios within a round.

    Args:
        contenders: What to time, by name.
        warmup: Rounds that do not count.
        rounds: Rounds that count.
        device: ``"cuda"`` takes the time between CUDA events, behind a cleared L2 cache.
        budget: Seconds; there are as many rounds as fit, by what the first took, of `rounds`, but two at least.

    Raises:
        Failed: for a contender that raises.
    """
    clock = _clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    i = 0
    while i < warmup + rounds:
        begin = time.perf_counter()
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            elapsed = _timed(name, contenders[name], clock)
            if i >= warmup:
                seconds[name].append(elapsed)
        if budget is not None and i == warmup:
            rounds = max(FEWEST_ROUNDS, min(rounds, int(budget / (time.perf_counter() - begin))))
        i += 1
    return seconds


def estimate(values: Sequence[float]) -> Estimate:
    """The median and its spread."""
    places = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return Estimate(*torch.tensor(values, dtype=torch.float64).quantile(places).tolist())


def ratio(above: Sequence[float], below: Sequence[float], factor: float = 1.0) -> Estimate:
    """The median, over rounds, of one contender's time to another's."""
    return estimate([factor * a / b for a, b in zip(above, below, strict=True)])


def measured(seconds: Mapping[str, list[float]], contenders: Mapping[str, Contender]) -> dict[str, dict[str, float]]:
    """Every contender's time and rate, as they are recorded."""
    times = {name: estimate(values) for name, values in seconds.items()}
    return {
        name: {
            "seconds": t.median,
            "low": t.low,
            "high": t.high,
            "flops": contenders[name].flops,
            "gflops_per_second": contenders[name].flops / t.median / 1e9,
        }
        for name, t in times.items()
    }


def measure(case: Case, *, kernels: Sequence[str] = (), lost: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A case's record: every kernel that takes part, behind its gate, beside the peers of the case's goals.

    A kernel that is wrong, or raises, is left out of the timing, and the record says why. Wrong is also one whose first
    result at full size is farther from the first contender's than the bounds of both gates together.

    Args:
        case: What to measure.
        kernels: The kernels that take part, where it is not for the case to say.
        lost: Kernels that are left out from the start, with the reason.

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
            _synchronize(case.device)
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
    tensors, first, standards = cache(_given), {}, {}

    def begin(name: str) -> Contender:
        asked = _asked(case, name)
        contender = _contender(asked, name, tensors)
        first[name], results = _first(case, contender)
        if case.budget is not None and name not in COMPILED and first[name] > PATIENCE * case.budget:
            raise TimeoutError(f"its first call took {first[name]:.3g} s, more than {PATIENCE * case.budget:.3g}")
        if name in gates:
            standard, expected = standards.setdefault(asked, (name, results))
            if standard != name:
                gates[name]["difference"] = _difference(asked, (name, results), (standard, expected))
        return contender

    order = sorted([*names, *peers], key=lambda name: name != "sdpa")  # by which, if it takes part, others are checked
    contenders = {
        name: contender for name in order if name not in lost and (contender := attempt(name, partial(begin, name)))
    }
    standards.clear()
    for name, contender in (("gemm", _gemm(case)), ("copy", _copy(case))):
        contenders[name] = contender
        first[name], _ = _first(case, contender)
    try:
        with Running(case.device) as running:
            if case.device == "cuda":
                _warm(contenders)
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


def standing(case: Case, folder: Path) -> dict[str, Any] | None:
    """What is on record of a case, if it was measured on this machine with these versions and this source."""
    path = folder / f"{case.name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    same = {"machine": machine(case.device), "versions": versions(case.device), "shape": case.shape}
    alike = all(found[key] == value for key, value in same.items())
    return found if alike and found["source"].get("digest") == source()["digest"] else None


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


def check(case: Case, name: str) -> dict[str, float]:
    """The gate: a kernel's error against float64, at most twice that of SDPA with a dense mask in the same dtype.

    On a small ragged scene of the same kind. Outputs, and where the case has a direction backward all gradients, each
    relative to its largest entry.

    Returns:
        The error that is closest to its bound, and that bound.

    Raises:
        Wrong: for a kernel that is; nothing of it is then timed.
    """
    _, error, bound = max(_check(_asked(case, name).gate, name), key=lambda found: found[1] / found[2])
    return {"error": error, "bound": bound}


@cache
def _check(case: Case, name: str) -> list[tuple[str, float, float]]:
    """What comes out, with its error and bound: the output and, where the case has a direction backward, gradients."""
    tensors, plan = attention_tensors(case), case.plan
    definition = _by_autograd(lambda q, k, v: attend(q, k, v, plan, kernel="reference"))
    exact = _outputs(tensors, definition, double=True)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        plain = _outputs(tensors, _passes(case, "masked"))  # cuDNN's gradients with a mask can be NaN
    torch.compiler.reset()
    ours = _outputs(tensors, _passes(case, name))
    found = []
    for what, want, reference, got in zip(("out", "dq", "dk", "dv"), exact, plain, ours, strict=False):
        error, bound = _error(got, want), 2 * _error(reference, want)
        if not error <= bound:
            raise Wrong(f"the error of {what} is {error:.2e}, more than {bound:.2e}")
        found.append((what, error, bound))
    return found


def _outputs(tensors: Sequence[Tensor], passes: Passes, *, double: bool = False) -> list[Tensor]:
    """The output, and the gradients where the tensors want them."""
    grad = tensors[0].requires_grad
    given = [x.detach().to(torch.float64 if double else x.dtype).requires_grad_(grad) for x in tensors]
    saved = passes.forward(*given)
    return [saved[0].detach(), *(passes.backward(saved, given, given[0].detach()) if grad else ())]


def _difference(case: Case, got: tuple[str, Sequence[Tensor]], want: tuple[str, Sequence[Tensor]]) -> float:
    """The largest difference of two contenders' results, each relative to its largest entry.

    Raises:
        Wrong: where one is more than both gates allow.
    """
    bounds = (_check(case.gate, name)[-len(results) :] for name, results in (got, want))
    worst = 0.0
    for (what, _, bound), (*_, other), ours, theirs in zip(*bounds, got[1], want[1], strict=True):
        difference = float((ours - theirs).abs_().max() / theirs.abs().max())
        if not difference <= bound + other:
            raise Wrong(
                f"at full size {what} differs from that of {want[0]} by {difference:.2e}, more than {bound + other:.2e}"
            )
        worst = max(worst, difference)
    return worst


def _error(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want).abs().max() / want.abs().max()
    return float(error.nan_to_num(nan=float("inf")))


def attention_tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from the normal distribution: constants would flatter a GPU's clock."""
    generator = torch.Generator(case.device).manual_seed(0)
    grad, plan = case.direction != "forward", case.plan
    return tuple(  # type: ignore[return-value]
        torch.randn(
            1, tokens, heads, case.head_dim, dtype=case.dtype, device=case.device, generator=generator
        ).requires_grad_(grad)
        for tokens, heads in ((plan.queries, case.heads), (plan.keys, case.kv_heads), (plan.keys, case.kv_heads))
    )


def _given(case: Case) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Queries, keys and values, and the gradient of the output where there is a direction backward."""
    if case.direction == "forward":
        return attention_tensors(case), None
    generator = torch.Generator(case.device).manual_seed(1)
    shape = 1, case.plan.queries, case.heads, case.head_dim
    return attention_tensors(case), torch.randn(shape, dtype=case.dtype, device=case.device, generator=generator)


def _asked(case: Case, name: str) -> Case:
    """What a contender is asked for: a raw one, where it has no call for the case, for a square of as many pairs."""
    whole = ("dense", "packed") if name == "raw-flash3" else ("dense",)
    if not name.startswith("raw-") or case.plan.form in whole:
        return case
    tokens = 128 * max(1, round(math.sqrt(case.plan.pairs) / 128))
    return replace(case, layout=row([tokens]), pattern="bidirectional", last_shot=False)


def _contender(case: Case, name: str, given: Callable[[Case], tuple[Sequence[Tensor], Tensor | None]]) -> Contender:
    """Backward, the forward pass is kept, but not of what is compiled, which gives away what it saved."""
    flops = case.cost(case.plan.queries * case.plan.keys) if name == "dense" else case.flops
    keep = case.direction == "backward" and name not in COMPILED
    passes, (tensors, dout), kept = _passes(case, name, keep=keep), given(case), []

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


def _first(case: Case, contender: Contender) -> tuple[float, Any]:
    """The seconds of the first call, which compiles, plans and allocates, and what it gives."""
    begin = time.perf_counter()
    results = contender.prepare()()
    _synchronize(case.device)
    return time.perf_counter() - begin, results


def _passes(case: Case, name: str, *, keep: bool = False) -> Passes:
    """A kernel of the registry, or a peer; with `keep`, its backward pass can be run again."""
    plan = case.plan
    if name == "raw-flash3":
        return _raw_flash3(case)
    peers = {"dense": _sdpa, "raw-cudnn": _raw_cudnn}
    if name == "masked":
        peers["masked"] = partial(_sdpa, mask=plan.dense(device=case.device))
    return _by_autograd(peers.get(name, lambda q, k, v: attend(q, k, v, plan, kernel=name)), keep=keep)


def _by_autograd(run: Callable[[Tensor, Tensor, Tensor], Tensor], *, keep: bool = False) -> Passes:
    return Passes(
        lambda *tensors: (run(*tensors),),
        lambda saved, tensors, dout: torch.autograd.grad(saved[0], tensors, dout, retain_graph=keep),
    )


def _raw_flash3(case: Case) -> Passes:
    """FA3's own functions, without autograd and without a plan; scenes that lie side by side are its sequences."""
    registry().kernels["flash3"].load()  # and with it the library
    flash, scale, sequences = import_module("lct_plugins.flash"), case.head_dim**-0.5, None
    if case.plan.form == "packed":
        sizes = [segment.queries.size for segment in case.plan.segments]
        ends = torch.tensor([*accumulate(sizes, initial=0)], dtype=torch.int32, device=case.device)
        sequences = flash.Sequences(ends, ends, None, max(sizes), max(sizes))

    def shaped(*tensors: Tensor) -> list[Tensor]:
        return [x.detach() if sequences is None else x.detach()[0] for x in tensors]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = flash.forward3(*shaped(q, k, v), sequences, scale)
        return out.view(q.shape), lse

    def backward(saved: Sequence[Tensor], tensors: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
        out, lse = saved
        shares = flash.backward3(*shaped(dout, *tensors, out), lse, sequences, scale)
        return [share.view(x.shape) for share, x in zip(shares, tensors, strict=True)]

    return Passes(forward, backward)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2]
    ).transpose(1, 2)


def _raw_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _gemm(case: Case) -> Contender:
    size = MULTIPLIED[case.device]
    a, b = (torch.randn(size, size, dtype=case.dtype, device=case.device) for _ in range(2))
    return Contender(lambda: lambda: a @ b, 2 * size**3)


def _copy(case: Case) -> Contender:
    original = torch.randn(COPIED[case.device] // 4, device=case.device)
    copy = torch.empty_like(original)
    return Contender(lambda: lambda: copy.copy_(original))


def _warm(contenders: Mapping[str, Contender]) -> None:
    spent = 0.0
    for name, contender in cycle(contenders.items()):
        if spent >= WARM:
            return
        spent += _timed(name, contender, _cuda_seconds)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def alive(device: str) -> bool:
    """Whether the device still answers; an illegal memory access ends all use of a GPU by its process."""
    try:
        _synchronize(device)
    except RuntimeError:
        return False
    return True


def in_words(error: BaseException | None) -> str:
    """A class and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def _timed(name: str, contender: Contender, clock: Callable[[Run], float]) -> float:
    try:
        return clock(contender.prepare())
    except Exception as error:
        raise Failed(name) from error


def _clock(device: str) -> Callable[[Run], float]:
    return _cuda_seconds if device == "cuda" else _cpu_seconds


def _cpu_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Run) -> float:
    """Between CUDA events, behind a cleared L2 cache."""
    torch.empty(256 * 2**20, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


#: What is asked of the driver while something runs, and how it is recorded.
RUNNING = {"clocks.sm": "sm_clock_megahertz", "power.draw": "power_watts"}


class Running:
    """The SM clock and power of a GPU while something runs, five times a second."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._process: subprocess.Popen[str] | None = None
        self._told = ""

    def __enter__(self) -> "Running":
        if self._device == "cuda":
            with suppress(OSError):  # what no driver tells is not recorded
                self._process = subprocess.Popen(
                    [*_nvidia_smi(*RUNNING), "--loop-ms=200"], stdout=subprocess.PIPE, text=True
                )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process:
            self._process.terminate()
            self._told, _ = self._process.communicate()

    def estimates(self) -> dict[str, dict[str, float]]:
        """Median and spread of each."""
        samples = []
        for line in self._told.split("\n")[:-1]:  # the last may have been cut off
            with suppress(ValueError):
                samples.append([float(value) for value in line.split(", ")])
        columns = zip(*samples, strict=True)
        return {name: estimate(values)._asdict() for name, values in zip(RUNNING.values(), columns, strict=False)}


def record(
    name: str,
    *,
    device: str,
    shape: Mapping[str, Any],
    warmup: int,
    rounds: int,
    times: Mapping[str, Mapping[str, float]],
    comparisons: Sequence[Comparison],
    **more: Any,
) -> dict[str, Any]:
    """One measurement with everything that it depends on."""
    return {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(device),
        "source": source(),
        "device": device,
        "shape": dict(shape),
        "warmup": warmup,
        "rounds": rounds,
        "times": {contender: dict(values) for contender, values in times.items()},
        "comparisons": [comparison.as_dict() for comparison in comparisons],
        **more,
    }


def write(measurement: Mapping[str, Any], folder: Path) -> None:
    """Write a record to ``folder/<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{measurement['name']}.json").write_text(json.dumps(measurement, indent=2) + "\n")


def machine(device: str) -> dict[str, Any]:
    """What it is measured on."""
    return {**_cpu(), **(_gpu() if device == "cuda" else {})}


@cache
def versions(device: str) -> dict[str, str]:
    """Of all software that a rate depends on; a package that runs from its source tree has no version."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "lct-core": _version("lct-core")}
    if device == "cuda":
        found |= {"cudnn": str(torch.backends.cudnn.version())}
    others = {name: _version(name) for name in PACKAGES}
    return {name: number or "source tree" for name, number in found.items()} | {n: v for n, v in others.items() if v}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


@cache
def _cpu() -> dict[str, Any]:
    return {
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.machine()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": sys.platform,
    }


@cache
def _gpu() -> dict[str, str]:
    try:
        driver = _output(*_nvidia_smi("driver_version"))
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": str(torch.version.cuda)}


def _nvidia_smi(*fields: str) -> list[str]:
    """The command that asks for them."""
    return [
        "nvidia-smi",
        f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
    ]


@cache
def source() -> dict[str, Any]:
    """The commit, whether the tree differs from it, results aside, and a digest of what a result depends on.

    Where there is no repository, the digest says alone which source it was.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    found = {"commit": None, "dirty": None, "digest": digest.hexdigest()}
    try:
        changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
        return found | {"commit": _output("git", "rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return found


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
