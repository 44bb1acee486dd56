"""Which token belongs to which shot of which scene: the one noun everything else derives from."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from typing import Literal, NamedTuple, get_args

Role = Literal["shot", "global"]


class Range(NamedTuple):
    """Half-open range of token positions in a row: ``start <= position < stop``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of tokens in the range."""
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """The range as a slice, for indexing."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Shot:
    """How many tokens one shot has.

    Args:
        text: Number of text tokens; 0 where the text is not part of self-attention.
        grid: Video tokens after patchify, ``(frames, height, width)``, each at least 1; ``(0, 0, 0)`` for a global
            prompt without dummy video, where text is cross-attended.
        role: ``"shot"``, or ``"global"`` for the global prompt with its dummy video (paper, 3.2.2).

    Raises:
        ValueError: for a negative count, an empty grid or an unknown role.
    """

    text: int
    grid: tuple[int, int, int]
    role: Role = "shot"

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        if not _is_count(self.text) or self.text < 0:
            raise ValueError(f"text: got {self.text!r}, expected a number of text tokens (an int, 0 or more)")
        bare = self.role == "global" and self.grid == (0, 0, 0)
        if len(self.grid) != 3 or not all(_is_count(n) and (n >= 1 or bare) for n in self.grid):
            raise ValueError(
                f"grid: got {self.grid!r}, expected three ints of at least 1: video tokens after patchify "
                "as (frames, height, width)"
            )
        if self.role not in get_args(Role):
            raise ValueError(f'role: got {self.role!r}, expected "shot" or "global"')

    @property
    def video(self) -> int:
        """Number of video tokens."""
        return prod(self.grid)

    @property
    def tokens(self) -> int:
        """Number of text and video tokens."""
        return self.text + self.video


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Layout:
    """Scenes of shots, side by side in one row of tokens.

    Immutable, hashable and cheap: it counts tokens, it holds none. Inside a shot the tokens keep the model's own order,
    text before video (the paper's) or after it (HunyuanVideo, SD3).

    Args:
        scenes: Scenes in row order, each a non-empty sequence of shots; a global shot can only come first in its scene.
        text_first: Whether a shot's text tokens come before its video tokens in the row.

    Raises:
        ValueError: for an empty row or scene, or a global shot that is not the first of its scene.
    """

    scenes: tuple[tuple[Shot, ...], ...]
    text_first: bool = True

    def __init__(self, scenes: Iterable[Iterable[Shot]], text_first: bool = True) -> None:
        object.__setattr__(self, "scenes", tuple(map(tuple, scenes)))
        object.__setattr__(self, "text_first", text_first)
        if not self.scenes:
            raise ValueError("scenes: got no scene, expected at least one sequence of shots")
        for i, scene in enumerate(self.scenes):
            if not scene:
                raise ValueError(f"scenes: scene {i} (counting from 0) has no shot, expected at least one")
            for j, shot in enumerate(scene):
                if not isinstance(shot, Shot):
                    raise ValueError(
                        f"scenes: shot {j} of scene {i} is {shot!r}, expected a Shot; "
                        "scenes are nested: Layout([[shot, shot], [shot]])"
                    )
                if shot.role == "global" and j > 0:
                    raise ValueError(
                        f"scenes: shot {j} of scene {i} (counting from 0) is global; "
                        "a scene has at most one global shot, and it comes first"
                    )

    @cached_property
    def shots(self) -> tuple[Shot, ...]:
        """Every shot in row order, global shots included."""
        return tuple(shot for scene in self.scenes for shot in scene)

    @property
    def num_shots(self) -> int:
        """Number of shots in the row, global shots included."""
        return len(self.shots)

    @cached_property
    def tokens(self) -> int:
        """Number of tokens in the row."""
        return sum(shot.tokens for shot in self.shots)

    @cached_property
    def spans(self) -> tuple[Range, ...]:
        """The tokens of every shot, in row order."""
        return consecutive(shot.tokens for shot in self.shots)

    @cached_property
    def scene_spans(self) -> tuple[Range, ...]:
        """The tokens of every scene, in row order."""
        return consecutive(sum(shot.tokens for shot in scene) for scene in self.scenes)

    @cached_property
    def scene_shots(self) -> tuple[range, ...]:
        """The indices, in row order, of every scene's shots."""
        return tuple(range(*span) for span in consecutive(map(len, self.scenes)))

    @property
    def video_only(self) -> "Layout":
        """The layout of the video tokens alone: what self-attention sees where the model cross-attends its text."""
        return Layout(((replace(shot, text=0) for shot in scene) for scene in self.scenes), self.text_first)


def consecutive(lengths: Iterable[int]) -> tuple[Range, ...]:
    """Ranges of the given lengths, end to end from 0."""
    return tuple(Range(*ends) for ends in pairwise(accumulate(lengths, initial=0)))
