"""Options that several commands share, and the choices of others; nothing here loads the library or torch."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import click

# what the library takes, as literals: a test says that they are equal
SCHEMES = ("paper", "anchored")
PATTERNS = ("bidirectional", "context_causal", "own_shot")
MODES = ("joint", "conditional", "autoregressive", "causal")
WRITES = ("pass", "nearest")
STORAGES = ("native", "int8", "fp8")
DTYPES = ("bfloat16", "float16", "float32")
CHECKED_DTYPES = ("float32", "bfloat16")  # by lct conformance
USES = ("bidirectional", "context_causal", "cached", "text")  # the attentions of lct kernels

OWN_AREA, SMALL_AREA = 480 * 480, 64 * 64  # pixels: the paper's; what a small model on a CPU can do
OWN_MULTIPLE, SMALL_MULTIPLE = 16, 8  # pixels: what autoencoder and patches usually need; the small model's patch


class Number(click.ParamType):
    """A finite number of another type, of whose range the help says nothing: the bounds only keep nonsense out."""

    def __init__(self, within: click.ParamType) -> None:
        self._within = within
        self.name = within.name.removesuffix(" range")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; click's usage error for another, for NaN, which click's own ranges take, and for infinity."""
        number = self._within.convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


COUNT = Number(click.IntRange(1, 10**9))
COUNT_OR_NONE = Number(click.IntRange(0, 10**9))
FINITE = Number(click.FLOAT)
POSITIVE = Number(click.FloatRange(min=0, min_open=True))
FPS = Number(click.FloatRange(0.01, 1000))
LEVEL = Number(click.FloatRange(0, 1000))
GIB = Number(click.FloatRange(0, 2**30))
FILE = click.Path(path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _together(*options: Decorator) -> Decorator:
    """Some options in this order, as one."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


seed = click.option("--seed", type=Number(click.IntRange(0, 2**63 - 1)), default=0, help="Of all randomness.")

device = click.option("--device", default="cpu", help="Where the model runs: cpu, cuda, cuda:1, ...")


sampling = _together(
    click.option("--steps", type=COUNT, default=32, help="Euler steps."),
    click.option(
        "--shift",
        type=POSITIVE,
        default=1.0,
        help="Above 1 for more of the steps at high noise, as the base model's pipeline has it; 1 is equal steps.",
    ),
    click.option(
        "--guidance", type=FINITE, default=7.5, help="Scale of classifier-free guidance, on the texts alone; 1 is none."
    ),
    click.option(
        "--negative",
        metavar="TEXT",
        default="",
        show_default=False,
        help="Negative prompt of the shots.  [default: empty]",
    ),
    click.option(
        "--negative-global",
        metavar="TEXT",
        default="",
        show_default=False,
        help="Negative global prompt.  [default: empty]",
    ),
)
"""``--steps``, ``--shift``, ``--guidance``, ``--negative`` and ``--negative-global``: how shots are generated."""


video = _together(
    click.option(
        "--size",
        metavar="FxHxW",
        help="Frames, height and width of the shots that are generated.  [default: as the first training shot]",
    ),
    click.option("--fps", type=FPS, help="Frames per second of the videos.  [default: as in training]"),
    click.option("--bf16", is_flag=True, help="Run the model under bfloat16 autocast."),
)
"""``--size``, ``--fps`` and ``--bf16``: of what size and in which arithmetic."""


storage = click.option(
    "--storage",
    type=click.Choice(STORAGES),
    default=STORAGES[0],
    help="How the KV cache keeps its shots: as they are, or in 8 bits.",
)


tiers = _together(
    click.option(
        "--on-device",
        type=GIB,
        metavar="GIB",
        help="Most of the KV cache on the device, in each branch of guidance.  [default: all]",
    ),
    click.option("--on-host", type=GIB, metavar="GIB", help="Most of the rest in host memory.  [default: all]"),
    click.option("--cache-folder", type=FOLDER, help="Where what remains is put in files."),
)
"""``--on-device``, ``--on-host`` and ``--cache-folder``."""


heads = _together(
    click.option("--heads", type=COUNT, default=16, help="Query heads."),
    click.option("--kv-heads", type=COUNT, help="Key and value heads.  [default: as many as --heads]"),
    click.option("--head-dim", type=COUNT, default=128, help="Channels of a head."),
    click.option("--dtype", type=click.Choice([*DTYPES]), default="bfloat16", help="Of keys and values."),
)
"""``--heads``, ``--kv-heads``, ``--head-dim`` and ``--dtype`` of an attention; see :func:`check_kv_heads`."""


def check_kv_heads(heads: int, kv_heads: int | None) -> int:
    """The number of key and value heads, or ``ValueError`` where it does not divide the query heads."""
    kv_heads = heads if kv_heads is None else kv_heads
    if heads % kv_heads:
        raise ValueError(f"--kv-heads: got {kv_heads}, expected a divisor of the {heads} of --heads")
    return kv_heads
