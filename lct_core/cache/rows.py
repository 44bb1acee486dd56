"""Rows of keys and values: the history in place, the current shots behind it, spare room."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lct_core.cache.budget import SiteSize
from lct_core.rope import RowParts


def empty(size: SiteSize, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the keys and values of some tokens: also what inference mode makes can be written to outside of it."""
    with torch.inference_mode(False):
        keys, values = (
            torch.empty(size.entries, tokens, size.heads, channels, dtype=size.dtype, device=device)
            for channels in size.channels
        )
    return keys, values


@dataclass(eq=False)
class Row:
    """One site's row, shared by the forks of a cache until they differ.

    Its shots are never changed. One branch may write behind them: the row's owner, or where it has none, the first
    branch whose history ends where the row's used part does.
    """

    k: Tensor
    v: Tensor
    owner: object | None
    used: int

    @property
    def nbytes(self) -> int:
        """Bytes, spare room included."""
        return self.k.nbytes + self.v.nbytes

    def takes(self, start: int, stop: int, *, branch: object) -> bool:
        """Whether a branch can write to these tokens."""
        free = start == stop or self.owner is branch or (self.owner is None and self.used == start)
        return free and stop <= self.k.shape[1]


class PlacedShot(NamedTuple):
    """A shot in a row: how many tokens, moved by how many diagonal steps from where it was written."""

    id: Hashable
    tokens: int
    steps: int


@dataclass(eq=False)
class SiteRows:
    """One attention site of one block.

    Args:
        size: What one token of keys and values is.
        device: Where the model runs it.
        row: The selected history, where all of it is on the device as the model attends to it.
        standing: What stands in the row, in order; shots without tokens here do not.
        staged: Where the history is brought from elsewhere for every call: the current shots' own keys and values.
        current_tokens: How many tokens the last call has written.
    """

    size: SiteSize
    device: torch.device
    row: Row | None = None
    standing: tuple[PlacedShot, ...] = ()
    staged: tuple[Tensor, Tensor] | None = None
    current_tokens: int = 0

    @property
    def current(self) -> tuple[Tensor, Tensor]:
        """What the last call has written here."""
        if self.staged is not None:
            return self.staged
        if self.row is None:
            return empty(self.size, 0, self.device)
        start = sum(shot.tokens for shot in self.standing)
        here = slice(start, start + self.current_tokens)
        return self.row.k[:, here], self.row.v[:, here]


def fill(out: Tensor, x: Tensor | RowParts) -> None:
    """Write current keys or values to their place; keys that are still to be rotated are rotated right there."""
    if isinstance(x, RowParts):
        x.into(out)
    else:
        out.copy_(x)
