"""A plan as rounds of rectangles that share neither queries nor keys.

A variable-length kernel's backward pass stores the gradients of keys and values and does not add to what is there, so
the overlapping key ranges of context-causal attention, one launch forward, would race backward. What is exact is the
arithmetic of ring attention (Liu et al., arXiv 2310.01889): with the output and the log-sum-exp of the whole softmax,
every rectangle of queries and keys gives its own share of all three gradients, and shares add up. Rectangles of one
round share nothing and so are one launch.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lct_core.layout import Range
from lct_core.plan import AttentionPlan


class Rectangle(NamedTuple):
    """Consecutive queries, all of which see all of some consecutive keys."""

    queries: Range
    keys: Range

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs."""
        return self.queries.size * self.keys.size


Round = tuple[Rectangle, ...]


def by_segment(plan: AttentionPlan) -> list[Round]:
    """Every segment against every one of its key ranges, in as few rounds as first fit finds.

    Context-causal scenes of n shots take n rounds, of one rectangle a scene: few and large, for long shots.
    """
    return _rounds(Rectangle(queries, keys) for queries, ranges in plan.segments for keys in ranges)


def log_depth(plan: AttentionPlan) -> list[Round]:
    """The same pairs in few rounds of many rectangles: 1 + ceil(log2 n) for context-causal scenes of n shots.

    What all segments of a run see is one rectangle of all their queries; the rest is left to the run's two halves.
    """
    return _rounds(rectangle for run in _scenes(plan) for rectangle in _halved([(q, list(k)) for q, k in run]))


def _scenes(plan: AttentionPlan) -> list[list[tuple[Range, tuple[Range, ...]]]]:
    """Runs of segments, cut where no key is seen from both sides."""
    runs: list[list[tuple[Range, tuple[Range, ...]]]] = []
    end = 0
    for segment in plan.segments:
        if not runs or segment.keys[0].start >= end:
            runs.append([])
        runs[-1].append(segment)
        end = max(end, segment.keys[-1].stop)
    return runs


def _halved(run: Sequence[tuple[Range, list[Range]]]) -> list[Rectangle]:
    common = run[0][1]
    for _, keys in run[1:]:
        common = _intersection(common, keys)
    whole = Range(run[0][0].start, run[-1][0].stop)
    rectangles = [Rectangle(whole, keys) for keys in common]
    if len(run) > 1:
        rest = [(queries, _difference(keys, common)) for queries, keys in run]
        middle = len(run) // 2
        rectangles += _halved(rest[:middle]) + _halved(rest[middle:])
    return rectangles


def _intersection(a: Sequence[Range], b: Sequence[Range]) -> list[Range]:
    both = (Range(max(x.start, y.start), min(x.stop, y.stop)) for x in a for y in b)
    return [r for r in both if r.start < r.stop]


def _difference(a: Sequence[Range], b: Sequence[Range]) -> list[Range]:
    left = list(a)
    for hole in b:
        parts = (
            p for r in left for p in (Range(r.start, min(r.stop, hole.start)), Range(max(r.start, hole.stop), r.stop))
        )
        left = [r for r in parts if r.start < r.stop]
    return left


def _rounds(rectangles: Iterable[Rectangle]) -> list[Round]:
    """First fit: each rectangle joins the first round in which it stands apart from all others, in one order."""
    rounds: list[list[Rectangle]] = []
    for rectangle in sorted(rectangles, key=lambda r: -r.pairs):
        fitting = next((r for r in rounds if all(_apart(rectangle, other) for other in r)), None)
        if fitting is None:
            rounds.append(fitting := [])
        fitting.append(rectangle)
    return [tuple(sorted(r)) for r in rounds]


def _apart(a: Rectangle, b: Rectangle) -> bool:
    """Whether one comes wholly before the other, in queries and in keys: a kernel takes both in one order."""
    return any(x.queries.stop <= y.queries.start and x.keys.stop <= y.keys.start for x, y in ((a, b), (b, a)))
