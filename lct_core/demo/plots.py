"""Curves and bars: how training went, how the modes compare, how errors accumulate.

Each function writes a picture and returns its figure, which no window shows and no global state holds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

_WIDTH, _DOTS_PER_INCH = 7.5, 120  # inches, and what makes them a README's width
_INK = "0.35"
_KINDS = {"single_shot": ("single shots", "tab:orange"), "scene": ("scenes", "tab:blue")}
_WINDOW = 0.05  # of a stage's losses, that a running mean is over


def loss_curves(path: str | Path, curves: Mapping[str, Sequence[tuple[int, str, float]]]) -> Figure:
    """Save the losses of training, a panel per stage: every step's as a dot, and a running mean over 5% of them.

    Args:
        path: Picture to write; its ending says which kind (``.png``, ``.pdf``, ``.svg``).
        curves: For every stage, by its name, the steps with their kind, ``"scene"`` or ``"single_shot"``, and loss.

    Raises:
        ValueError: no stage, a stage without a loss, or another kind.
    """
    if not curves or not all(curves.values()):
        empty = [name for name, losses in curves.items() if not losses]
        raise ValueError(f"curves: got {f'no loss of {empty}' if empty else 'no stage'}, expected losses to show")
    kinds = {kind for losses in curves.values() for _, kind, _ in losses}
    if not kinds <= _KINDS.keys():
        raise ValueError(f"curves: got the kinds {sorted(kinds)}, expected {' or '.join(map(repr, _KINDS))}")
    figure = _figure(2.7)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (stage, losses) in zip(panels, curves.items(), strict=True):
        _style(axes, title=stage, x="step")
        for kind, (label, colour) in _KINDS.items():
            points = [(step, loss) for step, of, loss in losses if of == kind]
            if points:
                steps, values = np.array(points).T
                count = max(1, round(_WINDOW * len(points)))
                mean = np.convolve(values, np.full(count, 1 / count), mode="valid")
                middles = steps[(count - 1) // 2 :][: len(mean)]
                axes.plot(steps, values, ".", markersize=2.5, markeredgewidth=0, color=colour, alpha=0.4)
                axes.plot(middles, mean, color=colour, linewidth=1.5, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("loss", fontsize=8, color=_INK)
    handles = {line.get_label(): line for axes in panels for line in axes.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path)
    return figure


def modes(
    path: str | Path, errors: Mapping[str, float], adherence: Mapping[str, float], *, goals: Mapping[str, float]
) -> Figure:
    """Save what the modes of generation reach, as bars: appearance error, less is better, and prompt adherence.

    Args:
        path: Picture to write.
        errors: Appearance error of every mode, by its label.
        adherence: Prompt adherence of the same modes.
        goals: The error that a mode should not exceed, for those that have one: a tick across its bar.

    Raises:
        ValueError: no mode, or labels that don't match.
    """
    if not errors or errors.keys() != adherence.keys() or not goals.keys() <= errors.keys():
        raise ValueError(
            f"errors, adherence, goals: got the modes {list(errors)}, {list(adherence)} and {list(goals)}, expected at "
            "least one, the same for both measures, and goals of those alone"
        )
    figure = _figure(0.75 + 0.34 * len(errors))
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("appearance error (lower is better)", "prompt adherence (higher is better)")
    for axes, values, title, colour in zip(panels, (errors, adherence), titles, ("tab:blue", "0.6"), strict=True):
        _style(axes, title=title)
        axes.barh([fill(mode, 30) for mode in errors], [values[mode] for mode in errors], height=0.62, color=colour)
        for row, mode in enumerate(errors):
            at = axes.get_yaxis_transform()  # x in parts of the panel, whose right end is kept free of bars
            axes.text(1, row, f"{values[mode]:.3f}", transform=at, ha="right", va="center", fontsize=8, color=_INK)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0, labelsize=8.5)
    rows = [list(errors).index(mode) for mode in goals]
    panels[0].scatter(list(goals.values()), rows, marker="|", s=260, color="tab:red", linewidth=1.5)
    if goals:
        panels[0].set_xlabel("| goal", loc="right", fontsize=8, color="tab:red")
    panels[0].set_xlim(0, 1.3 * max([*errors.values(), *goals.values()]) or 1)
    panels[1].set_xlim(0, 1.3)
    panels[1].set_xticks([0, 0.25, 0.5, 0.75, 1])
    panels[0].invert_yaxis()
    figure.savefig(path)
    return figure


def accumulation(
    path: str | Path, drift: Mapping[float, Sequence[float]], adherence: Mapping[float, Sequence[float]]
) -> Figure:
    """Save how errors accumulate from shot to shot, a line per noise level of the history (paper, Fig. 7 and 8).

    Args:
        path: Picture to write.
        drift: For every t_c, on the paper's 0-1000 scale, the distance of every shot's colours from the first one's.
        adherence: For the same t_c, every shot's prompt adherence.

    Raises:
        ValueError: nothing to show, or measures that don't match.
    """
    shots, others = ({t_c: len(values) for t_c, values in measure.items()} for measure in (drift, adherence))
    if not shots or 0 in shots.values() or shots != others:
        raise ValueError(
            f"drift, adherence: got shots for each t_c {shots} and {others}, expected at least one of each, as many in "
            "both"
        )
    figure = _figure(2.9)
    panels = figure.subplots(1, 2)
    titles = ("colour distance from shot 1", "prompt adherence")
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(shots)))
    for axes, measure, title in zip(panels, (drift, adherence), titles, strict=True):
        _style(axes, title=title, x="shot")
        for t_c, colour in zip(sorted(measure), colours, strict=True):
            numbers = range(1, len(measure[t_c]) + 1)
            axes.plot(numbers, measure[t_c], "o-", markersize=3, linewidth=1.5, color=colour, label=f"{t_c:g}")
        axes.xaxis.set_major_locator(MaxNLocator(14, integer=True, min_n_ticks=1))
        axes.set_xlim(0.5, max(shots.values()) + 0.5)
        axes.set_ylim(bottom=0)
    panels[1].set_ylim(top=1)
    lines = panels[0].get_lines()
    figure.legend(handles=lines, title="$t_c$", loc="outside right center", fontsize=8, title_fontsize=9, frameon=False)
    figure.savefig(path)
    return figure


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), dpi=_DOTS_PER_INCH, facecolor="white", layout="constrained")


def _style(axes: Axes, *, title: str, x: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel(x, fontsize=8, color=_INK)
    axes.tick_params(labelsize=8, color=_INK, labelcolor=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
