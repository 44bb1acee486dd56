"""``lct bench``: attention kernels timed, runs compared, results rendered; all of it from a clone's ``benchmarks``."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from lct_core.cli.tables import table

_ROOT = Path(__file__).parents[2]


def attention(
    *,
    names: tuple[str, ...],
    kernels: tuple[str, ...],
    tokens: int | None,
    device: str | None,
    rounds: int | None,
    out: Path | None,
    only_list: bool,
) -> int:
    """Time kernels on cases and print tables; returns the exit code. The arguments are the command's."""
    console, cases = Console(highlight=False), _of_the_clone("cases").CASES
    if only_list:
        console.print(_listed(cases))
        return 0
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
            return 1
        console.print(_table(measurement))
        refused = {name: "; ".join(why) for name, why in measurement["refusals"].items() if name in kernels}
        missing = measurement["lost"] | refused
        for name, reason in missing.items():
            console.print(f"{name}: {reason}", style="red", markup=False)
        if out is not None:
            _of_the_clone("provenance").write(measurement, out)
        good &= not missing
    return 0 if good else 1


def compare(*, old: Path, new: Path, tolerance: float, anyway: bool) -> int:
    """Print what changed between two runs; returns the exit code. The arguments are the command's."""
    bench = _of_the_clone("compare")
    changes = bench.compare(old, new, tolerance=tolerance, anyway=anyway)
    click.echo(bench.render(changes))
    return int(any(change.slower for change in changes))


def report(*, folder: Path | None) -> None:
    """Render results as tables and plots; the argument is the command's."""
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


def _listed(cases: Iterable[Any]) -> Table:
    made = table("case", "shots", "queries", "keys", "heads", numbers=True, wrap=False, gap=2)
    for case in cases:
        plan, shots, size = case.plan, case.layout.num_shots, f"{case.heads} x {case.head_dim}"
        made.add_row(case.name, str(shots), f"{plan.queries:,}", f"{plan.keys:,}", size)
    return made


def _table(measurement: dict[str, Any]) -> Table:
    shape, rounds = measurement["shape"], measurement["rounds"]
    made = table(
        *("kernel", "ms", "TFLOP/s", "% of GEMM", "error / bound"),
        numbers=True,
        wrap=False,
        gap=2,
        title=f"{measurement['name']}: {shape['queries']:,} queries, {shape['keys']:,} keys, {rounds} rounds",
        title_justify="left",
        caption=f"copied, read and written: {measurement['roofline']['copy_gigabytes_per_second']:.4g} GB/s",
        caption_justify="left",
    )
    gemm = measurement["roofline"]["gemm_gflops_per_second"]
    for name, t in measurement["times"].items():
        if name == "copy":
            continue
        rate, gate = t["gflops_per_second"], measurement["gates"].get(name)
        made.add_row(
            f"{name} (auto)" if name == measurement["auto"] else name,
            f"{1e3 * t['seconds']:.4g}",
            f"{rate / 1e3:.3g}" if rate else "",
            f"{rate / gemm:.0%}" if rate else "",
            f"{gate['error']:.1e} / {gate['bound']:.1e}" if gate else "",
        )
    return made
