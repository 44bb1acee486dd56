"""Scenes and noise levels as they come in: checked, and completed with the global shot's dummy video."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lct_core._describe import describe
from lct_core.backbone import Backbone, ShotInput
from lct_core.layout import Role

Scene = Sequence[ShotInput]


def as_scenes(shots: Scene | Sequence[Scene]) -> tuple[list[Scene], bool]:
    """Scenes, and whether there were several to begin with.

    Raises:
        ValueError: for anything but a scene or a sequence of scenes, none of them empty.
    """

    def is_scene(items: Any) -> bool:
        return isinstance(items, Sequence) and len(items) > 0 and all(isinstance(item, ShotInput) for item in items)

    if is_scene(shots):
        return [cast(Scene, shots)], False
    if isinstance(shots, Sequence) and len(shots) > 0 and all(map(is_scene, shots)):
        return list(cast(Sequence[Scene], shots)), True
    raise ValueError(
        f"shots: got {_kinds(shots)}, expected one scene, a sequence of ShotInput, or a sequence of such scenes; "
        "none of them empty"
    )


def _kinds(shots: object) -> str:
    """What was given, by types alone: latents are too large for a message."""
    return f"[{', '.join(map(_kinds, shots))}]" if isinstance(shots, list | tuple) else type(shots).__name__


def noise_levels(t: Tensor, roles: Sequence[Role], batch: int) -> Float[Tensor, "batch num_shots"]:
    """Every shot's noise level for every entry of the batch, float32 at least.

    Raises:
        ValueError: for another number of shots or entries, levels outside [0, 1], or a global shot that is not clean.
    """
    shots = len(roles)
    shapes = (shots,), (batch, shots)
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.is_meta or t.shape not in shapes:
        kind = f"; it is {t.dtype} on {t.device}" if isinstance(t, Tensor) and t.shape in shapes else ""
        raise ValueError(
            f"t: got {describe(t)}, expected floating-point noise levels [{shots}] or [{batch}, {shots}], one for "
            f"every shot in row order{kind}"
        )
    levels = t.to(torch.promote_types(t.dtype, torch.float32)).expand(batch, -1)
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(
            f"t: got levels from {levels.min().item():g} to {levels.max().item():g}, expected [0, 1], 0 = "
            "clean and 1 = noise; divide a 0-1000 timestep by 1000"
        )
    if any(role == "global" and bool(levels[:, i].any()) for i, role in enumerate(roles)):
        raise ValueError(f"t: got {t.tolist()}, expected 0 for a global shot: its dummy video is clean")
    return levels


def with_dummy_video(scene: Scene, adapter: Backbone) -> list[ShotInput]:
    """The scene with its global shot's dummy video filled in: one frame of zeros, as large as the first shot's.

    Where text is cross-attended, a global shot has no video, and the scene stays as it is.
    """
    first, *rest = scene
    if first.role != "global" or first.latents is not None or adapter.traits.text == "cross":
        return list(scene)
    if not rest or not isinstance(rest[0].latents, Tensor) or rest[0].latents.ndim != 5:
        raise ValueError(
            "shots: a global shot without latents needs a shot with latents [batch, channels, frames, height, width] "
            "after it, whose size its dummy video takes; alone in a call, give it latents of one frame of zeros"
        )
    return [replace(first, latents=torch.zeros_like(rest[0].latents[:, :, : adapter.traits.patch[0]])), *rest]


def complete(scene: Scene, adapter: Backbone) -> list[ShotInput]:
    """The scene with latents everywhere; those of a global prompt without video stand for a size only."""
    first, *rest = with_dummy_video(scene, adapter)
    if first.role != "global" or adapter.traits.text == "joint":
        return [first, *rest]
    if first.latents is not None:
        raise ValueError(
            f"shots: the global shot has latents {describe(first.latents)}, expected none: this model cross-attends "
            "its text, so that a global prompt needs no dummy video"
        )
    if not isinstance(first.text, Tensor):
        return [first, *rest]  # which the adapter refuses
    like = rest[0].latents if rest and isinstance(rest[0].latents, Tensor) else first.text
    size = (len(first.text), adapter.traits.latent_channels, *adapter.traits.patch)
    return [replace(first, latents=like.new_zeros(size)), *rest]
