"""Conditional generation: given clips or images are shots of low noise (paper, 3.2.3 and Fig. 4 a.2)."""

from collections.abc import Mapping, Sequence

from lct_core.backbone.inputs import ShotInput
from lct_core.experts import Experts
from lct_core.generation.common import Levels, left_to_generate
from lct_core.generation.director import Director
from lct_core.generation.euler import Callback, Latents
from lct_core.generation.guidance import Guidance
from lct_core.generation.schedulers import Steps
from lct_core.generation.takes import Take, in_order
from lct_core.patterns import Pattern
from lct_core.scene_model import SceneModel


def conditional(
    model: SceneModel | Experts,
    scene: Sequence[ShotInput],
    given: Mapping[int, Latents],
    *,
    t_c: Levels = 100.0,
    steps: Steps = 32,
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
        t_c: Noise level of the given shots, 0-1000, for all or by index (paper, 4.2: 100-500; C: 100). Low keeps more
            of them.
        steps: Euler steps (paper, A.2: 32), their noise levels, or a scheduler, as :class:`Director` takes them.
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
    left = left_to_generate(scene, given, t_c, in_order=in_order(pattern))
    director = Director(model, scene, guidance=guidance, t_c=t_c, steps=steps)
    for i, latents in given.items():
        director.give(i, latents)
    take = Take(tuple(left), history=tuple(sorted(given)), cached=False, pattern=pattern)
    director.keep(director.shoot(take, callback=callback), take)
    return [director.done.get(i) for i in range(len(scene))]
