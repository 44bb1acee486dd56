"""How it is measured: interleaved rounds, ratios within a round, a correctness gate first, and a record of the rest."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import cpuinfo
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Case, Goal
from lct_core import KernelRequest, attend, registry

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "runs" / "benchmarks"

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


def interleave(
    contenders: Mapping[str, Contender], *, warmup: int, rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """The seconds of every contender in every round; all run in each, every other round in reverse order.

    What drifts, the clock or a neighbour's load, so meets all of them alike, and cancels in ratios within a round.
    """
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            elapsed = clock(contenders[name].prepare())
            if i >= warmup:
                seconds[name].append(elapsed)
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


def attention_contenders(case: Case) -> tuple[str, dict[str, Contender]]:
    """Every registered kernel that serves the case, and the peers of its goals; and which of them ``attend`` picks."""
    tensors = attention_tensors(case)
    plan, kernels = case.plan, serving(case)
    contenders = {name: _attention(case, tensors, name) for name in kernels}
    for goal in case.goals:
        if goal.peer == "dense":
            contenders["dense"] = Contender(_prepare(case, tensors, _sdpa), case.cost(plan.queries * plan.keys))
        elif goal.peer == "masked":
            mask = plan.dense(device=case.device)
            masked = _prepare(case, tensors, lambda q, k, v, mask=mask: _sdpa(q, k, v, mask))
            contenders["masked"] = Contender(masked, case.flops)
        elif goal.peer == "gemm":
            contenders["gemm"] = _gemm(case)
    return kernels[0], contenders


def serving(case: Case) -> list[str]:
    """The registered kernels that serve a case, the one that ``attend`` picks by itself first."""
    request = KernelRequest(
        case.plan,
        torch.device(case.device),
        case.dtype,
        case.heads,
        case.kv_heads,
        case.head_dim,
        case.direction != "forward",
    )
    names = [name for name, spec in registry().kernels.items() if name != "reference" and not spec.refusals(request)]
    auto = registry().kernel("auto", request)
    return sorted(names, key=lambda name: registry().kernel(name, request) is not auto)


def against(
    goal: Goal, subject: str, seconds: Mapping[str, list[float]], contenders: Mapping[str, Contender]
) -> Comparison:
    """A goal, and what was measured: the ratio of rates where it has a least, of times where it has a most."""
    if goal.most is not None:
        return Comparison(f"time / {goal.peer}", ratio(seconds[subject], seconds[goal.peer]), most=goal.most)
    work = contenders[subject].flops / contenders[goal.peer].flops
    return Comparison(f"rate / {goal.peer}", ratio(seconds[goal.peer], seconds[subject], work), least=goal.least)


def check(case: Case, kernel: str) -> dict[str, float]:
    """The gate: a kernel's error against float64, at most twice that of SDPA with a dense mask in the same dtype.

    Outputs, and where the case has a direction backward all gradients, each relative to its largest entry.

    Returns:
        The worst error, and the bound it was held to.

    Raises:
        AssertionError: for a kernel that is wrong; nothing of it is then timed.
    """
    return _check(case.gate, kernel)


@cache
def _check(case: Case, kernel: str) -> dict[str, float]:
    tensors, plan = attention_tensors(case), case.plan
    mask = plan.dense(device=case.device)
    exact = _outputs(tensors, lambda q, k, v: attend(q, k, v, plan, kernel="reference"), double=True)
    plain = _outputs(tensors, lambda q, k, v: _sdpa(q, k, v, mask))
    torch.compiler.reset()
    ours = _outputs(tensors, lambda q, k, v: attend(q, k, v, plan, kernel=kernel))
    worst = {"error": 0.0, "bound": 0.0}
    for name, want, reference, got in zip(("out", "dq", "dk", "dv"), exact, plain, ours, strict=False):
        error, bound = _error(got, want), 2 * _error(reference, want)
        assert error <= bound, f"{kernel}: the error of {name} is {error:.2e}, more than {bound:.2e}: not timed"
        if error >= worst["error"]:
            worst = {"error": error, "bound": bound}
    return worst


def _outputs(tensors: Sequence[Tensor], run: Callable[..., Tensor], *, double: bool = False) -> list[Tensor]:
    """The output, and the gradients where the tensors want them."""
    grad = tensors[0].requires_grad
    q, k, v = (x.detach().to(torch.float64 if double else x.dtype).requires_grad_(grad) for x in tensors)
    out = run(q, k, v)
    if not grad:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), q.detach())]


def _error(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want).abs().max() / want.abs().max()
    return float(error.nan_to_num(nan=float("inf")))


def _attention(case: Case, tensors: Sequence[Tensor], kernel: str) -> Contender:
    plan = case.plan
    return Contender(_prepare(case, tensors, lambda q, k, v: attend(q, k, v, plan, kernel=kernel)), case.flops)


def _prepare(case: Case, tensors: Sequence[Tensor], run: Callable[..., Tensor]) -> Callable[[], Run]:
    """What is timed of an attention in the case's direction."""
    upstream = torch.randn_like(tensors[0])

    def both() -> object:
        return torch.autograd.grad(run(*tensors), tensors, upstream)

    def backward() -> Run:
        out = run(*tensors)
        return lambda: torch.autograd.grad(out, tensors, upstream)

    if case.direction == "forward":
        return lambda: lambda: run(*tensors)
    return backward if case.direction == "backward" else lambda: both


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2]
    ).transpose(1, 2)


def _gemm(case: Case) -> Contender:
    size = 8192
    a, b = (torch.randn(size, size, dtype=case.dtype, device=case.device) for _ in range(2))
    return Contender(lambda: lambda: a @ b, 2 * size**3)


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
        "machine": {**_machine(), **(_gpu() if device == "cuda" else {})},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lct-core": version("lct-core")},
        "source": _source(),
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


@cache
def _machine() -> dict[str, Any]:
    return {
        "cpu": cpuinfo.get_cpu_info()["brand_raw"],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": sys.platform,
    }


def _gpu() -> dict[str, str]:
    """The GPU, with the clock and power at the end of the measurement."""
    fields = ("name", "driver_version", "clocks.sm", "power.draw")
    query = _output(
        "nvidia-smi",
        f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader",
    )
    values = dict(zip(("gpu", "driver", "sm_clock", "power"), query.split(", "), strict=True))
    return values | {"cuda": str(torch.version.cuda)}


@cache
def _source() -> dict[str, Any]:
    """The commit, and whether the tree differs from it, results aside."""
    changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": _output("git", "rev-parse", "HEAD"), "dirty": bool(changed)}


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
