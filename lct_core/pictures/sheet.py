"""Contact sheets: scenes side by side as different methods made them, in one picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from jaxtyping import Float
from torch import Tensor

# inches
_FRAME, _GAP, _MARGIN = 0.95, 0.12, 0.15
_LABELS, _TEXTS, _TITLE = 1.35, 0.42, 0.45
_DOTS_PER_INCH = 120


@dataclass(frozen=True, eq=False)
class SceneRows:
    """One scene as several methods made it.

    Args:
        texts: The text of every shot.
        rows: For every method, by its label, the frames of every shot, RGB in [0, 1] (clamped where a model left it).

    Raises:
        ValueError: nothing to show, or a row that has not one shot per text.
    """

    texts: Sequence[str]
    rows: Mapping[str, Sequence[Float[Tensor, "3 frames height width"]]]

    def __post_init__(self) -> None:
        if not (self.texts and self.rows):
            raise ValueError(f"rows: got {len(self.rows)} of {len(self.texts)} shots, expected at least one of each")
        for label, shots in self.rows.items():
            if len(shots) != len(self.texts):
                raise ValueError(
                    f"rows: row {label!r} has {len(shots)} shots, expected one for each of its {len(self.texts)} texts"
                )


def contact_sheet(path: str | Path, scenes: Sequence[SceneRows], *, title: str = "") -> None:
    """Save a picture of scenes, each with its shots as columns and its methods as rows.

    A cell is the first and the last frame of a shot, side by side, pixels left as they are. Scenes stand below each
    other.

    Args:
        path: Picture to write; its ending says which kind (``.png``, ``.pdf``, ``.svg``).
        scenes: At least one.
        title: One line above all.

    Raises:
        ValueError: no scene.
    """
    from matplotlib.figure import Figure  # takes a second to load, and most who import this room draw nothing

    if not scenes:
        raise ValueError("scenes: got none, expected at least one")
    column, row = 2 * _FRAME + _GAP, _FRAME + _GAP
    width = 2 * _MARGIN + _LABELS + column * max(len(scene.texts) for scene in scenes) - _GAP
    top = _TITLE if title else _MARGIN
    height = top + sum(_TEXTS + row * len(scene.rows) + _GAP for scene in scenes) - 2 * _GAP + _MARGIN
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, facecolor="white")
    figure.text(_MARGIN / width, 1 - _MARGIN / height, title, va="top", fontsize=11, fontweight="bold")
    y = top
    for scene in scenes:
        for k, text in enumerate(scene.texts):
            x = _MARGIN + _LABELS + k * column
            at = x / width, 1 - (y + _TEXTS - 0.06) / height
            figure.text(*at, fill(text, 42), va="bottom", fontsize=6, color="0.35", linespacing=1.25)
        y += _TEXTS
        for label, shots in scene.rows.items():
            at = (_MARGIN + _LABELS - _GAP) / width, 1 - (y + _FRAME / 2) / height
            figure.text(*at, fill(label, 18), va="center", ha="right", fontsize=8.5)
            for k, shot in enumerate(shots):
                for i, frame in enumerate((shot[:, 0], shot[:, -1])):
                    x = _MARGIN + _LABELS + k * column + i * _FRAME
                    axes = figure.add_axes(
                        (x / width, 1 - (y + _FRAME) / height, (_FRAME - 0.02) / width, _FRAME / height)
                    )
                    picture = frame.detach().float().clamp(0, 1).permute(1, 2, 0).cpu()
                    axes.imshow(picture.numpy(), interpolation="nearest")
                    axes.set_axis_off()
            y += row
        y += _GAP
    figure.savefig(path)
