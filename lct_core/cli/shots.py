"""Shots as they are written on the command line, and what each of them costs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lct_core.coordinates import Scheme
from lct_core.layout import Layout, Shot
from lct_core.pictures.style import shot_names, starts
from lct_core.plan import AttentionPlan

#: A global prompt and four unequal shots, and two shorter scenes.
EXAMPLE = (
    *("global:10:1x5x8", "8:4x5x8", "5:2x7x5", "12:6x4x6", "6:1x6x6"),
    *("/", "9:3x6x6", "6:2x6x6"),
    *("/", "7:3x5x5"),
)

_SHOT = re.compile(r"(global:)?([0-9]{1,5}):([0-9]{1,5})x([0-9]{1,5})x([0-9]{1,5})")


def parse_shots(arguments: Sequence[str], *, text_first: bool = True) -> Layout:
    """The layout of shots as they are written on the command line.

    Args:
        arguments: ``TEXT:FRAMESxHEIGHTxWIDTH`` for every shot, in tokens; a leading ``global:`` makes it the global
            shot of its scene; ``/`` begins the next scene.
        text_first: As for :class:`lct_core.Layout`.

    Raises:
        ValueError: for anything else, and for what is no layout.
    """
    scenes: list[list[Shot]] = [[]]
    for argument in arguments:
        if argument == "/":
            scenes.append([])
            continue
        match = _SHOT.fullmatch(argument)
        if match is None:
            raise ValueError(
                f"SHOT: got {argument!r}, expected TEXT:FRAMESxHEIGHTxWIDTH in tokens, each below 100,000, like "
                "12:4x6x6, with global: before it for a global shot, or / between scenes"
            )
        role, text, *grid = match.groups()
        frames, height, width = map(int, grid)
        try:
            scenes[-1].append(Shot(int(text), (frames, height, width), "global" if role else "shot"))
        except ValueError as error:
            raise ValueError(f"SHOT: got {argument!r}: {error}") from None
    return Layout(scenes, text_first)


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What of a model decides the price of its attention.

    Args:
        layers: Blocks, with one self-attention each.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        dtype: Of the cached keys and values.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class ShotCost(NamedTuple):
    """What one shot costs, or all of them together.

    Args:
        scene: The scene's number, from 1; None for all together.
        name: What the shot is called.
        text: Text tokens.
        video: Video tokens.
        start: Where on the diagonal it starts; None for all together.
        pairs: Pairs of its queries and the keys they see, in one head of one layer.
        flops: Floating point operations of one forward attention of its queries, in all heads and layers.
        cache: Bytes of its keys and values in all layers.
    """

    scene: int | None
    name: str
    text: int
    video: int
    start: int | None
    pairs: int
    flops: int
    cache: int


def costs(layout: Layout, plan: AttentionPlan, size: ModelSize, *, scheme: Scheme) -> list[ShotCost]:
    """What every shot of a row costs, and last all of them together; batch 1."""

    def cost(scene: int | None, name: str, shots: Sequence[Shot], start: int | None, part: AttentionPlan) -> ShotCost:
        text, video = sum(shot.text for shot in shots), sum(shot.video for shot in shots)
        flops = size.layers * part.flops(heads=size.heads, head_dim=size.head_dim)
        cache = 2 * size.layers * size.kv_heads * size.head_dim * size.dtype.itemsize * (text + video)
        return ShotCost(scene, name, text, video, start, part.pairs, flops, cache)

    scenes = (number for number, scene in enumerate(layout.scenes, start=1) for _ in scene)
    shots = zip(scenes, shot_names(layout), layout.shots, starts(layout, scheme=scheme), layout.spans, strict=True)
    rows = [cost(scene, name, [shot], start, plan.rows(span)) for scene, name, shot, start, span in shots]
    return [*rows, cost(None, "all", layout.shots, None, plan)]
