"""``lct kernels``: the installed attention kernels, and which of them serve this machine."""

from typing import NamedTuple

import click
import torch

from lct_core.backbone import KernelRequest
from lct_core.cli import options
from lct_core.cli.shots import EXAMPLE, parse_shots
from lct_core.masks import context_causal
from lct_core.plugins import PluginError, Registry, registry


class KernelRow(NamedTuple):
    """One line of the table; ``rank`` is None for a kernel that must be asked for by name."""

    name: str
    summary: str
    rank: int | None
    refusals: list[str]


def kernel_rows(registry: Registry, request: KernelRequest) -> list[KernelRow]:
    """A registry's kernels in the order that ``kernel="auto"`` follows, each with its reasons to refuse a request."""
    rows = []
    for name, rank in registry.ranks(request).items():
        try:
            refusals = registry.refusals(name, request)
        except PluginError as error:
            refusals = [str(error)]
        rows.append(KernelRow(name, registry.kernels[name].summary, rank, refusals))
    return rows


def auto_choice(rows: list[KernelRow]) -> str | None:
    """The kernel that ``kernel="auto"`` takes; None where all refuse."""
    return next((row.name for row in rows if row.rank is not None and not row.refusals), None)


@click.command("kernels")
@click.option("--device", help="Where attention runs, e.g. cpu or cuda.  [default: cuda where there is one, else cpu]")
@options.heads
@click.option("--grad/--no-grad", default=False, show_default=True, help="Whether gradients are needed.")
def command(device: str | None, heads: int, kv_heads: int | None, head_dim: int, dtype: str, grad: bool) -> None:
    """List the attention kernels, and why any of them refuses.

    They come in the order that kernel="auto" follows. They are asked about a row of three scenes, the example of "lct
    inspect", with context-causal attention.

    \b
    Example:
      lct kernels --dtype float32 --grad
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    request = KernelRequest(
        plan=context_causal(parse_shots(EXAMPLE)),
        device=_device(device),
        dtype=options.DTYPES[dtype],
        heads=heads,
        kv_heads=options.check_kv_heads(heads, kv_heads),
        head_dim=head_dim,
        grad=grad,
    )
    rows = kernel_rows(registry(), request)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("rank", no_wrap=True)
    table.add_column("here")
    table.add_column("what it is")
    for row in rows:
        here = "refused:\n" + "\n".join(row.refusals) if row.refusals else "available"
        table.add_row(row.name, "by name" if row.rank is None else str(row.rank), here, row.summary)
    console = Console(highlight=False)
    console.print(
        f"{dtype} on {request.device}, {heads} query heads and {request.kv_heads} key-value heads of {head_dim}, "
        f"{'with' if grad else 'without'} gradients"
    )
    console.print(table)
    choice = auto_choice(rows)
    console.print('kernel="auto" takes ' + (choice or "none of them: each refuses"))


def _device(name: str | None) -> torch.device:
    """The device, or ``ValueError`` where this machine does not have it."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: got {name!r}, expected a device of this machine, like cpu: {reason}") from error
