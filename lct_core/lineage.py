"""What depends on what: which shots hold something of others, and in which order their keys and values are written.

Shots are named by whatever names them: an index, a number, an id. A shot ``saw`` others directly; through them it holds
something of all that those saw.
"""

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

Id = TypeVar("Id", bound=Hashable)


def dependents(saw: Mapping[Id, Collection[Id]], shots: Iterable[Id]) -> set[Id]:
    """Every shot that saw one of these, directly or through others; these themselves left out.

    Args:
        saw: What every shot saw directly.
        shots: Shots that ``saw`` may not know.
    """
    replaced = set(shots)
    found = set(replaced)
    while more := {i for i in saw if i not in found and not found.isdisjoint(saw[i])}:
        found |= more
    return found - replaced


def ancestors(saw: Mapping[Id, Collection[Id]], shot: Id) -> set[Id]:
    """A shot, all that it saw, all that those saw, and so on."""
    found: set[Id] = set()
    left = [shot]
    while left:
        i = left.pop()
        if i not in found:
            found.add(i)
            left += saw.get(i, ())
    return found


def behind(history: Sequence[Id], made: Sequence[Id], shot: Id) -> tuple[Id, ...]:
    """The shots visible when a shot's keys and values were written: its take's history, and what was made before it.

    Args:
        history: What the take saw, in order.
        made: The shots that the take made, in order.
        shot: One of them.
    """
    return (*history, *made[: made.index(shot)])


def beside(made: Sequence[Id], shot: Id, *, in_order: bool) -> frozenset[Id]:
    """The shots made with one that it saw: those before it where the attention is context-causal, else all.

    Args:
        made: The shots that a take made, in order.
        shot: One of them.
        in_order: Whether no shot saw a later one.
    """
    return frozenset(made[: made.index(shot)] if in_order else made) - {shot}


def writing_order(
    stands_behind: Mapping[Id, Sequence[Id]], shots: Iterable[Id], written: Collection[Id]
) -> Iterator[Id]:
    """Shots whose keys and values are to be written before these can be seen, and these, each after what it saw.

    Args:
        stands_behind: The shots visible when the keys of each are written.
        shots: What is to be seen.
        written: Shots that have their keys already.
    """
    done = set(written)

    def order(some: Iterable[Id]) -> Iterator[Id]:
        for i in some:
            if i not in done:
                done.add(i)
                yield from order(stands_behind.get(i, ()))
                yield i

    return order(shots)
