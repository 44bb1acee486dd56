"""A drawing of who sees whom."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lct_core.layout import Layout, Range, consecutive
from lct_core.pictures.style import INK, Colour, number_tokens, shade, shot_colours, shot_names, spread, titled
from lct_core.plan import AttentionPlan


def plan_figure(layout: Layout, plan: AttentionPlan, *, pattern: str) -> Figure:
    """Who sees whom: queries downwards, keys to the right, all lengths in proportion to tokens.

    Args:
        layout: The row's scenes of shots.
        plan: A plan over the layout's tokens, as queries and as keys.
        pattern: What the plan is called.
    """
    share = plan.pairs / (plan.queries * plan.keys)
    calls = len(plan.segments)
    figure, height = titled(
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
                        fills.append(shade(_part_colour(colours[other], is_text), 0.0 if own == other else 0.55))
    axes.add_collection(PolyCollection(tiles, facecolors=fills, edgecolors=fills, linewidths=0.2))
    between = [span.start for span in layout.spans[1:]]
    for lines in (axes.axvline, axes.axhline):
        for place in between:
            lines(place, color="white", linewidth=0.8)
        for scene in layout.scene_spans[1:]:
            lines(scene.start, color="0.45", linewidth=0.8, linestyle=(0, (3, 2)))
    blocks = [_rectangle(keys, queries) for queries, ranges in plan.segments for keys in ranges]
    axes.add_collection(PolyCollection(blocks, facecolors="none", edgecolors=INK, linewidths=1.3, zorder=4))
    for axis in (axes.xaxis, axes.yaxis):
        number_tokens(axis, ticks=6)
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
            Patch(facecolor=shade(grey, 0.55), label="another shot's"),
            Patch(facecolor="#F3F3F3", edgecolor="0.75", label="not seen"),
            Patch(facecolor="none", edgecolor=INK, label="one dense block"),
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
    return shade(colour, -0.4) if is_text else shade(colour, 0.15)


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
            ink = shade(colour, -0.4)
            axes.text(place, at - 0.03 * inch, name, fontsize=8.5, color=ink, rotation=90, ha="center", va="bottom")
            axes.text(at - 0.03 * inch, place, name, fontsize=8.5, color=ink, ha="right", va="center")
    for number, span in enumerate(layout.scene_spans, start=1):
        if len(layout.scenes) > 1 and span.size > 0.6 * inch:
            at, middle = -0.98 * inch, (span.start + span.stop) / 2
            line([span.start + 0.04 * inch, span.stop - 0.04 * inch], [at, at])
            style: dict[str, Any] = {"fontsize": 9, "fontweight": "bold", "color": INK}
            axes.text(middle, at - 0.05 * inch, f"scene {number}", ha="center", va="bottom", **style)
            axes.text(at - 0.05 * inch, middle, f"scene {number}", ha="right", va="center", rotation=90, **style)


def _common(a: Range, b: Range) -> Range:
    return Range(max(a.start, b.start), min(a.stop, b.stop))


def _rectangle(x: Range, y: Range) -> list[tuple[float, float]]:
    return [(x.start, y.start), (x.stop, y.start), (x.stop, y.stop), (x.start, y.stop)]
