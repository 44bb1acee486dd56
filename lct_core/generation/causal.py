"""Auto-regressive generation with a context-causal model and a KV cache (paper, 3.3 and Fig. 4 b)."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from lct_core.backbone import ShotInput
from lct_core.experts import Experts, new_cache
from lct_core.generation.common import as_condition, history_noise, left_to_generate, noisy_parts, predict
from lct_core.generation.euler import Callback, Latents, euler
from lct_core.generation.guidance import Guidance, branches
from lct_core.generation.history import History, choose, recent
from lct_core.scene_model import SceneModel, with_dummy_video


@torch.no_grad()
def causal(
    model: SceneModel | Experts,
    scene: Sequence[ShotInput],
    given: Mapping[int, Latents] | None = None,
    *,
    t_c: float = 100.0,
    history: History | None = None,
    seed: int = 0,
    steps: int | Sequence[float] = 32,
    guidance: Guidance | None = None,
    callback: Callback | None = None,
) -> list[Latents | None]:
    """Generate one shot at a time, each from the keys and values of the earlier ones.

    A finished shot is noised to ``t_c`` and its keys and values are written in one pass of its own, seeing the history
    that it was generated from; guidance keeps a second cache, written with the negative prompts.

    Args:
        model: A scene model, tuned with context-causal attention.
        scene: The shots; their latents are the noise that they start from, or that a given shot is noised with, in the
            dtype and on the device in which the model is called.
        given: Clean latents of the first shots, which are not to be generated, by their index in the scene counting
            from 0.
        t_c: Noise level of the history, 0-1000 (paper, 4.2: 100-500). Low keeps more of it, high accumulates fewer
            errors.
        history: Which earlier shots are seen (default: the last eight, see :func:`recent`); the global one always is.
            A chosen shot's keys hold what it saw itself when it was made (:meth:`KVCache.select`).
        seed: Of the noise that a generated shot gets as history: another than the one that it started from, which it
            still tells of (ours; the paper leaves it open).
        steps: Euler steps for each shot (paper, A.2: 32), or their noise levels, as :func:`euler` takes them.
        guidance: Guidance on the texts (default: none).
        callback: Called after every step.

    Returns:
        Clean latents for every shot of the scene, in float32 at least, the given ones as they came; None for a global
        shot.

    Raises:
        ValueError: as :func:`conditional` does, and for a history that is not of earlier shots.
    """
    done = dict(given or {})
    left = left_to_generate(scene, done, t_c, in_order=True)
    scene = with_dummy_video(scene, model.adapter)
    path = model.adapter.traits.path
    texts = branches(scene, guidance, model.adapter.traits)
    caches = [
        new_cache(model, capacity=sum(model.adapter.shot(shot).tokens for shot in branch if shot.latents is not None))
        for branch in texts
    ]
    shots = [i for i, shot in enumerate(scene) if shot.role != "global"]
    everywhere = [i for i, shot in enumerate(scene) if shot.role == "global"]

    def run(i: int, latents: Sequence[Latents], level: float, *, active: Sequence[int] = (0,)) -> list[Latents]:
        """One pass of shot i in every branch, behind the history."""
        alone = [[branch[i]] for branch in texts]
        return predict(
            model,
            alone,
            guidance,
            dict(enumerate(latents)),
            [level],
            active,
            pattern="context_causal",
            caches=caches,
        )

    def keep(i: int, latents: Sequence[Latents], level: float) -> None:
        """Write shot i behind the history, in a pass of its own whose prediction nobody needs."""
        run(i, latents, level, active=())
        for cache in caches:
            cache.append(i)

    for i in everywhere:  # clean, and first: it sees nothing else
        keep(i, [], 0.0)
    for i in shots:
        seen = [*everywhere, *choose(history or recent(), shots, i)]
        for cache in caches:
            if [entry.id for entry in cache.shots] != seen:
                cache.select(seen)
        noise = scene[i].latents
        if i in left:
            (done[i],) = euler(
                partial(run, i),
                [noise],
                path=path,
                noisy=noisy_parts(model, scene, [i]),
                steps=steps,
                shots=[i],
                callback=callback,
            )
            noise = history_noise(scene[i], i, seed).to(noise.dtype)
        if i != shots[-1]:
            keep(i, [as_condition(model, scene[i], done[i], noise, t_c)], t_c / 1000)
    return [done.get(i) for i in range(len(scene))]
