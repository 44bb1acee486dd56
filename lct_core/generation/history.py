"""Which earlier shots a shot sees when shots are generated one after the other (paper, 3.4)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lct_core.layout import Shot

History = Callable[[int, Sequence[int]], Sequence[int]]
"""``history(shot, earlier)``: which of the earlier shots of a scene a shot sees, in this order, all by index.

The global shot is not among them: it is always seen.
"""


@dataclass(frozen=True)
class Recent:
    """The choice of :func:`recent`."""

    window: int

    def __call__(self, shot: int, earlier: Sequence[int]) -> Sequence[int]:
        """The last of the earlier shots."""
        return last_before((shot,), earlier, window=self.window)


def last_before(made: Sequence[int], shots: Iterable[int], *, window: int) -> tuple[int, ...]:
    """The last shots before a take's that fit a window with it.

    Args:
        made: The shots of the take, by index.
        shots: Those that it may see, by index; later ones are left out.
        window: Most shots in the take and its history together, the global one not counted.
    """
    earlier = sorted(i for i in shots if i < min(made))
    return tuple(earlier[max(0, len(earlier) - max(0, window - len(made))) :])


def recent(window: int = 9) -> Recent:
    """The last shots that fit the window in which the model was trained, the current one counted.

    Args:
        window: Most shots in it, the global one not counted (paper, 4: nine).

    Raises:
        ValueError: for a window of less than one shot.
    """
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window: got {window!r}, expected at least 1, the current shot")
    return Recent(window)


def room(shots: Sequence[Shot], window: int, *, text: bool) -> int:
    """Tokens of the longest row that a window allows: the global shot, and as many others, the largest.

    Args:
        shots: A scene's.
        window: Most shots in it, the global one not counted.
        text: Whether their text takes part in self-attention.
    """
    sizes = [(shot.role == "global", shot.tokens if text else shot.video) for shot in shots]
    largest = sorted((size for is_global, size in sizes if not is_global), reverse=True)
    return sum(largest[:window]) + sum(size for is_global, size in sizes if is_global)


def choose(history: History, scene: Sequence[int], shot: int) -> list[int]:
    """The earlier shots that a shot sees.

    Args:
        history: The choice.
        scene: Indices of the shots of a scene, the global one left out.
        shot: The current one.

    Raises:
        ValueError: for a choice of a shot that is not an earlier one, or of a shot twice.
    """
    earlier = [i for i in scene if i < shot]
    chosen = list(history(shot, earlier))
    if unknown := [i for i in chosen if i not in earlier]:
        raise ValueError(f"history: got {unknown} for shot {shot}, expected some of the earlier shots, {earlier}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"history: got {chosen} for shot {shot}, expected every shot once")
    return chosen
