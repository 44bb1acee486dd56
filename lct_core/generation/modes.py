"""The four modes of generation (paper, 3.2.3, 3.3 and Fig. 4), each a list of takes.

=====================  ===========================  ==================================
mode                   shots that are made          what they see
=====================  ===========================  ==================================
:func:`joint`          all at once                  one another
:func:`conditional`    those not given, at once     one another and the given shots
:func:`autoregressive` one after the other          earlier shots, run again every step
:func:`causal`         one after the other          keys and values of earlier shots
=====================  ===========================  ==================================

How they generate is a :class:`Sampling`: given as ``sampling``, or its fields as keywords. Fields that a mode has no
use for change nothing, such as ``storage`` where there is no cache; what the model does not allow with them, every mode
refuses.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from lct_core.backbone import ShotInput
from lct_core.denoiser import Denoiser
from lct_core.generation.common import left_to_generate
from lct_core.generation.director import Director
from lct_core.generation.euler import Callback, Latents
from lct_core.generation.history import History, Recent, choose, recent
from lct_core.generation.sampling import Sampling, SamplingOptions
from lct_core.generation.takes import Take, in_order, shots_of
from lct_core.patterns import Pattern


def joint(
    model: Denoiser,
    scene: Sequence[ShotInput],
    *,
    pattern: str | Pattern = "bidirectional",
    callback: Callback | None = None,
    sampling: Sampling | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Latents | None]:
    """Generate all shots together, at one noise level (paper, 3.2.3 and Fig. 4 a.1).

    A scene of one shot is the base model's own single-shot generation, with the same noise levels in ``steps``.

    Args:
        model: A scene model, tuned with the pattern.
        scene: The shots; their latents are the noise that they start from, e.g. :func:`lct_core.shot_noise`.
        pattern: As :class:`SceneModel` takes it.
        callback: Called after every step.
        sampling: How it generates (default: ``Sampling()``).
        options: Fields of the sampling.

    Returns:
        Clean latents for every shot of the scene; None for a global shot.

    Raises:
        ValueError: as :class:`SceneModel` and :class:`Sampling` do, and for fewer than one step.
    """
    return conditional(model, scene, {}, pattern=pattern, callback=callback, sampling=sampling, **options)


def conditional(
    model: Denoiser,
    scene: Sequence[ShotInput],
    given: Mapping[int, Latents],
    *,
    pattern: str | Pattern = "bidirectional",
    callback: Callback | None = None,
    sampling: Sampling | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Latents | None]:
    """Generate the other shots of a scene together, at one noise level, from the given ones (paper, Fig. 4 a.2).

    A given shot may be a clip or an image, its latents one frame; it keeps its place in the scene and its text. It is
    noised to ``t_c`` once, with its own noise (ours; the paper leaves open whether each step draws anew).

    Args:
        model: A scene model, tuned with the pattern.
        scene: The shots; their latents are the noise that they start from, or that a given shot is noised with, in the
            dtype and on the device in which the model is called.
        given: Clean latents of the given shots, by their index in the scene counting from 0 (a global shot counts).
        pattern: As :class:`SceneModel` takes it.
        callback: Called after every step.
        sampling: How it generates (default: ``Sampling()``).
        options: Fields of the sampling.

    Returns:
        Clean latents for every shot of the scene, in float32 at least, the given ones as they came; None for a global
        shot.

    Raises:
        ValueError: as :class:`SceneModel` and :class:`Sampling` do; for a given shot that the scene does not have, of
            another shape or, in a context-causal model, after one that would not see it; a scene with nothing to
            generate, and fewer than one step.
    """
    sampling = Sampling.of(sampling, options)
    left = left_to_generate(scene, given, in_order=in_order(pattern))
    director = Director(model, scene, sampling=sampling)
    for i, latents in given.items():
        director.give(i, latents)
    take = Take(tuple(left), history=tuple(sorted(given)), cached=False, pattern=pattern)
    return _made(director, [take], callback)


def autoregressive(
    model: Denoiser,
    scene: Sequence[ShotInput],
    given: Mapping[int, Latents] | None = None,
    *,
    history: History | None = None,
    seed: int = 0,
    pattern: str | Pattern = "bidirectional",
    callback: Callback | None = None,
    sampling: Sampling | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Latents | None]:
    """Generate one shot at a time, each from the earlier ones as low-noise conditions (paper, Fig. 4 a.2).

    Every step runs the whole history again; with a context-causal model :func:`causal` does not.

    Args:
        model: A scene model, tuned with the pattern.
        scene: As :func:`conditional` takes it.
        given: Clean latents of the first shots, which are not to be generated, by their index in the scene counting
            from 0.
        history: Which earlier shots are seen (default: the last ones of the sampling's window, see :func:`recent`); the
            global one always is. ``recent(n)`` sets the window too.
        seed: Of the noise that a generated shot gets as history, see :class:`Director`.
        pattern: As :class:`SceneModel` takes it.
        callback: Called after every step.
        sampling: How it generates (default: ``Sampling()``).
        options: Fields of the sampling.

    Returns:
        As :func:`conditional` does.

    Raises:
        ValueError: as :func:`conditional` does, and for a history that is not of earlier shots.
    """
    sampling = _seeing(history, Sampling.of(sampling, options))
    director = Director(model, scene, sampling=sampling, seed=seed)
    return _one_by_one(director, given or {}, history, callback, cached=False, pattern=pattern)


def causal(
    model: Denoiser,
    scene: Sequence[ShotInput],
    given: Mapping[int, Latents] | None = None,
    *,
    history: History | None = None,
    seed: int = 0,
    new_cache: Callable[..., Any] | None = None,
    callback: Callback | None = None,
    sampling: Sampling | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Latents | None]:
    """Generate one shot at a time, each from the keys and values of the earlier ones (paper, 3.3 and Fig. 4 b).

    A finished shot is noised to ``t_c`` and its keys and values are written in one pass of its own, seeing the history
    that it was generated from; guidance keeps a second cache, written with the negative prompts. Shots that have left
    the window stay in the cache, and on the device where the cache has no budget.

    Args:
        model: A scene model, tuned with context-causal attention.
        scene: As :func:`conditional` takes it.
        given: As :func:`autoregressive` takes it.
        history: As :func:`autoregressive` takes it. A chosen shot's keys hold what it saw itself when it was made
            (:meth:`KVCache.select`).
        seed: Of the noise that a generated shot gets as history, see :class:`Director`.
        new_cache: Makes an empty cache, as :class:`Director` takes it.
        callback: Called after every step.
        sampling: How it generates (default: ``Sampling()``).
        options: Fields of the sampling.

    Returns:
        As :func:`conditional` does.

    Raises:
        ValueError: as :func:`conditional` does, and for a history that is not of earlier shots.
    """
    sampling = _seeing(history, Sampling.of(sampling, options))
    director = Director(model, scene, sampling=sampling, seed=seed, new_cache=new_cache)
    return _one_by_one(director, given or {}, history, callback, cached=True)


def _seeing(history: History | None, sampling: Sampling) -> Sampling:
    """The sampling with the window of a history, where it is known before it chooses."""
    return replace(sampling, window=history.window) if isinstance(history, Recent) else sampling


def _one_by_one(
    director: Director,
    given: Mapping[int, Latents],
    history: History | None,
    callback: Callback | None,
    *,
    cached: bool,
    pattern: str | Pattern = "context_causal",
) -> list[Latents | None]:
    left, shots = left_to_generate(director.scene, given, in_order=True), shots_of(director.scene)
    choice = history or recent(director.sampling.window)
    for i in sorted(given):
        director.give(i, given[i], history=choose(choice, shots, i) if cached else ())
    takes = (Take((i,), tuple(choose(choice, shots, i)), cached=cached, pattern=pattern) for i in left)
    return _made(director, takes, callback)


def _made(director: Director, takes: Iterable[Take], callback: Callback | None) -> list[Latents | None]:
    """Every shot of the scene after some takes."""
    for take in takes:
        director.keep(director.shoot(take, callback=callback), take)
    return [director.done.get(i) for i in range(len(director.scene))]
