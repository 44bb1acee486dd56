"""The loss of Long Context Tuning (Eq. 1; paper, 3.4 and A.1)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, stack
from torch.nn import functional as F

from lct_core.backbone import ShotInput
from lct_core.masks import Pattern
from lct_core.scene_model import Scene, SceneModel, is_scene


class SceneLoss(NamedTuple):
    """A scene's loss and what it is the average of, in row order without the global shots; float32."""

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
        raise ValueError("outputs: got no shot with a prediction, expected at least one that is not global")
    for i, (output, target) in enumerate(pairs):
        if output.shape != target.shape:
            raise ValueError(f"targets: target {i} has shape {list(target.shape)}, expected {list(output.shape)} "
                             "like its prediction")
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
    path = model.adapter.traits.path
    flat = list(_pairs(shots, noise))
    batch = next(len(shot.latents) for shot, _ in flat if shot.latents is not None)
    levels = t.expand(batch, -1)
    noisy, targets = [], []
    for i, (shot, eps) in enumerate(flat):
        if shot.role == "global" or shot.latents is None:
            noisy.append(shot)
            targets.append(None)
        else:
            latents = path.add_noise(shot.latents, eps, levels[:, i])
            noisy.append(ShotInput(latents=latents, text=shot.text, extras=shot.extras, role=shot.role))
            targets.append(path.target(shot.latents, eps, levels[:, i]))
    out = model(_nested_like(shots, noisy), t, pattern=pattern)
    return scene_loss(out, _nested_like(shots, targets))


def _pairs(a: Sequence[Any], b: Sequence[Any]) -> Any:
    if len(a) != len(b):
        raise ValueError(f"targets, noise: got {len(b)} entries for {len(a)} shots or scenes, expected them nested alike")
    for x, y in zip(a, b, strict=True):
        if isinstance(x, list | tuple):
            yield from _pairs(x, y)
        elif x is not None:
            yield x, y


def _nested_like(shots: Scene | Sequence[Scene], flat: Sequence[Any]) -> list[Any]:
    if is_scene(shots):
        return list(flat)
    items = iter(flat)
    return [[next(items) for _ in scene] for scene in shots]
