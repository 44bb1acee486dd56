"""A generation as passes through the model: which shots together, behind which history, how often.

For N shots of s tokens and K Euler steps, where every shot sees all before it, and the global shot left out here (but
not below):

==================  ======================  ============================
mode                tokens through layers   attended pairs
==================  ======================  ============================
joint, conditional  K N s                   K N² s²
causal              (K + 1) N s             (K + 1) N (N + 1) / 2 s²
autoregressive      K N (N + 1) / 2 s       K N (N + 1) (N + 2) / 6 s²
==================  ======================  ============================

So tokens grow linearly, and quadratically only where the history is run again. Pairs grow quadratically where all shots
see one another, half as fast if context-causal, and with the third power where the history is run again (context-causal
too; bidirectional, twice that in the limit). A window makes all of it linear. A cache costs one pass more for each
shot, which writes it at the level t_c; the last shot needs none: s tokens and N s² pairs less.
"""

from collections.abc import Sequence
from heapq import merge
from typing import NamedTuple, Unpack

from lct_core import lineage
from lct_core.generation import Sampling, Take
from lct_core.generation.history import last_before
from lct_core.generation.sampling import SamplingOptions
from lct_core.generation.takes import shots_of
from lct_core.generation.write import NEAREST_SHARED
from lct_core.layout import Shot
from lct_core.patterns import PATTERNS, Pattern, named
from lct_core.routing import Router


class Pass(NamedTuple):
    """Some shots through the model at once, a number of times.

    Args:
        made: The shots of the scene that it is run for, by index.
        row: The shots that go through the layers, by index.
        behind: The shots that are seen besides, from a cache, by index.
        pattern: Who sees whom, what is cached counted in.
        times: How often it is run.
        cached: Whether the keys and values of the row go into a cache.
        writes: Whether they are then kept as history: in a pass of its own, or in the step nearest to their level.
        text_free: Whether it is run without prompts, so that what is kept serves both branches of guidance.
    """

    made: tuple[int, ...]
    row: tuple[int, ...]
    behind: tuple[int, ...]
    pattern: Pattern
    times: int
    cached: bool = False
    writes: bool = False
    text_free: bool = False


def passes(
    scene: Sequence[Shot],
    takes: Sequence[Take],
    *,
    sampling: Sampling | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Pass]:
    """What some takes run for one branch of guidance, in order.

    Args:
        scene: The shots' token counts, a global shot first where there is one.
        takes: What is made; a shot of a history that none of them makes is given.
        sampling: How it generates (default: ``Sampling()``). Its ``steps`` are calls of the model for every take: Euler
            steps, or what a scheduler makes of its own. With ``write="nearest"``, keys and values of a given shot, and
            of one that was not made alone and through the cache, take a pass all the same. With a shared history,
            passes which write shots are run text-free, and in one branch alone.
        options: Fields of the sampling.

    Raises:
        ValueError: as :class:`Sampling` does, for a scene without shots, another number of steps, a pattern that is
            unknown or chooses by data, and a take of shots that the scene does not have.
    """
    sampling = Sampling.of(sampling, options)
    steps, write, window = sampling.steps, sampling.write, sampling.window
    shots, first = shots_of(scene), tuple(i for i, shot in enumerate(scene) if shot.role == "global")
    if write == "nearest" and sampling.shares_history:
        raise ValueError(NEAREST_SHARED)
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise ValueError(f"steps: got {steps!r}, expected an int of at least 1: calls of the model for every take")
    histories = [_seen(take, shots, window) for take in takes]
    behind: dict[int, tuple[int, ...]] = {i: (*first, *last_before((i,), shots, window=window)) for i in shots}
    for take, history in zip(takes, histories, strict=True):
        behind |= {i: (*first, *lineage.behind(history, take.shots, i)) for i in take.shots}
    made_with = {i: _pattern(take.pattern) for take in takes for i in take.shots}
    held = {take.shots[0] for take in takes if write == "nearest" and take.cached and len(take.shots) == 1}
    written: set[int] = set()
    run: list[Pass] = []
    for take, history in zip(takes, histories, strict=True):
        pattern = _pattern(take.pattern)
        if take.cached:
            for i in lineage.writing_order(behind, [*first, *history], written):
                written.add(i)
                if i not in held:
                    free = sampling.shares_history and i not in first
                    by = made_with.get(i, PATTERNS["context_causal"])
                    run.append(Pass((i,), (i,), behind.get(i, ()), by, 1, cached=True, writes=True, text_free=free))
            holds = take.shots[0] in held
            run.append(Pass(take.shots, take.shots, (*first, *history), pattern, steps, cached=True, writes=holds))
        else:
            run.append(Pass(take.shots, (*first, *merge(history, take.shots)), (), pattern, steps))
    return run


def _seen(take: Take, shots: Sequence[int], window: int) -> tuple[int, ...]:
    """What a take sees, the global shot left out."""
    history = last_before(take.shots, shots, window=window) if take.history is None else take.history
    if unknown := [i for i in (*take.shots, *history) if i not in shots]:
        raise ValueError(f"takes: got shots {unknown}, expected some of {list(shots)}, the scene's, counting from 0")
    return history


def _pattern(pattern: str | Pattern) -> Pattern:
    if isinstance(pattern, Router):
        raise ValueError(
            f"pattern: got a {type(pattern).__name__}, which chooses from queries and keys when it runs, so that its "
            'pairs are not known before; expected one that does not, such as "context_causal": all that it can choose'
        )
    return named(pattern)
