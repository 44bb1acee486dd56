"""Pictures of a layout: where its tokens stand, who sees whom, and how its scenes fill rows.

They are drawn from ranges and boxes; single tokens only where they are large enough to be seen, so a scene of a million
tokens costs no more than one of a hundred.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lct_core.cli.shots import shot_names, starts
from lct_core.coordinates import Scheme, extent
from lct_core.layout import Layout, Range, Shot, consecutive
from lct_core.masks import AttentionPlan

Colour = tuple[float, float, float]
Points = np.ndarray  # [..., 2] on the screen or [..., 3] in coordinates

#: Paul Tol's "muted" scheme, made to be told apart with any colour vision; in an order in which neighbours differ most.
PALETTE = ("#332288", "#CC6677", "#44AA99", "#DDCC77", "#88CCEE", "#882255", "#117733", "#AA4499", "#999933")
_GLOBAL, _INK, _FAINT = "#8A8A8A", "#222222", "#D9D9D9"
_DPI = 150

#: Where one step of frame, height and width goes on the screen: orthographic, seen from above and to the side.
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


def shot_colours(layout: Layout) -> list[Colour]:
    """A colour for every shot in row order: by its number in its scene, grey for a global shot."""
    colours = []
    for scene in layout.scenes:
        first = 0 if scene[0].role == "global" else 1
        colours += [to_rgb(PALETTE[(k - 1) % len(PALETTE)] if k else _GLOBAL) for k in range(first, first + len(scene))]
    return colours


def boxes(layout: Layout, *, scheme: Scheme) -> list[list[Box]]:
    """Every scene's shots, as they stand along the space diagonal."""
    found = [
        Box(name, shot, start, start + extent(shot, scheme=scheme) - max(shot.grid), colour)
        for name, shot, start, colour in zip(
            shot_names(layout), layout.shots, starts(layout, scheme=scheme), shot_colours(layout), strict=True
        )
    ]
    return [found[scene.start : scene.stop] for scene in layout.scene_shots]


# --- coordinates ---


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
    figure, height = _titled(
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
            axes.text(x, y, f"scene {number}", fontsize=10, fontweight="bold", color=_INK, ha="right")
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
            facecolors=[_shade(colour, light) for _, light in faces],
            edgecolors=_line_colour(colour),
            linewidths=0.8 if max(sizes) * scale > 0.2 else 0.4,
            joinstyle="round",
        )
    )
    if scale >= _CELL and max(sizes) * scale < 12.0:  # larger than any picture: seen only in part, too many to draw
        lines = [line * scale + offset for line in _cells(corner, sizes)]
        axes.add_collection(LineCollection(lines, colors=[_line_colour(colour)], linewidths=0.4))


def _draw_chain(axes: Axes, chain: Sequence[Box], *, scale: float, offset: Points, scheme: Scheme) -> None:
    end = chain[-1].corner + max(chain[-1].shot.grid)
    axes.plot(*_on_diagonal([0, end], scale, offset).T, color="0.55", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    for box in chain:
        dark = _shade(box.colour, -0.25)
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
            axes.plot(*at, "o", color=_shade(box.colour, -0.35), markersize=6, markeredgecolor="white", zorder=5)


def _label_chain(axes: Axes, chain: Sequence[Box], *, scale: float, offset: Points) -> None:
    """Names above the blocks, and below the diagonal where every shot starts and the last one ends."""
    outlines = [_outline(box)[:-2] * scale + offset for box in chain]
    centres = [(points[:, 0].min() + points[:, 0].max()) / 2 for points in outlines]
    wide = len(chain) == 1 or (max(centres) - min(centres)) / (len(chain) - 1) > 0.6
    places = spread(centres, 0.75 if wide else 0.35)
    for box, points, place in zip(chain, outlines, places, strict=True):
        diagonal = offset[1] + _SLOPE * (place + (0.38 if wide else 0.1) - offset[0])  # at the label's right end
        y = max(points[:, 1].max(), diagonal if box is not chain[-1] else -np.inf) + 0.08
        dark = _shade(box.colour, -0.4)
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
    closer.text(*at, title, fontsize=9, fontweight="bold", color=_shade(box.colour, -0.4), va="top")


# --- attention ---


def plan_figure(layout: Layout, plan: AttentionPlan, *, pattern: str) -> Figure:
    """Who sees whom: queries downwards, keys to the right, all lengths in proportion to tokens.

    Args:
        layout: The row's scenes of shots.
        plan: A plan over the layout's tokens, as queries and as keys.
        pattern: What the plan is called.
    """
    share = plan.pairs / (plan.queries * plan.keys)
    calls = len(plan.segments)
    figure, height = _titled(
        f"Who sees whom: {pattern}",
        f"queries in rows, keys in columns; {share:.1%} of all pairs, in {calls} dense call{'s' if calls > 1 else ''}",
        size=(8.8, 8.4),
    )
    side, left, bottom = 6.2, 1.5, 0.95  # inches
    axes = figure.add_axes((left / 8.8, bottom / height, side / 8.8, side / height))
    n = layout.tokens
    axes.set(xlim=(0, n), ylim=(n, 0), facecolor="#F3F3F3")
    colours, parts = shot_colours(layout), _parts(layout)
    tiles, fills = [], []
    for queries, ranges in plan.segments:
        for row, own, _ in parts:
            rows = _common(row, queries)
            for keys in ranges if rows.size > 0 else ():
                for column, other, is_text in parts:
                    columns = _common(column, keys)
                    if columns.size > 0:
                        tiles.append(_rectangle(columns, rows))
                        fills.append(_shade(_part_colour(colours[other], is_text), 0.0 if own == other else 0.55))
    axes.add_collection(PolyCollection(tiles, facecolors=fills, edgecolors=fills, linewidths=0.2))
    between = [span.start for span in layout.spans[1:]]
    for lines in (axes.axvline, axes.axhline):
        for place in between:
            lines(place, color="white", linewidth=0.8)
        for scene in layout.scene_spans[1:]:
            lines(scene.start, color="0.45", linewidth=0.8, linestyle=(0, (3, 2)))
    blocks = [_rectangle(keys, queries) for queries, ranges in plan.segments for keys in ranges]
    axes.add_collection(PolyCollection(blocks, facecolors="none", edgecolors=_INK, linewidths=1.3, zorder=4))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
    axes.yaxis.set_major_formatter(FuncFormatter(_tokens))
    axes.yaxis.tick_right()
    axes.tick_params(labelsize=8, colors="0.35", length=3)
    axes.set_xlabel("key token", fontsize=9, color="0.25")
    axes.yaxis.set_label_position("right")
    axes.set_ylabel("query token", fontsize=9, color="0.25")
    for spine in axes.spines.values():
        spine.set(color="0.6", linewidth=0.8)
    _draw_edges(axes, layout, parts, colours, inch=n / side)
    grey = to_rgb("#777777")
    axes.legend(
        handles=[
            Patch(facecolor=_part_colour(grey, False), label="its own video"),
            Patch(facecolor=_part_colour(grey, True), label="its own text"),
            Patch(facecolor=_shade(grey, 0.55), label="another shot's"),
            Patch(facecolor="#F3F3F3", edgecolor="0.75", label="not seen"),
            Patch(facecolor="none", edgecolor=_INK, label="one dense block"),
        ],
        loc="upper center", bbox_to_anchor=(0.45, -0.09), ncols=5, frameon=False, fontsize=8.5, handlelength=1.3,
        columnspacing=1.4, handletextpad=0.5,
    )  # fmt: skip
    return figure


def _parts(layout: Layout) -> list[tuple[Range, int, bool]]:
    """The text and the video of every shot as they lie in the row: range, the shot's index, whether it is text."""
    kinds = (True, False) if layout.text_first else (False, True)
    cut = [(i, text, shot.text if text else shot.video) for i, shot in enumerate(layout.shots) for text in kinds]
    spans = consecutive(size for _, _, size in cut)
    return [(span, i, text) for span, (i, text, size) in zip(spans, cut, strict=True) if size]


def _part_colour(colour: Colour, is_text: bool) -> Colour:
    return _shade(colour, -0.4) if is_text else _shade(colour, 0.15)


def _draw_edges(
    axes: Axes, layout: Layout, parts: Sequence[tuple[Range, int, bool]], colours: Sequence[Colour], *, inch: float
) -> None:
    """Along the top and the left: every shot's text and video, its name, and its scene; ``inch`` is in tokens."""
    near, far = -0.05 * inch, -0.18 * inch
    strips = [[(far, a), (near, a), (near, b), (far, b)] for (a, b), _, _ in parts]
    fills = [_part_colour(colours[index], is_text) for _, index, is_text in parts]
    for polygons in (strips, [[(y, x) for x, y in strip] for strip in strips]):
        axes.add_collection(
            PolyCollection(polygons, facecolors=fills, edgecolors="white", linewidths=0.4, clip_on=False)
        )

    def line(along: Sequence[float], across: Sequence[float]) -> None:
        for points in ((along, across), (across, along)):
            axes.plot(*points, color="0.6", linewidth=0.7, clip_on=False)

    gap = 0.17 * inch
    if layout.num_shots * gap <= layout.tokens:  # where more shots than fit have no names, their colours still tell
        centres = [(span.start + span.stop) / 2 for span in layout.spans]
        places = spread(centres, gap, last=layout.tokens - gap / 2)
        for name, colour, centre, place in zip(shot_names(layout), colours, centres, places, strict=True):
            at = far - 0.17 * inch
            line([centre, place], [far - 0.02 * inch, at])
            ink = _shade(colour, -0.4)
            axes.text(place, at - 0.03 * inch, name, fontsize=8.5, color=ink, rotation=90, ha="center", va="bottom")
            axes.text(at - 0.03 * inch, place, name, fontsize=8.5, color=ink, ha="right", va="center")
    for number, span in enumerate(layout.scene_spans, start=1):
        if len(layout.scenes) > 1 and span.size > 0.6 * inch:
            at, middle = -0.98 * inch, (span.start + span.stop) / 2
            line([span.start + 0.04 * inch, span.stop - 0.04 * inch], [at, at])
            style: dict[str, Any] = {"fontsize": 9, "fontweight": "bold", "color": _INK}
            axes.text(middle, at - 0.05 * inch, f"scene {number}", ha="center", va="bottom", **style)
            axes.text(at - 0.05 * inch, middle, f"scene {number}", ha="right", va="center", rotation=90, **style)


def _common(a: Range, b: Range) -> Range:
    return Range(max(a.start, b.start), min(a.stop, b.stop))


def _rectangle(x: Range, y: Range) -> list[tuple[float, float]]:
    return [(x.start, y.start), (x.stop, y.start), (x.stop, y.stop), (x.start, y.stop)]


def _tokens(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value < 1_000_000 else f"{value / 1_000_000:,g} M"


# --- packing ---


def packing_figure(layout: Layout, rows: Sequence[Sequence[int]], *, budget: int) -> Figure:
    """Rows of the token budget, filled with scenes: each scene in one colour, its shots delimited.

    Args:
        layout: The scenes.
        rows: Rows of indices into the layout's scenes, as :func:`lct_core.plan_rows` returns them.
        budget: Most tokens in a row.
    """
    row_height = min(0.75, 60 / len(rows))
    full = layout.tokens / (budget * len(rows))
    figure, height = _titled(
        f"Rows of at most {budget:,} tokens",
        f"{_count(len(layout.scenes), 'scene')} in {_count(len(rows), 'row')}, {full:.1%} full",
        size=(11.0, row_height * len(rows) + 0.75),
    )
    left, width = 0.85, 9.8  # inches
    axes = figure.add_axes((left / 11.0, 0.65 / height, width / 11.0, row_height * len(rows) / height))
    axes.set(xlim=(0, budget), ylim=(len(rows) - 0.5, -0.5))
    names = shot_names(layout)
    inch = budget / width
    for place, row in enumerate(rows):
        at = 0
        for scene in row:
            colour = to_rgb(PALETTE[scene % len(PALETTE)])
            start = at
            for index in layout.scene_shots[scene]:
                shot, name = layout.shots[index], names[index]
                face = _shade(colour, 0.35 if shot.role == "global" else 0.0)
                axes.barh(place, shot.tokens, left=at, height=0.56, color=face, edgecolor="white", linewidth=1.0)
                for label in (name, name.removeprefix("shot ")):
                    if shot.tokens > 0.08 * (len(label) + 1) * inch and row_height > 0.3:
                        ink = "white" if _luminance(face) < 0.4 else _INK
                        axes.text(at + shot.tokens / 2, place, label, fontsize=8, color=ink, ha="center", va="center")
                        break
                at += shot.tokens
            label = f"scene {scene + 1}: {at - start:,} tokens"
            if at - start > 0.08 * len(label) * inch and row_height > 0.5:
                axes.text(start, place - 0.31, label, fontsize=8.5, fontweight="bold", color=_shade(colour, -0.4))
        if at < budget:
            axes.barh(place, budget - at, left=at, height=0.56, color="white", edgecolor="0.75", hatch="////")
            label = f"{budget - at:,} free"
            if budget - at > 0.08 * len(label) * inch and row_height > 0.3:
                style: dict[str, Any] = {"fontsize": 8, "color": "0.35", "ha": "center", "va": "center"}
                clear = {"facecolor": "white", "edgecolor": "none", "pad": 2.0}
                axes.text((at + budget) / 2, place, label, bbox=clear, **style)
    if row_height > 0.3:
        axes.set_yticks(range(len(rows)), [f"row {k}" for k in range(1, len(rows) + 1)])
    else:
        axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
    axes.set_xlabel("tokens", fontsize=9, color="0.25")
    axes.tick_params(labelsize=9, colors="0.25", length=3)
    axes.tick_params(axis="y", length=0)
    for name in ("top", "right", "left"):
        axes.spines[name].set_visible(False)
    axes.spines["bottom"].set_color("0.6")
    return figure


# --- what all three need ---


def _titled(title: str, subtitle: str, *, size: tuple[float, float]) -> tuple[Figure, float]:
    """A figure with room for a picture below two lines of title, and its whole height, in inches."""
    width, height = size[0], size[1] + 0.95
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    figure.text(0.25 / width, 1 - 0.25 / height, title, fontsize=14, fontweight="bold", color=_INK, va="top")
    figure.text(0.25 / width, 1 - 0.57 / height, subtitle, fontsize=9.5, color="0.3", va="top")
    return figure, height


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _luminance(colour: Colour) -> float:
    return float(np.dot(colour, (0.2126, 0.7152, 0.0722)))


def _line_colour(colour: Colour) -> Colour:
    """A colour for lines between cells: darker than a light face, lighter than a dark one."""
    return _shade(colour, -0.5) if _luminance(colour) > 0.2 else _shade(colour, 0.45)


def _shade(colour: Colour, light: float) -> Colour:
    """A colour mixed with white (above 0) or black (below 0)."""
    target = 1.0 if light > 0 else 0.0
    r, g, b = ((1 - abs(light)) * c + abs(light) * target for c in colour)
    return r, g, b


def spread(centres: Sequence[float], gap: float, *, last: float = np.inf) -> list[float]:
    """Places for labels that are at least ``gap`` apart, in order, each near its centre and none beyond ``last``."""
    # where labels are too close they are pooled, and the pool is centred on the mean of what its labels want
    pools: list[list[float]] = []
    for k, centre in enumerate(centres):
        pools.append([centre - k * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    free = [float(np.mean(pool)) for pool in pools for _ in pool]
    return [min(place, last - (len(free) - 1) * gap) + k * gap for k, place in enumerate(free)]
