"""Scenes as one row of tokens and back, and the planner that fills rows of a token budget with whole scenes."""

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from lct_core.layout import Layout, Shot
from lct_core.noise import check_generator

__all__ = ["pack", "plan_rows", "unpack"]

WINDOW = 4096
"""Scenes that compete for the same rows: enough to fill rows to more than 99 %, few enough to keep them random."""


def pack(scenes: Sequence[Sequence[tuple[Tensor, Tensor]]], layout: Layout) -> Shaped[Tensor, "batch tokens *rest"]:
    """Lay the shots of all scenes side by side in one row, without padding; `unpack` is the inverse.

    Shots keep their own lengths and aspect ratios (paper, A.1: native aspect ratios without cropping).

    Args:
        scenes: Nested like ``layout.scenes``: scenes of shots, each shot a pair ``(text, video)`` of tensors
            ``[batch, text_tokens, *rest]`` and ``[batch, frames, height, width, *rest]``, in tokens after patchify.
            ``rest`` is anything, the same for all: a width, heads and head_dim, or nothing. The text may have 0 tokens.
        layout: What the tensors are; it alone knows which shot is global and whether text comes first.

    Returns:
        The row, a copy; dtype and device as given. No arithmetic is done.

    Raises:
        ValueError: if scenes, shots, shapes, dtypes or devices differ from the layout or from the first shot's video.
    """
    parts = []
    for shot, text, video in _check_scenes(scenes, layout):
        flat = video.reshape(video.shape[0], shot.video, *video.shape[4:])
        parts += [text, flat] if layout.text_first else [flat, text]
    return torch.cat(parts, dim=1)


def unpack(row: Shaped[Tensor, "batch tokens *rest"], layout: Layout) -> list[list[tuple[Tensor, Tensor]]]:
    """Take a row apart into the scenes that `pack` was given.

    Args:
        row: ``[batch, tokens, *rest]``, as `pack` returns it.
        layout: The layout it was packed with.

    Returns:
        Scenes of shots, each a pair ``(text, video)`` shaped as in `pack`; views of the row, not copies.

    Raises:
        ValueError: if the row has another number of tokens than the layout.
    """
    if row.ndim < 2 or row.shape[1] != layout.tokens:
        raise ValueError(
            f"row: got shape {tuple(row.shape)}, expected [batch, {layout.tokens}, *rest]; "
            "give the layout that the row was packed with"
        )
    spans = iter(layout.spans)
    return [[_split(row[:, next(spans).slice], shot, layout.text_first) for shot in scene] for scene in layout.scenes]


def plan_rows(
    scenes: Sequence[Sequence[int]], *, budget: int, generator: torch.Generator, max_shots: int = 9
) -> list[list[int]]:
    """Fill rows of a token budget with whole scenes: best-fit decreasing in windows of 4,096 shuffled scenes.

    A window keeps rows random, since a scene meets only the scenes it was shuffled next to; the rows of a window, and
    the scenes in a row, come in random order. The emptiest row of a window is planned again with the next one, so every
    row but at most one is more than half full. Whole scenes, because attention is joint over a scene.

    Args:
        scenes: For every scene the number of tokens of each of its shots. The global shot does not count as one of
            ``max_shots``: add its tokens to the first shot's.
        budget: Most tokens a row may have.
        generator: CPU generator; takes one draw.
        max_shots: Most shots a scene may have (paper, 4: a window of nine).

    Returns:
        Rows of indices into ``scenes``; every scene is in exactly one.

    Raises:
        ValueError: for an empty scene, a scene of more than ``max_shots`` shots or more than ``budget`` tokens, a count
            that is not a positive int, or a generator that is not on the CPU.
    """
    sizes = [_scene_size(i, shots, budget, max_shots) for i, shots in enumerate(scenes)]
    check_generator(generator)
    rng = random.Random(int(torch.randint(2**63 - 1, (), generator=generator)))
    order = list(range(len(sizes)))
    rng.shuffle(order)

    planned: list[list[int]] = []
    carried: list[int] = []
    done = 0
    while done < len(order):
        window = carried + order[done : done + max(1, WINDOW - len(carried))]
        done += len(window) - len(carried)
        rows = _best_fit_decreasing(window, sizes, budget)
        carried = rows.pop()
        rng.shuffle(rows)
        planned += rows
    if carried:
        planned.insert(rng.randint(0, len(planned)), carried)
    for row in planned:
        rng.shuffle(row)
    return planned


def _check_scenes(
    scenes: Sequence[Sequence[tuple[Tensor, Tensor]]], layout: Layout
) -> Iterator[tuple[Shot, Tensor, Tensor]]:
    if len(scenes) != len(layout.scenes):
        raise ValueError(
            f"scenes: got {len(scenes)} scenes, expected {len(layout.scenes)} as in the layout; "
            "scenes are nested: pack([[(text, video), (text, video)], [(text, video)]], layout)"
        )
    first = None
    for i, (scene, shots) in enumerate(zip(scenes, layout.scenes, strict=True)):
        if len(scene) != len(shots):
            raise ValueError(
                f"scenes: scene {i} (counting from 0) has {len(scene)} shots, expected {len(shots)} as in the layout "
                "(a global shot counts)"
            )
        for j, (pair, shot) in enumerate(zip(scene, shots, strict=True)):
            where = f"shot {j} of scene {i} (counting from 0)"
            if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)):
                raise ValueError(
                    f"scenes: {where} is a {type(pair).__name__}, expected a pair of tensors (text, video)"
                )
            text, video = pair
            first = video if first is None else first
            batch, rest = first.shape[:1], first.shape[4:]
            _check_like(f"video of {where}", video, (*batch, *shot.grid, *rest), first)
            _check_like(f"text of {where}", text, (*batch, shot.text, *rest), first)
            yield shot, text, video


def _check_like(name: str, tensor: Tensor, shape: tuple[int, ...], first: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"scenes: {name} has shape {tuple(tensor.shape)}, expected {shape}: the token counts of the layout, "
            "batch and trailing dimensions of the first shot's video"
        )
    if (tensor.dtype, tensor.device) != (first.dtype, first.device):
        raise ValueError(
            f"scenes: {name} is {tensor.dtype} on {tensor.device}, expected {first.dtype} on {first.device} like the "
            "first shot's video; convert it before packing"
        )


def _split(tokens: Tensor, shot: Shot, text_first: bool) -> tuple[Tensor, Tensor]:
    if text_first:
        text, video = tokens[:, : shot.text], tokens[:, shot.text :]
    else:
        video, text = tokens[:, : shot.video], tokens[:, shot.video :]
    return text, video.unflatten(1, shot.grid)


def _scene_size(index: int, shots: Sequence[int], budget: int, max_shots: int) -> int:
    where = f"scenes: scene {index} (counting from 0)"
    if not 1 <= len(shots) <= max_shots:
        raise ValueError(
            f"{where} has {len(shots)} shots, expected 1 to {max_shots} (max_shots); "
            "choose some of its shots, e.g. with sample_shot_run"
        )
    size = sum(shots)
    if not isinstance(size, int) or min(shots) < 1:
        raise ValueError(f"{where} has token counts {list(shots)}, expected ints of at least 1")
    if size > budget:
        raise ValueError(
            f"{where} has {size} tokens, {size - budget} more than the budget of {budget}; scenes are never split: "
            "raise the budget or choose fewer of its shots"
        )
    return size


def _best_fit_decreasing(scenes: list[int], sizes: list[int], budget: int) -> list[list[int]]:
    """Put each scene, largest first, into the fullest row that still has room; rows come fullest first."""
    room: list[int] = []  # ascending; room[k] belongs to rows[k]
    rows: list[list[int]] = []
    for scene in sorted(scenes, key=sizes.__getitem__, reverse=True):
        at = bisect_left(room, sizes[scene])
        left, row = (room.pop(at), rows.pop(at)) if at < len(room) else (budget, [])
        row.append(scene)
        left -= sizes[scene]
        at = bisect_left(room, left)
        room.insert(at, left)
        rows.insert(at, row)
    return rows
