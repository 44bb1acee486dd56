"""What commands work within: a device, its memory, and random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def usable(name: str) -> torch.device:
    """A device that can be computed on.

    Raises:
        ValueError: for another.
    """
    try:
        torch.empty(0, device=name).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # unknown; not of this machine; without data
        raise ValueError(f"--device: got {name!r}, which torch can't use here: {error}") from error
    return torch.device(name)


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Whatever draws from torch's global generators inside the ``with`` draws the same for the same number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        yield


@contextmanager
def within_memory(device: torch.device, *, fix: str) -> Iterator[None]:
    """Where memory runs out inside the ``with``, say so in one line.

    Args:
        device: Where the work runs.
        fix: What to do about it.

    Raises:
        ValueError: instead of torch's error, which has a class of its own on a GPU, and words of its own on the CPU.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        said = ". ".join(str(error).split(". ")[:2]).rstrip(".")  # what follows is about torch's allocator
        raise ValueError(f"--device: {device} is out of memory; {fix} ({said})") from error
