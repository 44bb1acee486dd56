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
from typing import NamedTuple, get_args

from lct_core.generation.history import choose, recent
from lct_core.generation.takes import Take, _shots
from lct_core.generation.write import Write
from lct_core.layout import Shot
from lct_core.patterns import PATTERNS, Pattern
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
        text_free: Whether the row hears no prompt, so that what is kept serves both branches of guidance.
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
    steps: int = 32,
    window: int = 9,
    write: Write = "pass",
    shared_history: bool = False,
) -> list[Pass]:
    """What some takes run for one branch of guidance, in order.

    Args:
        scene: The shots' token counts, a global shot first where there is one.
        takes: What is made; a shot of a history that none of them makes is given.
        steps: Calls of the model for every take (paper, A.2: 32): Euler steps, or what a scheduler makes of its own.
        window: Most shots that a shot sees, itself counted, where no take says which (paper, 4: nine).
        write: Whether keys and values that a later take needs are written in a pass of their own (``"pass"``, paper) or
            are those of a step that is run anyway (``"nearest"``). Those of a given shot, and of one that was not made
            alone and through the cache, always take a pass.
        shared_history: Whether one history serves both branches of guidance (:class:`Guidance`), so that passes which
            write shots are run text-free, and in one branch alone.

    Raises:
        ValueError: for a scene without shots, another number or way to write, a pattern that is unknown or chooses by
            data, and a take of shots that the scene does not have.
    """
    shots, first = _shots(scene), tuple(i for i, shot in enumerate(scene) if shot.role == "global")
    if write not in get_args(Write):
        raise ValueError(f"write: got {write!r}, expected one of {get_args(Write)}")
    if write == "nearest" and shared_history:
        raise ValueError(
            'write: got "nearest", but a shared history is written in a pass that hears no prompt; expected "pass"'
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps: got {steps!r}, expected an int of at least 1: calls of the model for every take")
    histories = [_seen(take, shots, window) for take in takes]
    stands_behind = {
        i: (*seen, *take.shots[:n])
        for take, seen in zip(takes, histories, strict=True)
        for n, i in enumerate(take.shots)
    }
    made_with = {i: _pattern(take.pattern) for take in takes for i in take.shots}
    held = {take.shots[0] for take in takes if write == "nearest" and take.cached and len(take.shots) == 1}
    written: set[int] = set()
    run: list[Pass] = []

    def need(history: Sequence[int]) -> None:
        """Have the keys and values of some shots written, each behind what it was made from."""
        for i in history:
            if i in written:
                continue
            written.add(i)
            behind = (
                ()
                if i in first
                else (*first, *(stands_behind[i] if i in stands_behind else choose(recent(window), shots, i)))
            )
            need(behind)
            if i not in held:
                free = shared_history and i not in first
                pattern = made_with.get(i, PATTERNS["context_causal"])
                run.append(Pass((i,), (i,), behind, pattern, 1, cached=True, writes=True, text_free=free))

    for take, history in zip(takes, histories, strict=True):
        pattern = _pattern(take.pattern)
        if take.cached:
            need([*first, *history])
            holds = take.shots[0] in held
            run.append(Pass(take.shots, take.shots, (*first, *history), pattern, steps, cached=True, writes=holds))
        else:
            run.append(Pass(take.shots, (*first, *merge(history, take.shots)), (), pattern, steps))
    return run


def _seen(take: Take, shots: Sequence[int], window: int) -> tuple[int, ...]:
    """What a take sees, the global shot left out."""
    left = max(0, window - len(take.shots))
    history = tuple(choose(recent(left + 1), shots, take.shots[0])) if take.history is None else take.history
    if unknown := [i for i in (*take.shots, *history) if i not in shots]:
        raise ValueError(f"takes: got shots {unknown}, expected some of {list(shots)}, the scene's, counting from 0")
    return history


def _pattern(pattern: str | Pattern) -> Pattern:
    if isinstance(pattern, Router):
        raise ValueError(
            f"pattern: got a {type(pattern).__name__}, which chooses from queries and keys when it runs, so that its "
            'pairs are not known before; expected one that does not, such as "context_causal": all that it can choose'
        )
    if callable(pattern):
        return pattern
    if pattern not in PATTERNS:
        raise ValueError(f"pattern: got {pattern!r}, expected one of {list(PATTERNS)} or a function of a layout")
    return PATTERNS[pattern]
