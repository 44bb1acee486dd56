"""Shots joined in one row, rotated into their places, and taken apart again."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lct_core.backbone import QKV, Backbone, ShotInput, State
from lct_core.backbone.adapter import Tokens
from lct_core.coordinates import Scheme, extent, measured_extent, shot_coordinates
from lct_core.engine.explain import check_places
from lct_core.layout import Layout
from lct_core.rope import Rotary, Rotation, RowParts, pays_in_pieces, rotate_into

Groups = Sequence[Sequence[int]]
"""Shots that go through the blocks as one batch, by their place in the row."""


class Places(NamedTuple):
    """Where the shots of a row stand.

    Args:
        coordinates: The model's own, of every shot's self-attention tokens.
        origins: Where on the diagonal each shot starts.
        extents: How many diagonal steps it takes.
    """

    coordinates: list[Tensor]
    origins: tuple[int, ...]
    extents: tuple[int, ...]


def place(adapter: Backbone, layout: Layout, inputs: Sequence[ShotInput], *, scheme: Scheme, start: int) -> Places:
    """Let every scene's shots follow one another on the diagonal (paper, 3.2.2).

    Args:
        adapter: The model's.
        layout: The shots' token counts.
        inputs: The shots.
        scheme: Coordinates, see :func:`lct_core.coordinates`.
        start: Where a scene starts.
    """
    traits = adapter.traits
    shots = (layout if traits.text == "joint" else layout.video_only).shots
    unit = torch.tensor(traits.unit, dtype=torch.float64)
    coordinates, origins, extents = [], [], []
    remaining = iter(zip(shots, inputs, strict=True))
    for scene in layout.scenes:
        origin = start
        for _ in scene:
            shot, given = next(remaining)
            if scheme == "paper":
                coords = shot_coordinates(shot, scheme=scheme, text_first=traits.text_first)
                coords = F.pad(coords, (0, len(unit) - 3)) * unit  # 0 on axes of the model's own
                steps = extent(shot, scheme=scheme)
            else:
                coords = adapter.coordinates(given, shot)
                check_places(coords, given)
                steps = measured_extent(coords, traits.unit)
            coordinates.append(coords + origin * unit)
            origins.append(origin)
            extents.append(steps)
            origin += steps
    return Places(coordinates, tuple(origins), tuple(extents))


def rotations(
    adapter: Backbone, layout: Layout, inputs: Sequence[ShotInput], coordinates: Sequence[Tensor]
) -> dict[Tokens, Rotation | None]:
    """The rotations of a row's tokens, in float32 at least, by which tokens take part; None without RoPE.

    To be made inside the model's forward: angles may be weights of its own, which offloading and sharding hooks bring.
    Every shot's is made by itself: a cosine's bits depend on where it stands in a tensor.
    """
    traits = adapter.traits
    if traits.pairing is None:
        return {"all": None, "video": None}
    turns, videos = [], []
    shots = (layout if traits.text == "joint" else layout.video_only).shots
    for coords, given, shot in zip(coordinates, inputs, shots, strict=True):
        device, dtype = given.latents.device, torch.promote_types(given.latents.dtype, torch.float32)
        by = adapter.rotation(coords.to(device), shot, dtype=dtype)
        tokens = slice(len(by.cos) - shot.video, None) if traits.text_first else slice(shot.video)
        turns.append(by)
        videos.append(Rotation(by.cos[tokens], by.sin[tokens], by.pairing))
    return {"all": _joined(turns), "video": _joined(videos)}


def row(
    parts: Sequence[Tensor], by: Rotation | None, adapter: Backbone, rotary: Rotary | None = None
) -> Tensor | RowParts:
    """Every shot's queries, keys or values in one row: rotated on their way there where that is asked for or pays.

    Else, and where an adapter rotates in its own way or learns its angles, they are joined and rotated first.

    Args:
        parts: One for every shot, ``[batch, tokens, heads, head_dim]``.
        by: How they are rotated (None: not at all).
        adapter: The model's.
        rotary: What rotates, see :func:`lct_core.retrofit`.
    """
    learned = by is not None and (by.cos.requires_grad or by.sin.requires_grad)
    if rotary is None and not learned and rotates_plainly(adapter) and pays_in_pieces(parts):
        rotary = rotate_into
    if by is None or rotary is None:
        x = cat(parts, dim=1)
        x = x if by is None else adapter.rotate(x, by)
        return x.to(_autocast_dtype(x))
    if learned:
        raise ValueError(
            f"rotary: the angles of this {type(adapter.model).__name__} are learned, and a rotary has no "
            "gradient for them; leave it out, freeze them, or call under torch.no_grad()"
        )
    return RowParts(parts, by, _autocast_dtype(parts[0]), rotary)


def whole(joined: Tensor | RowParts) -> Tensor:
    """A row as one tensor."""
    return joined.joined() if isinstance(joined, RowParts) else joined


def across_shots(
    parts: Sequence[QKV],
    groups: Groups,
    attention: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor],
) -> list[Tensor]:
    """Take the groups apart into shots, attend in one row, and put what comes out into the groups again.

    Args:
        parts: Queries, keys and values of every group.
        groups: The shots of each.
        attention: From every shot's queries, keys and values to the row's outputs.
    """
    queries, keys, values = (shot_by_shot([part[i] for part in parts], groups) for i in range(3))
    outs = attention(queries, keys, values).split([x.shape[1] for x in queries], dim=1)
    # A shot's own tokens lie contiguous whatever surrounds it in the row: a matmul's bits depend on the strides.
    return [cat([outs[i] for i in group], dim=0).contiguous() for group in groups]


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
        {name: cat([x, *(state.streams[name] for state in rest)], dim=0) for name, x in first.streams.items()},
        {name: cat([x, *(s.conditioning[name] for s in rest)], dim=0) for name, x in first.conditioning.items()},
    )


def shot_by_shot(grouped: Sequence[Tensor], groups: Groups) -> list[Tensor]:
    """What was computed group by group, in row order."""
    parts: dict[int, Tensor] = {}
    for group, x in zip(groups, grouped, strict=True):
        parts.update(zip(group, x.chunk(len(group)), strict=True))
    return [parts[i] for i in range(len(parts))]


def cat(parts: Sequence[Tensor], *, dim: int) -> Tensor:
    """Tensors end to end; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def rotates_plainly(adapter: Backbone) -> bool:
    """Whether an adapter rotates as :func:`lct_core.rotate` does."""
    return getattr(adapter.rotate, "__func__", None) is Backbone.rotate


def _joined(turns: Sequence[Rotation]) -> Rotation:
    return Rotation(cat([by.cos for by in turns], dim=0), cat([by.sin for by in turns], dim=0), turns[0].pairing)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Under autocast, what torch's own attention casts its inputs to; here, so that the cache holds the same."""
    device = x.device.type
    kept = x.dtype == torch.float64 or not torch.is_autocast_enabled(device)
    return x.dtype if kept else torch.get_autocast_dtype(device)
