"""The planner: what it expects of a generation, against what that then takes."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import provenance, timing
from benchmarks.generation_cost import scene_of
from benchmarks.test_generation import QUICK, SIZES, Size, model_of, scene_for
from lct_core import KVCache, SceneModel, Shot
from lct_core.cache import Budget
from lct_core.cost import Meter, Mode, Plan, measure, plan, takes_of
from lct_core.generation import Guidance
from lct_core.generation.director import Director

Publish = Callable[[dict[str, Any]], None]

#: How far time and bytes may be from what was planned.
OFF_TIME, OFF_BYTES = 0.15, 0.02


class Kind(NamedTuple):
    """How a scene is generated.

    Args:
        mode: Of generation.
        shots: How many.
        guided: Whether with guidance.
        cache: How the cache keeps its shots.
        share: Of the bytes that the cache takes on the device, those that a budget leaves it; None for no budget.
    """

    mode: Mode
    shots: int
    guided: bool = False
    cache: Mapping[str, Any] = {}
    share: float | None = None


KINDS = {
    "joint, 4 shots": Kind("joint", 4),
    "auto-regressive, 9 shots": Kind("autoregressive", 9),
    "cached, 4 shots": Kind("causal", 4),
    "cached, 9 shots": Kind("causal", 9),
    "cached, 20 shots": Kind("causal", 20),
    "cached, 9 shots, guided": Kind("causal", 9, guided=True),
    "cached, 9 shots, int8": Kind("causal", 9, cache={"storage": "int8"}),
    "cached, 9 shots, some of them in host memory": Kind("causal", 9, share=0.75),
}
QUICK_KINDS = ("joint, 4 shots", "cached, 4 shots")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_plan(device: str, quick: bool, benchmark: BenchmarkFixture, publish: Publish) -> None:
    size = QUICK if quick else SIZES[device]
    model, rounds = model_of(size.config, size.dtype, device), 1 if quick else 3
    comparisons, times, rows = [], {}, []
    for what, kind in KINDS.items():
        if quick and what not in QUICK_KINDS:
            continue
        expected, seconds, held = [], [], 0
        for _ in range(rounds):  # both anew: a machine that is slow for a while is slow in both
            planned = _planned(model, size, kind, device)
            took, held = _took(model, size, kind, device)
            expected.append(planned.seconds or 0)
            seconds.append(took)
        comparisons.append(_near(f"{what}: time / planned", timing.ratio(seconds, expected), OFF_TIME))
        row = {"what": what, "planned, s": median(expected), "took, s": median(seconds)}
        if kind.mode == "causal":
            of_bytes = timing.ratio([held], [planned.peak_cache])
            comparisons.append(_near(f"{what}: peak of the cache / planned", of_bytes, OFF_BYTES))
            row |= {"cache planned, bytes": planned.peak_cache, "held, bytes": held}
        rows.append(row)
        times[what] = {"seconds": median(seconds), "low": min(seconds), "high": max(seconds)} | {
            "flops": planned.cost.total,
            "gflops_per_second": planned.cost.total / median(seconds) / 1e9,
        }
    benchmark.pedantic(partial(_planned, model, size, KINDS[QUICK_KINDS[0]], device), rounds=1)
    about = "What the planner expects of a generation from a few measured passes, and what that then takes."
    publish(
        provenance.record(
            f"plan-{device}",
            device=device,
            warmup=1,
            rounds=rounds,
            shape={
                **{name: size.config[name] for name in ("width", "depth", "heads")},
                "tokens": size.shot.tokens,
                "steps": size.steps,
                "dtype": str(size.dtype).removeprefix("torch."),
            },
            times=times,
            comparisons=comparisons,
            tables=[{"title": f"Planned against measured, {device}", "about": about, "rows": rows}],
        )
    )


def _options(model: SceneModel, size: Size, kind: Kind) -> dict[str, Any]:
    """The cache's, with its budget."""
    if kind.share is None:
        return dict(kind.cache)
    scene = scene_of(size.shot, kind.shots)
    nbytes = plan(Meter(model), scene, mode="causal", steps=size.steps).peak_cache
    return {**kind.cache, "budget": Budget(device=int(kind.share * nbytes))}


def _planned(model: SceneModel, size: Size, kind: Kind, device: str) -> Plan:
    """What is expected, from passes measured now."""
    scene, options = scene_of(size.shot, kind.shots), _options(model, size, kind)
    throughput = measure(model, scene, new_cache=partial(KVCache, **options))
    negative = scene if kind.guided else None
    return plan(
        model,
        scene,
        mode=kind.mode,
        steps=size.steps,
        negative=negative,
        device=device,
        throughput=throughput,
        **options,
    )


def _took(model: SceneModel, size: Size, kind: Kind, device: str) -> tuple[float, int]:
    """Seconds, and the most bytes that the caches held."""
    counts: list[Shot] = scene_of(size.shot, kind.shots)
    scene = scene_for(model, counts, size.dtype, device)
    guidance = Guidance(text=scene[1].text, global_text=scene[0].text) if kind.guided else None
    options = _options(model, size, kind)
    director = Director(model, scene, guidance=guidance, steps=size.steps, new_cache=partial(KVCache, **options))
    begin = time.perf_counter()
    for take in takes_of(kind.mode, counts):
        director.keep(director.shoot(take), take)
    if device == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - begin
    return took, sum(cache.peak_nbytes for cache in director.caches) if kind.mode == "causal" else 0


def _near(what: str, value: timing.Estimate, off: float) -> timing.Comparison:
    return timing.Comparison(what, value, least=1 - off, most=1 + off)
