"""A scene to look at: its contact sheet, and one video of it all."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lct_core.data import write_video
from lct_core.pictures.sheet import SceneRows, contact_sheet


def write_views(out: Path, texts: Sequence[str], frames: Sequence[Tensor], *, label: str, fps: float) -> list[Path]:
    """Write a scene's contact sheet and, where all shots are of one size, one video of it all.

    Args:
        out: Folder to write to.
        texts: Every shot's.
        frames: Every shot's, RGB in [0, 1], ``[3, frames, height, width]``.
        label: What the contact sheet calls the row.
        fps: Frames per second of the video.

    Returns:
        What was written.
    """
    written = [out / "contact_sheet.png"]
    contact_sheet(written[0], [SceneRows(texts, {label: frames})])
    height, width = frames[0].shape[2:]
    if all(clip.shape[2:] == (height, width) for clip in frames) and not (height % 2 or width % 2):
        written.append(out / "scene.mp4")
        write_video(written[1], torch.cat([*frames], dim=1), fps=fps)
    return written
