"""What commands that generate share: a tuned model from its checkpoint, sizes of shots, and views of a scene."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path

import torch
from torch import Tensor

from lct_core.cli.source import ModelCard
from lct_core.codec import Codec
from lct_core.data import write_video
from lct_core.scene_model import SceneModel
from lct_core.training import load_checkpoint

_WINDOW = 9  # shots, the paper's, where a checkpoint does not say its own

Size = tuple[int, int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class Tuned:
    """What a finished stage of tuning left.

    Args:
        file: The checkpoint.
        card: What it says of its model.
        weights: Of the model.
        pattern: The attention that it was tuned with.
        window: Most shots that it was tuned on.
    """

    file: Path
    card: ModelCard
    weights: Mapping[str, Tensor]
    pattern: str
    window: int

    @classmethod
    def load(cls, file: Path) -> "Tuned":
        """Read a checkpoint.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not of a finished stage, or does not say how to make its model.
        """
        saved = load_checkpoint(file)
        if "model" not in saved:
            raise ValueError(f"{file}: a stage that is not finished, expected one of the files named like a stage")
        card = ModelCard.from_state(saved.get("about", {}), file)
        windows = {stage["name"]: stage["max_shots"] for stage in saved.get("stages", [])}
        window = windows.get(saved.get("stage"), _WINDOW)
        return cls(file=file, card=card, weights=saved["model"], pattern=saved["pattern"], window=window)

    def build(self, device: torch.device) -> tuple[SceneModel, Codec]:
        """The tuned model on its device, and its codec.

        Raises:
            ValueError: for weights of another model, and as :meth:`ModelCard.build` does.
        """
        model, codec = self.card.build()
        try:
            model.backbone.load_state_dict(self.weights)
        except RuntimeError as error:
            raise ValueError(f"{self.file}: its weights are not of {self.card.name}: {error}") from error
        model.backbone.to(device).eval()
        return model, codec


def parse_size(size: str | None, default: Sequence[int]) -> Size:
    """Frames, height and width as they are written on the command line.

    Raises:
        ValueError: for anything else.
    """
    if size is None:
        frames, height, width = default
        return frames, height, width
    match = re.fullmatch(r"([0-9]+)x([0-9]+)x([0-9]+)", size)
    if not match:
        raise ValueError(f"--size: got {size!r}, expected frames, height and width, like 4x64x64")
    return int(match[1]), int(match[2]), int(match[3])


def check_size(size: Size, card: ModelCard, codec: Codec, *, option: str, fix: str) -> None:
    """Refuse a size that the codec cannot take, or that no file can hold.

    Args:
        size: Frames, height and width in pixels.
        card: The model's, which says what sizes its data had.
        codec: The model's.
        option: What the error is to name.
        fix: What to do about it: "choose another size, for example", before multiples of a number.

    Raises:
        ValueError: for such a size.
    """
    try:
        codec.latent_shape(*size)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    frames, height, width = size
    if frames > 1 and (height % 2 or width % 2):
        raise ValueError(
            f"{option}: got a video of {height} x {width} pixels, expected even ones, as MP4 files need; {fix} "
            f"multiples of {lcm(2, card.multiple)}"
        )


def check_free(out: Path) -> None:
    """Refuse a folder that holds a scene.

    Raises:
        FileExistsError: for such a one.
    """
    if (out / "script.txt").exists() or any(out.glob("shot_*")):
        raise FileExistsError(f"{out}: already holds a scene, so it is left alone; choose another --out")


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
    from lct_core.cli.sheet import SceneRows, contact_sheet  # it brings matplotlib

    written = [out / "contact_sheet.png"]
    contact_sheet(written[0], [SceneRows(texts, {label: frames})])
    height, width = frames[0].shape[2:]
    if all(clip.shape[2:] == (height, width) for clip in frames) and not (height % 2 or width % 2):
        written.append(out / "scene.mp4")
        write_video(written[1], torch.cat([*frames], dim=1), fps=fps)
    return written
