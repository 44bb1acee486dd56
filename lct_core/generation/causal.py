"""Auto-regressive generation with a context-causal model and a KV cache (paper, 3.3 and Fig. 4 b)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from lct_core.backbone import ShotInput
from lct_core.cache import KVCache
from lct_core.generation.conditional import left_to_generate, noised_shots, predict, with_dummy_video
from lct_core.generation.euler import Callback, Latents, euler
from lct_core.generation.guidance import Guidance, branches
from lct_core.generation.history import History, choose, recent
from lct_core.scene_model import SceneModel


@torch.no_grad()
def causal(
    model: SceneModel,
    scene: Sequence[ShotInput],
    given: Mapping[int, Latents] | None = None,
    *,
    t_c: float = 100.0,
    history: History | None = None,
    steps: int = 32,
    guidance: Guidance | None = None,
    callback: Callback | None = None,
) -> list[Latents | None]:
    """Generate one shot at a time, each from the keys and values of the earlier ones.

    A finished shot is noised to ``t_c`` and its keys and values are written in one pass of its own, seeing the history
    that it was generated from; guidance keeps a second cache, written with the negative prompts.

    Args:
        model: A scene model, tuned with context-causal attention.
        scene: The shots; their latents are the noise that they start from, and that they are noised with as history.
        given: Clean latents of shots that are not to be generated, by their index in the scene counting from 0.
        t_c: Noise level of the history, 0-1000 (paper, 4.2: 100-500). Low keeps more of it, high accumulates fewer
            errors.
        history: Which earlier shots are seen (default: the last eight, see :func:`recent`); the global one always is.
            A chosen shot's keys hold what it saw itself when it was made (:meth:`KVCache.select`).
        steps: Euler steps for each shot (paper, A.2: 32).
        guidance: Guidance on the texts (default: none).
        callback: Called after every step.

    Returns:
        Clean latents for every shot of the scene, the given ones as they came; None for a global shot.

    Raises:
        ValueError: as :func:`conditional` does, and for a history that is not of earlier shots.
    """
    done = dict(given or {})
    left = left_to_generate(scene, done, t_c)
    scene = with_dummy_video(model, scene)
    noised = noised_shots(model, scene, done, t_c)
    texts = branches(scene, guidance)
    caches = [KVCache() for _ in texts]
    shots = [i for i, shot in enumerate(scene) if shot.role != "global"]
    everywhere = [i for i, shot in enumerate(scene) if shot.role == "global"]

    def run(i: int, latents: list[Latents], level: float) -> list[Latents]:
        """One pass of shot i in every branch, behind the history: the guided velocity."""
        said = [
            predict(
                model, [replace(branch[i], latents=latents[0])], [level], [0], pattern="context_causal", cache=cache
            )
            for branch, cache in zip(texts, caches, strict=True)
        ]
        return said[0] if guidance is None or len(said) == 1 else guidance.combine(*said)

    for i in everywhere:  # clean, and first: it sees nothing else
        for branch, cache in zip(texts, caches, strict=True):
            predict(model, [branch[i]], [0.0], [], pattern="context_causal", cache=cache)
            cache.append(i)
    for i in shots:
        seen = [*everywhere, *choose(history or recent(), shots, i)]
        for cache in caches:
            if [entry.id for entry in cache.shots] != seen:
                cache.select(seen)
        if i in left:
            (done[i],) = euler(partial(run, i), [scene[i].latents], steps=steps, shots=[i], callback=callback)
            noised |= noised_shots(model, scene, {i: done[i]}, t_c)
        if i != shots[-1]:
            run(i, [noised[i]], t_c / 1000)
            for cache in caches:
                cache.append(i)
    return [done.get(i) for i in range(len(scene))]
