"""A history that is kept elsewhere than on the device, or in 8 bits: what generation then takes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import provenance, timing
from benchmarks.filled_cache import DEVICES, Publish, kind
from benchmarks.generation_cost import cached, scene_of
from benchmarks.report import goal
from benchmarks.test_generation import SMALL, model_of, scene_for
from lct_backbones.mmdit import PAPER_3B
from lct_core import KVCache, SceneModel, Shot, ShotInput
from lct_core.cache import Budget
from lct_core.cost import plan
from lct_core.generation import Director, Take


class Tiered(NamedTuple):
    """A scene whose history is kept elsewhere than on the model's device."""

    config: dict[str, Any]
    dtype: torch.dtype
    shot: Shot
    shots: int
    rounds: int

    @property
    def layer_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.config["width"] * self.dtype.itemsize


TIERED = {
    "cpu": Tiered({**SMALL, "depth": 6}, torch.float32, Shot(32, (12, 8, 8)), 9, 3),
    "cuda": Tiered({**PAPER_3B, "depth": 8}, torch.bfloat16, Shot(576, (1, 30, 30)), 9, 3),
}


QUICK_TIERED = Tiered({**SMALL, "depth": 3}, torch.float32, Shot(8, (2, 4, 4)), 3, 2)
STEPS_OF_A_SHOT = 4
SLOWER = 1.15  # what generation may take, for a history that comes from elsewhere as fast as it has to


@pytest.mark.parametrize("device", DEVICES)
def test_where_the_history_is_kept(
    device: str, quick: bool, tmp_path: Path, benchmark: BenchmarkFixture, publish: Publish
) -> None:
    """A scene from a history on the device, and from one that is brought to every layer of every pass."""
    size = QUICK_TIERED if quick else TIERED[device]
    model = model_of(size.config, size.dtype, device)
    shots = scene_of(size.shot, size.shots)
    scene = scene_for(model, shots, size.dtype, device)
    near = plan(model, shots, window=size.shots, steps=STEPS_OF_A_SHOT, device=device).least_budget
    caches: dict[str, Callable[..., KVCache]] = {
        "resident": KVCache,
        "host": partial(KVCache, budget=Budget(device=near)),
        "disk": partial(KVCache, budget=Budget(device=near, host=0, folder=tmp_path)),
        "int8": partial(KVCache, storage="int8"),
        "fp8": partial(KVCache, storage="fp8"),
    }
    made: dict[str, Director] = {}

    def contender(name: str) -> timing.Contender:
        def run() -> None:
            made[name] = _directed(model, scene, caches[name])

        return timing.Contender(lambda: run)

    layers, tokens = size.config["depth"], sum(shot.tokens for shot in shots[:-1])
    history = torch.zeros(layers, tokens * size.layer_bytes, dtype=torch.uint8)
    history = history.pin_memory() if device == "cuda" else history
    row = torch.empty_like(history[0], device=device)

    def copy() -> None:
        for layer in history:
            row.copy_(layer, non_blocking=True)

    contenders = {name: contender(name) for name in caches} | {"copy": timing.Contender(lambda: copy)}
    warmup = 1
    seconds = timing.interleave(contenders, warmup=warmup, rounds=size.rounds, device=device)
    gate = _check_tiers(made)
    benchmark.pedantic(contenders["host"].prepare(), rounds=1)
    times = timing.measured(seconds, contenders)
    bandwidth = Bandwidth(
        brought=_brought(shots) * size.layer_bytes * layers,
        seconds=times["resident"]["seconds"] * (1 if device == "cuda" else SLOWER - 1),
        had=history.nbytes / times["copy"]["seconds"],
    )
    comparisons = {
        name: timing.Comparison(
            f"{name}: time / resident",
            timing.ratio(seconds[name], seconds["resident"]),
            most=SLOWER if name in ("host", "disk") and bandwidth.enough else None,
        )
        for name in caches
        if name != "resident"
    }
    publish(
        provenance.record(
            f"cache-tiers-{device}",
            device=device,
            warmup=warmup,
            rounds=size.rounds,
            shape={
                **{name: size.config[name] for name in ("width", "depth", "heads")},
                "shots": size.shots,
                "tokens": size.shot.tokens,
                "steps": STEPS_OF_A_SHOT,
                "dtype": str(size.dtype).removeprefix("torch."),
            },
            times=times,
            comparisons=[*comparisons.values()],
            gate=gate,
            bandwidth=bandwidth._asdict(),
            tables=[
                {
                    "title": f"Where the history is kept, {kind(device)}",
                    "about": bandwidth.in_words(device),
                    "rows": [
                        _tier_row(name, times[name]["seconds"], comparisons.get(name), made[name].caches[0])
                        for name in caches
                    ],
                }
            ],
        )
    )


class Bandwidth(NamedTuple):
    """What a history that is kept elsewhere asks for.

    Args:
        brought: Bytes that come to the layers in all.
        seconds: In which they may come: on a GPU while the model works, on a CPU, whose threads bring them themselves,
            in what may be added to that time.
        had: Bytes a second of a plain copy of all layers' histories, one after the other into one row.
    """

    brought: float
    seconds: float
    had: float

    @property
    def needed(self) -> float:
        """Bytes a second."""
        return self.brought / self.seconds

    @property
    def enough(self) -> bool:
        """Whether there are as many."""
        return self.had >= self.needed

    def in_words(self, device: str) -> str:
        """What there is, and what is asked for."""
        how = "while the model works" if device == "cuda" else f"in {SLOWER - 1:.0%} of the resident time"
        verdict = "enough" if self.enough else "too little, so that no goal is set"
        return (
            f"{self.brought / 1e9:.3g} GB are brought to the layers in all; to come {how}, they need "
            f"{self.needed / 1e9:.3g} GB/s. A plain copy of all layers' histories has {self.had / 1e9:.3g} GB/s: "
            f"{verdict}. Files are in the page cache."
        )


def _tier_row(name: str, seconds: float, against: timing.Comparison | None, cache: KVCache) -> dict[str, Any]:
    keys, values = map(max, zip((0.0, 0.0), *cache.errors.values(), strict=True))
    return {
        "History": name,
        "Seconds": seconds,
        "/ resident": against.value.median if against else 1.0,
        "Goal": goal(against.as_dict()) if against else "",
        "Met": against.met if against else None,
        "Most bytes on the device": cache.peak_nbytes,
        "Largest error of keys": keys,
        "Of values": values,
    }


def _directed(model: SceneModel, scene: Sequence[ShotInput], new_cache: Callable[..., KVCache]) -> Director:
    """A scene, shot after shot, each from all before it."""
    director = Director(model, scene, steps=STEPS_OF_A_SHOT, new_cache=new_cache)
    for i in range(1, len(scene)):
        take = Take((i,), history=tuple(range(1, i)))
        director.keep(director.shoot(take), take)
    return director


def _brought(shots: Sequence[Shot]) -> int:
    """Tokens of history that are seen in all passes of a scene, in every layer."""
    ((scene, run),) = cached(shots, STEPS_OF_A_SHOT)
    return sum(one.times * sum(scene[i].tokens for i in one.behind) for one in run)


def _check_tiers(made: Mapping[str, Director]) -> dict[str, Any]:
    """The gate: shots are where they should be, and where a history comes from changes no bit."""
    for name in ("host", "disk"):
        tiers = {entry.tier for entry in made[name].caches[0].shots}
        assert name in tiers, f"{name}: the shots are in {tiers}: not published"
        for i, latents in made["resident"].done.items():
            assert torch.equal(latents, made[name].done[i]), f"{name}: shot {i} is another: not published"
    return {"difference": 0.0}
