"""The loss of Long Context Tuning (Eq. 1; paper, 3.4 and A.1)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, stack
from torch.nn import functional as F

from lct_core._describe import describe
from lct_core.backbone import Backbone, ShotInput
from lct_core.engine.scene import Scene, as_scenes, noise_levels
from lct_core.patterns import Pattern
from lct_core.scene_model import SceneModel


class SceneLoss(NamedTuple):
    """A scene's loss and what it is the average of, in row order; without global shots, and those clean throughout."""

    mean: Float[Tensor, ""]
    shots: Float[Tensor, " shots"]


def scene_loss(outputs: Sequence[Any], targets: Sequence[Any]) -> SceneLoss:
    """Mean squared error of every shot, averaged over shots, so that a short shot weighs as much as a long one.

    Args:
        outputs: Predictions, nested as a :class:`SceneModel` returns them; None (a global shot) is left out: its dummy
            tokens have no loss.
        targets: Nested alike, what the path of the adapter makes of latents and noise; ignored for a global shot.

    Returns:
        The average and every shot's own loss; arithmetic in float32.

    Raises:
        ValueError: where the two are not nested alike, a shape differs, or no shot has a loss.
    """
    pairs = list(_pairs(outputs, targets))
    if not pairs:
        raise ValueError(
            "outputs: got no shot with a prediction, expected at least one that is neither global nor a clean "
            "condition throughout"
        )
    for i, (output, target) in enumerate(pairs):
        if not isinstance(target, Tensor):
            raise ValueError(f"targets: target {i} is {target!r}, expected a tensor shaped like its prediction")
        if output.shape != target.shape:
            raise ValueError(
                f"targets: target {i} has shape {list(target.shape)}, expected {list(output.shape)} like its prediction"
            )
    shots = stack([F.mse_loss(output.float(), target.float()) for output, target in pairs])
    return SceneLoss(shots.mean(), shots)


def tuning_loss(
    model: SceneModel,
    shots: Scene | Sequence[Scene],
    t: Float[Tensor, "*batch shots"],
    noise: Sequence[Any],
    *,
    pattern: str | Pattern = "bidirectional",
) -> SceneLoss:
    """Noise every shot to its own level, predict all of them at once, and regress the adapter's training target.

    Args:
        model: A retrofitted model.
        shots: Clean shots, one scene or several packed in one row; a global shot passes through as it is.
        t: Noise levels as :class:`SceneModel` takes them, e.g. from :func:`lct_core.sample_levels`.
        noise: Gaussian noise nested like ``shots`` and shaped like their latents; ignored for a global shot.
        pattern: As :class:`SceneModel` takes it.

    Raises:
        ValueError: as :class:`SceneModel` and :func:`scene_loss` do.
    """
    if not isinstance(model, SceneModel):
        raise ValueError(
            f"model: got {type(model).__name__}, expected a SceneModel; tune each of two experts by itself, the "
            "shots that it is to denoise at levels on its side of the boundary and their conditions at any"
        )
    scenes, nested = as_scenes(shots)
    draws = noise if nested else [noise]
    if not all(isinstance(draw, list | tuple) for draw in draws) or [*map(len, scenes)] != [*map(len, draws)]:
        raise ValueError("noise: it is not nested like shots; expected one tensor, or None for a global shot, per shot")
    roles = [shot.role for scene in scenes for shot in scene]
    batch = next((len(shot.latents) for scene in scenes for shot in scene if isinstance(shot.latents, Tensor)), 1)
    levels = iter(noise_levels(t, roles, batch).unbind(-1))
    pairs = [
        [_noised(model.adapter, shot, eps, next(levels)) for shot, eps in zip(scene, draw, strict=True)]
        for scene, draw in zip(scenes, draws, strict=True)
    ]
    outputs = model([[shot for shot, _ in scene] for scene in pairs], t, pattern=pattern)
    said = [
        [_judged(model.adapter, *pair) for pair in zip(*both, strict=True)] for both in zip(pairs, outputs, strict=True)
    ]
    return scene_loss(
        [[out for out, _ in scene] for scene in said], [[target for _, target in scene] for scene in said]
    )


def _judged(adapter: Backbone, given: tuple[ShotInput, Tensor | None], out: Any) -> tuple[Any, Any]:
    """A prediction and its target, without what was clean: a condition has no loss, nor has a shot that is all one."""
    shot, target = given
    noisy = None if target is None else adapter.noisy(shot)
    if noisy is None or target is None:
        return out, target
    judged = noisy.expand_as(target)
    return (out[judged], target[judged]) if judged.any() else (None, None)


def _noised(adapter: Backbone, shot: ShotInput, eps: Tensor, level: Tensor) -> tuple[ShotInput, Tensor | None]:
    """A shot at its noise level, and what is to be predicted of it."""
    if shot.role == "global":
        return shot, None
    if not isinstance(shot.latents, Tensor) or not isinstance(eps, Tensor):
        raise ValueError(
            f"shots, noise: got latents {describe(shot.latents)} and noise {describe(eps)}, expected tensors "
            "alike: only a global shot goes without"
        )
    path, clean, noisy = adapter.traits.path, shot.latents, adapter.noisy(shot)
    noised = path.add_noise(clean, eps, level)
    noised = noised if noisy is None else torch.where(noisy, noised, clean)
    return replace(shot, latents=noised), path.target(clean, eps, level)


def _pairs(a: Sequence[Any], b: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """What stands at the same place of two nestings, None left out."""
    if len(a) != len(b):
        raise ValueError(f"targets: got {len(b)} entries for {len(a)} outputs, expected the two nested alike")
    for x, y in zip(a, b, strict=True):
        if isinstance(x, list | tuple) != isinstance(y, list | tuple):
            raise ValueError(f"targets: got {describe(y)} for {describe(x)}, expected the two nested alike")
        if isinstance(x, list | tuple):
            yield from _pairs(x, y)
        elif x is not None:
            yield x, y
