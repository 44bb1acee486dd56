"""What the modes share: which shots are left to generate, a shot as a condition, one guided prediction."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lct_core.backbone import ShotInput, describe
from lct_core.cache import KVCache
from lct_core.experts import ExpertCache, Experts
from lct_core.generation.euler import Latents, wide
from lct_core.generation.guidance import Guidance
from lct_core.masks import Pattern
from lct_core.noise import keyed_generator
from lct_core.scene_model import SceneModel


def left_to_generate(
    scene: Sequence[ShotInput], given: Mapping[int, Latents], t_c: float, *, in_order: bool = False
) -> list[int]:
    """Indices of the shots of a scene that are not given.

    Args:
        scene: The shots.
        given: Clean latents by index.
        t_c: Noise level of conditions, 0-1000.
        in_order: Whether a shot sees none that come after it.

    Raises:
        ValueError: where there are none, for a shot without noise, a global shot that is not the first, a given shot
            that the scene does not have, of another shape or after one that would not see it, and a level outside
            0-1000.
    """
    if not 0 <= t_c <= 1000:
        raise ValueError(
            f"t_c: got {t_c!r}, expected a level from 0 (clean) to 1000 (noise); the paper uses 100 to 500"
        )
    roles = [shot.role for shot in scene]
    if "global" in roles[1:] or "shot" not in roles:
        raise ValueError(f"scene: got roles {roles}, expected shots, and before them at most one global shot")
    shots = [i for i, role in enumerate(roles) if role != "global"]
    for i in shots:
        if not isinstance(scene[i].latents, Tensor):
            raise ValueError(
                f"scene: shot {i} has latents {scene[i].latents!r}, expected the noise that it starts from, "
                "also where it is given; lct_core.shot_noise draws it"
            )
    for i, latents in given.items():
        if i not in shots:
            raise ValueError(f"given: got shot {i!r}, expected one of {shots}, the scene's shots counting from 0")
        noise = scene[i].latents
        if not isinstance(latents, Tensor) or latents.shape != noise.shape:
            raise ValueError(
                f"given: shot {i} is {describe(latents)}, expected the shape of its noise in the scene, "
                f"{describe(noise)}"
            )
    left = [i for i in shots if i not in given]
    if not left:
        raise ValueError(f"given: shots {sorted(given)} are given, expected at least one left to generate")
    if in_order and given and max(given) > left[0]:
        raise ValueError(
            f"given: shot {max(given)} comes after shot {left[0]}, which is to be generated and would not see it; "
            "put given shots first, or generate from them together: conditional, with a bidirectional model"
        )
    return left


def as_condition(model: SceneModel | Experts, shot: ShotInput, latents: Latents, noise: Latents, t_c: float) -> Latents:
    """A clean shot at the noise level of a condition, but where it is clean anyway; in float32 at least."""
    level = torch.full((len(latents),), t_c / 1000, dtype=torch.float32)
    clean = wide(latents).to(noise.device)
    noised = model.adapter.traits.path.add_noise(clean, noise.to(clean.dtype), level)
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
    caches: Sequence[KVCache | ExpertCache | None] = (None, None),
) -> list[Latents]:
    """The guided velocity of some shots of a scene.

    Args:
        model: The scene model, or its experts: the active shots decide which of them runs.
        branches: The scene, and the same with negative prompts where guidance has an effect.
        guidance: How to combine them.
        latents: What stands in for the scene's latents, by index; the model gets it in the dtype of the scene's.
        levels: Every shot's noise level.
        active: The shots to return, by index.
        pattern: As :class:`SceneModel` takes it.
        caches: One for each branch.

    Returns:
        Velocities of the active shots, in the dtype of their latents.
    """
    path = model.adapter.traits.path
    t = torch.tensor(levels, dtype=torch.float32)
    said = []
    for branch, cache in zip(branches, caches, strict=False):
        scene = [
            replace(shot, latents=latents[i].to(shot.latents.dtype)) if i in latents else shot
            for i, shot in enumerate(branch)
        ]
        if isinstance(model, Experts):
            assert cache is None or isinstance(cache, ExpertCache)
            outputs = model(scene, t, pattern=pattern, cache=cache, denoised=active)
        else:
            assert not isinstance(cache, ExpertCache)
            outputs = model(scene, t, pattern=pattern, cache=cache)
        said.append(
            [
                path.to_velocity(outputs[i].to(latents[i].dtype), latents[i], t[i].expand(len(latents[i])))
                for i in active
            ]
        )
    return said[0] if guidance is None or len(said) == 1 else guidance.combine(*said)
