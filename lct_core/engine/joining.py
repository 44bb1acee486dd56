"""Shots joined in one row, rotated into their places, and taken apart again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lct_core.backbone.adapter import Backbone, State
from lct_core.rope import Rotation, RowParts


def alike(states: Sequence[State]) -> list[list[int]]:
    """Shots whose states can be stacked, by their indices in the row."""
    groups: dict[Any, list[int]] = {}
    for i, state in enumerate(states):
        tensors = {**state.streams, **state.conditioning}
        groups.setdefault(tuple((n, x.shape, x.dtype) for n, x in tensors.items()), []).append(i)
    return list(groups.values())


def stacked(states: Sequence[State]) -> State:
    """Some shots as one batch."""
    first, *rest = states
    return State(
        {name: _cat([x, *(state.streams[name] for state in rest)], dim=0) for name, x in first.streams.items()},
        {name: _cat([x, *(s.conditioning[name] for s in rest)], dim=0) for name, x in first.conditioning.items()},
    )


def _joined(rotations: Sequence[Rotation | None]) -> Rotation | None:
    """The rotations of all shots, each made by itself: a cosine's bits depend on where it stands in a tensor."""
    made = [by for by in rotations if by is not None]
    if not made:
        return None
    return Rotation(_cat([by.cos for by in made], dim=0), _cat([by.sin for by in made], dim=0), made[0].pairing)


def _cat(parts: Sequence[Tensor], *, dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Under autocast, what torch's own attention casts its inputs to; here, so that the cache holds the same."""
    device = x.device.type
    kept = x.dtype == torch.float64 or not torch.is_autocast_enabled(device)
    return x.dtype if kept else torch.get_autocast_dtype(device)


def _whole(row: Tensor | RowParts) -> Tensor:
    return row.joined() if isinstance(row, RowParts) else row


def _rotates_plainly(adapter: Backbone) -> bool:
    return getattr(adapter.rotate, "__func__", None) is Backbone.rotate


def _video(by: Rotation | None, video: int, text_first: bool) -> Rotation | None:
    """The video tokens' share of a shot's rotation."""
    if by is None:
        return None
    tokens = slice(len(by.cos) - video, None) if text_first else slice(video)
    return Rotation(by.cos[tokens], by.sin[tokens], by.pairing)
