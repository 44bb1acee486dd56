"""The one table of tolerances.

An error is the largest difference over the largest expected magnitude. Where a bound is not 0 or a plain number, it is
a multiple of the low-precision reference's own error: that of plain eager arithmetic in the same dtype against float64.
For kernels the multiples, 2 for outputs and 3 for gradients, are those of FlashAttention's own tests; a gradient's
is of the worst of the reference's three, as one alone can be right by luck.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Bound(NamedTuple):
    """An allowed error: ``absolute``, or ``of_own`` times the low-precision reference's own, whichever is larger."""

    absolute: float = 0.0
    of_own: float = 0.0

    def given(self, own: float) -> float:
        """The bound where the reference's own error is ``own``."""
        return max(self.absolute, self.of_own * own)


EXACT = Bound()

BOUNDS: dict[torch.dtype, dict[str, Bound]] = {
    torch.float32: {
        "one shot": EXACT,
        "masked": Bound(absolute=2e-6),
        "one shot, changed": EXACT,
        "masked, changed": Bound(absolute=2e-6),
        "compiled": Bound(absolute=2e-6),
        "definition": Bound(absolute=1e-6),
        "causal": EXACT,
        "cached": Bound(absolute=1e-6),
        "packed": EXACT,
        "batched": Bound(absolute=2e-6),
        "checkpointed": Bound(absolute=1e-6),
        "shifted": Bound(absolute=2e-6),
        "copies": EXACT,
        "moved keys": Bound(absolute=1e-6),
        "kernel": Bound(absolute=1e-6, of_own=2.0),
        "kernel gradients": Bound(absolute=1e-6, of_own=3.0),
    },
    torch.bfloat16: {
        "one shot": Bound(of_own=1.0),
        "masked": Bound(of_own=1.0),
        "one shot, changed": Bound(of_own=2.0),  # both sides err, and wrong weights err by far more
        "masked, changed": Bound(of_own=2.0),
        "compiled": Bound(of_own=2.0),
        "definition": Bound(of_own=2.0),
        "causal": EXACT,
        "cached": Bound(of_own=1.0),
        "packed": EXACT,
        "batched": Bound(of_own=2.0),
        "checkpointed": Bound(of_own=1.0),
        "shifted": Bound(of_own=2.0),
        "copies": EXACT,
        "moved keys": Bound(absolute=2**-8),  # the one extra rounding of a moved key
        "kernel": Bound(of_own=2.0),
        "kernel gradients": Bound(of_own=3.0),
    },
    torch.float16: {
        "moved keys": Bound(absolute=2**-11),
        "kernel": Bound(of_own=2.0),
        "kernel gradients": Bound(of_own=3.0),
    },
}


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected magnitude, in float64; infinite where anything is not finite."""
    got, expected = got.detach().double(), expected.detach().double()
    if got.shape != expected.shape or not bool((got.isfinite() & expected.isfinite()).all()):
        return float("inf")
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((got - expected).abs().max() / largest).item()
