"""What takes and modes share: what may be given, a shot as a condition, one guided prediction."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lct_core._describe import describe
from lct_core.backbone.inputs import ShotInput
from lct_core.cache import KVCache
from lct_core.cache.expert_cache import ExpertCache
from lct_core.experts import Experts
from lct_core.generation.euler import Latents, wide
from lct_core.generation.guidance import Guidance
from lct_core.noise import keyed_generator
from lct_core.patterns import Pattern
from lct_core.scene_model import SceneModel

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
    roles = [shot.role for shot in scene]
    if "global" in roles[1:] or "shot" not in roles:
        raise ValueError(f"scene: got roles {roles}, expected shots, and before them at most one global shot")
    for i, shot in enumerate(scene):
        if shot.role != "global" and not isinstance(shot.latents, Tensor):
            raise ValueError(
                f"scene: shot {i} has latents {shot.latents!r}, expected the noise that it starts from, "
                "also where it is given; lct_core.shot_noise draws it"
            )


def check_given(scene: Sequence[ShotInput], given: Mapping[int, Latents]) -> None:
    """Refuse latents that are of no shot of a scene.

    Raises:
        ValueError: for a shot that the scene does not have, and latents of another shape than its noise.
    """
    shots = [i for i, shot in enumerate(scene) if shot.role != "global"]
    for i, latents in given.items():
        if i not in shots:
            raise ValueError(f"given: got shot {i!r}, expected one of {shots}, the scene's shots counting from 0")
        noise = scene[i].latents
        if not isinstance(latents, Tensor) or latents.shape != noise.shape:
            raise ValueError(
                f"given: shot {i} is {describe(latents)}, expected the shape of its noise in the scene, "
                f"{describe(noise)}"
            )


def left_to_generate(
    scene: Sequence[ShotInput], given: Mapping[int, Latents], t_c: Levels, *, in_order: bool = False
) -> list[int]:
    """Indices of the shots of a scene that are not given.

    Args:
        scene: The shots.
        given: Clean latents by index.
        t_c: Noise level of conditions.
        in_order: Whether a shot sees none that come after it.

    Raises:
        ValueError: where there are none, for a given shot after one that would not see it, and as
            :func:`check_levels`, :func:`check_scene` and :func:`check_given` do.
    """
    check_levels(t_c)
    check_scene(scene)
    check_given(scene, given)
    left = [i for i, shot in enumerate(scene) if shot.role != "global" and i not in given]
    if not left:
        raise ValueError(f"given: shots {sorted(given)} are given, expected at least one left to generate")
    if in_order and given and max(given) > left[0]:
        raise ValueError(
            f"given: shot {max(given)} comes after shot {left[0]}, which is to be generated and would not see it; "
            "put given shots first, or generate from them together: conditional, with a bidirectional model"
        )
    return left


def as_condition(model: SceneModel | Experts, shot: ShotInput, latents: Latents, t_c: float) -> Latents:
    """A clean shot at the noise level of a condition, but where it is clean anyway; in float32 at least.

    Args:
        model: The scene model.
        shot: The shot; its latents are the noise.
        latents: The clean shot.
        t_c: The level, 0-1000.
    """
    level = torch.full((len(latents),), t_c / 1000, dtype=torch.float32)
    clean = wide(latents).to(shot.latents.device)
    noised = model.adapter.traits.path.add_noise(clean, shot.latents.to(clean.dtype), level)
    noisy = model.adapter.noisy(shot)
    return noised if noisy is None else torch.where(noisy, noised, clean)


def noisy_parts(model: SceneModel | Experts, scene: Sequence[ShotInput], active: Sequence[int]) -> list[Tensor | None]:
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
    """The noise that generated shot i gets as history: another than it started from, on which it depends."""
    noise = torch.randn(shot.latents.shape, generator=keyed_generator("history", seed, i), dtype=torch.float32)
    return noise.to(shot.latents.device)


def predict(
    model: SceneModel | Experts,
    branches: Sequence[Sequence[ShotInput]],
    guidance: Guidance | None,
    latents: Mapping[int, Latents],
    levels: Sequence[float],
    active: Sequence[int],
    *,
    pattern: str | Pattern,
    caches: Iterable[KVCache | ExpertCache | None] = (None, None),
    text_free: bool = False,
) -> list[Latents]:
    """The guided velocity of some shots of a row.

    Args:
        model: The scene model, or its experts: the active shots decide which of them runs.
        branches: The row, and the same with negative prompts where guidance has an effect.
        guidance: How to combine them.
        latents: What stands in for the row's latents, by place; the model gets it in the dtype of the row's.
        levels: Every shot's noise level.
        active: The shots to return, by place.
        pattern: As :class:`SceneModel` takes it.
        caches: One for each branch; each is asked for just before its branch runs.
        text_free: As :class:`SceneModel` takes it.

    Returns:
        Velocities of the active shots, in the dtype of their latents.
    """
    path = model.adapter.traits.path
    t = torch.tensor(levels, dtype=torch.float32)
    said = []
    for branch, cache in zip(branches, caches, strict=False):
        row = [
            replace(shot, latents=latents[i].to(shot.latents.dtype)) if i in latents else shot
            for i, shot in enumerate(branch)
        ]
        if isinstance(model, Experts):
            assert cache is None or isinstance(cache, ExpertCache)
            outputs = model(row, t, pattern=pattern, cache=cache, denoised=active, text_free=text_free)
        else:
            assert not isinstance(cache, ExpertCache)
            outputs = model(row, t, pattern=pattern, cache=cache, text_free=text_free)
        said.append(
            [
                path.to_velocity(outputs[i].to(latents[i].dtype), latents[i], t[i].expand(len(latents[i])))
                for i in active
            ]
        )
    return said[0] if guidance is None or len(said) == 1 else guidance.combine(*said)
