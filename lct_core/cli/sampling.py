"""The sampling, and the sizes of shots, that a command's options ask for."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lct_core.cache import Budget
from lct_core.generation import Sampling

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


def sampling_of(
    *, on_device: float | None, on_host: float | None, cache_folder: Path | None, **fields: Any
) -> Sampling:
    """The sampling that some options ask for.

    Args:
        on_device: GiB of the KV cache on the device; None for all.
        on_host: GiB of the rest in host memory; None for all.
        cache_folder: Where what remains is put in files.
        fields: Of the sampling, by name; those that are None keep their default.
    """
    device, host = (None if gib is None else int(gib * 2**30) for gib in (on_device, on_host))
    said = (on_device, on_host, cache_folder) != (None, None, None)
    given = {name: value for name, value in fields.items() if value is not None}
    return Sampling(budget=Budget(device=device, host=host, folder=cache_folder) if said else None, **given)
