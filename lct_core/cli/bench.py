"""``lct bench``: attention kernels timed, runs compared, results rendered; all of it from a clone's ``benchmarks``."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import torch

from lct_core.cli import options

_ROOT = Path(__file__).parents[2]


class _Bench(click.Group):
    """What a command of the group refuses says which command it was."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            name = ctx.invoked_subcommand or ""
            place = click.Context(self.commands[name], parent=ctx, info_name=name)
            raise click.UsageError(str(error), place) from error


@click.group("bench", cls=_Bench, invoke_without_command=True)
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
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for a JSON file for every case.")
@click.option("--list", "only_list", is_flag=True, help="List the cases, and run nothing.")
@click.pass_context
def attention(
    ctx: click.Context,
    names: tuple[str, ...],
    kernels: tuple[str, ...],
    tokens: int | None,
    device: str | None,
    rounds: int | None,
    out: Path | None,
    only_list: bool,
) -> None:
    """Time attention kernels behind a gate.

    All take turns in every round, and none that is not right on a small scene is timed. Rates are on attended pairs,
    and beside them is their share of a matrix product's rate in the same rounds. The exit code is 1 if a kernel was
    wrong, failed, or was asked for and refuses.

    \b
    Example:
      lct bench attention --case cpu-packed-8k-fp32-forward --tokens 1024 --rounds 3
    """
    from rich.console import Console

    console, cases = Console(highlight=False), _of_the_clone("cases").CASES
    if only_list:
        console.print(_listed(cases))
        return
    harness = _of_the_clone("harness")
    chosen = _chosen(cases, names, device)
    known = {"auto", *harness.registry().kernels}
    if unknown := [name for name in kernels if name not in known]:
        raise ValueError(f"--kernel: got {unknown[0]!r}, expected one of {', '.join(sorted(known))}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # now: what is measured for nothing is lost
    good = True
    for case in chosen:
        if device not in (None, case.device) or tokens is not None:
            case = replace(case, goals=(), device=device or case.device)
        if tokens is not None:
            case = case.scaled(tokens)
        if rounds is not None:
            case = replace(case, rounds=rounds, budget=None)
        try:
            measurement = harness.measure(case, kernels=kernels)
        except harness.DeviceLost as error:
            click.echo(f"{error}; go on without, by --kernel with others", err=True)
            ctx.exit(1)
        console.print(_table(measurement))
        missing = _missing(measurement, kernels)
        for name, reason in missing.items():
            console.print(f"{name}: {reason}", style="red", markup=False)
        if out is not None:
            harness.write(measurement, out)
        good &= not missing
    ctx.exit(0 if good else 1)


@command.command("compare")
@click.argument("old", type=click.Path(exists=True, path_type=Path))
@click.argument("new", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--tolerance", type=options.Number(click.FloatRange(0, 1)), default=0.03, show_default=True, help="Of the speed."
)
@click.option("--anyway", is_flag=True, help="Whatever differs in device, cases and shapes.")
@click.pass_context
def compare(ctx: click.Context, old: Path, new: Path, tolerance: float, anyway: bool) -> None:
    """Tell what became slower.

    Between two result files, or two folders of them. Rates are taken as shares of the matrix product of their own run.
    A kernel is slower where its speed fell by more than the tolerance and the spreads do not meet, or where it was
    lost. The exit code is 1 if anything is slower.

    \b
    Example:
      lct bench compare before/gpu-B2-forward.json benchmarks/results/gpu-B2-forward.json
    """
    bench = _of_the_clone("compare")
    changes = bench.compare(old, new, tolerance=tolerance, anyway=anyway)
    click.echo(bench.render(changes))
    ctx.exit(int(any(change.slower for change in changes)))


@command.command("report")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
def report(folder: Path | None) -> None:
    """Render results as tables and plots.

    They go beside the results.  [default: benchmarks/results]

    \b
    Example:
      lct bench report runs/mine
    """
    folder = folder or _ROOT / "benchmarks" / "results"
    _of_the_clone("report").main(folder)
    click.echo(f"wrote {folder / 'report.md'}")


def _of_the_clone(name: str) -> Any:
    """A module of the benchmarks, which are no part of an installed package.

    Raises:
        ValueError: where they are not there, or lack a package.
    """
    if not (_ROOT / "benchmarks" / "harness.py").is_file():
        raise ValueError(
            "benchmarks/ is not part of the installed package; clone the repository and install from there: "
            "pip install --editable '.[dev]'"
        )
    if str(_ROOT) not in sys.path:
        sys.path.append(str(_ROOT))
    try:
        return import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; benchmarks need pip install --editable '.[dev]'") from error


def _chosen(cases: Iterable[Any], names: tuple[str, ...], device: str | None) -> list[Any]:
    """The cases asked for, or ``ValueError`` for one that there is not, or that this machine can't run."""
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise ValueError("--device: got cuda, but torch finds no CUDA device here; use cpu")
    known = {case.name: case for case in cases}
    if not names:
        wanted = device or ("cuda" if gpu else "cpu")
        return [case for case in known.values() if case.device == wanted]
    for name in names:
        if name not in known:
            raise ValueError(f"--case: got {name!r}, expected a name that lct bench attention --list shows")
        if known[name].device == "cuda" and device is None and not gpu:
            raise ValueError(
                f"--case: {name} needs a CUDA device, and torch finds none here; --device cpu --tokens 2048 runs a "
                "small one of its kind"
            )
    return [known[name] for name in names]


def _listed(cases: Iterable[Any]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for name in ("shots", "queries", "keys", "heads"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        plan, shots, size = case.plan, case.layout.num_shots, f"{case.heads} x {case.head_dim}"
        table.add_row(case.name, str(shots), f"{plan.queries:,}", f"{plan.keys:,}", size)
    return table


def _table(measurement: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    shape, rounds = measurement["shape"], measurement["rounds"]
    table = Table(
        title=f"{measurement['name']}: {shape['queries']:,} queries, {shape['keys']:,} keys, {rounds} rounds",
        title_justify="left",
        caption=f"copied, read and written: {measurement['roofline']['copy_gigabytes_per_second']:.4g} GB/s",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("kernel", no_wrap=True)
    for name in ("ms", "TFLOP/s", "% of GEMM", "error / bound"):
        table.add_column(name, justify="right", no_wrap=True)
    gemm = measurement["roofline"]["gemm_gflops_per_second"]
    for name, t in measurement["times"].items():
        if name == "copy":
            continue
        rate, gate = t["gflops_per_second"], measurement["gates"].get(name)
        table.add_row(
            f"{name} (auto)" if name == measurement["auto"] else name,
            f"{1e3 * t['seconds']:.4g}",
            f"{rate / 1e3:.3g}" if rate else "",
            f"{rate / gemm:.0%}" if rate else "",
            f"{gate['error']:.1e} / {gate['bound']:.1e}" if gate else "",
        )
    return table


def _missing(measurement: dict[str, Any], kernels: tuple[str, ...]) -> dict[str, str]:
    """What was lost, and which of the kernels asked for refuses, with the reasons."""
    refused = {name: "; ".join(reasons) for name, reasons in measurement["refusals"].items() if name in kernels}
    return measurement["lost"] | refused
