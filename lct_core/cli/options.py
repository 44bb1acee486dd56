"""Options that several commands share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import click
import torch

from lct_core.cache import Budget
from lct_core.cache.budget import STORAGES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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

seed = click.option(
    "--seed",
    type=Number(click.IntRange(0, 2**63 - 1)),
    default=0,
    show_default=True,
    help="Of all randomness.",
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


def sampling(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--steps``, ``--shift``, ``--guidance``, ``--negative`` and ``--negative-global``: how shots are generated."""
    return _with(
        function,
        click.option("--steps", type=COUNT, default=32, show_default=True, help="Euler steps."),
        click.option(
            "--shift",
            type=POSITIVE,
            default=1.0,
            show_default=True,
            help="Above 1 for more of the steps at high noise, as the base model's pipeline has it; 1 is equal steps.",
        ),
        click.option("--guidance", type=FINITE, default=7.5, show_default=True, help="On the texts; 1 is none."),
        click.option("--negative", metavar="TEXT", default="", help="Negative prompt of the shots.  [default: empty]"),
        click.option("--negative-global", metavar="TEXT", default="", help="Negative global prompt.  [default: empty]"),
    )


def video(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--size``, ``--fps`` and ``--bf16``: of what size and in which arithmetic."""
    return _with(
        function,
        click.option(
            "--size",
            metavar="FxHxW",
            help="Frames, height and width of the shots that are generated.  [default: as the first training shot]",
        ),
        click.option("--fps", type=FPS, help="Frames per second of the videos.  [default: as in training]"),
        click.option("--bf16", is_flag=True, help="Run the model under bfloat16 autocast."),
    )


storage = click.option(
    "--storage",
    type=click.Choice(STORAGES),
    default=STORAGES[0],
    show_default=True,
    help="How the KV cache keeps its shots: as they are, or in 8 bits.",
)


def tiers(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--on-device``, ``--on-host`` and ``--cache-folder``; see :func:`budget`."""
    return _with(
        function,
        click.option(
            "--on-device",
            type=GIB,
            metavar="GIB",
            help="Most of the KV cache on the device, in each branch of guidance.  [default: all]",
        ),
        click.option("--on-host", type=GIB, metavar="GIB", help="Most of the rest in host memory.  [default: all]"),
        click.option(
            "--cache-folder",
            type=click.Path(file_okay=False, path_type=Path),
            help="Where what remains is put in files.",
        ),
    )


def budget(on_device: float | None, on_host: float | None, cache_folder: Path | None) -> Budget | None:
    """What :func:`tiers` asked for; None where nothing was said.

    Args:
        on_device: GiB.
        on_host: GiB.
        cache_folder: Of files.
    """
    if on_device is None and on_host is None and cache_folder is None:
        return None
    device, host = (None if gib is None else int(gib * 2**30) for gib in (on_device, on_host))
    return Budget(device=device, host=host, folder=cache_folder)


def heads(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--heads``, ``--kv-heads``, ``--head-dim`` and ``--dtype`` of an attention; see :func:`check_kv_heads`."""
    return _with(
        function,
        click.option("--heads", type=COUNT, default=16, show_default=True, help="Query heads."),
        click.option("--kv-heads", type=COUNT, help="Key and value heads.  [default: as many as --heads]"),
        click.option("--head-dim", type=COUNT, default=128, show_default=True, help="Channels of a head."),
        click.option(
            "--dtype", type=click.Choice([*DTYPES]), default="bfloat16", show_default=True, help="Of keys and values."
        ),
    )


def check_kv_heads(heads: int, kv_heads: int | None) -> int:
    """The number of key and value heads, or ``ValueError`` where it does not divide the query heads."""
    kv_heads = heads if kv_heads is None else kv_heads
    if heads % kv_heads:
        raise ValueError(f"--kv-heads: got {kv_heads}, expected a divisor of the {heads} of --heads")
    return kv_heads


def _with(function: Callable[..., Any], *options: Callable[..., Any]) -> Callable[..., Any]:
    """A command with some options, in this order."""
    for option in reversed(options):
        function = option(function)
    return function
