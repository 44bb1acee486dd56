"""What Figure 1 compares (supplement, D): four ways to generate a scene, and the paper's size of it."""

from collections.abc import Callable, Sequence
from functools import lru_cache

from torch import nn

from lct_core import Shot, registry
from lct_core.cost import Cost, Meter, Mode, Pass, passes, takes_of

#: The paper's longest shot: 125 frames of an area of 480 × 480 pixels (A.1). Its VAE and its number of text tokens are
#: not published; ours are 4 frames × 8 × 8 pixels to a latent, as is usual, 2 × 2 latents to a token, and 576.
PAPER_SHOT = Shot(text=576, grid=(32, 30, 30))

#: Euler steps of the paper (A.2).
PAPER_STEPS = 32

Scene = Sequence[Shot]
Run = list[tuple[Scene, list[Pass]]]  # of scenes by themselves


def scene_of(shot: Shot, count: int) -> list[Shot]:
    """A global shot, whose dummy video is one latent frame, and a number of equal shots."""
    return [Shot(shot.text, (1, *shot.grid[1:]), "global"), *[shot] * count]


def joint(scene: Scene, steps: int) -> Run:
    """Bidirectional attention, all shots at once: :func:`lct_core.generation.joint`."""
    return _run("joint", scene, steps)


def cached(scene: Scene, steps: int) -> Run:
    """Context-causal attention, shot after shot behind a KV cache of all earlier ones: the mode ``causal``."""
    return _run("causal", scene, steps)


def recomputed(scene: Scene, steps: int) -> Run:
    """The same model to the same end without a cache, the whole history in every step: ``autoregressive``."""
    return _run("autoregressive", scene, steps)


def independent(scene: Scene, steps: int) -> Run:
    """Every shot by itself, without a global prompt: the single-shot model."""
    return [run for shot in scene if shot.role == "shot" for run in joint([shot], steps)]


MODES: dict[str, Callable[[Scene, int], Run]] = {
    "recomputed": recomputed,
    "joint": joint,
    "cached": cached,
    "independent": independent,
}


def label(mode: str, shots: int) -> str:
    """What a mode at a number of shots is called in the results."""
    return f"{mode}, {shots} shot{'s' if shots > 1 else ''}"


def cost(model: nn.Module, run: Run) -> Cost:
    """What a run takes; the model may be on the meta device."""
    meter = _meter(model)
    return sum((meter.cost(scene, of_scene) for scene, of_scene in run), Cost())


def _run(mode: Mode, scene: Scene, steps: int) -> Run:
    """Every shot sees all before it."""
    pattern = "bidirectional" if mode == "joint" else "context_causal"
    takes = takes_of(mode, scene, window=len(scene), pattern=pattern)
    return [(scene, passes(scene, takes, steps=steps))]


@lru_cache(maxsize=1)
def _meter(model: nn.Module) -> Meter:
    return Meter(registry().adapter(model))
