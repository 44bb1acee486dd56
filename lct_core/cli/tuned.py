"""What commands that generate share: a tuned model from its checkpoint, sizes of shots, and views of a scene."""

import re
from collections.abc import Sequence
from math import lcm
from pathlib import Path

from lct_core.checkpoints.model_card import ModelCard
from lct_core.codec import Codec

Size = tuple[int, int, int]


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
