"""What the tests need to know of a family, beside its adapter: facts about the model that the oracle goes by."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lct_core import Shot, ShotInput


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model of a family at a tiny size.

    Args:
        name: Family and variant.
        model: Makes it, every time the same.
        joined: Its attention modules that join shots.
        text: Its attention modules that cross-attend text; none where text is part of self-attention.
        sources: What each attention of such a module sees, in order: text, or the image tokens of its own shot.
        diagonal: Angles of one diagonal step, ``[heads or 1, pairs]``; None without RoPE.
        pairing: Which channels they turn.
        steps: Diagonal steps that a shot takes, from its inputs and token grid.
        without: Extras that are left out.
        shots: Text lengths and token grids of three unequal shots.
        masks_padding: Whether the model always runs with a mask, or in its stead entry by entry, which changes sums in
            the last bits.
    """

    name: str
    model: Callable[[], nn.Module]
    joined: Callable[[Any], Sequence[nn.Module]]
    text: Callable[[Any], Sequence[nn.Module]] | None = None
    sources: tuple[Literal["text", "image"], ...] = ("text",)
    diagonal: Tensor | None = None
    pairing: str = "interleaved"
    steps: Callable[[ShotInput, Shot], int] = lambda inputs, shot: max(shot.grid)
    without: tuple[str, ...] = ()
    shots: tuple[Shot, ...] = (Shot(3, (2, 3, 4)), Shot(2, (1, 1, 2)), Shot(5, (1, 4, 2)))
    masks_padding: bool = False

    def __str__(self) -> str:
        return self.name


def random_model(make: Callable[..., nn.Module], *, scale: float = 0.1, **config: Any) -> nn.Module:
    """A model in evaluation mode, every time the same, every weight away from where it starts: gates start at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(**config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()


def series(*channels: int, theta: float = 10_000.0) -> Tensor:
    """The angles of one step along every axis at once: for each axis in turn, theta to the power of -2i / channels."""
    rows = [[theta ** (-2 * i / n) for i in range(n // 2)] for n in channels]
    return torch.tensor([[angle for row in rows for angle in row]], dtype=torch.float64)


def fractional(heads: int, head_dim: int, *, step: Sequence[float]) -> Tensor:
    """Angles of one step: a series of periods from 4 down to 4 / 10000 times an axis, the axes by turns.

    Args:
        heads: Number of heads; the series runs through all of them.
        head_dim: Channels of a head.
        step: What one step is of every axis' whole length.
    """
    width = heads * head_dim
    count = width // 6
    flat = [0.0] * (width // 2 - 3 * count)
    for i in range(count):
        flat += [math.pi / 2 * 10_000 ** (i / (count - 1)) * 2 * share for share in step]
    return torch.tensor(flat, dtype=torch.float64).view(heads, -1)
