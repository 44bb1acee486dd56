"""How many bytes a cache may hold where, and which shots are kept near."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from lct_core.cache.quantize import BLOCK, Format
from lct_core.cache.shots import CachedShot, Space

Storage = Literal["native"] | Format
STORAGES: tuple[Storage, ...] = ("native", *get_args(Format))

Policy = Callable[[Sequence[CachedShot]], Sequence[Hashable]]
"""``policy(shots)``: the ids of a cache's shots, those most worth keeping near the model first.

The shots come in the order in which they were appended.
"""


def recency(shots: Sequence[CachedShot]) -> list[Hashable]:
    """Pinned shots first, then the selected ones, then the latest (default: ours)."""
    latest = sorted(enumerate(shots), key=lambda each: (each[1].pinned, each[1].selected, each[0]), reverse=True)
    return [entry.id for _, entry in latest]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes of keys and values that a cache may hold, temporary copies included.

    Shots that the device has no room for are held in host memory; those that it has no room for either, in files.

    Args:
        device: On the model's device (default: as many as it takes).
        host: In host memory, page-locked where the device is a GPU (default: as many as it takes).
        folder: Where files go: memory-mapped safetensors, one for each shot. Deleted when the last cache that uses it
            is released, unless :meth:`KVCache.save` has made it part of a saved one (default: no files).
        policy: Which shots are kept near the model: those that it names last leave first.

    Raises:
        ValueError: for a number of bytes that is negative or no int, and a policy that is no function.
    """

    device: int | None = None
    host: int | None = None
    folder: Path | None = None
    policy: Policy = recency

    def __post_init__(self) -> None:
        for name in ("device", "host"):
            nbytes = getattr(self, name)
            if nbytes is not None and (not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes < 0):
                raise ValueError(f"{name}: got {nbytes!r}, expected a number of bytes, 0 or more, or None for no limit")
        if not callable(self.policy):
            raise ValueError(f"policy: got {self.policy!r}, expected a function of the shots, such as recency")
        if self.folder is not None:
            object.__setattr__(self, "folder", Path(self.folder))


def divided(budget: Budget, parts: int) -> Budget:
    """An equal share of a budget's bytes."""
    device, host = (None if nbytes is None else nbytes // parts for nbytes in (budget.device, budget.host))
    return replace(budget, device=device, host=host)


class SiteSize(NamedTuple):
    """What one token takes at one attention site of one block.

    Args:
        space: Which tokens are its keys.
        entries: Entries of the batch.
        heads: Of keys and values.
        channels: Of a key and of a value.
        dtype: In which the model attends.
    """

    space: Space
    entries: int
    heads: int
    channels: tuple[int, int]
    dtype: torch.dtype

    def nbytes(self, tokens: int, storage: Storage = "native") -> tuple[int, int]:
        """Bytes of the keys and of the values of some tokens of one shot, scales included."""
        if storage == "native":
            keys, values = (self.entries * self.heads * n * tokens * self.dtype.itemsize for n in self.channels)
        else:
            scales = 4 * self.entries * self.heads * -(-tokens // BLOCK)
            keys, values = (self.entries * self.heads * n * tokens + scales for n in self.channels)
        return keys, values


def shot_bytes(sizes: Sequence[SiteSize], tokens: Mapping[Space, int], storage: Storage = "native") -> int:
    """Bytes of the keys and values of one shot at all sites of a model.

    Args:
        sizes: Every site.
        tokens: How many tokens it has in each of the sites' spaces.
        storage: How they are kept.
    """
    return sum(sum(size.nbytes(tokens[size.space], storage)) for size in sizes)
