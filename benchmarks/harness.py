"""How it is measured: interleaved rounds, ratios within a round, a correctness gate first, and a record of the rest."""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import cpuinfo
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import BEHIND, COMPILED, Case, Goal, row
from lct_core import KernelRequest, PluginError, attend, registry

#: cuDNN makes a plan for every length of a sequence, each in a good part of a second; so told, it makes one for all.
#: For this process alone; what is set outside stands, and what is set is recorded.
SETTINGS = {"TORCH_CUDNN_SDPA_AVOID_RECOMPILE": "1"}
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "runs" / "benchmarks"

#: What a result depends on: where any of it changes, the case is measured again.
SOURCES = ("lct_core/*.py", "plugins/lct_plugins/*.py", "benchmarks/cases.py", "benchmarks/harness.py")

#: Distributions whose versions are recorded where they are installed.
PACKAGES = (
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
    "magi-attention",
    "nvidia-cudnn-frontend",
)

#: The roofline: sides of the square matrices that are multiplied, and bytes that are copied, many times any cache.
MULTIPLIED = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 2**28, "cuda": 2**31}

FEWEST_ROUNDS = 3
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


class DeviceLost(Exception):
    """A kernel has left the GPU unusable to this process; ``record`` is what is known of the case, with the culprit."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(
            f"{record['name']}: the GPU is lost to this process; run again, to go on without: {record['lost']}"
        )
        self.record = record


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
        budget: Seconds; there are as many rounds as fit, by what the first took, of `rounds`, but three at least.
    """
    clock = _clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    i = 0
    while i < warmup + rounds:
        begin = time.perf_counter()
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            elapsed = clock(contenders[name].prepare())
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

    A kernel that is wrong, or raises, is left out of the timing, and the record says why.

    Args:
        case: What to measure.
        kernels: The kernels that take part, where it is not for the case to say.
        lost: Kernels that are left out from the start, with the reason.

    Raises:
        DeviceLost: for a kernel after whose error nothing runs on the GPU in this process.
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

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        try:
            value = call()
            _synchronize(case.device)
            return value
        except Wrong as error:
            lost[name] = f"wrong: {error}"
        except Exception as error:
            lost[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
            if not _alive(case.device):
                raise DeviceLost(publish(rounds=0, times={}, comparisons=[], lost=lost, gates={})) from error
        return None

    gated = [name for name in [*names, *peers] if name not in (*lost, "dense", "masked")]
    gates = {name: attempt(name, partial(check, case, name)) for name in gated}
    torch.compiler.reset()  # so that what is compiled is compiled for this shape, not for any
    tensors = cache(attention_tensors)
    contenders = {}
    for name in [*names, *peers]:
        if name not in lost and (made := attempt(name, partial(_contender, case, name, tensors))):
            attempt(name, partial(_first, case, name, made))
            contenders |= {} if name in lost else {name: made}
    contenders |= {"gemm": _gemm(case), "copy": _copy(case)}
    if case.device == "cuda":
        _warm(contenders)
    with Running(case.device) as running:
        seconds = interleave(contenders, warmup=case.warmup, rounds=case.rounds, device=case.device, budget=case.budget)
    times = measured(seconds, contenders)
    return publish(
        rounds=len(seconds["gemm"]),
        times=times,
        comparisons=_comparisons(case, auto, names, seconds, contenders),
        lost=lost,
        gates={name: gate for name, gate in gates.items() if gate},
        roofline={
            "gemm_gflops_per_second": times["gemm"]["gflops_per_second"],
            "copy_gigabytes_per_second": 2 * COPIED[case.device] / times["copy"]["seconds"] / 1e9,
        },
        running=running.estimates(),
        settings={name: os.environ[name] for name in SETTINGS},
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
    named = {auto, *(name for goal in case.goals for name in (goal.peer, goal.subject))}
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
        The worst error, and the bound it was held to.

    Raises:
        Wrong: for a kernel that is; nothing of it is then timed.
    """
    return _check(_asked(case, name).gate, name)


@cache
def _check(case: Case, name: str) -> dict[str, float]:
    tensors, plan = attention_tensors(case), case.plan
    exact = _outputs(tensors, lambda q, k, v: attend(q, k, v, plan, kernel="reference"), double=True)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        plain = _outputs(tensors, _runner(case, "masked"))  # cuDNN's gradients with a mask can be NaN
    torch.compiler.reset()
    ours = _outputs(tensors, _runner(case, name))
    worst = {"error": 0.0, "bound": 0.0}
    for what, want, reference, got in zip(("out", "dq", "dk", "dv"), exact, plain, ours, strict=False):
        error, bound = _error(got, want), 2 * _error(reference, want)
        if not error <= bound:
            raise Wrong(f"the error of {what} is {error:.2e}, more than {bound:.2e}")
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


def _asked(case: Case, name: str) -> Case:
    """What a contender is asked for: a raw one, where the case is not dense, for a square of as many pairs."""
    if not name.startswith("raw-") or case.plan.form == "dense":
        return case
    tokens = 128 * max(1, round(math.sqrt(case.plan.pairs) / 128))
    return replace(case, layout=row([tokens]), pattern="bidirectional", last_shot=False)


def _contender(case: Case, name: str, tensors: Callable[[Case], Sequence[Tensor]]) -> Contender:
    case = _asked(case, name)
    flops = case.cost(case.plan.queries * case.plan.keys) if name == "dense" else case.flops
    keep = name not in COMPILED  # they give away what is saved for their backward pass
    return Contender(_prepare(case, tensors(case), _runner(case, name), keep=keep), flops)


def _first(case: Case, name: str, contender: Contender) -> None:
    """The first call, which compiles, plans and allocates.

    Raises:
        TimeoutError: for one that would take the time of all others.
    """
    begin = time.perf_counter()
    contender.prepare()()
    _synchronize(case.device)
    taken = time.perf_counter() - begin
    if case.budget is not None and name not in COMPILED and taken > PATIENCE * case.budget:
        raise TimeoutError(f"its first call took {taken:.3g} s, more than {PATIENCE * case.budget:.3g}")


def _runner(case: Case, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A kernel of the registry, or a peer, as a function of queries, keys and values.

    Raw FA3 is its own function; a bundled FA3 has none, and stands under the kernel ``flash3`` with a dense plan.
    """
    plan = case.plan
    if name == "dense":
        return _sdpa
    if name == "masked":
        return partial(_sdpa, mask=plan.dense(device=case.device))
    if name == "raw-cudnn":
        return _raw_cudnn
    if name == "raw-flash3":
        return _raw_flash3 if find_spec("flash_attn_interface") else partial(attend, plan=plan, kernel="flash3")
    return lambda q, k, v: attend(q, k, v, plan, kernel=name)


def _prepare(
    case: Case, tensors: Sequence[Tensor], run: Callable[..., Tensor], *, keep: bool = True
) -> Callable[[], Run]:
    """What is timed of an attention in the case's direction; backward, its forward pass is kept where it may be."""
    upstream = torch.randn_like(tensors[0])
    kept: list[Tensor] = []

    def both() -> object:
        return torch.autograd.grad(run(*tensors), tensors, upstream)

    def backward() -> Run:
        out = kept[0] if kept else run(*tensors)
        if keep and not kept:
            kept.append(out)
        return lambda: torch.autograd.grad(out, tensors, upstream, retain_graph=keep)

    if case.direction == "forward":
        return lambda: lambda: run(*tensors)
    return backward if case.direction == "backward" else lambda: both


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2]
    ).transpose(1, 2)


def _raw_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _raw_flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # older releases return the log-sum-exp too


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
    for contender in cycle(contenders.values()):
        if spent >= WARM:
            return
        spent += _cuda_seconds(contender.prepare())


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _alive(device: str) -> bool:
    """Whether the device still answers; an illegal memory access ends all use of a GPU by its process."""
    try:
        _synchronize(device)
    except RuntimeError:
        return False
    return True


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
    """The SM clock and power of a GPU while something runs, asked for a few times a second."""

    def __init__(self, device: str) -> None:
        self._samples: list[list[float]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True) if device == "cuda" else None

    def __enter__(self) -> "Running":
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        if self._thread:
            self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(0.2):
            try:
                self._samples.append([float(value) for value in _nvidia_smi(*RUNNING)])
            except (OSError, subprocess.CalledProcessError, ValueError):
                return  # what the driver does not tell is not recorded

    def estimates(self) -> dict[str, dict[str, float]]:
        """Median and spread of each."""
        columns = zip(*self._samples, strict=True)
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
        "cpu": cpuinfo.get_cpu_info()["brand_raw"],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": sys.platform,
    }


@cache
def _gpu() -> dict[str, str]:
    name, driver = _nvidia_smi("name", "driver_version")
    return {"gpu": name, "driver": driver, "cuda": str(torch.version.cuda)}


def _nvidia_smi(*fields: str) -> list[str]:
    return _output(
        "nvidia-smi",
        f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
    ).split(", ")


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
