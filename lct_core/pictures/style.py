"""What all figures share: the colours of shots, their names, titles."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lct_core.coordinates import Scheme, extent
from lct_core.layout import Layout

Colour = tuple[float, float, float]
"""RGB in [0, 1]."""

Points = np.ndarray
"""``[..., 2]`` on the screen, or ``[..., 3]`` in coordinates."""

PALETTE = ("#332288", "#CC6677", "#44AA99", "#DDCC77", "#88CCEE", "#882255", "#117733", "#AA4499", "#999933")
"""Paul Tol's "muted" scheme, made to be told apart with any colour vision; ordered so that neighbours differ most."""

INK = "#222222"
"""The colour of letters and of lines that stand out."""

_GLOBAL = "#8A8A8A"
_DPI = 150


def shot_names(layout: Layout) -> list[str]:
    """What to call every shot in row order: ``"global"``, or its number in its scene, counted from 1 without it."""
    return [f"shot {k}" if k else "global" for k in _numbers(layout)]


def starts(layout: Layout, *, scheme: Scheme) -> list[int]:
    """Where on the diagonal every shot starts, in row order; every scene starts at 0."""
    return [
        start
        for scene in layout.scenes
        for start in [*accumulate((extent(shot, scheme=scheme) for shot in scene), initial=0)][:-1]
    ]


def shot_colours(layout: Layout) -> list[Colour]:
    """A colour for every shot in row order: by its number in its scene, grey for a global shot."""
    return [to_rgb(PALETTE[(k - 1) % len(PALETTE)] if k else _GLOBAL) for k in _numbers(layout)]


def _numbers(layout: Layout) -> list[int]:
    """The number of every shot in its scene: 0 for a global one, which comes first, and the others from 1."""
    return [k for scene in layout.scenes for k, _ in enumerate(scene, start=0 if scene[0].role == "global" else 1)]


def shade(colour: Colour, light: float) -> Colour:
    """A colour mixed with white (above 0) or black (below 0)."""
    target = 1.0 if light > 0 else 0.0
    r, g, b = ((1 - abs(light)) * c + abs(light) * target for c in colour)
    return r, g, b


def luminance(colour: Colour) -> float:
    """How bright a colour is, from 0 to 1."""
    return float(np.dot(colour, (0.2126, 0.7152, 0.0722)))


def line_colour(colour: Colour) -> Colour:
    """A colour for lines between cells: darker than a light face, lighter than a dark one."""
    return shade(colour, -0.5) if luminance(colour) > 0.2 else shade(colour, 0.45)


def titled(title: str, subtitle: str, *, size: tuple[float, float]) -> tuple[Figure, float]:
    """A figure with room for a picture below two lines of title, and its whole height, in inches."""
    width, height = size[0], size[1] + 0.95
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    figure.text(0.25 / width, 1 - 0.25 / height, title, fontsize=14, fontweight="bold", color=INK, va="top")
    figure.text(0.25 / width, 1 - 0.57 / height, subtitle, fontsize=9.5, color="0.3", va="top")
    return figure, height


def counted(number: int, noun: str) -> str:
    """A number of things in words: ``"1 row"``, ``"2 rows"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def number_tokens(axis: Axis, *, ticks: int) -> None:
    """Number an axis of tokens, with so many ticks at most."""
    axis.set_major_locator(MaxNLocator(ticks, integer=True))
    axis.set_major_formatter(FuncFormatter(token_number))


def token_number(value: float, _: object = None) -> str:
    """A tick's label on an axis of tokens; matplotlib also passes the tick's position."""
    return f"{value:,.0f}" if value < 1_000_000 else f"{value / 1_000_000:,g} M"


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
