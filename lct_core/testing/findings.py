"""One measurement of a conformance suite."""

from typing import NamedTuple

import torch


class Finding(NamedTuple):
    """One measurement.

    Args:
        invariant: Its number, 1 to 9.
        name: What must hold.
        case: Scheme, pattern and dtype that it was measured in.
        error: What was measured, see :mod:`lct_core.testing.tolerances`.
        bound: What is allowed.
    """

    invariant: int
    name: str
    case: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound


def short(dtype: torch.dtype) -> str:
    """The name of a dtype as findings have it, such as ``"float32"``."""
    return str(dtype).removeprefix("torch.")
