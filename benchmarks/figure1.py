"""Draw the paper's Figure 1 (supplement, D): ``python -m benchmarks.figure1 [folder]``.

The operations are those of the 3B model at the paper's size, counted; the latencies are those that were measured.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.generation_cost import MODES, PAPER_SHOT, PAPER_STEPS, cost, label, scene_of
from benchmarks.harness import RESULTS
from benchmarks.report import COLOURS, read
from lct_backbones.mmdit import PAPER_3B, MMDiT

#: How the modes are drawn.
STYLES: dict[str, dict[str, Any]] = {
    "recomputed": {"color": COLOURS[0], "label": "context-causal, history run again"},
    "joint": {"color": COLOURS[1], "label": "bidirectional, all shots at once"},
    "cached": {"color": COLOURS[2], "label": "context-causal, KV cache"},
    "independent": {"color": COLOURS[3], "label": "independent shots"},
}


def main(folder: Path = RESULTS) -> None:
    """Write ``figure1.png`` beside the results."""
    records = [read(path) for path in sorted(folder.glob("generation-*.json"))]
    if not records:
        raise SystemExit(
            f"{folder}: no latencies, expected generation-*.json; measure first: pytest benchmarks/test_generation.py"
        )
    panels = 1 + len(records)
    figure = Figure(figsize=(5.2 * panels, 4.4), layout="constrained")
    axes = figure.subplots(1, panels)
    figure.get_layout_engine().set(wspace=0.05)
    _operations(axes[0])
    for ax, record in zip(axes[1:], records, strict=True):
        _latencies(ax, record)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    figure.savefig(folder / "figure1.png", dpi=160)


def _operations(ax: Any) -> None:
    with torch.device("meta"):
        model = MMDiT(**PAPER_3B)
    shots = range(1, 21)
    for mode in STYLES:
        flops = [cost(model, MODES[mode](scene_of(PAPER_SHOT, n), PAPER_STEPS)).total for n in shots]
        ax.errorbar(shots, [count / 1e18 for count in flops], marker=".", **STYLES[mode])
    what = _what(sum(p.numel() for p in model.parameters()), PAPER_SHOT.tokens, PAPER_STEPS)
    _dress(ax, f"Operations, counted\n{what}", "10¹⁸ FLOPs for a scene")


def _latencies(ax: Any, record: dict[str, Any]) -> None:
    shape, machine = record["shape"], record["machine"]
    for mode in STYLES:
        shots = [n for n in shape["shots"] if label(mode, n) in record["times"]]
        times = [record["times"][label(mode, n)] for n in shots]
        middle = [t["seconds"] for t in times]
        spread = [[t["seconds"] - t["low"] for t in times], [t["high"] - t["seconds"] for t in times]]
        ax.errorbar(shots, middle, spread, marker=".", capsize=2, **STYLES[mode])
    where = machine.get("gpu", f"{machine['cpu']}, {machine['threads']} threads")
    what = f"{_what(shape['parameters'], shape['tokens'], shape['steps'])}, {shape['dtype']}"
    _dress(ax, f"Latency, measured on {where}\n{what}", "seconds for a scene")


def _what(parameters: int, tokens: int, steps: int) -> str:
    size = f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
    return f"MMDiT of {size}, {tokens:,} tokens a shot, {steps} steps"


def _dress(ax: Any, title: str, unit: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_ylabel(unit)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("shots")
    ax.set_xticks([1, 4, 9, 12, 16, 20])
    ax.grid(axis="y", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    _write_ends(ax, [bars.lines[0] for bars in ax.containers])


def _write_ends(ax: Any, lines: Sequence[Any]) -> None:
    """Every line's last value beside it, from the top down, a line of text apart."""
    height = float("inf")
    for line in sorted(lines, key=lambda line: line.get_ydata()[-1], reverse=True):
        shots, value = line.get_xydata()[-1]
        height = min(value, height / 1.35)
        text = f"{value:#.2g}".rstrip(".")
        ax.annotate(text, (shots, height), (7, 0), textcoords="offset points", va="center", color=line.get_color())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
