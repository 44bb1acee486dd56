"""What takes and modes share: what may be given, and a shot as a condition."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lct_core._describe import describe
from lct_core.backbone import ShotInput
from lct_core.denoiser import Denoiser
from lct_core.generation.euler import Latents, wide
from lct_core.generation.takes import DoneShot, shots_of
from lct_core.noise import keyed_generator

Levels = float | Mapping[int, float]
"""Noise level of conditions and history, 0-1000: one for all shots, or by their index; 100 for those not named."""


def level_of(t_c: Levels, i: int) -> float:
    """The level at which shot i is a condition (paper, C: 100, where none is named)."""
    return t_c.get(i, 100.0) if isinstance(t_c, Mapping) else t_c


def check_levels(t_c: Levels) -> None:
    """Refuse levels of conditions outside 0-1000.

    Raises:
        ValueError: naming the first of them.
    """
    for i, level in t_c.items() if isinstance(t_c, Mapping) else [(None, t_c)]:
        if not isinstance(level, int | float) or not 0 <= level <= 1000:
            of_shot = "" if i is None else f" for shot {i!r}"
            raise ValueError(
                f"t_c: got {level!r}{of_shot}, expected a level from 0 (clean) to 1000 (noise); the paper uses 100 to "
                "500"
            )


def check_scene(scene: Sequence[ShotInput]) -> None:
    """Refuse what is no scene to generate.

    Raises:
        ValueError: for no shots, a global shot that is not the first, and a shot without noise.
    """
    for i in shots_of(scene):
        if not isinstance(scene[i].latents, Tensor):
            raise ValueError(
                f"scene: shot {i} has latents {scene[i].latents!r}, expected the noise that it starts from, "
                "also where it is given; lct_core.shot_noise draws it"
            )


def check_given(scene: Sequence[ShotInput], given: Mapping[int, Latents]) -> None:
    """Refuse latents that are of no shot of a scene.

    Raises:
        ValueError: for a shot that the scene does not have, and latents of another shape than its noise.
    """
    shots = shots_of(scene)
    for i, latents in given.items():
        if i not in shots:
            raise ValueError(f"given: got shot {i!r}, expected one of {shots}, the scene's shots counting from 0")
        noise = scene[i].latents
        if not isinstance(latents, Tensor) or latents.shape != noise.shape:
            raise ValueError(
                f"given: shot {i} is {describe(latents)}, expected the shape of its noise in the scene, "
                f"{describe(noise)}"
            )


def left_to_generate(scene: Sequence[ShotInput], given: Mapping[int, Latents], *, in_order: bool = False) -> list[int]:
    """Indices of the shots of a scene that are not given.

    Args:
        scene: The shots.
        given: Clean latents by index.
        in_order: Whether a shot sees none that come after it.

    Raises:
        ValueError: where there are none, for a given shot after one that would not see it, and as
            :func:`check_scene` and :func:`check_given` do.
    """
    check_scene(scene)
    check_given(scene, given)
    left = [i for i in shots_of(scene) if i not in given]
    if not left:
        raise ValueError(f"given: shots {sorted(given)} are given, expected at least one left to generate")
    if in_order and given and max(given) > left[0]:
        raise ValueError(
            f"given: shot {max(given)} comes after shot {left[0]}, which is to be generated and would not see it; "
            "put given shots first, or generate from them together: conditional, with a bidirectional model"
        )
    return left


def noisy_parts(model: Denoiser, scene: Sequence[ShotInput], active: Sequence[int]) -> list[Tensor | None]:
    """Where the active shots are to be denoised; None for all of a shot.

    Raises:
        ValueError: for one that is clean throughout.
    """
    parts = [model.adapter.noisy(scene[i]) for i in active]
    for i, noisy in zip(active, parts, strict=True):
        if noisy is not None and not bool(noisy.any()):
            raise ValueError(f"scene: shot {i} is a clean condition throughout; give it: given={{{i}: latents}}")
    return parts


def history_noise(shot: ShotInput, i: int, seed: int) -> Latents:
    """The noise that generated shot i gets as history: drawn anew, independent of the noise it started from."""
    noise = torch.randn(shot.latents.shape, generator=keyed_generator("history", seed, i), dtype=torch.float32)
    return noise.to(shot.latents.device)


def history_condition(model: Denoiser, i: int, done: DoneShot, seed: int) -> Latents:
    """A done shot at its level: a given one with its own noise, one that was made with other than it started from.

    What is clean anyway stays so; in float32 at least.

    Args:
        model: The scene model.
        i: The shot's index.
        done: The shot.
        seed: Of the noise of one that was made.
    """
    noise = done.shot.latents
    if not done.given:
        noise = history_noise(done.shot, i, seed).to(noise.dtype)
    level = torch.full((len(done.latents),), done.level / 1000, dtype=torch.float32)
    clean = wide(done.latents).to(noise.device)
    noised = model.adapter.traits.path.add_noise(clean, noise.to(clean.dtype), level)
    noisy = model.adapter.noisy(replace(done.shot, latents=noise))
    return noised if noisy is None else torch.where(noisy, noised, clean)
