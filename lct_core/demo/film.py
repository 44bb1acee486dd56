"""Films: scenes as different methods made them, side by side and in time."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lct_core.data import write_video
from lct_core.pictures.sheet import SceneRows

# pixels, even: H.264 stores colour for 2 x 2 of them
_GAP, _LINE = 12, 20
_BASELINE, _LETTER = 8, 8  # of labels above the panels, and a letter's width, about
_DPI = 128  # a power of two: sizes in inches are exact


def film(path: str | Path, scenes: Sequence[SceneRows], *, fps: float = 4, size: int = 192) -> None:
    """Write an MP4 of scenes, one after the other: each shot in turn, as every method made it, side by side.

    A method's label stands above its panel. Frames are enlarged by a whole factor, pixels left as they are.

    Args:
        path: File to write; one that is there is replaced.
        scenes: At least one. All have equally many rows, and all their shots frames of one size; a shot is equally long
            in all rows.
        fps: Frames per second (ours: 4, slow enough to compare).
        size: A panel's side in pixels, about: the frames' side times the largest factor that keeps within, at least 1.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: no scene; rows or frames that don't match; or a rate that is not positive.
    """
    if not scenes:
        raise ValueError("scenes: got none, expected at least one")
    _check(scenes)
    height, width = next(iter(scenes[0].rows.values()))[0].shape[2:]
    factor = max(1, size // max(height, width))
    height, width = factor * height, factor * width
    column = width + width % 2 + _GAP
    lines = max(len(_wrapped(label, width)) for scene in scenes for label in scene.rows)
    top = _GAP + _LINE * lines
    shots = []
    for scene in scenes:
        strip = _labels(list(scene.rows), width=width, column=column, height=top)
        for row in zip(*scene.rows.values(), strict=True):
            pictures = torch.ones(3, row[0].shape[1], top + height + height % 2 + _GAP, strip.shape[2])
            pictures[:, :, :top] = strip[:, None]
            for k, frames in enumerate(row):
                x = _GAP + k * column
                large = repeat(frames.detach().float(), "c t y x -> c t (y p) (x q)", p=factor, q=factor)
                pictures[:, :, top : top + height, x : x + width] = large.clamp(0, 1)
            shots.append(pictures)
    write_video(path, torch.cat(shots, dim=1), fps=fps)


def _check(scenes: Sequence[SceneRows]) -> None:
    first, *_ = chain(*scenes[0].rows.values())
    for number, scene in enumerate(scenes, 1):
        if len(scene.rows) != len(scenes[0].rows):
            raise ValueError(
                f"scenes: scene {number} has {len(scene.rows)} rows, expected {len(scenes[0].rows)} as in scene 1: "
                "they share a film's width"
            )
        reference = next(iter(scene.rows.values()))
        for label, shots in scene.rows.items():
            for k, (shot, other) in enumerate(zip(shots, reference, strict=True), 1):
                expected = [3, other.shape[1], *first.shape[2:]]
                if list(shot.shape) != expected:
                    raise ValueError(
                        f"scenes: shot {k} of row {label!r} of scene {number} has shape {list(shot.shape)}, expected "
                        f"{expected}: equally many frames in all rows, of one size in the whole film"
                    )


def _wrapped(label: str, width: int) -> list[str]:
    return wrap(label, max(1, width // _LETTER))


def _labels(labels: Sequence[str], *, width: int, column: int, height: int) -> Float[Tensor, "3 height width"]:
    """Draw labels above the panels' columns, RGB in [0, 1]."""
    total = _GAP + column * len(labels)
    figure = Figure(figsize=(total / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for k, label in enumerate(labels):
        x = (_GAP + k * column + width / 2) / total
        text = "\n".join(_wrapped(label, width))
        figure.text(x, _BASELINE / height, text, ha="center", va="baseline", fontsize=8, linespacing=1.1)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1) / 255
