"""A KV cache without a model, of random keys and values, for what is timed with it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lct_core import KVCache, Shot
from lct_core.cache import StagedShots
from lct_core.cache.writing import WriteKeys

Publish = Callable[[dict[str, Any]], None]
Pair = tuple[Tensor, Tensor]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SITE = "self"


class Size(NamedTuple):
    """A cache without a model: so many layers of so many heads, and shots of so many tokens."""

    depth: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    shot: Shot
    rounds: int

    def pair(self, tokens: int, device: str, generator: torch.Generator) -> Pair:
        """Keys and values, or whatever has their shape, from the normal distribution."""
        shape = 2, 1, tokens, self.heads, self.head_dim
        keys, values = torch.randn(shape, dtype=self.dtype, device=device, generator=generator)
        return keys, values

    @property
    def diagonal(self) -> Tensor:
        """Angles of one diagonal step."""
        return torch.linspace(0, 1, self.head_dim // 2, dtype=torch.float64)[None]

    def told(self) -> dict[str, Any]:
        """As it is recorded."""
        return {
            **{name: getattr(self, name) for name in ("depth", "heads", "head_dim")},
            "tokens": self.shot.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


QUICK = Size(2, 2, 32, torch.float32, Shot(8, (2, 4, 4)), 2)


def fill(cache: KVCache, shots: Sequence[Shot], size: Size, device: str, generator: torch.Generator) -> None:
    """Append shots of random keys and values, end to end, under their numbers."""
    for i, shot in enumerate(shots):
        with writing(cache, shot, size) as write:
            for layer in range(size.depth):
                write((layer, SITE), "tokens", *size.pair(shot.tokens, device, generator))
        cache.append(i)


def writing(cache: KVCache, shot: Shot, size: Size) -> AbstractContextManager[WriteKeys]:
    """A call that writes a shot behind the history."""
    staged = StagedShots((shot,), torch.zeros(1, 1), (cache.end,), (max(shot.grid),))
    return cache.writing(staged, scheme="anchored", diagonal=size.diagonal, pairing="interleaved")


def kind(device: str) -> str:
    """What to call it in a title."""
    return f"on a {'GPU' if device == 'cuda' else 'CPU'}"
