"""A drawing of where tokens stand in space and time (paper, Fig. 3b)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from lct_core.coordinates import Scheme, extent
from lct_core.layout import Layout, Shot
from lct_core.pictures import style
from lct_core.pictures.style import Colour, Points, shade, shot_colours, shot_names, starts

# where one step of frame, height and width goes on the screen: orthographic, seen from above and to the side
_TURN, _TILT = np.deg2rad(50.0), np.deg2rad(58.0)
_SCREEN = np.array(
    [
        [np.cos(_TURN), np.sin(_TILT) * np.sin(_TURN)],  # frames: into the depth
        [0.0, np.cos(_TILT)],  # height: up
        [np.sin(_TURN), -np.sin(_TILT) * np.cos(_TURN)],  # width: to the right, towards the eye
    ]
)
_SLOPE = _SCREEN.sum(0)[1] / _SCREEN.sum(0)[0]

_CELL = 0.045  # inches: smaller cells are not drawn
_LABEL, _SCENE_NAME, _CLOSER = 0.65, 0.85, (3.7, 2.6)  # inches


class Box(NamedTuple):
    """One shot in coordinates.

    Args:
        name: What it is called.
        shot: Its token counts.
        start: Where on the diagonal it starts: its first text token, or its video where text has no extent.
        corner: Where on the diagonal its video starts.
        colour: Its colour.
    """

    name: str
    shot: Shot
    start: int
    corner: int
    colour: Colour


def boxes(layout: Layout, *, scheme: Scheme) -> list[list[Box]]:
    """Every scene's shots, as they stand along the space diagonal."""
    found = [
        Box(name, shot, start, start + extent(shot, scheme=scheme) - max(shot.grid), colour)
        for name, shot, start, colour in zip(
            shot_names(layout), layout.shots, starts(layout, scheme=scheme), shot_colours(layout), strict=True
        )
    ]
    return [found[scene.start : scene.stop] for scene in layout.scene_shots]


def coordinates_figure(layout: Layout, *, scheme: Scheme) -> Figure:
    """Text tokens and video blocks along the space diagonal (paper, Fig. 3b), one chain for each scene.

    A token fills the unit cube from its coordinates on. Cells are drawn where they are large enough to be seen; where
    the blocks are small, one is shown again at a larger scale.
    """
    chains = boxes(layout, scheme=scheme)
    bounds = [np.concatenate([_outline(box) for box in chain]) for chain in chains]
    scale = min(0.3, 11.0 / max(np.ptp(points[:, 0]) for points in bounds))  # inches per step
    bounds = [points * scale for points in bounds]
    offsets = _place_chains(bounds)
    placed = np.concatenate([points + offset for points, offset in zip(bounds, offsets, strict=True)])
    small = [
        (f"scene {number}, {box.name}" if len(chains) > 1 else box.name, chain, box)
        for number, chain in enumerate(chains, start=1)
        for box in chain
        if max(box.shot.grid) * scale < 0.3 and box.shot.role == "shot"
    ]

    left = placed[:, 0].min() - (_SCENE_NAME if len(chains) > 1 else 0.0) - 0.35
    right = max(placed[:, 0].max() + 0.35, left + 8.5)
    low = placed[:, 1].min() - 0.4
    high = max(placed[:, 1].max() + _LABEL, low + (_CLOSER[1] + 1.6 if small else 2.4))
    figure, height = style.titled(
        "Where every token stands",
        f'"{scheme}" scheme: '
        + (
            "each shot's text steps along the space diagonal, its video follows, then the next shot"
            if scheme == "paper"
            else "each shot keeps the base model's own coordinates, text at its origin (the dot), and moves as one body"
        ),
        size=(right - left, high - low),
    )
    axes = figure.add_axes((0, 0, 1, (high - low) / height))
    axes.set(xlim=(left, right), ylim=(low, high))
    axes.set_axis_off()
    for number, (chain, offset) in enumerate(zip(chains, offsets, strict=True), start=1):
        _draw_chain(axes, chain, scale=scale, offset=offset, scheme=scheme)
        _label_chain(axes, chain, scale=scale, offset=offset)
        if len(chains) > 1:
            x, y = offset + np.array([-0.15, 0.05])
            axes.text(x, y, f"scene {number}", fontsize=10, fontweight="bold", color=style.INK, ha="right")
    _draw_directions(axes, corner=(right - 1.45, low + 0.7))
    if small:
        _draw_closer(axes, *small[0], corner=(left + 0.3, high - 0.1), scale=scale, scheme=scheme)
    return figure


def _place_chains(bounds: Sequence[Points]) -> list[Points]:
    """Where on the screen every chain starts: on parallel diagonals, several on one where they are short."""
    width = max(np.ptp(points[:, 0]) for points in bounds)
    offsets: list[Points] = []
    x = drop = below = 0.0  # how far along the diagonal, how far down it is, what hangs from it
    for points in bounds:
        above_line = points[:, 1] - _SLOPE * points[:, 0]
        if offsets and x + _SCENE_NAME + np.ptp(points[:, 0]) <= width:
            x += _SCENE_NAME + 0.2
        else:
            x, drop, below = 0.0, drop - (below + above_line.max() + _LABEL + 0.1 if offsets else 0.0), 0.0
        offsets.append(np.array([x, drop + _SLOPE * x]))
        x += np.ptp(points[:, 0])
        below = max(below, 0.3 - above_line.min())
    return offsets


def _project(points: Points) -> Points:
    return np.asarray(points, dtype=float) @ _SCREEN


def _corners(corner: Points, sizes: Sequence[int]) -> Points:
    """The eight corners of a box, ``[2, 2, 2, 3]``."""
    return np.stack(np.meshgrid(*([c, c + s] for c, s in zip(corner, sizes, strict=True)), indexing="ij"), axis=-1)


def _outline(box: Box) -> Points:
    """What a shot takes up on the screen: its block's corners, and its two ends on the diagonal, last."""
    corners = _corners(np.full(3, box.corner), box.shot.grid).reshape(-1, 3)
    return _project(np.concatenate([corners, [[box.start] * 3], [[box.corner + max(box.shot.grid)] * 3]]))


def _faces(corner: Points, sizes: Sequence[int]) -> list[tuple[Points, float]]:
    """The three faces of a box that are seen, as polygons on the screen, each with its brightness."""
    c = _project(_corners(corner, sizes))
    front, top, side = c[0], c[:, 1], c[:, :, 1]
    return [(face[[0, 0, 1, 1], [0, 1, 1, 0]], light) for face, light in ((front, 0.0), (top, 0.28), (side, -0.22))]


def _cells(corner: Points, sizes: Sequence[int]) -> list[Points]:
    """The lines between tokens on the three seen faces."""
    lines = []
    for fixed, at in ((0, 0), (1, 1), (2, 1)):  # the first frame, the top, the right
        for across in {0, 1, 2} - {fixed}:
            (along,) = {0, 1, 2} - {fixed, across}
            ends = np.repeat(np.asarray(corner, dtype=float)[None, None], sizes[across] - 1, axis=0).repeat(2, axis=1)
            ends[..., fixed] += at * sizes[fixed]
            ends[..., across] += np.arange(1, sizes[across])[:, None]
            ends[:, 1, along] += sizes[along]
            lines += [*_project(ends)]
    return lines


def _draw_box(
    axes: Axes, corner: Points, sizes: Sequence[int], colour: Colour, *, scale: float, offset: Points
) -> None:
    faces = _faces(corner, sizes)
    axes.add_collection(
        PolyCollection(
            [face * scale + offset for face, _ in faces],
            facecolors=[shade(colour, light) for _, light in faces],
            edgecolors=style.line_colour(colour),
            linewidths=0.8 if max(sizes) * scale > 0.2 else 0.4,
            joinstyle="round",
        )
    )
    if scale >= _CELL and max(sizes) * scale < 12.0:  # larger than any picture: seen only in part, too many to draw
        lines = [line * scale + offset for line in _cells(corner, sizes)]
        axes.add_collection(LineCollection(lines, colors=[style.line_colour(colour)], linewidths=0.4))


def _draw_chain(axes: Axes, chain: Sequence[Box], *, scale: float, offset: Points, scheme: Scheme) -> None:
    end = chain[-1].corner + max(chain[-1].shot.grid)
    axes.plot(*_on_diagonal([0, end], scale, offset).T, color="0.55", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    for box in chain:
        dark = shade(box.colour, -0.25)
        if box.corner > box.start:  # text takes room on the diagonal
            if scale >= _CELL:
                places = (np.array(axes.get_xlim()) - offset[0]) / (scale * _SCREEN.sum(0)[0])
                first, last = max(box.start, int(places[0]) - 1), min(box.corner, int(places[1]) + 1)
                for place in range(first, last):
                    _draw_box(axes, np.full(3, place), (1, 1, 1), dark, scale=scale, offset=offset)
            else:
                ends = _on_diagonal([box.start, box.corner], scale, offset)
                axes.plot(*ends.T, color=dark, linewidth=3.5, solid_capstyle="butt", zorder=1)
        _draw_box(axes, np.full(3, box.corner), box.shot.grid, box.colour, scale=scale, offset=offset)
        if scheme == "anchored" and box.shot.text:
            (at,) = _on_diagonal([box.start], scale, offset)
            axes.plot(*at, "o", color=shade(box.colour, -0.35), markersize=6, markeredgecolor="white", zorder=5)


def _label_chain(axes: Axes, chain: Sequence[Box], *, scale: float, offset: Points) -> None:
    """Names above the blocks, and below the diagonal where every shot starts and the last one ends."""
    outlines = [_outline(box)[:-2] * scale + offset for box in chain]
    centres = [(points[:, 0].min() + points[:, 0].max()) / 2 for points in outlines]
    wide = len(chain) == 1 or (max(centres) - min(centres)) / (len(chain) - 1) > 0.6
    places = style.spread(centres, 0.75 if wide else 0.35)
    for box, points, place in zip(chain, outlines, places, strict=True):
        diagonal = offset[1] + _SLOPE * (place + (0.38 if wide else 0.1) - offset[0])  # at the label's right end
        y = max(points[:, 1].max(), diagonal if box is not chain[-1] else -np.inf) + 0.08
        dark = shade(box.colour, -0.4)
        if not wide:
            axes.text(place, y, box.name.removeprefix("shot "), fontsize=7, color=dark, ha="center", va="bottom")
            continue
        size = "\N{MULTIPLICATION SIGN}".join(map(str, box.shot.grid))
        count = f"{box.shot.text:,} text\n{size}" if box.shot.text else size
        axes.text(place, y, count, fontsize=7.5, color="0.25", ha="center", va="bottom", linespacing=1.15)
        y += 0.28 if box.shot.text else 0.15
        axes.text(place, y, box.name, fontsize=9.5, fontweight="bold", color=dark, ha="center", va="bottom")
    undersides = [
        _project(box.corner + np.array([[0, 0, 0], [0, 0, w], [f, 0, w]])) * scale + offset
        for box, (f, _, w) in ((box, box.shot.grid) for box in chain)
    ]
    ends = [*(box.start for box in chain), chain[-1].corner + max(chain[-1].shot.grid)]
    last = -np.inf
    for end, (x, y) in zip(ends, _on_diagonal(ends, scale, offset), strict=True):
        text = f"{end:,}"
        half = 0.03 + 0.034 * len(text)
        if x - half < last:
            continue
        last = x + half
        width = np.array([x - half, x, x + half])
        under = [np.interp(width, side[:, 0], side[:, 1], left=y, right=y).min() for side in undersides]
        foot = min(y - 0.02, *under) - 0.1
        axes.plot([x, x], [y - 0.02, foot], color="0.35", linewidth=0.8, zorder=6)
        axes.text(x, foot - 0.02, text, fontsize=8, color="0.2", ha="center", va="top", zorder=6)


def _on_diagonal(places: Sequence[int], scale: float, offset: Points) -> Points:
    return _project(np.array([[place] * 3 for place in places])) * scale + offset


def _draw_directions(axes: Axes, *, corner: tuple[float, float]) -> None:
    for step, name, align in zip(_SCREEN * 0.7, ("frames", "height", "width"), ("left", "center", "left"), strict=True):
        axes.annotate(
            "",
            xy=tuple(np.add(corner, step)),
            xytext=corner,
            arrowprops={"arrowstyle": "-|>", "color": "0.3", "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0},
        )
        x, y = np.add(corner, step) + np.array([0.05, 0.0] if align == "left" else [0.0, 0.05])
        axes.text(x, y, name, fontsize=8.5, color="0.3", ha=align, va="bottom" if name == "height" else "center")


def _draw_closer(
    axes: Axes, name: str, chain: Sequence[Box], box: Box, *, corner: tuple[float, float], scale: float, scheme: Scheme
) -> None:
    """A video block and what it touches, again at a larger scale, in a frame below the corner."""
    points = _outline(box)[:-2]
    centre, size = (points.max(0) + points.min(0)) / 2, np.ptp(points, axis=0)
    width, height = _CLOSER
    zoom = min(0.3, 0.62 * width / size[0], 0.62 * height / size[1])
    closer = axes.inset_axes((corner[0], corner[1] - height, width, height), transform=axes.transData, zorder=10)
    closer.set(xlim=(-width / 2, width / 2), ylim=(-height / 2, height / 2), xticks=[], yticks=[], facecolor="#FAFAFA")
    for spine in closer.spines.values():
        spine.set(color="0.5", linewidth=0.8)
    _draw_chain(closer, chain, scale=zoom, offset=-centre * zoom, scheme=scheme)
    title = f"{name}, {zoom / scale:,.0f} times as large"
    at = -width / 2 + 0.1, height / 2 - 0.1
    closer.text(*at, title, fontsize=9, fontweight="bold", color=shade(box.colour, -0.4), va="top")
