"""``lct bench``: attention kernels timed, runs compared, results rendered; all of it from a clone's ``benchmarks``."""

from pathlib import Path
from typing import Any

import click

from lct_core.cli import options
from lct_core.cli.group import Group


@click.group("bench", cls=Group, invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Time attention kernels, compare two runs, render results.

    It works from a clone: what is measured, and how, is in its benchmarks/.

    \b
    Examples:
      lct bench attention --list
      lct bench attention --case cpu-causal-4k-fp32-forward --kernel sdpa --out runs/mine
      lct bench compare benchmarks/results runs/mine --anyway
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@command.command("attention")
@click.option("--case", "names", multiple=True, help="A case's name; can be repeated.  [default: all of the device]")
@click.option("--kernel", "kernels", multiple=True, help="A kernel's name or auto; can be repeated.  [default: all]")
@click.option("--tokens", type=options.COUNT, help="Scale every case to about as many tokens.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to run.  [default: where the case belongs]")
@click.option("--rounds", type=options.COUNT, help="Rounds that count.  [default: the case's]")
@click.option("--out", type=options.FOLDER, help="Folder for a JSON file for every case.")
@click.option("--list", "only_list", is_flag=True, help="List the cases, and run nothing.")
def attention(**given: Any) -> int:
    """Time attention kernels behind a gate.

    All take turns in every round, and none that is not right on a small scene is timed. Rates are on attended pairs,
    and beside them is their share of a matrix product's rate in the same rounds. The exit code is 1 if a kernel was
    wrong, failed, or was asked for and refuses.

    \b
    Example:
      lct bench attention --case cpu-packed-8k-fp32-forward --tokens 1024 --rounds 3
    """
    from lct_core.cli import bench

    return bench.attention(**given)


@command.command("compare")
@click.argument("old", type=click.Path(exists=True, path_type=Path))
@click.argument("new", type=click.Path(exists=True, path_type=Path))
@click.option("--tolerance", type=options.Number(click.FloatRange(0, 1)), default=0.03, help="Of the speed.")
@click.option("--anyway", is_flag=True, help="Whatever differs in device, cases and shapes.")
def compare(**given: Any) -> int:
    """Tell what became slower.

    Between two result files, or two folders of them. Rates are taken as shares of the matrix product of their own run.
    A kernel is slower where its speed fell by more than the tolerance and the spreads do not meet, or where it was
    lost. The exit code is 1 if anything is slower.

    \b
    Example:
      lct bench compare before/gpu-B2-forward.json benchmarks/results/gpu-B2-forward.json
    """
    from lct_core.cli import bench

    return bench.compare(**given)


@command.command("report")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
def report(**given: Any) -> None:
    """Render results as tables and plots.

    They go beside the results.  [default: benchmarks/results]

    \b
    Example:
      lct bench report runs/mine
    """
    from lct_core.cli import bench

    bench.report(**given)
