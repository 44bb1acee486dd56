"""Hypothesis strategies; examples shrink to one shot of one video token without text.

For shots, layouts, noise levels, and what a cache goes through.
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from jaxtyping import Float32
from torch import Tensor

from lct_core.cache import Tier
from lct_core.layout import Layout, Shot

__all__ = ["CacheOperation", "cache_operations", "layouts", "levels", "shots"]

TIERS: tuple[Tier, ...] = ("device", "host")


def shots(*, max_text: int = 5, max_grid: tuple[int, int, int] = (3, 3, 3)) -> st.SearchStrategy[Shot]:
    """Shots of role ``"shot"``, among them shots without text and shots of one video token.

    Args:
        max_text: Most text tokens (ours).
        max_grid: Most video tokens along frames, height and width (ours).
    """
    return st.builds(
        Shot,
        text=st.integers(0, max_text),
        grid=st.tuples(*(st.integers(1, most) for most in max_grid)),
    )


@st.composite
def layouts(
    draw: st.DrawFn,
    *,
    max_scenes: int = 3,
    max_shots: int = 4,
    max_text: int = 5,
    max_grid: tuple[int, int, int] = (3, 3, 3),
    with_global: bool | None = None,
    text_first: bool | None = None,
) -> Layout:
    """Layouts, from one shot of one token to several scenes with global shots.

    Args:
        draw: Given by hypothesis.
        max_scenes: Most scenes in the row (ours).
        max_shots: Most shots in a scene, its global shot not counted (ours).
        max_text: Most text tokens in a shot (ours).
        max_grid: Most video tokens of a shot along frames, height and width (ours).
        with_global: Whether scenes begin with a global shot, whose dummy video is one frame of the first shot's height
            and width; None for either, scene by scene.
        text_first: Whether text comes first; None for either.
    """
    shot = shots(max_text=max_text, max_grid=max_grid)
    scenes = draw(st.lists(st.lists(shot, min_size=1, max_size=max_shots), min_size=1, max_size=max_scenes))
    for scene in scenes:
        if draw(st.booleans()) if with_global is None else with_global:
            _, height, width = scene[0].grid
            scene.insert(0, Shot(text=draw(st.integers(0, max_text)), grid=(1, height, width), role="global"))
    return Layout(scenes, text_first=draw(st.booleans()) if text_first is None else text_first)


@st.composite
def levels(draw: st.DrawFn, layout: Layout) -> Float32[Tensor, " shots"]:
    """Noise levels ``[num_shots]`` for a layout: anything in [0, 1], clean and pure noise included; 0 for global shots.

    Args:
        draw: Given by hypothesis.
        layout: The row, usually drawn from `layouts`.
    """
    level = st.floats(0, 1, width=32)
    drawn = [0.0 if shot.role == "global" else draw(level) for shot in layout.shots]
    return torch.tensor(drawn, dtype=torch.float32)


class CacheOperation(NamedTuple):
    """One thing that happens to a :class:`lct_core.KVCache`.

    Args:
        name: ``"append"``, after a call that writes ``shot``; ``"select"``, ``"reorder"``, ``"drop"``, ``"pin"``,
            ``"unpin"``, ``"move"`` or ``"reposition"``.
        shot: What is written, for ``"append"``; its id is the number of appends before it.
        ids: The shots that it is about, in order.
        origins: Where each selected shot is to stand, for ``"reposition"``; None for end to end.
        tier: Where they go, for ``"move"``: ``"device"`` or ``"host"``.
    """

    name: str
    shot: Shot | None = None
    ids: tuple[int, ...] = ()
    origins: tuple[int, ...] | None = None
    tier: Tier = "device"


@st.composite
def cache_operations(draw: st.DrawFn, *, max_operations: int = 8, max_origin: int = 99) -> list[CacheOperation]:
    """Operations on an empty cache, in order, all valid: parked shots come back, positions go and return.

    Args:
        draw: Given by hypothesis.
        max_operations: Most operations (ours).
        max_origin: Farthest place on the diagonal (ours).
    """
    operations: list[CacheOperation] = []
    held: list[int] = []
    selected: list[int] = []
    count = 0
    names = ["append", "select", "reposition", "reorder", "drop", "pin", "unpin", "move"]
    for _ in range(draw(st.integers(1, max_operations))):
        name = draw(st.sampled_from(names if held else names[:1]))
        if name == "append":
            operations.append(CacheOperation(name, shot=draw(shots())))
            held, selected, count = [*held, count], [*selected, count], count + 1
        elif name == "reposition":
            places = st.tuples(*[st.integers(0, max_origin)] * len(selected))
            operations.append(CacheOperation(name, origins=draw(st.none() | places)))
        elif name == "reorder":
            selected = list(draw(st.permutations(selected)))
            operations.append(CacheOperation(name, ids=tuple(selected)))
        else:
            ids = tuple(draw(st.permutations(held))[: draw(st.integers(0, len(held)))])
            tier = draw(st.sampled_from(TIERS)) if name == "move" else "device"
            operations.append(CacheOperation(name, ids=ids, tier=tier))
            if name == "select":
                selected = list(ids)
            elif name == "drop":
                held, selected = ([i for i in each if i not in ids] for each in (held, selected))
    return operations
