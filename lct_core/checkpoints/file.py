"""Checkpoint files: written whole or not at all, read without running anything in them."""

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from lct_core.files import replacing

_FORMAT = "lct checkpoint 1"


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dicts to a file, in place of an older one only when all is written.

    Args:
        path: File to write; its folder must exist.
        content: What to keep.
    """
    with replacing(Path(path)) as partial:
        torch.save({"format": _FORMAT, **content}, partial)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, on the CPU. No code in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a checkpoint that lct tune wrote")
    if not is_zipfile(path):  # what torch.save writes
        raise ValueError(f"{path}: can't be read as a checkpoint; is the file complete?")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes of a broken file can fail in any way
        raise ValueError(f"{path}: can't be read as a checkpoint; is the file complete?") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a checkpoint that lct tune wrote, expected one in the format {_FORMAT!r}")
    return content
