"""Rows of keys and values: the history in place, the current shots behind it, spare room."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lct_core.cache.budget import SiteSize
from lct_core.rope import Pairing, Rotation, RowParts, rotation


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

    What stands in it is never changed. Behind it one branch may write: whose it is, or who comes first where it is
    nobody's and nothing has been kept behind this branch's history.
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


class Segment(NamedTuple):
    """A shot in a row: how many tokens, moved by how many diagonal steps from where it was written."""

    id: Hashable
    tokens: int
    steps: int


@dataclass(eq=False)
class Site:
    """One attention site of one block.

    Args:
        size: What a token takes.
        device: Where the model runs it.
        row: The selected history, where all of it is on the device as the model attends to it.
        standing: What stands in the row, in order; shots without tokens here do not.
        staged: Where the history is brought from elsewhere for every call: the current shots' own keys and values.
        written: How many tokens the present call has written.
    """

    size: SiteSize
    device: torch.device
    row: Row | None = None
    standing: tuple[Segment, ...] = ()
    staged: tuple[Tensor, Tensor] | None = None
    written: int = 0

    @property
    def current(self) -> tuple[Tensor, Tensor]:
        """What the present call has written here."""
        if self.staged is not None:
            return self.staged
        if self.row is None:
            return empty(self.size, 0, self.device)
        start = sum(segment.tokens for segment in self.standing)
        here = slice(start, start + self.written)
        return self.row.k[:, here], self.row.v[:, here]


def fill(out: Tensor, x: Tensor | RowParts) -> None:
    """Write current keys or values to their place; keys that are still to be rotated are rotated right there."""
    if isinstance(x, RowParts):
        x.into(out)
    else:
        out.copy_(x)


def turn(steps: int, tokens: int, *, diagonal: Tensor, pairing: Pairing, like: Tensor) -> Rotation:
    """The constant rotation R(steps) for some tokens, as :func:`lct_core.rope.move` makes it."""
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    by = rotation((steps * diagonal.double())[None].to(like.device), pairing=pairing, dtype=exact)
    return Rotation(by.cos.expand(tokens, -1, -1), by.sin.expand(tokens, -1, -1), pairing)
