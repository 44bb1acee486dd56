"""What is measured: every attention case as data, and the goals that its comparisons have to reach."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count, pairwise
from typing import Any, Literal

import torch

from lct_core import AttentionPlan, Layout, Shot
from lct_core.patterns import PATTERNS

Direction = Literal["forward", "backward", "forward+backward"]

#: The lengths of nine ragged shots, in thousands of tokens where they are taken as they are.
RAGGED = (5.2, 9.8, 7.4, 3.1, 12.1, 6.6, 8.8, 4.3, 10.2)

#: Work of a direction in units of the forward pass; a backward pass computes its scores again.
WORK: dict[Direction, float] = {"forward": 1, "backward": 2.5, "forward+backward": 3.5}

#: What an 8192³ bf16 matrix product reaches on the GPU that the GPU goals were set for, in TFLOP/s.
REFERENCE_GEMM = 790

#: Kernels that compile for every new shape, which costs more than a case: they take part where a goal names them.
COMPILED = ("flex", "flex-flash")

#: How far behind the best kernel of a case the one that ``attend`` picks may be.
BEHIND = 1.03


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a kernel has to reach against a peer measured in the same rounds; without a bound, it is information.

    Args:
        peer: ``"dense"``, one SDPA call without a mask; ``"masked"``, one with a boolean mask; ``"gemm"``, a matrix
            product; ``"raw-cudnn"`` or ``"raw-flash3"``, one call of that library without a mask: for the case,
            where it has one, else for a square of as many pairs; or the name of a registered kernel.
        least: Least ratio of the rates, FLOP/s on the pairs that each is asked for.
        most: Most ratio of the times.
        subject: The kernel that has to reach it; ``"auto"`` is the one that ``attend`` picks.
        without: A kernel in whose absence alone the goal holds.
    """

    peer: str
    least: float | None = None
    most: float | None = None
    subject: str = "auto"
    without: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention call, and how often it is measured.

    Args:
        name: Unique; names the result file.
        layout: The row's scenes of shots.
        pattern: ``"bidirectional"`` or ``"context_causal"``.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        dtype: Of queries, keys and values.
        direction: What is timed; ``"backward"`` times the gradients alone.
        last_shot: Whether only the last shot asks, over the keys of all: generation with a cache.
        device: ``"cpu"`` or ``"cuda"``.
        goals: What has to be reached; these name the peers that are measured beside the kernels.
        kernels: The kernels that take part besides those of the goals and what ``attend`` picks; none: all that serve
            the case, but for those that compile for every shape.
        published: The best published rate that it can be held against, in words.
        warmup: Rounds before the first that counts.
        rounds: Rounds that count; the most of them where there is a budget.
        budget: Seconds for the rounds that count, of which there are two at least; None: all of them are run.
    """

    name: str
    layout: Layout
    pattern: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    direction: Direction
    last_shot: bool = False
    device: str = "cpu"
    goals: tuple[Goal, ...] = field(default=(), compare=False)
    kernels: tuple[str, ...] = field(default=(), compare=False)
    published: str = field(default="", compare=False)
    warmup: int = 1
    rounds: int = 5
    budget: float | None = None

    @property
    def plan(self) -> AttentionPlan:
        """Who sees whom."""
        plan = PATTERNS[self.pattern](self.layout)
        return plan.rows(self.layout.spans[-1]) if self.last_shot else plan

    @property
    def flops(self) -> float:
        """Floating point operations on the attended pairs, in the case's direction."""
        return self.cost(self.plan.pairs)

    def cost(self, pairs: int) -> float:
        """Floating point operations of attention over that many pairs, in the case's direction."""
        return 4 * self.head_dim * self.heads * pairs * WORK[self.direction]

    def scaled(self, tokens: int) -> "Case":
        """The same kind of case, every shot shortened or lengthened alike, with about that many tokens in all."""
        factor = tokens / self.layout.tokens
        scenes = [[max(1, round(shot.tokens * factor)) for shot in scene] for scene in self.layout.scenes]
        return replace(self, layout=row(*scenes))

    @property
    def quick(self) -> "Case":
        """A sixteenth of the size in two rounds, without what compiles: to see that it runs."""
        goals = tuple(goal for goal in self.goals if goal.peer not in COMPILED)
        return replace(self.scaled(self.layout.tokens // 16), goals=goals, rounds=2)

    @property
    def gate(self) -> "Case":
        """The small ragged row on which a kernel has to be right before it is timed; one for all sizes of a kind."""
        sizes, most = (150 + 61 * i % 97 for i in count()), max(1, 9 // len(self.layout.scenes))
        scenes = [[next(sizes) for _ in scene[:most]] for scene in self.layout.scenes]
        return replace(self, name="gate", layout=row(*scenes), warmup=0, rounds=0, budget=None)

    @property
    def shape(self) -> dict[str, Any]:
        """All sizes, as they are recorded."""
        return {
            "scenes": [[shot.tokens for shot in scene] for scene in self.layout.scenes],
            "queries": self.plan.queries,
            "keys": self.plan.keys,
            "pairs": self.plan.pairs,
            "pattern": self.pattern,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": self.direction,
        }

    @property
    def tflops(self) -> int | None:
        """The goal in TFLOP/s, where a matrix product reaches ``REFERENCE_GEMM``."""
        shares = [goal.least for goal in self.goals if (goal.peer, goal.subject) == ("gemm", "auto")]
        return round(REFERENCE_GEMM * shares[0]) if shares and shares[0] else None


def row(*scenes: Iterable[int]) -> Layout:
    """A row of scenes, given every shot's number of tokens."""
    return Layout([[Shot(text=0, grid=(1, 1, tokens)) for tokens in scene] for scene in scenes])


def ragged(tokens: int) -> list[int]:
    """Nine shots, as ragged as ``RAGGED``, of that many tokens in all."""
    ends = [round(tokens * end / sum(RAGGED)) for end in accumulate(RAGGED, initial=0)]
    return [stop - start for start, stop in pairwise(ends)]


def _cpu() -> list[Case]:
    """Few, since peers compile for each. Even rounds weigh both orders alike."""
    causal = Case(
        name="",
        layout=row(ragged(4096)),
        pattern="context_causal",
        heads=8,
        kv_heads=8,
        head_dim=64,
        dtype=torch.float32,
        direction="forward",
        goals=(Goal(peer="dense", least=0.9), Goal(peer="masked", least=1.4), Goal(peer="flex", most=1.05)),
    )
    packed = replace(
        causal,
        layout=row(ragged(2048), ragged(4096), ragged(2048)),
        pattern="bidirectional",
        goals=(Goal(peer="dense", least=0.9),),
    )
    cached = replace(causal, layout=row([2048] * 8), last_shot=True, goals=(Goal(peer="dense", least=0.98),))
    cases = []
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for tokens, rounds in ((4096, 8), (8192, 4), (16384, 2)):
            name = f"cpu-causal-{tokens // 1024}k-{short}-forward"
            cases.append(replace(causal, name=name, layout=row(ragged(tokens)), dtype=dtype, rounds=rounds))
        both = replace(cases[-3], direction="forward+backward", goals=(Goal(peer="masked", least=1.3),))
        cases += [
            replace(both, name=both.name + "-backward"),
            replace(packed, name=f"cpu-packed-8k-{short}-forward", dtype=dtype, rounds=4),
            replace(cached, name=f"cpu-cached-16k-{short}-forward", dtype=dtype, rounds=8),
        ]
    return cases


def _gpu() -> list[Case]:
    """Training a scene (A), context-causal tuning (B) and generation with a cache (C), at the paper's sizes.

    The cheapest come first, so that a run that is cut short leaves the most results.
    """
    long, thousands = [29_400] * 9, [round(1000 * weight) for weight in RAGGED]
    packed = [1700, 4100, 2600, 5200, 3300, 2300]
    dense, magi = ("FA3 dense",) * 2, "MagiAttention"
    cases = [
        # name, scenes, heads, head_dim, goals in TFLOP/s, their best published peers, least share of raw FA3's rate
        *_full("A1", [[16_200]], 24, 128, (660, 540), dense, 0.98),
        *_full("A2", [[9_100], [22_400], [14_700], [18_800]], 24, 128, (640, 530), _h100("FA3 varlen", 605, 501), 0.98),
        *_full("A3", [long], 24, 128, (690, 580), _h100("FA3", 701, 601), None),
        *_full("A4", [thousands], 32, 64, (490, 460), _h100("FA3", 497, 474), 0.98),
        *_causal("B1", [[1800] * 9], 24, 128, (590, 470), _h100(magi, 548, 344), 0.88),
        *_causal("B2", [thousands], 24, 128, (650, 550), _h100(magi, 572, 362), 0.95, flex=True),
        *_causal("B3", [long], 24, 128, (685, 575), dense, 0.95),
        *_causal("B4", [packed] * 3, 16, 128, (600, 480), _h100(magi, 572, 362), 0.88),
        *_causal("B5", [thousands], 32, 64, (460, 440), ("FA3 dense D64",) * 2, None),
        _cached("C1", [1800] * 9, 24, 610, "FA3 same shape"),
        _cached("C2", long, 24, 690, "FA3 same shape"),
        _cached("C3", [29_400] * 20, 16, 690, "FA3 same shape"),
        _cached("C4", [1500] * 200, 16, 580, "unsplit ~500 (modelled)"),
    ]
    return sorted(cases, key=lambda case: case.flops)


def _h100(peer: str, *tflops: int) -> tuple[str, ...]:
    return tuple(f"{peer} {rate} (H100)" for rate in tflops)


def _full(
    name: str,
    scenes: Sequence[list[int]],
    heads: int,
    head_dim: int,
    tflops: tuple[int, int],
    published: Sequence[str],
    raw: float | None,
) -> list[Case]:
    layout, directions = row(*scenes), ("forward", "backward")
    return [
        _one(f"{name}-{direction}", layout, "bidirectional", heads, head_dim, rate, peer, raw, direction=direction)
        for direction, rate, peer in zip(directions, tflops, published, strict=True)
    ]


def _causal(
    name: str,
    scenes: Sequence[list[int]],
    heads: int,
    head_dim: int,
    tflops: tuple[int, int],
    published: Sequence[str],
    raw: float | None,
    *,
    flex: bool = False,
) -> list[Case]:
    """Without FA3, the library's own kernel has goals of its own."""
    cases = []
    for case, own in zip(_full(name, scenes, heads, head_dim, tflops, published, raw), (450, 320), strict=True):
        goals = [*case.goals, Goal(peer="gemm", subject="triton", least=own / REFERENCE_GEMM, without="flash3")]
        if flex:
            goals += [Goal(peer="flex"), Goal(peer="flex", subject="triton", most=1.0, without="flash3")]
        cases.append(replace(case, pattern="context_causal", goals=tuple(goals)))
    return cases


def _cached(name: str, shots: list[int], heads: int, tflops: int, published: str) -> Case:
    return _one(f"{name}-forward", row(shots), "context_causal", heads, 128, tflops, published, 0.98, last_shot=True)


def _one(
    name: str,
    layout: Layout,
    pattern: str,
    heads: int,
    head_dim: int,
    tflops: int,
    published: str,
    raw: float | None,
    *,
    direction: Direction = "forward",
    last_shot: bool = False,
) -> Case:
    case = Case(
        name=f"gpu-{name}",
        layout=layout,
        pattern=pattern,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        direction=direction,
        last_shot=last_shot,
        device="cuda",
        goals=(
            Goal(peer="gemm", least=tflops / REFERENCE_GEMM),
            Goal(peer="raw-flash3", least=raw),
            Goal(peer="raw-cudnn"),
        ),
        published=published,
        warmup=0,  # the first call of everything, and half a second of work, come before
        rounds=20,
        budget=3.0,
    )
    if case.plan.queries > 100_000:  # seconds a call: only what competes, and sdpa is cuDNN itself there
        return replace(case, goals=tuple(goal for goal in case.goals if goal.least), kernels=("flash3", "sdpa"))
    return case


CASES = [*_cpu(), *_gpu()]
