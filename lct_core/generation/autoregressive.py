"""Auto-regressive generation with a bidirectional model: shot after shot, earlier ones given (paper, Fig. 4 a.2)."""

from collections.abc import Mapping, Sequence

from lct_core.backbone.inputs import ShotInput
from lct_core.experts import Experts
from lct_core.generation.common import Levels, left_to_generate
from lct_core.generation.director import Director
from lct_core.generation.euler import Callback, Latents
from lct_core.generation.guidance import Guidance
from lct_core.generation.history import History, choose, recent
from lct_core.generation.schedulers import Steps
from lct_core.generation.takes import Take
from lct_core.patterns import Pattern
from lct_core.scene_model import SceneModel


def autoregressive(
    model: SceneModel | Experts,
    scene: Sequence[ShotInput],
    given: Mapping[int, Latents] | None = None,
    *,
    t_c: Levels = 100.0,
    history: History | None = None,
    seed: int = 0,
    steps: Steps = 32,
    guidance: Guidance | None = None,
    pattern: str | Pattern = "bidirectional",
    callback: Callback | None = None,
) -> list[Latents | None]:
    """Generate one shot at a time, each from the earlier ones as low-noise conditions.

    Every step runs the whole history again; with a context-causal model :func:`causal` does not.

    Args:
        model: A scene model, tuned with the pattern.
        scene: The shots; their latents are the noise that they start from, or that a given shot is noised with, in the
            dtype and on the device in which the model is called.
        given: Clean latents of the first shots, which are not to be generated, by their index in the scene counting
            from 0.
        t_c: Noise level of earlier shots, 0-1000, for all or by index (paper, 4.2: 100-500). Low keeps more of them,
            high accumulates fewer errors.
        history: Which earlier shots are seen (default: the last eight, see :func:`recent`); the global one always is.
        seed: Of the noise that a generated shot gets as history: another than the one that it started from, which it
            still tells of (ours; the paper leaves it open).
        steps: Euler steps for each shot (paper, A.2: 32), their noise levels, or a scheduler, as :class:`Director`
            takes them.
        guidance: Guidance on the texts (default: none).
        pattern: As :class:`SceneModel` takes it.
        callback: Called after every step.

    Returns:
        Clean latents for every shot of the scene, in float32 at least, the given ones as they came; None for a global
        shot.

    Raises:
        ValueError: as :func:`conditional` does, and for a history that is not of earlier shots.
    """
    given = dict(given or {})
    left = left_to_generate(scene, given, t_c, in_order=True)
    director = Director(model, scene, guidance=guidance, t_c=t_c, seed=seed, steps=steps)
    for i, latents in given.items():
        director.give(i, latents)
    shots = [i for i, shot in enumerate(scene) if shot.role != "global"]
    for i in left:
        seen = choose(history or recent(), shots, i)
        take = Take((i,), history=tuple(seen), cached=False, pattern=pattern)
        director.keep(director.shoot(take, callback=callback), take)
    return [director.done.get(i) for i in range(len(scene))]
