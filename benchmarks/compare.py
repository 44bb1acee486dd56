"""Whether anything became slower, between two result files or two folders of them: ``lct bench compare OLD NEW``.

Rates are compared as shares of the matrix product of their own run, so that another clock is no change; times as they
are where there is no rate or no matrix product.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import load, of_gemm, read

Record = dict[str, Any]

TOLERANCE = 0.03  # ours: less is not told from noise between two runs


class Change(NamedTuple):
    """What became of one contender of one case.

    Args:
        case: Its case.
        name: The contender.
        speed: New speed over old; None where it is measured no more.
        by: Of what the speeds are: ``"% of GEMM"`` or ``"time"``.
        slower: Whether it is a regression.
        why: In words, where there is no speed.
    """

    case: str
    name: str
    speed: float | None
    by: str
    slower: bool
    why: str = ""


def compare(old: Path, new: Path, *, tolerance: float = TOLERANCE, anyway: bool = False) -> list[Change]:
    """Every contender that was measured before, against what it is now.

    It is slower where its speed fell by more than the tolerance and the spreads of the two do not meet; so is one
    that was timed and is now lost.

    Args:
        old: A result file, or a folder of them.
        new: Likewise.
        tolerance: Share of the speed.
        anyway: Compare what there is in both, on whatever device and in whatever shape.

    Raises:
        ValueError: where the two differ in device, cases or shapes, naming what does; for a file that is no result.
        OSError: where there is nothing to read.
    """
    before, after = _read(old), _read(new)
    both = [name for name in before if name in after]
    differences = [] if anyway else _differences(before, after)
    if not both:
        differences.append("no case is in both")
    if differences:
        fix = "" if not both else "; --anyway compares what is in both"
        raise ValueError(f"OLD, NEW: expected the same device, cases and shapes, but {'; '.join(differences)}{fix}")
    return [
        change
        for case in both
        for name in before[case]["times"]
        if (change := _change(before[case], after[case], name, tolerance))
    ]


def render(changes: Sequence[Change]) -> str:
    """The changes as a table, regressions marked, and what it comes to."""
    rows = [("case", "contender", "new / old speed", "by", "")]
    for c in changes:
        speed = c.why if c.speed is None else f"{c.speed:.3f}"
        rows.append((c.case, c.name, speed, c.by, "SLOWER" if c.slower else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in rows]
    slower = sum(c.slower for c in changes)
    return "\n".join(
        [*lines, f"{slower} of {len(changes)} slower" if slower else f"{len(changes)} compared, none slower"]
    )


def _read(path: Path) -> dict[str, Record]:
    return {record["name"]: record for record in (load(path) if path.is_dir() else [read(path)])}


def _differences(before: Mapping[str, Record], after: Mapping[str, Record]) -> list[str]:
    found = {}
    for there, where, here in (("OLD", before, after), ("NEW", after, before)):
        if alone := [name for name in where if name not in here]:
            found[f"only {there} has {', '.join(alone)}"] = None
    for name, record in before.items():
        for part in ("machine", "shape"):
            a, b = record[part], after.get(name, record)[part]
            for key in sorted(a.keys() | b.keys()):
                if a.get(key) != b.get(key):
                    whose = f"{name}: " if part == "shape" else ""
                    found[f"{whose}{key} is {a.get(key)} in OLD and {b.get(key)} in NEW"] = None
    return list(found)


def _change(before: Record, after: Record, name: str, tolerance: float) -> Change | None:
    case = before["name"]
    if name in ("gemm", "copy"):
        return None  # what the others are held against
    if name not in after["times"]:
        lost = after.get("lost", {}).get(name)
        return Change(case, name, None, "", bool(lost), f"lost: {lost}" if lost else "not measured")
    old, new = before["times"][name], after["times"][name]
    shares = of_gemm(before, name), of_gemm(after, name)
    by, unit = ("% of GEMM", shares[1] / shares[0]) if all(shares) else ("time", old["seconds"] / new["seconds"])
    # a spread in units of its own median: what is left of the speed at the fast end of the new and the slow of the old
    nearest = unit * (new["seconds"] / new["low"]) / (old["seconds"] / old["high"])
    return Change(case, name, unit, by, unit < 1 - tolerance and nearest < 1)
