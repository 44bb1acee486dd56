"""Joint generation: all shots of a scene at once (paper, 3.2.3 and Fig. 4 a.1)."""

from collections.abc import Sequence

from lct_core.backbone.inputs import ShotInput
from lct_core.experts import Experts
from lct_core.generation.conditional import conditional
from lct_core.generation.euler import Callback, Latents
from lct_core.generation.guidance import Guidance
from lct_core.generation.schedulers import Steps
from lct_core.patterns import Pattern
from lct_core.scene_model import SceneModel


def joint(
    model: SceneModel | Experts,
    scene: Sequence[ShotInput],
    *,
    steps: Steps = 32,
    guidance: Guidance | None = None,
    pattern: str | Pattern = "bidirectional",
    callback: Callback | None = None,
) -> list[Latents | None]:
    """Generate all shots together, at one noise level.

    A scene of one shot is the base model's own single-shot generation, with the same noise levels in ``steps``.

    Args:
        model: A scene model, tuned with the pattern.
        scene: The shots; their latents are the noise that they start from, e.g. :func:`lct_core.shot_noise`.
        steps: Euler steps (paper, A.2: 32), their noise levels, or a scheduler, as :class:`Director` takes them.
        guidance: Guidance on the texts (default: none).
        pattern: As :class:`SceneModel` takes it.
        callback: Called after every step.

    Returns:
        Clean latents for every shot of the scene; None for a global shot.

    Raises:
        ValueError: as :class:`SceneModel` does, and for fewer than one step.
    """
    return conditional(model, scene, {}, steps=steps, guidance=guidance, pattern=pattern, callback=callback)
