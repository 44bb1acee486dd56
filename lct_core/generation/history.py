"""Which earlier shots a shot sees when shots are generated one after the other (paper, 3.4)."""

from collections.abc import Callable, Sequence

History = Callable[[int, Sequence[int]], Sequence[int]]
"""``history(shot, earlier)``: which of the earlier shots of a scene a shot sees, in this order, all by index.

The global shot is not among them: it is always seen.
"""


def recent(window: int = 9) -> History:
    """The last shots that fit the window in which the model was trained, the current one counted.

    Args:
        window: Most shots in it, the global one not counted (paper, 4: nine).

    Raises:
        ValueError: for a window of less than one shot.
    """
    if window < 1:
        raise ValueError(f"window: got {window}, expected at least 1, the current shot")
    return lambda shot, earlier: earlier[len(earlier) - min(len(earlier), window - 1) :]


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
