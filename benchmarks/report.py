"""Render the results as tables and a plot: ``python -m benchmarks.report [folder]``."""

import json
import sys
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Record = dict[str, Any]

COLOURS = ("#0b6e99", "#d9730d", "#6940a5", "#0f7b6c", "#ad1a72")

#: What kernels are held against, as it is drawn.
PEERS: dict[str, dict[str, Any]] = {
    "masked": {"color": "#9b9a97", "label": "SDPA with a boolean mask"},
    "dense": {"color": "black", "linestyle": "--", "label": "dense SDPA: the line to reach"},
}


def main(folder: Path = Path(__file__).parent / "results") -> None:
    """Write ``report.md`` and ``rates.png`` beside the results."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"), key=_natural)]
    if not records:
        raise SystemExit(f"{folder}: no results, expected *.json; measure first: pytest benchmarks --benchmark-only")
    parts = ["# Benchmarks", *map("\n".join, _by_machine(records))]
    if plot(records, folder / "rates.png"):
        parts.insert(1, "![Rate on attended pairs against tokens](rates.png)")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")


def goal(comparison: dict[str, Any]) -> str:
    """The bound of a recorded comparison; nothing where it is information."""
    least, most = comparison["least"], comparison["most"]
    return f"≥ {least:.3g}" if least is not None else f"≤ {most:.3g}" if most is not None else ""


def plot(records: list[Record], path: Path) -> bool:
    """Every kernel's rate against tokens, with the dense rate as the line to reach; False where there is no series."""
    panels: dict[str, list[Record]] = {}
    for r in records:
        if "auto" in r and r["shape"]["pattern"] == "context_causal" and r["shape"]["queries"] == r["shape"]["keys"]:
            shape = r["shape"]
            title = f"{r['device']}, {shape['dtype']}, {shape['direction']}, head dim {shape['head_dim']}"
            panels.setdefault(title, []).append(r)
    panels = {title: sorted(rs, key=lambda r: r["shape"]["queries"]) for title, rs in panels.items() if len(rs) > 1}
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), squeeze=False, layout="constrained")
    kernels = dict.fromkeys(n for rs in panels.values() for r in rs for n in r["times"] if n not in (*PEERS, "gemm"))
    styles = {name: {"color": colour, "label": f"attend, {name}"} for name, colour in zip(kernels, cycle(COLOURS))}
    for ax, (title, series) in zip(axes[0], panels.items(), strict=True):
        _panel(ax, title, series, styles | PEERS)
    entries = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=len(entries), frameon=False)
    axes[0][0].set_ylabel("rate on attended pairs, GFLOP/s")
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return True


def _panel(ax: Any, title: str, series: list[Record], styles: dict[str, dict[str, Any]]) -> None:
    for name, style in styles.items():
        points = [(r["shape"]["queries"], r["times"][name]) for r in series if name in r["times"]]
        if not points:
            continue
        rates = [t["gflops_per_second"] for _, t in points]
        below = [rate - t["flops"] / t["high"] / 1e9 for rate, (_, t) in zip(rates, points, strict=True)]
        above = [t["flops"] / t["low"] / 1e9 - rate for rate, (_, t) in zip(rates, points, strict=True)]
        ax.errorbar([x for x, _ in points], rates, [below, above], marker=".", capsize=3, **style)
    ax.set_xscale("log", base=2)
    ticks = sorted({r["shape"]["queries"] for r in series})
    ax.set_xticks(ticks, [f"{t / 1024:.3g}K" for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tokens")
    ax.set_title(title, fontsize=10)
    ax.grid(axis="y", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _by_machine(records: list[Record]) -> list[list[str]]:
    """One section for everything measured on one machine with the same versions and source."""
    sections: dict[str, list[Record]] = {}
    for r in records:
        sections.setdefault(_setting(r), []).append(r)
    return [[f"## {setting}", "", *_goals(rs), "", *_times(rs)] for setting, rs in sections.items()]


def _setting(r: Record) -> str:
    machine, versions, source = r["machine"], r["versions"], r["source"]
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['instructions']}"
    if "gpu" in machine:
        where = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}"
    what = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{where}; {what}; commit {source['commit'][:10]}{' and changes' if source['dirty'] else ''}"


def _goals(records: list[Record]) -> list[str]:
    rows = [_line(("Case", "What", "Value", "Spread", "Goal", "Met")), "|---|---|---:|---:|---:|---|"]
    for r in records:
        for c in r["comparisons"]:
            met = {True: "yes", False: "**no**", None: ""}[c["met"]]
            spread = f"{c['low']:.3g} to {c['high']:.3g}"
            rows.append(_line((r["name"], c["what"], f"{c['median']:.3g}", spread, goal(c), met)))
    return rows


def _times(records: list[Record]) -> list[str]:
    columns = ("Case", "Contender", "Median, ms", "Spread, ms", "GFLOP/s", "Rounds", "Date")
    rows = [_line(columns), "|---|---|---:|---:|---:|---:|---|"]
    for r in records:
        for name, t in r["times"].items():
            rate = f"{t['gflops_per_second']:.0f}" if t["flops"] else ""
            chosen = " (auto)" if name == r.get("auto") else ""
            spread = f"{1e3 * t['low']:.4g} to {1e3 * t['high']:.4g}"
            median = f"{1e3 * t['seconds']:.4g}"
            rows.append(_line((r["name"], name + chosen, median, spread, rate, str(r["rounds"]), r["date"][:10])))
    return rows


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _natural(path: Path) -> tuple[int, str]:
    """Short names first, so that 4k comes before 16k."""
    return len(path.stem), path.stem


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
