"""The paper's Figure 1 (supplement, D): how long it takes to generate a scene, against its number of shots."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import generation_cost, provenance, timing
from benchmarks.generation_cost import label, scene_of
from lct_backbones.mmdit import PAPER_3B, MMDiT, tiny
from lct_core import SceneModel, Shot, ShotInput, generation, retrofit
from lct_core.testing.tolerances import BOUNDS, error

Publish = Callable[[dict[str, Any]], None]
Scene = Sequence[ShotInput]


class Size(NamedTuple):
    """What a device is given to do: what takes minutes, not hours, so shots are short and steps few.

    Four at least: with fewer, the pass that writes the cache would be much of what there is to do with it.
    """

    config: dict[str, Any]
    dtype: torch.dtype
    shot: Shot
    steps: int
    counts: tuple[int, ...]
    recomputed: int  # the most shots whose history is run again in every step: that would be most of the time
    rounds: int


#: Narrow, with shots of many tokens: attention is most of the work, as it is in the 3B model at the paper's size.
SMALL = {"channels": 16, "text_width": 64, "width": 64, "depth": 2, "heads": 1}
SIZES = {
    "cpu": Size(SMALL, torch.float32, Shot(32, (12, 8, 8)), 4, (1, 2, 4, 9, 12, 16, 20), 20, 2),
    "cuda": Size(PAPER_3B, torch.bfloat16, Shot(576, (1, 30, 30)), 4, (1, 4, 9, 20), 9, 2),
}
QUICK = Size(SMALL, torch.float32, Shot(8, (1, 4, 4)), 4, (1, 2, 4), 2, 2)

#: At so many shots the cache is to bring nine tenths of what the operations that it spares promise.
PROMISED = (4, 9, 20)

#: How much larger an error the gate allows: on a GPU, products of other shapes may be added up in another order.
ALLOWED = {"cpu": 1, "cuda": 10}


def _recomputed(model: SceneModel, scene: Scene, steps: int) -> list[Any]:
    history = generation.recent(len(scene))
    return generation.autoregressive(model, scene, steps=steps, history=history, pattern="context_causal")


def _joint(model: SceneModel, scene: Scene, steps: int) -> list[Any]:
    return generation.joint(model, scene, steps=steps)


def _cached(model: SceneModel, scene: Scene, steps: int) -> list[Any]:
    return generation.causal(model, scene, steps=steps, history=generation.recent(len(scene)))


def _independent(model: SceneModel, scene: Scene, steps: int) -> list[Any]:
    return [generation.joint(model, [shot], steps=steps)[0] for shot in scene if shot.role == "shot"]


MODES = {"recomputed": _recomputed, "joint": _joint, "cached": _cached, "independent": _independent}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_generation(device: str, quick: bool, benchmark: BenchmarkFixture, publish: Publish) -> None:
    gate = _check(device)
    size = QUICK if quick else SIZES[device]
    model, steps, most = model_of(size.config, size.dtype, device), size.steps, size.counts[-1]
    scene = scene_for(model, scene_of(size.shot, most), size.dtype, device)

    made: dict[str, list[Any]] = {}

    def contender(mode: str, shots: int) -> timing.Contender:
        passes = generation_cost.MODES[mode](scene_of(size.shot, shots), steps)
        flops = generation_cost.cost(model.adapter.model, passes).total

        def run() -> None:
            made[label(mode, shots)] = MODES[mode](model, scene[: shots + 1], steps)

        return timing.Contender(lambda: run, flops)

    contenders = {
        label(mode, n): contender(mode, n)
        for n in size.counts
        for mode in MODES
        if mode != "recomputed" or n <= size.recomputed
    }
    warmup, both = 1, [n for n in size.counts[1:] if n <= size.recomputed]
    seconds = timing.interleave(contenders, warmup=warmup, rounds=size.rounds, device=device)
    if size.dtype == torch.float32:
        gate["differences"] = {str(n): _difference(n, made, ALLOWED[device]) for n in both}
    benchmark.pedantic(contenders[label("cached", most)].prepare(), rounds=1)
    publish(
        provenance.record(
            f"generation-{device}",
            device=device,
            warmup=warmup,
            rounds=size.rounds,
            shape={
                **{name: size.config[name] for name in ("width", "depth", "heads")},
                "parameters": sum(p.numel() for p in model.backbone.parameters()),
                "shots": size.counts,
                "tokens": size.shot.tokens,
                "steps": steps,
                "dtype": str(size.dtype).removeprefix("torch."),
            },
            times=timing.measured(seconds, contenders),
            comparisons=[c for n in both for c in _speed_up(n, seconds, contenders)],
            gate=gate,
        )
    )


def _speed_up(
    shots: int, seconds: dict[str, list[float]], contenders: dict[str, timing.Contender]
) -> list[timing.Comparison]:
    """What a cache saves, and how much of what the operations it spares would have it save."""
    again, once = label("recomputed", shots), label("cached", shots)
    promise = contenders[again].flops / contenders[once].flops
    what = f"speed-up by the cache, {shots} shots"
    return [
        timing.Comparison(what, timing.ratio(seconds[again], seconds[once])),
        timing.Comparison(
            f"{what} / in FLOPs",
            timing.ratio(seconds[again], seconds[once], 1 / promise),
            least=0.9 if shots in PROMISED else None,
        ),
    ]


def _difference(shots: int, made: Mapping[str, list[Any]], allowed: float) -> float:
    """The gate at full size, in float32: what was timed came to the same scene, or nothing is published."""
    once, again = (made[label(mode, shots)][1:] for mode in ("cached", "recomputed"))
    worst = max(error(*pair) for pair in zip(once, again, strict=True))
    bound = BOUNDS[torch.float32]["cached"].absolute * allowed
    assert worst <= bound, f"{shots} shots from the cache differ by {worst:.2e}, more than {bound:.2e}: not published"
    return worst


def _check(device: str) -> dict[str, Any]:
    """The gate: with a cache comes out what comes out without, within what each pass may add in float32."""
    model, shots, steps = retrofit(tiny().to(device)), scene_of(Shot(4, (2, 3, 3)), 3), 2
    scene = scene_for(model, shots, torch.float32, device)
    pairs = zip(_cached(model, scene, steps)[1:], _recomputed(model, scene, steps)[1:], strict=True)
    worst = max(error(*pair) for pair in pairs)
    bound = 3 * steps * BOUNDS[torch.float32]["cached"].absolute * ALLOWED[device]
    assert worst <= bound, f"the error of what comes from the cache is {worst:.2e}, more than {bound:.2e}: not timed"
    return {"error": worst, "bound": bound}


def model_of(config: dict[str, Any], dtype: torch.dtype, device: str) -> SceneModel:
    """With weights of no meaning, but none that are zero: an untrained model would predict nothing."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MMDiT(**config).to(dtype).requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.02)
    return retrofit(model)


def scene_for(model: SceneModel, shots: Sequence[Shot], dtype: torch.dtype, device: str) -> list[ShotInput]:
    """Noise and texts; the global shot's dummy video is left to the modes."""
    generator = torch.Generator().manual_seed(0)
    overall, *others = (
        model.adapter.example(shot, batch=1, generator=generator, dtype=dtype).to(device) for shot in shots
    )
    return [ShotInput(text=overall.text, role="global"), *others]
