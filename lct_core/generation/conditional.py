"""Conditional generation: given clips or images are shots of low noise (paper, 3.2.3 and Fig. 4 a.2)."""

from collections.abc import Mapping, Sequence

import torch

from lct_core.backbone import ShotInput
from lct_core.experts import Experts
from lct_core.generation.common import as_condition, left_to_generate, noisy_parts, predict
from lct_core.generation.euler import Callback, Latents, euler
from lct_core.generation.guidance import Guidance, branches
from lct_core.masks import Pattern
from lct_core.scene_model import SceneModel


@torch.no_grad()
def conditional(
    model: SceneModel | Experts,
    scene: Sequence[ShotInput],
    given: Mapping[int, Latents],
    *,
    t_c: float = 100.0,
    steps: int | Sequence[float] = 32,
    guidance: Guidance | None = None,
    pattern: str | Pattern = "bidirectional",
    callback: Callback | None = None,
) -> list[Latents | None]:
    """Generate the other shots of a scene together, at one noise level, from the given ones.

    A given shot may be a clip or an image, its latents one frame; it keeps its place in the scene and its text. It is
    noised to ``t_c`` once, with its own noise (ours; the paper leaves open whether each step draws anew).

    Args:
        model: A scene model, tuned with the pattern.
        scene: The shots; their latents are the noise that they start from, or that a given shot is noised with, in the
            dtype and on the device in which the model is called.
        given: Clean latents of the given shots, by their index in the scene counting from 0 (a global shot counts).
        t_c: Noise level of the given shots, 0-1000 (paper, 4.2: 100-500; C: 100). Low keeps more of them.
        steps: Euler steps (paper, A.2: 32), or their noise levels, as :func:`euler` takes them.
        guidance: Guidance on the texts (default: none).
        pattern: As :class:`SceneModel` takes it.
        callback: Called after every step.

    Returns:
        Clean latents for every shot of the scene, in float32 at least, the given ones as they came; None for a global
        shot.

    Raises:
        ValueError: as :class:`SceneModel` does; for a given shot that the scene does not have, of another shape or, in
            a context-causal model, after one that would not see it; a scene with nothing to generate, a level outside
            0-1000 and fewer than one step.
    """
    active = left_to_generate(scene, given, t_c, in_order=pattern == "context_causal")
    texts = branches(scene, guidance, model.adapter.traits)
    held = {i: as_condition(model, scene[i], latents, scene[i].latents, t_c) for i, latents in given.items()}

    def velocity(latents: list[Latents], t: float) -> list[Latents]:
        now = {**held, **dict(zip(active, latents, strict=True))}
        levels = [0.0 if shot.role == "global" else t_c / 1000 if i in held else t for i, shot in enumerate(scene)]
        return predict(model, texts, guidance, now, levels, active, pattern=pattern)

    noise, path, noisy = (
        [scene[i].latents for i in active],
        model.adapter.traits.path,
        noisy_parts(model, scene, active),
    )
    done = euler(velocity, noise, path=path, noisy=noisy, steps=steps, shots=active, callback=callback)
    result = {**given, **dict(zip(active, done, strict=True))}
    return [result.get(i) for i in range(len(scene))]
