"""What is measured: every attention case as data, and the goals that its comparisons have to reach."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Literal

import torch

from lct_core import AttentionPlan, Layout, Shot
from lct_core.masks import PATTERNS

Direction = Literal["forward", "backward", "forward+backward"]

#: The lengths of nine ragged shots, in thousands of tokens where they are taken as they are.
RAGGED = (5.2, 9.8, 7.4, 3.1, 12.1, 6.6, 8.8, 4.3, 10.2)

#: Work of a direction in units of the forward pass; a backward pass computes its scores again.
WORK: dict[Direction, float] = {"forward": 1, "backward": 2.5, "forward+backward": 3.5}

#: What an 8192³ bf16 matrix product reaches on the GPU that the GPU goals were set for, in TFLOP/s.
REFERENCE_GEMM = 790


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What ``attend`` has to reach against a peer measured in the same rounds.

    Args:
        peer: ``"dense"``, one SDPA call without a mask; ``"masked"``, one with a boolean mask; ``"gemm"``, an 8192³
            matrix product; or the name of a registered kernel.
        least: Least ratio of the rates, FLOP/s on the pairs that each is asked for.
        most: Most ratio of the times.
    """

    peer: str
    least: float | None = None
    most: float | None = None


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
        warmup: Rounds before the first that counts.
        rounds: Rounds that count.
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
    warmup: int = 1
    rounds: int = 5

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
    def gate(self) -> "Case":
        """The small ragged scene on which a kernel has to be right before it is timed; one for all sizes of a kind."""
        scenes = [[150 + 61 * i % 97 for i, _ in enumerate(scene[:9])] for scene in self.layout.scenes]
        return replace(self, name="gate", layout=row(*scenes), warmup=0, rounds=0)


def row(*scenes: Iterable[int]) -> Layout:
    """A row of scenes, given every shot's number of tokens."""
    return Layout([[Shot(text=0, grid=(1, 1, tokens)) for tokens in scene] for scene in scenes])


def ragged(tokens: int) -> list[int]:
    """Nine shots, as ragged as ``RAGGED``, of that many tokens in all."""
    ends = [round(tokens * end / sum(RAGGED)) for end in accumulate(RAGGED, initial=0)]
    return [stop - start for start, stop in pairwise(ends)]


def _cpu() -> list[Case]:
    """Context-causal at 4K to 16K tokens; few, since peers compile for each. Even rounds weigh both orders alike."""
    cases = []
    for tokens, rounds in ((4096, 8), (8192, 4), (16384, 2)):
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            case = Case(
                name=f"cpu-causal-{tokens // 1024}k-{short}-forward",
                layout=row(ragged(tokens)),
                pattern="context_causal",
                heads=8,
                kv_heads=8,
                head_dim=64,
                dtype=dtype,
                direction="forward",
                rounds=rounds,
                goals=(Goal(peer="dense", least=0.9), Goal(peer="masked", least=1.4), Goal(peer="flex", most=1.05)),
            )
            cases.append(case)
            if tokens == 4096:
                cases.append(
                    replace(
                        case,
                        name=case.name + "-backward",
                        direction="forward+backward",
                        goals=(Goal(peer="masked", least=1.3),),
                    )
                )
    return cases


def _gpu() -> list[Case]:
    """Training a scene (A), context-causal tuning (B) and generation with a cache (C), at the paper's sizes."""
    long, thousands = [29_400] * 9, [round(1000 * weight) for weight in RAGGED]
    packed = [1700, 4100, 2600, 5200, 3300, 2300]
    full, causal = "bidirectional", "context_causal"
    return [
        # name, scenes, pattern, heads, head_dim, goals forward and backward in TFLOP/s, least share of the dense rate
        *_both("A1", [[16_200]], full, 24, 128, 660, 540, 0.98),
        *_both("A2", [[9_100], [22_400], [14_700], [18_800]], full, 24, 128, 640, 530, None),
        *_both("A3", [long], full, 24, 128, 690, 580, 0.98),
        *_both("A4", [thousands], full, 32, 64, 490, 460, 0.98),
        *_both("B1", [[1800] * 9], causal, 24, 128, 590, 470, 0.88),
        *_both("B2", [thousands], causal, 24, 128, 650, 550, 0.95),
        *_both("B3", [long], causal, 24, 128, 685, 575, 0.95),
        *_both("B4", [packed] * 3, causal, 16, 128, 600, 480, 0.88),
        *_both("B5", [thousands], causal, 32, 64, 460, 440, None),
        _one("C1", [[1800] * 9], causal, 24, 128, 610, 0.98, last_shot=True),
        _one("C2", [long], causal, 24, 128, 690, 0.98, last_shot=True),
        _one("C3", [[29_400] * 20], causal, 16, 128, 690, 0.98, last_shot=True),
        _one("C4", [[1500] * 200], causal, 16, 128, 580, 0.98, last_shot=True),
    ]


def _both(
    name: str,
    scenes: Sequence[list[int]],
    pattern: str,
    heads: int,
    head_dim: int,
    forward: int,
    backward: int,
    dense: float | None,
) -> list[Case]:
    return [
        _one(name, scenes, pattern, heads, head_dim, forward, dense),
        _one(name, scenes, pattern, heads, head_dim, backward, dense, direction="backward"),
    ]


def _one(
    name: str,
    scenes: Sequence[list[int]],
    pattern: str,
    heads: int,
    head_dim: int,
    tflops: int,
    dense: float | None,
    *,
    direction: Direction = "forward",
    last_shot: bool = False,
) -> Case:
    goals = [Goal(peer="gemm", least=tflops / REFERENCE_GEMM)]
    if dense is not None:
        goals.append(Goal(peer="dense", least=dense))
    huge = sum(map(sum, scenes)) > 100_000
    return Case(
        name=f"gpu-{name}-{direction}",
        layout=row(*scenes),
        pattern=pattern,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        direction=direction,
        last_shot=last_shot,
        device="cuda",
        goals=tuple(goals),
        warmup=2 if huge else 5,
        rounds=7 if huge else 20,
    )


CASES = [*_cpu(), *_gpu()]
