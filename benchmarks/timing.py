"""How contenders are timed: in interleaved rounds, as ratios within a round; and what a GPU does meanwhile.

``interleave`` gives the seconds of every contender in every round; ``ratio``, ``estimate`` and ``measured`` say what
they come to. :class:`Running` samples the clock and power of a GPU.
"""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import torch

FEWEST_ROUNDS = 2  # both orders
WARM = 0.5  # seconds of a GPU's work before the first round

#: What is asked of the driver while something runs, and how it is recorded.
RUNNING = {"clocks.sm": "sm_clock_megahertz", "power.draw": "power_watts"}

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


class Failed(Exception):
    """A contender, by its name, has raised while it was timed."""


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


def first_call(contender: Contender, device: str) -> tuple[float, Any]:
    """The seconds of the first call, which compiles, plans and allocates, and what it gives."""
    begin = time.perf_counter()
    results = contender.prepare()()
    synchronize(device)
    return time.perf_counter() - begin, results


def warm_up(contenders: Mapping[str, Contender]) -> None:
    """Let a GPU run the contenders in turn for half a second of its time.

    Raises:
        Failed: for a contender that raises.
    """
    spent = 0.0
    for name, contender in cycle(contenders.items()):
        if spent >= WARM:
            return
        spent += _timed(name, contender, _cuda_seconds)


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
                    [*nvidia_smi(*RUNNING), "--loop-ms=200"], stdout=subprocess.PIPE, text=True
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


def nvidia_smi(*fields: str) -> list[str]:
    """The command that asks the driver for some fields of the GPU."""
    return [
        "nvidia-smi",
        f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
    ]


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


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
