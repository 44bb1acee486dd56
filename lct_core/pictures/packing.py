"""A drawing of how scenes share rows."""

from collections.abc import Sequence

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lct_core.layout import Layout
from lct_core.pictures.style import INK, PALETTE, counted, luminance, number_tokens, shade, shot_names, titled


def packing_figure(layout: Layout, rows: Sequence[Sequence[int]], *, budget: int) -> Figure:
    """Rows of the token budget, filled with scenes: each scene in one colour, its shots delimited.

    Args:
        layout: The scenes.
        rows: Rows of indices into the layout's scenes, as :func:`lct_core.plan_rows` returns them.
        budget: Most tokens in a row.
    """
    row_height = min(0.75, 60 / len(rows))
    full = layout.tokens / (budget * len(rows))
    figure, height = titled(
        f"Rows of at most {budget:,} tokens",
        f"{counted(len(layout.scenes), 'scene')} in {counted(len(rows), 'row')}, {full:.1%} full",
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
                face = shade(colour, 0.35 if shot.role == "global" else 0.0)
                axes.barh(place, shot.tokens, left=at, height=0.56, color=face, edgecolor="white", linewidth=1.0)
                for label in (name, name.removeprefix("shot ")):
                    if shot.tokens > 0.08 * (len(label) + 1) * inch and row_height > 0.3:
                        ink = "white" if luminance(face) < 0.4 else INK
                        axes.text(at + shot.tokens / 2, place, label, fontsize=8, color=ink, ha="center", va="center")
                        break
                at += shot.tokens
            label = f"scene {scene + 1}: {at - start:,} tokens"
            if at - start > 0.08 * len(label) * inch and row_height > 0.5:
                axes.text(start, place - 0.31, label, fontsize=8.5, fontweight="bold", color=shade(colour, -0.4))
        if at < budget:
            axes.barh(place, budget - at, left=at, height=0.56, color="white", edgecolor="0.75", hatch="////")
            label = f"{budget - at:,} free"
            if budget - at > 0.08 * len(label) * inch and row_height > 0.3:
                clear = {"facecolor": "white", "edgecolor": "none", "pad": 2.0}
                middle = (at + budget) / 2
                axes.text(middle, place, label, fontsize=8, color="0.35", ha="center", va="center", bbox=clear)
    if row_height > 0.3:
        axes.set_yticks(range(len(rows)), [f"row {k}" for k in range(1, len(rows) + 1)])
    else:
        axes.set_yticks([])
    number_tokens(axes.xaxis, ticks=8)
    axes.set_xlabel("tokens", fontsize=9, color="0.25")
    axes.tick_params(labelsize=9, colors="0.25", length=3)
    axes.tick_params(axis="y", length=0)
    for name in ("top", "right", "left"):
        axes.spines[name].set_visible(False)
    axes.spines["bottom"].set_color("0.6")
    return figure
