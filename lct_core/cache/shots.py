"""What a cache knows of its shots."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from lct_core.layout import Shot

Space = Literal["tokens", "video", "text"]
Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True, kw_only=True)
class CachedShot:
    """What a cache knows of one shot.

    Args:
        id: The name it was appended under.
        shot: Its token counts.
        level: The noise level it was written at, 0 to 1; one number for every entry of the batch.
        written: Where on the diagonal its keys were written.
        origin: Where on the diagonal its keys stand now.
        extent: How many diagonal steps it takes; a successor starts at ``origin + extent``.
        saw: The shots that its keys and values may depend on directly, by id: the history that it was written behind,
            and the other shots of its call.
        prompt: What it was prompted with; only recorded.
        branch: The guidance branch of its cache.
        tier: Where its keys and values are: on the model's ``"device"``, in ``"host"`` memory or on ``"disk"``.
        pinned: Whether it is to be kept near before others, see :func:`lct_core.cache.recency`.
        selected: Whether it is part of the history that later calls see.
    """

    id: Hashable
    shot: Shot
    level: tuple[float, ...]
    written: int
    origin: int
    extent: int
    saw: tuple[Hashable, ...] = ()
    prompt: str = ""
    branch: str = ""
    tier: Tier = "device"
    pinned: bool = False
    selected: bool = True

    def tokens(self, space: Space) -> int:
        """How many of its tokens are keys of the sites of a space: of all its tokens, the video's or the text's."""
        count: int = getattr(self.shot, space)
        return count


class StagedShots(NamedTuple):
    """The shots that a call writes behind the history, and :meth:`KVCache.append` can keep.

    Args:
        shots: Their token counts, in row order.
        levels: Their noise levels, 0 to 1.
        origins: Where on the diagonal each starts.
        extents: How many diagonal steps each takes.
    """

    shots: tuple[Shot, ...]
    levels: Float[Tensor, "batch shots"]
    origins: tuple[int, ...]
    extents: tuple[int, ...]

    def tokens(self, space: Space) -> int:
        """How many keys they have together at the sites of a space."""
        return sum(getattr(shot, space) for shot in self.shots)
