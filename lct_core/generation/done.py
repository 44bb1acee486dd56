"""What is done of a scene, and what depends on what."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lct_core.backbone.inputs import ShotInput
from lct_core.generation.euler import Latents
from lct_core.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A shot that is done, and what stands for it in what is made from it.

    Args:
        latents: The clean shot.
        shot: Its prompt and noise, as it was made.
        level: Its noise level as a condition and as history, 0-1000.
        history: The shots behind which its keys and values are written.
        beside: The shots made with it that it saw.
        pattern: The pattern that it was made with.
        given: Whether it was given, not made.
    """

    latents: Latents
    shot: ShotInput
    level: float
    history: tuple[int, ...]
    beside: frozenset[int]
    pattern: str | Pattern
    given: bool


def dependents(kept: Mapping[int, Kept], shots: Iterable[int], *, seen_by_all: Iterable[int]) -> set[int]:
    """Every done shot that saw one of these, directly or through others.

    Args:
        kept: What is done, by index.
        shots: Indices, of shots that may not be done.
        seen_by_all: The global shot.
    """
    saw = {i: {*seen_by_all, *each.history, *each.beside} for i, each in kept.items()}
    replaced = set(shots)
    found = set(replaced)
    while more := {i for i in saw if i not in found and found & saw[i]}:
        found |= more
    return found - replaced
