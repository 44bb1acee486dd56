"""Options that several commands share."""

from collections.abc import Callable
from math import isfinite
from typing import Any

import click
import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Finite(click.FloatRange):
    """A range of numbers without NaN, which click's own takes, and without infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; click's usage error for another."""
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


COUNT = click.IntRange(1, 10**9)
POSITIVE = Finite(min=0, min_open=True)
FPS = Finite(0.01, 1000)

seed = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of all randomness."
)


def _device(ctx: click.Context, option: click.Parameter, value: str) -> torch.device:
    try:
        torch.empty(0, device=value).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # unknown; not of this machine; without data
        raise ValueError(f"--device: got {value!r}, which torch can't use here: {error}") from error
    return torch.device(value)


device = click.option(
    "--device", default="cpu", show_default=True, callback=_device, help="Where the model runs: cpu, cuda, cuda:1, ..."
)


def heads(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--heads``, ``--kv-heads``, ``--head-dim`` and ``--dtype`` of an attention; see :func:`check_kv_heads`."""
    options = [
        click.option("--heads", type=COUNT, default=16, show_default=True, help="Query heads."),
        click.option("--kv-heads", type=COUNT, help="Key and value heads.  [default: as many as --heads]"),
        click.option("--head-dim", type=COUNT, default=128, show_default=True, help="Channels of a head."),
        click.option(
            "--dtype", type=click.Choice([*DTYPES]), default="bfloat16", show_default=True, help="Of keys and values."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def check_kv_heads(heads: int, kv_heads: int | None) -> int:
    """The number of key and value heads, or ``ValueError`` where it does not divide the query heads."""
    kv_heads = heads if kv_heads is None else kv_heads
    if heads % kv_heads:
        raise ValueError(f"--kv-heads: got {kv_heads}, expected a divisor of the {heads} of --heads")
    return kv_heads
