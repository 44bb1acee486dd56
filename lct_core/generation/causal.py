"""Auto-regressive generation with a context-causal model and a KV cache (paper, 3.3 and Fig. 4 b)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lct_core.backbone.inputs import ShotInput
from lct_core.experts import Experts
from lct_core.generation.common import Levels, left_to_generate
from lct_core.generation.director import Director
from lct_core.generation.euler import Callback, Latents
from lct_core.generation.guidance import Guidance
from lct_core.generation.history import History, Recent, choose, recent
from lct_core.generation.schedulers import Steps
from lct_core.generation.takes import Take
from lct_core.scene_model import SceneModel


def causal(
    model: SceneModel | Experts,
    scene: Sequence[ShotInput],
    given: Mapping[int, Latents] | None = None,
    *,
    t_c: Levels = 100.0,
    history: History | None = None,
    seed: int = 0,
    steps: Steps = 32,
    guidance: Guidance | None = None,
    new_cache: Callable[..., Any] | None = None,
    callback: Callback | None = None,
) -> list[Latents | None]:
    """Generate one shot at a time, each from the keys and values of the earlier ones.

    A finished shot is noised to ``t_c`` and its keys and values are written in one pass of its own, seeing the history
    that it was generated from; guidance keeps a second cache, written with the negative prompts. Shots that have left
    the window stay in the cache, and on the device where ``new_cache`` gives it no budget.

    Args:
        model: A scene model, tuned with context-causal attention.
        scene: The shots; their latents are the noise that they start from, or that a given shot is noised with, in the
            dtype and on the device in which the model is called.
        given: Clean latents of the first shots, which are not to be generated, by their index in the scene counting
            from 0.
        t_c: Noise level of the history, 0-1000, for all or by index (paper, 4.2: 100-500). Low keeps more of it, high
            accumulates fewer errors.
        history: Which earlier shots are seen (default: the last eight, see :func:`recent`); the global one always is.
            A chosen shot's keys hold what it saw itself when it was made (:meth:`KVCache.select`).
        seed: Of the noise that a generated shot gets as history: another than the one that it started from, which it
            still tells of (ours; the paper leaves it open).
        steps: Euler steps for each shot (paper, A.2: 32), their noise levels, or a scheduler, as :class:`Director`
            takes them.
        guidance: Guidance on the texts (default: none).
        new_cache: Makes an empty cache, as :class:`Director` takes it.
        callback: Called after every step.

    Returns:
        Clean latents for every shot of the scene, in float32 at least, the given ones as they came; None for a global
        shot.

    Raises:
        ValueError: as :func:`conditional` does, and for a history that is not of earlier shots.
    """
    given = dict(given or {})
    left_to_generate(scene, given, t_c, in_order=True)
    choice = history or recent()
    window = choice.window if isinstance(choice, Recent) else 9  # of others, nobody knows before they choose
    director = Director(
        model, scene, guidance=guidance, t_c=t_c, seed=seed, steps=steps, window=window, new_cache=new_cache
    )
    shots = [i for i, shot in enumerate(scene) if shot.role != "global"]
    for i in shots:
        seen = choose(choice, shots, i)
        if i in given:
            director.give(i, given[i], history=seen)
        else:
            take = Take((i,), history=tuple(seen))
            director.keep(director.shoot(take, callback=callback), take)
    return [director.done.get(i) for i in range(len(scene))]
