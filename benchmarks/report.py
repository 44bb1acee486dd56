"""Render the results as tables and a plot: ``python -m benchmarks.report [folder]``."""

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, REFERENCE_GEMM, Case

Record = dict[str, Any]

COLOURS = ("#0b6e99", "#d9730d", "#6940a5", "#0f7b6c", "#ad1a72", "#8a6d00", "#d44c47", "#37352f")

#: What kernels are held against, as it is drawn.
PEERS: dict[str, dict[str, Any]] = {
    "masked": {"color": "#9b9a97", "label": "SDPA with a boolean mask"},
    "dense": {"color": "black", "linestyle": "--", "label": "dense SDPA"},
    "raw-flash3": {"color": "black", "linestyle": "--", "label": "raw FA3"},
    "raw-cudnn": {"color": "#9b9a97", "linestyle": "--", "label": "raw cuDNN"},
    "gemm": {"color": "#37352f", "linestyle": ":", "marker": "", "capsize": 0, "label": "matrix product: the roofline"},
}

#: What is always drawn in the same colour, whatever else there is.
FAMILIAR = ("sdpa", "flex", "triton", "flash3", "flash-torch", "flash2", "xformers")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


#: What is read of a result, here and in comparisons: its parts, and of what kind they are.
RECORD: Record = {
    **dict.fromkeys(("name", "date", "device"), str),
    "rounds": int,
    "machine": {"cpu": str, "threads": int, "instructions": str},
    "versions": dict,
    "source": dict.fromkeys(("commit", "digest"), str | None),
    "shape": dict,
    "times": {"*": {**dict.fromkeys(("seconds", "low", "high"), _positive), "gflops_per_second": float | int}},
    "comparisons": [{"what": str, **dict.fromkeys(("median", "low", "high"), float | int)}],
}

#: And of attention.
ATTENTION: Record = {
    "auto": str,
    "lost": dict,
    "refusals": dict,
    "shape": {**dict.fromkeys(("pattern", "direction", "dtype"), str), **dict.fromkeys(("queries", "keys"), int)},
}

#: And of what a measurement shows besides, in tables of its own.
TABLES: Record = {"tables": [{"title": str, "about": str, "rows": [dict]}]}

PLOTS = {"cuda": "rates-gpu.png", "cpu": "rates.png"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
WIDEST = 3  # panels side by side


def main(folder: Path = Path(__file__).parent / "results") -> None:
    """Write ``report.md`` and the plots beside the results, and show every other picture that lies there."""
    records = load(folder)
    for device, name in PLOTS.items():
        plot([r for r in records if r["device"] == device], folder / name)
    pictures = [f"![{path.stem}]({path.name})" for path in sorted(folder.glob("*.png"))]
    parts = ["# Benchmarks", *pictures, *map("\n".join, (hopper(records), *tables(records), *_by_machine(records)))]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")


def load(folder: Path) -> list[Record]:
    """All results of a folder.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file that is none.
    """
    records = [read(path) for path in sorted(folder.glob("*.json"), key=_natural)]
    if not records:
        raise FileNotFoundError(f"{folder}: no results, expected *.json; measure first, with make bench")
    return records


def read(path: Path) -> Record:
    """One result.

    Raises:
        ValueError: for a file that is none, naming it and what is wrong in it.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path}: expected a result as make bench writes it, got no JSON: {error}") from error
    faults = _faults(record, RECORD)
    if not faults and "auto" in record:
        record = {"lost": {}, "refusals": {}} | record
        faults = _faults(record, ATTENTION)
    if not faults and "tables" in record:
        faults = _faults(record, TABLES)
    if faults:
        raise ValueError(f"{path}: expected a result as make bench writes it, but of that it lacks {', '.join(faults)}")
    return record


def _faults(found: Any, expected: Any, where: str = "an object") -> list[str]:
    """What in a value is not as expected; ``"*"`` stands for every key, and a list for one whose items are like its."""
    if isinstance(expected, list):
        items = found if isinstance(found, list) else [None]
        return [fault for item in items for fault in _faults(item, expected[0], where)]
    if not isinstance(expected, dict):
        fits = expected(found) if expected is _positive else isinstance(found, expected)
        return [] if fits else [where]
    if not isinstance(found, dict):
        return [where]
    parts = dict.fromkeys(found, expected["*"]) if "*" in expected else expected
    return [fault for key, kind in parts.items() for fault in _faults(found.get(key), kind, key)]


def goal(comparison: dict[str, Any]) -> str:
    """The bound of a recorded comparison; nothing where it is information."""
    least, most = comparison["least"], comparison["most"]
    if least is not None and most is not None:
        return f"{least:.3g} to {most:.3g}"
    return f"≥ {least:.3g}" if least is not None else f"≤ {most:.3g}" if most is not None else ""


def hopper(records: Sequence[Record], cases: Sequence[Case] = CASES) -> list[str]:
    """Every case that needs a GPU, with its goal and what was measured of it."""
    found = {r["name"]: r for r in records}
    lines = [
        "## Hopper cases",
        "",
        f"In TFLOP/s on attended pairs. Goals are for a GPU whose 8192³ matrix product reaches {REFERENCE_GEMM}, and "
        "scale with it. Published rates are of other machines and shapes.",
        "",
        _line(("Case", "Shape", "Goal", "Best published", "auto picks", "TFLOP/s", "% of GEMM", "Goal here", "Met")),
        "|---|---|---:|---|---|---:|---:|---:|---|",
    ]
    gpu = sorted((c for c in cases if c.device == "cuda"), key=lambda c: (c.name[:6], c.direction != "forward"))
    lines += [
        _line((case.name, _sizes(case), str(case.tflops), case.published, *_result(case, found.get(case.name))))
        for case in gpu
    ]
    return lines


def tables(records: Sequence[Record]) -> list[list[str]]:
    """What measurements show in tables of their own, and where they were measured; those of one name are one."""
    sections: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in records:
        for t in r.get("tables", ()):
            about = f"{t['about']} Measured on {_setting(r)}."
            sections.setdefault((t["title"], about), []).extend(t["rows"])
    return [[f"## {title}", "", about, "", *table(rows)] for (title, about), rows in sections.items()]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows under the names of what they hold: numbers to three digits, goals as met or not, None as nothing."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numbers = [all(_is_number(row.get(name)) for row in rows) for name in columns]
    rule = f"|{'|'.join('---:' if right else '---' for right in numbers)}|"
    return [_line(columns), rule, *(_line(_cell(row.get(name)) for name in columns) for row in rows)]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str("" if value is None else value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _sizes(case: Case) -> str:
    scenes, size = case.layout.scenes, f"H{case.heads} D{case.head_dim}"
    if case.last_shot:
        return f"q {_thousands(case.plan.queries)}, kv {_thousands(case.plan.keys)}, {size}"
    shots = {len(scene) for scene in scenes}
    parts = [f"{len(scenes)} scenes"] if len(scenes) > 1 else []
    parts += [f"{n} shots{' each' if parts else ''}" for n in shots if n > 1]
    return ", ".join([*parts, f"{_thousands(case.layout.tokens)}{' in all' if parts else ''}", size])


def _thousands(tokens: int) -> str:
    return f"{tokens / 1000:.3g}K"


def _result(case: Case, r: Record | None) -> tuple[str, ...]:
    if r is None:
        return ("", "**not measured**", "", "", "")
    auto = r["auto"]
    if auto not in r["times"]:
        return (auto, f"**not timed**: {r['lost'].get(auto, '')}", "", "", "**no**")
    rate, gemm = r["times"][auto]["gflops_per_second"] / 1e3, r["roofline"]["gemm_gflops_per_second"] / 1e3
    held = next((c for c in r["comparisons"] if c["what"] == "rate / gemm"), None)
    if held is None:  # at another size the goal is none
        return (auto, f"{rate:.0f}", f"{rate / gemm:.0%}", "", "")
    here = (case.tflops or 0) * gemm / REFERENCE_GEMM
    return (auto, f"{rate:.0f}", f"{held['median']:.0%}", f"{here:.0f}", "yes" if held["met"] else "**no**")


def plot(records: Sequence[Record], path: Path) -> bool:
    """Every kernel's rate against tokens, below the roofline; False, and no picture, where there is no series."""
    panels: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        if "auto" in r and r["times"]:
            panels.setdefault(_panel_of(r), []).append(r)
    panels = {title: sorted(rs, key=_tokens) for title, rs in panels.items() if len({_tokens(r) for r in rs}) > 1}
    if not panels:
        return False
    columns = min(len(panels), WIDEST)
    rows = ceil(len(panels) / columns)
    from matplotlib.figure import Figure  # to measure, nothing is drawn

    figure = Figure(figsize=(4.6 * columns, 3.9 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    timed = {name for rs in panels.values() for r in rs for name, t in r["times"].items() if t["flops"]} - {*PEERS}
    order = [*FAMILIAR, *sorted(timed.difference(FAMILIAR))]
    styles = {name: {"color": colour, "label": name} for name, colour in zip(order, cycle(COLOURS))}
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, series) in zip(axes.flat, panels.items(), strict=False):
        _panel(ax, series, styles | PEERS)
        ax.set_title("\n".join(title), fontsize=10)
    drawn = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    entries = {s["label"]: drawn[s["label"]] for s in (styles | PEERS).values() if s["label"] in drawn}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(len(entries), 5), frameon=False)
    figure.savefig(path, dpi=160)
    return True


def _panel_of(r: Record) -> tuple[str, str]:
    shape = r["shape"]
    pattern = "behind a cache" if shape["queries"] != shape["keys"] else shape["pattern"].replace("_", "-")
    kind = f"{pattern}, {shape['direction']}, {DTYPES[shape['dtype']]}, head dim {shape['head_dim']}"
    return kind, r["machine"].get("gpu", r["machine"]["cpu"])


def _tokens(r: Record) -> int:
    return r["shape"]["keys"]


def _panel(ax: Any, series: Sequence[Record], styles: dict[str, dict[str, Any]]) -> None:
    """Evenly spaced, shortest first: lengths that lie close would write over each other."""
    unit, scale = _unit(series[0])
    for name, style in styles.items():
        points = [(i, r["times"][name]) for i, r in enumerate(series) if name in r["times"]]
        if not points:
            continue
        rates = [t["gflops_per_second"] / scale for _, t in points]
        below = [rate - t["flops"] / t["high"] / 1e9 / scale for rate, (_, t) in zip(rates, points, strict=True)]
        above = [t["flops"] / t["low"] / 1e9 / scale - rate for rate, (_, t) in zip(rates, points, strict=True)]
        ax.errorbar([i for i, _ in points], rates, [below, above], **{"marker": ".", "capsize": 3, **style})
    ax.set_xticks(range(len(series)), [_tick(r) for r in series])
    ax.margins(x=0.08)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tokens")
    ax.set_ylabel(f"{unit} on attended pairs")
    ax.grid(axis="y", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _tick(r: Record) -> str:
    """The number of tokens and, where they have one, the case's letter and number."""
    short = r["name"].split("-")[1] if r["device"] == "cuda" else ""
    tokens = _tokens(r)
    return f"{tokens / (1000 if tokens % 1024 else 1024):.3g}K\n{short}".rstrip()


def _unit(r: Record) -> tuple[str, float]:
    """In which a device's rates are told, and how many GFLOP/s it is."""
    return ("TFLOP/s", 1e3) if r["device"] == "cuda" else ("GFLOP/s", 1.0)


def _by_machine(records: Sequence[Record]) -> list[list[str]]:
    """One section for everything measured on one machine with the same versions and source."""
    sections: dict[str, list[Record]] = {}
    for r in records:
        sections.setdefault(_setting(r), []).append(r)
    return [
        [f"## {setting}", "", *_goals(rs), "", *_times(rs), *_absent(rs), *_clocks(rs)]
        for setting, rs in sections.items()
    ]


def _setting(r: Record) -> str:
    machine, versions, source = r["machine"], r["versions"], r["source"]
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['instructions']}"
    if "gpu" in machine:
        where = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}"
    what = ", ".join(f"{name} {number}" for name, number in versions.items())
    if commit := source.get("commit"):
        return f"{where}; {what}; commit {commit[:10]}{' and changes' if source.get('dirty') else ''}"
    return f"{where}; {what}; source {(source.get('digest') or 'unknown')[:10]}"


def _goals(records: Sequence[Record]) -> list[str]:
    rows = [_line(("Case", "What", "Value", "Spread", "Goal", "Met")), "|---|---|---:|---:|---:|---|"]
    for r in records:
        for c in r["comparisons"]:
            met = {True: "yes", False: "**no**", None: ""}[c["met"]]
            spread = f"{c['low']:.3g} to {c['high']:.3g}"
            rows.append(_line((r["name"], c["what"], f"{c['median']:.3g}", spread, goal(c), met)))
    return rows


def _times(records: Sequence[Record]) -> list[str]:
    unit, scale = _unit(records[0])
    columns = ("Case", "Contender", "Median, ms", "Spread, ms", unit, "% of GEMM", "Rounds", "Date")
    rows = [_line(columns), "|---|---|---:|---:|---:|---:|---:|---|"]
    for r in records:
        for name, t in r["times"].items():
            rate = f"{t['gflops_per_second'] / scale:.0f}" if t["flops"] else ""
            chosen = " (auto)" if name == r.get("auto") else ""
            spread = f"{1e3 * t['low']:.4g} to {1e3 * t['high']:.4g}"
            median, share = f"{1e3 * t['seconds']:.4g}", of_gemm(r, name)
            of = "" if share is None else f"{share:.0%}"
            rows.append(_line((r["name"], name + chosen, median, spread, rate, of, str(r["rounds"]), r["date"][:10])))
    return rows


def of_gemm(r: Record, name: str) -> float | None:
    """A contender's rate as a share of the matrix product's in the same rounds; None where either has none."""
    gemm, rate = (r["times"].get(n, {}).get("gflops_per_second") for n in ("gemm", name))
    return rate / gemm if gemm and rate else None


def _absent(records: Sequence[Record]) -> list[str]:
    """Kernels that are not in the table above, each with its reasons and the cases of which that holds."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in records:
        for name, why in r.get("lost", {}).items():
            reasons.setdefault((name, f"**lost**: {why}"), []).append(r["name"])
        for name, refusals in r.get("refusals", {}).items():
            reasons.setdefault((name, "; ".join(refusals)), []).append(r["name"])
    if not reasons:
        return []
    every = {r["name"] for r in records if "refusals" in r}
    rows = [
        _line((name, why.replace("\n", " ").replace("|", "\\|"), "all" if {*cases} == every else ", ".join(cases)))
        for (name, why), cases in sorted(reasons.items())
    ]
    return ["", _line(("Not timed", "Why", "Cases")), "|---|---|---|", *rows]


def _clocks(records: Sequence[Record]) -> list[str]:
    """The roofline of every run, and how the GPU ran."""
    rows = []
    for r in records:
        if roofline := r.get("roofline"):
            unit, scale = _unit(r)
            running = [_between(r["running"].get(name)) for name in ("sm_clock_megahertz", "power_watts")]
            gemm, copy = roofline["gemm_gflops_per_second"] / scale, roofline["copy_gigabytes_per_second"]
            rows.append(_line((r["name"], f"{gemm:.0f} {unit}", f"{copy:.0f} GB/s", *running)))
    head = _line(("Case", "Matrix product", "Copy, read and written", "SM clock, MHz", "Power, W"))
    return ["", head, "|---|---:|---:|---:|---:|", *rows] if rows else []


def _between(e: dict[str, float] | None) -> str:
    return f"{e['median']:.0f} ({e['low']:.0f} to {e['high']:.0f})" if e else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _natural(path: Path) -> tuple[int, str]:
    """Short names first, so that 4k comes before 16k."""
    return len(path.stem), path.stem


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
