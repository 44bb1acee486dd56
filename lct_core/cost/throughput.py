"""How long a model's passes take on a device: a fit to a few of them, measured."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from pathlib import Path

import torch

from lct_core.cache import KVCache
from lct_core.cost.meter import Cost, Meter, example
from lct_core.cost.passes import Pass
from lct_core.layout import Shot
from lct_core.patterns import PATTERNS
from lct_core.scene_model import SceneModel

# Of linear layers, a shot's attention, that of shots together, passes and shots: what has a rate, or an overhead, each.
_RATES = (
    [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]],
    [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0]],
    [[1, 1, 1, 0, 0]],
)
_OVERHEADS: tuple[list[list[int]], ...] = (
    [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]],
    [[0, 0, 0, 1, 0]],
    [[0, 0, 0, 0, 1]],
    [],
)

_TOGETHER = (2, 5)  # shots in the rows that are timed

_LEAST = 0.2  # seconds that a pass is timed for, so that short ones are timed more often


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Seconds: operations by their rates, and an overhead of every pass and shot; :class:`Cost` says what these count.

    Args:
        linear: Floating point operations per second in the model's own layers.
        attention: The same in the attention of a lone shot, also behind a cache: its way to there included.
        call: Seconds that a pass takes whatever is in it.
        shot: Seconds that a shot takes in it whatever its size.
        together: As ``attention``, of several shots in one pass (default: the same).
        where: What it was measured with, in words.

    Raises:
        ValueError: for a rate that is not positive, and an overhead that is negative.
    """

    linear: float
    attention: float
    call: float = 0.0
    shot: float = 0.0
    together: float | None = None
    where: str = ""

    def __post_init__(self) -> None:
        for name in ("linear", "attention", "call", "shot", *(["together"] if self.together is not None else [])):
            value, least = getattr(self, name), "0 or more" if name in ("call", "shot") else "above 0"
            number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
            if not number or value < 0 or (not value and least == "above 0"):
                raise ValueError(f"{name}: got {value!r}, expected a finite number, {least}")

    def seconds(self, cost: Cost) -> float:
        """How long some passes take."""
        alone = (cost.attention - cost.together) / self.attention
        together = cost.together / (self.together or self.attention)
        return cost.linear / self.linear + alone + together + cost.calls * self.call + cost.shots * self.shot

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Throughput":
        """Read what :meth:`save` has written.

        Raises:
            ValueError: for anything else.
        """
        names = {field.name for field in fields(cls)}
        try:
            read = json.loads(path.read_text())
            if not isinstance(read, dict) or set(read) != names:
                raise ValueError(f"it has {sorted(read) if isinstance(read, dict) else read!r}, not {sorted(names)}")
            return cls(**read)
        except ValueError as error:
            raise ValueError(f"{path}: not a throughput, expected the JSON of lct plan --measure: {error}") from error


def fitted(costs: Sequence[Cost], seconds: Sequence[float], *, where: str = "") -> Throughput:
    """The throughput that is closest to what was measured, each relative to its own time; none of its parts negative.

    Raises:
        ValueError: for no measurement, or of no cost.
    """
    if not costs or len(costs) != len(seconds):
        raise ValueError(f"costs: got {len(costs)} for {len(seconds)} times, expected at least one, and as many")
    counts = [(c.linear, c.attention - c.together, c.together, c.calls, c.shots) for c in costs]
    relative = [[n / t for n in count] for count, t in zip(counts, seconds, strict=True)]
    terms = torch.tensor(relative, dtype=torch.float64)
    # What is too small to tell is not fitted: then operations of several kinds have one rate, or calls or shots no
    # overhead.
    choices = [torch.tensor(rates + overheads).double() for rates in _RATES for overheads in _OVERHEADS]
    best = None
    for choice in choices:
        columns = terms @ choice.T
        scale = columns.amax(dim=0)
        if not bool((scale > 0).all()):
            continue  # of a kind that was not measured
        weights = torch.linalg.lstsq(columns / scale, torch.ones(len(terms), 1, dtype=torch.float64)).solution[:, 0]
        error = float((columns / scale @ weights - 1).square().sum())
        if bool((weights > 0).all()) and (best is None or error < best[0]):
            best = error, (weights / scale @ choice).tolist()
    if best is None:
        raise ValueError(
            f"costs: got {list(costs)} for {list(seconds)} seconds, which no throughput fits; measure again"
        )
    linear, attention, together, call, shot = best[1]
    return Throughput(
        linear=1 / linear, attention=1 / attention, call=call, shot=shot, together=1 / together, where=where
    )


@torch.no_grad()
def measure(
    model: SceneModel,
    scene: Sequence[Shot],
    *,
    window: int = 9,
    rounds: int = 3,
    new_cache: Callable[[], KVCache] = KVCache,
) -> Throughput:
    """Run a few passes of a model, on noise, and see how long they take.

    A shot alone, behind half and behind the whole of the longest history, through a cache; its first frame alone; two
    shots and five together: each once to warm up, then some times, of which the median counts. Under autocast as the
    caller has it.

    Args:
        model: On the device in question.
        scene: The shots' token counts, a global shot first where there is one.
        window: Most shots that are seen, the current one counted (paper, 4: nine).
        rounds: How often each is timed, at least (ours).
        new_cache: Makes the cache, so that one that streams its history is measured as such.

    Raises:
        ValueError: as the model does.
    """
    meter = Meter(model)
    first, shots = [s for s in scene if s.role == "global"], [s for s in scene if s.role == "shot"][:window]
    order, costs, seconds = [*first, *shots], [], []
    timed = {len(first), len(first) + len(shots) // 2, len(order) - 1}
    place = next(model.backbone.parameters())

    def run(row: Sequence[Shot], cache: KVCache | None) -> Callable[[], object]:
        given = [example(model.adapter, shot, dtype=meter.dtype).to(place.device) for shot in row]
        levels = torch.tensor([0.0 if shot.role == "global" else 0.5 for shot in row])
        return lambda: model(given, levels, pattern=_pattern(cache), cache=cache)

    def take_time(
        row: Sequence[Shot], behind: Sequence[Shot], cache: KVCache | None, call: Callable[[], object]
    ) -> None:
        whole = [*behind, *row]
        seen, own = tuple(range(len(behind))), tuple(range(len(behind), len(whole)))
        costs.append(meter.cost(whole, [Pass((), own, seen, PATTERNS[_pattern(cache)], 1)]))
        seconds.append(_median(call, place.device, rounds))

    cache = new_cache()
    for i, shot in enumerate(order):
        call = run([shot], cache)
        call()
        if i in timed:
            take_time([shot], order[:i], cache, call)
        cache.append(i)
    frame = replace(shots[0], grid=(1, *shots[0].grid[1:]))
    for row in ([frame], *([*first, *shots[:count]] for count in _TOGETHER)):
        call = run(row, None)
        call()
        take_time(row, [], None, call)
    return fitted(costs, seconds, where=_where(model, place))


def _pattern(cache: KVCache | None) -> str:
    """What runs through a cache is context-causal, and what runs together mostly is not."""
    return "bidirectional" if cache is None else "context_causal"


def _median(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    times = [_seconds(call, device) for _ in range(rounds)]
    while sum(times) < _LEAST:
        times.append(_seconds(call, device))
    return statistics.median(times)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _where(model: SceneModel, place: torch.Tensor) -> str:
    what = f"{type(model.backbone).__name__}, {str(place.dtype).removeprefix('torch.')}, kernel {model.kernel}"
    if place.device.type == "cuda":
        return f"{what}, {torch.cuda.get_device_name(place.device)}"
    return f"{what}, {place.device.type} with {torch.get_num_threads()} threads"
