"""Conditional generation: given clips or images are shots of low noise (paper, 3.2.3 and Fig. 4 a.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lct_core.backbone import ShotInput, describe
from lct_core.cache import KVCache
from lct_core.generation.euler import Callback, Latents, euler
from lct_core.generation.guidance import Guidance, branches
from lct_core.masks import Pattern
from lct_core.scene_model import SceneModel


@torch.no_grad()
def conditional(
    model: SceneModel,
    scene: Sequence[ShotInput],
    given: Mapping[int, Latents],
    *,
    t_c: float = 100.0,
    steps: int = 32,
    guidance: Guidance | None = None,
    pattern: str | Pattern = "bidirectional",
    callback: Callback | None = None,
) -> list[Latents | None]:
    """Generate the other shots of a scene together, at one noise level, from the given ones.

    A given shot may be a clip or an image, its latents one frame; it keeps its place in the scene and its text. It is
    noised to ``t_c`` once, with its own noise (ours; the paper leaves open whether each step draws anew).

    Args:
        model: A scene model, tuned with the pattern.
        scene: The shots; their latents are the noise that they start from, or that a given shot is noised with.
        given: Clean latents of the given shots, by their index in the scene counting from 0 (a global shot counts).
        t_c: Noise level of the given shots, 0-1000 (paper, 4.2: 100-500; C: 100). Low keeps more of them.
        steps: Euler steps (paper, A.2: 32).
        guidance: Guidance on the texts (default: none).
        pattern: As :class:`SceneModel` takes it.
        callback: Called after every step.

    Returns:
        Clean latents for every shot of the scene, the given ones as they came; None for a global shot.

    Raises:
        ValueError: as :class:`SceneModel` does; for a given shot that the scene does not have or of another shape, a
            scene with nothing to generate, a level outside 0-1000 and fewer than one step.
    """
    active = left_to_generate(scene, given, t_c)
    held = noised_shots(model, scene, given, t_c)
    texts = branches(scene, guidance)

    def velocity(latents: list[Latents], t: float) -> list[Latents]:
        now = {**held, **dict(zip(active, latents, strict=True))}
        levels = [0.0 if shot.role == "global" else t_c / 1000 if i in held else t for i, shot in enumerate(scene)]
        said = [predict(model, _with(branch, now), levels, active, pattern=pattern) for branch in texts]
        return said[0] if guidance is None or len(said) == 1 else guidance.combine(*said)

    done = euler(velocity, [scene[i].latents for i in active], steps=steps, shots=active, callback=callback)
    result = {**given, **dict(zip(active, done, strict=True))}
    return [result.get(i) for i in range(len(scene))]


def left_to_generate(scene: Sequence[ShotInput], given: Mapping[int, Latents], t_c: float) -> list[int]:
    """Indices of the shots of a scene that are not given.

    Raises:
        ValueError: where there are none, for a shot without noise, a global shot that is not the first, a given shot
            that the scene does not have or of another shape, and a level outside 0-1000.
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
    return left


def with_dummy_video(model: SceneModel, scene: Sequence[ShotInput]) -> list[ShotInput]:
    """The scene with a global shot's dummy video filled in, as large as the first shot.

    As :class:`SceneModel` does it; but where shots are generated one after the other, calls may leave the first out.
    """
    first, *rest = scene
    if first.role != "global" or first.latents is not None:
        return list(scene)
    return [replace(first, latents=torch.zeros_like(rest[0].latents[:, :, : model.adapter.traits.patch[0]])), *rest]


def noised_shots(
    model: SceneModel, scene: Sequence[ShotInput], given: Mapping[int, Latents], t_c: float
) -> dict[int, Latents]:
    """Given shots at the noise level of a condition, each with its own noise: its latents in the scene."""
    path = model.adapter.traits.path
    return {
        i: path.add_noise(latents, scene[i].latents, torch.full((len(latents),), t_c / 1000))
        for i, latents in given.items()
    }


def predict(
    model: SceneModel,
    scene: Sequence[ShotInput],
    levels: Sequence[float],
    active: Sequence[int],
    *,
    pattern: str | Pattern,
    cache: KVCache | None = None,
) -> list[Latents]:
    """The velocity of the active shots of a scene whose shots stand at these noise levels."""
    outputs = model(scene, torch.tensor(levels), pattern=pattern, cache=cache)
    path = model.adapter.traits.path
    return [path.to_velocity(outputs[i], scene[i].latents, torch.full((len(outputs[i]),), levels[i])) for i in active]


def _with(scene: Sequence[ShotInput], latents: Mapping[int, Latents]) -> list[ShotInput]:
    return [replace(shot, latents=latents[i]) if i in latents else shot for i, shot in enumerate(scene)]
