"""Attention patterns, as plans of ranges, and the forms in which kernels take them.

A pattern says which shots a shot sees. All of LCT's patterns are unions of rectangles: some consecutive queries, and
the ranges of keys that all of them see. So a plan costs per shot, never per token, and no kernel needs a dense mask.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lct_core.layout import Layout, Range, consecutive

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Pattern = Callable[[Layout], "AttentionPlan"]
Form = Literal["dense", "packed", "overlapping", "gathered"]


class Segment(NamedTuple):
    """Consecutive queries and the ranges of keys that every one of them sees."""

    queries: Range
    keys: tuple[Range, ...]

    @property
    def num_keys(self) -> int:
        """How many keys each of the queries sees."""
        return sum(keys.size for keys in self.keys)


class Varlen(NamedTuple):
    """Arguments of a variable-length attention kernel: one sequence for each segment of a plan.

    Sequence ``i`` holds queries ``cu_seqlens_q[i] : cu_seqlens_q[i + 1]`` and the ``seqused_k[i]`` keys that start at
    ``cu_seqlens_k[i]``. Without ``key_index`` these are places in the key space itself, and the key ranges of different
    sequences may overlap (the kernel must honour ``seqused_k``; forward only). With it they are places in
    ``key_index``, which lists the keys to gather, and the sequences lie end to end.
    """

    cu_seqlens_q: Int[Tensor, " sequences+1"]
    cu_seqlens_k: Int[Tensor, " sequences+1"]
    seqused_k: Int[Tensor, " sequences"]
    max_seqlen_q: int
    max_seqlen_k: int
    key_index: Int[Tensor, " gathered"] | None


@dataclass(frozen=True)
class AttentionPlan:
    """Who sees whom, as data: the one form from which every kernel's own is made.

    Args:
        queries: Size of the query space, in tokens.
        keys: Size of the key space, in tokens; not the query space's where there is a text or a cache.
        segments: The query space cut into consecutive ranges, each with the key ranges it sees. Key ranges are put in
            order and merged, so no key counts twice.

    Raises:
        ValueError: where the segments do not cover the query space in order, a key range leaves the key space or
            stops before it starts, or some queries see no key.
    """

    queries: int
    keys: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        segments = tuple(Segment(Range(*queries), merged(keys)) for queries, keys in self.segments)
        object.__setattr__(self, "segments", segments)
        end = 0
        for i, (queries, keys) in enumerate(segments):
            if queries.start != end or queries.size < 1:
                raise ValueError(
                    f"segments: segment {i} has queries {tuple(queries)}, expected a range from {end} on: "
                    "segments cover the query space in order, without gap or overlap"
                )
            if not keys:
                raise ValueError(
                    f"segments: the queries {tuple(queries)} of segment {i} see no key, expected at least one"
                )
            if keys[0].start < 0 or keys[-1].stop > self.keys:
                raise ValueError(
                    f"segments: segment {i} sees keys {[tuple(k) for k in keys]}, "
                    f"expected ranges within (0, {self.keys})"
                )
            end = queries.stop
        if end != self.queries:
            raise ValueError(f"segments: they end at query {end}, expected {self.queries}, the size of the query space")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.queries, self.keys, self.segments))

    @cached_property
    def pairs(self) -> int:
        """Number of (query, key) pairs that are attended."""
        return sum(segment.queries.size * segment.num_keys for segment in self.segments)

    @cached_property
    def form(self) -> Form:
        """How the key ranges lie, which is what decides how kernels can run a plan.

        ``"dense"``: all queries see one range (a scene, a shot behind its history); ``"packed"``: every segment sees
        one range and no two overlap (scenes side by side); ``"overlapping"``: one range each, and some overlap
        (context-causal); ``"gathered"``: some segment sees several ranges (a history with gaps).
        """
        if any(len(keys) > 1 for _, keys in self.segments):
            return "gathered"
        if len(self.segments) == 1:
            return "dense"
        keys = sorted(keys[0] for _, keys in self.segments)
        return "packed" if all(a.stop <= b.start for a, b in pairwise(keys)) else "overlapping"

    def flops(self, *, heads: int, head_dim: int, backward: bool = False) -> int:
        """Floating point operations of the attention itself, attended pairs only.

        4 · head_dim · heads · pairs forward; the backward alone, with its recomputed scores, 2.5 times that.
        """
        forward = 4 * head_dim * heads * self.pairs
        return forward * 5 // 2 if backward else forward

    def rows(self, queries: Range) -> "AttentionPlan":
        """The plan of some of the queries, over the same keys: what is left to do where the others are cached."""
        inside = (
            Segment(Range(max(q.start, queries.start) - queries.start, min(q.stop, queries.stop) - queries.start), k)
            for q, k in self.segments
            if q.start < queries.stop and queries.start < q.stop
        )
        return AttentionPlan(queries.size, self.keys, tuple(inside))

    def dense(self, *, device: torch.device | str | None = None) -> Bool[Tensor, "queries keys"]:
        """The definition: True where the row's token sees the column's. For tests and small pictures only."""
        mask = torch.zeros(self.queries, self.keys, dtype=torch.bool, device=device)
        for queries, ranges in self.segments:
            for keys in ranges:
                mask[queries.slice, keys.slice] = True
        return mask

    def varlen(self, *, device: torch.device | str | None = None) -> Varlen:
        """Arguments of a variable-length kernel, int32, without a gather wherever every segment sees one range."""
        contiguous = all(len(keys) == 1 for _, keys in self.segments)
        used = [segment.num_keys for segment in self.segments]
        ends = [0, *(q.stop for q, _ in self.segments)]
        starts = [keys[0].start for _, keys in self.segments] if contiguous else [r.start for r in consecutive(used)]
        index = None if contiguous else torch.cat([torch.arange(*r) for _, keys in self.segments for r in keys])
        return Varlen(
            cu_seqlens_q=torch.tensor(ends, dtype=torch.int32, device=device),
            cu_seqlens_k=torch.tensor([*starts, starts[-1] + used[-1]], dtype=torch.int32, device=device),
            seqused_k=torch.tensor(used, dtype=torch.int32, device=device),
            max_seqlen_q=max(q.size for q, _ in self.segments),
            max_seqlen_k=max(used),
            key_index=None if index is None else index.to(device),
        )

    def block_mask(
        self, *, block_size: tuple[int, int] = (128, 128), device: torch.device | str | None = None
    ) -> "BlockMask":
        """A FlexAttention ``BlockMask`` built from the ranges: blocks² numbers, never tokens².

        Args:
            block_size: Tokens per block, ``(queries, keys)`` (default: upstream).
            device: Where the mask's tensors go.
        """
        from torch.nn.attention.flex_attention import BlockMask

        counts = self._block_counts(*block_size)
        full = counts == block_size[0] * block_size[1]  # the padded tail counts as partial: its padding is unseen
        partial = (counts > 0) & ~full
        return BlockMask.from_kv_blocks(
            *_ordered(partial, device),
            *_ordered(full, device),
            BLOCK_SIZE=block_size,
            mask_mod=self._mask_mod(device),
            seq_lengths=(self.queries, self.keys),
        )

    def _block_counts(self, query_block: int, key_block: int) -> Int[Tensor, "query_blocks key_blocks"]:
        """Attended pairs in every block: tokens of each segment's queries in a block x its keys in a block, summed."""
        queries = _overlaps([(q,) for q, _ in self.segments], self.queries, query_block)
        keys = _overlaps([k for _, k in self.segments], self.keys, key_block)
        return (queries.double().T @ keys.double()).long()

    def _mask_mod(self, device: torch.device | str | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The plan as a function of a query's and a key's place, by looking both up in a table of intervals."""
        cuts = sorted({0, self.keys, *(end for _, keys in self.segments for r in keys for end in r)})
        sees = torch.zeros(len(self.segments), len(cuts) - 1, dtype=torch.bool)
        for i, (_, keys) in enumerate(self.segments):
            for r in keys:
                sees[i, cuts.index(r.start) : cuts.index(r.stop)] = True
        sizes = torch.tensor([q.size for q, _ in self.segments])
        segment_of = torch.arange(len(sizes)).repeat_interleave(sizes).to(device)
        widths = torch.tensor([b - a for a, b in pairwise(cuts)])
        interval_of = torch.arange(len(widths)).repeat_interleave(widths).to(device)
        sees = sees.to(device)

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees[segment_of[query], interval_of[key]]

        return mask_mod


def bidirectional(layout: Layout) -> AttentionPlan:
    """Every token sees its whole scene (paper, 3.2.2: full attention)."""
    return _plan(layout, layout.scene_spans, [(scene,) for scene in layout.scene_spans])


def context_causal(layout: Layout) -> AttentionPlan:
    """Bidirectional inside a shot; a shot sees the earlier shots of its scene (paper, 3.3)."""
    starts = [scene.start for scene, shots in zip(layout.scene_spans, layout.scene_shots, strict=True) for _ in shots]
    return _plan(
        layout, layout.spans, [(Range(start, shot.stop),) for start, shot in zip(starts, layout.spans, strict=True)]
    )


def own_shot(layout: Layout) -> AttentionPlan:
    """Every shot sees itself alone: the base model."""
    return _plan(layout, layout.spans, [(shot,) for shot in layout.spans])


def selected_history(layout: Layout, history: Sequence[Iterable[int]]) -> AttentionPlan:
    """Every shot sees itself and the earlier shots chosen for it: by relevance rather than recency (paper, 3.4).

    Args:
        layout: The row's scenes of shots.
        history: For every shot of the row, the shots it sees besides itself, counted from 0 in row order. A global shot
            is one of them: name it where it should be seen.

    Raises:
        ValueError: for a history of the wrong length, or one that holds a shot of another scene or a later shot.
    """
    chosen = [sorted(set(shots)) for shots in history]
    if len(chosen) != layout.num_shots:
        raise ValueError(f"history: got {len(chosen)} entries, expected one for each of the {layout.num_shots} shots")
    for scene in layout.scene_shots:
        for shot in scene:
            for other in chosen[shot]:
                if not scene.start <= other < shot:
                    raise ValueError(
                        f"history: shot {shot} is to see shot {other}, expected earlier shots of its own "
                        f"scene: {list(range(scene.start, shot))}"
                    )
    return _plan(
        layout,
        layout.spans,
        [[layout.spans[s] for s in (*others, own)] for own, others in enumerate(chosen)],
    )


def first_frames(layout: Layout, *, causal: bool = False) -> AttentionPlan:
    """Every shot sees itself, the global shot, and the first latent frame of every other shot of its scene.

    After HoloCine (Meng et al., arXiv 2510.20822), where a shot's first frame stands for it. Of another shot only video
    is seen, not its text.

    Args:
        layout: The row's scenes of shots.
        causal: Whether a shot sees the earlier shots alone (default: all of its scene).
    """
    keys = [
        [layout.spans[own], *(_summary(layout, shot) for shot in (range(scene.start, own) if causal else scene))]
        for scene in layout.scene_shots
        for own in scene
    ]
    return _plan(layout, layout.spans, keys)


def own_text(layout: Layout) -> AttentionPlan:
    """Cross-attention from every shot's video tokens to its own text; both spaces are in row order."""
    return _text_plan(layout, with_global=False)


def own_and_global_text(layout: Layout) -> AttentionPlan:
    """Cross-attention from every shot's video tokens to its own text and its scene's global prompt."""
    return _text_plan(layout, with_global=True)


def seen_text(layout: Layout, plan: AttentionPlan) -> AttentionPlan:
    """Cross-attention to the texts of all shots of which a plan shows some video, and to the global prompt.

    Args:
        layout: The row's scenes of shots, with their texts.
        plan: Who sees whom in the self-attention of ``layout.video_only``.

    Raises:
        ValueError: where a shot sees no text at all.
    """
    videos = consecutive(shot.video for shot in layout.shots)
    texts = consecutive(shot.text for shot in layout.shots)
    scenes = list(zip(layout.video_only.scene_spans, layout.scene_shots, strict=True))
    segments = []
    for queries, keys in plan.segments:
        shown = [
            text
            for video, text in zip(videos, texts, strict=True)
            if video.size and any(video.start < r.stop and r.start < video.stop for r in keys)
        ]
        for span, shots in scenes:
            part = Range(max(queries.start, span.start), min(queries.stop, span.stop))
            if part.start >= part.stop:
                continue
            # A global prompt without video is shown by no plan: its whole scene sees it.
            prompt = [texts[shots.start]] if layout.shots[shots.start].role == "global" else []
            seen = merged([*shown, *prompt])
            if not seen:
                own = next(i for i, video in enumerate(videos) if video.start <= part.start < video.stop)
                raise ValueError(
                    f"layout: shot {own} (in row order) has no text to attend to, expected text > 0 in a shot that it "
                    "sees or a global shot in its scene"
                )
            segments.append(Segment(part, seen))
    return AttentionPlan(plan.queries, texts[-1].stop, tuple(segments))


PATTERNS: dict[str, Pattern] = {"bidirectional": bidirectional, "context_causal": context_causal, "own_shot": own_shot}


def _plan(layout: Layout, queries: Iterable[Range], keys: Iterable[Iterable[Range]]) -> AttentionPlan:
    segments = tuple(Segment(q, tuple(k)) for q, k in zip(queries, keys, strict=True) if q.size)
    return AttentionPlan(layout.tokens, layout.tokens, segments)


def _summary(layout: Layout, shot: int) -> Range:
    """The tokens that stand for a shot: the first frame of its video, or all of a global shot."""
    own, span = layout.shots[shot], layout.spans[shot]
    if own.role == "global":
        return span
    start = span.start + (own.text if layout.text_first else 0)
    return Range(start, start + own.video // own.grid[0])


def _text_plan(layout: Layout, *, with_global: bool) -> AttentionPlan:
    videos = consecutive(shot.video for shot in layout.shots)
    texts = consecutive(shot.text for shot in layout.shots)
    segments = []
    for scene in layout.scene_shots:
        shared = [texts[scene.start]] if with_global and layout.shots[scene.start].role == "global" else []
        for shot in scene:
            if not layout.shots[shot].video:
                continue
            keys = merged([*shared, texts[shot]])
            if not keys:
                raise ValueError(
                    f"layout: shot {shot} (in row order) has no text to attend to, expected text > 0"
                    + (" or a global shot in its scene" if with_global else "")
                )
            segments.append(Segment(videos[shot], keys))
    return AttentionPlan(videos[-1].stop, texts[-1].stop, tuple(segments))


def merged(ranges: Iterable[tuple[int, int]]) -> tuple[Range, ...]:
    """Ranges in order, without the empty ones, those that touch or overlap made one."""
    ranges = list(ranges)
    if backward := [tuple(r) for r in ranges if r[0] > r[1]]:
        raise ValueError(f"segments: key ranges {backward} stop before they start")
    out: list[Range] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if out and start <= out[-1].stop:
            out[-1] = Range(out[-1].start, max(stop, out[-1].stop))
        else:
            out.append(Range(start, stop))
    return tuple(out)


def _overlaps(sets: Sequence[Iterable[Range]], size: int, block: int) -> Int[Tensor, "sets blocks"]:
    """How many tokens of each set of ranges lie in each block of a space."""
    edges = torch.arange(0, size + block, block).clamp(max=size)
    out = torch.zeros(len(sets), len(edges) - 1, dtype=torch.int64)
    for row, ranges in zip(out, sets, strict=True):
        for start, stop in ranges:
            row += edges.clamp(start, stop).diff()
    return out


def _ordered(blocks: Bool[Tensor, "rows columns"], device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """For every row, how many blocks are set, and all columns with the set ones first; int32, ``[1, 1, rows, ...]``."""
    counts = blocks.sum(-1, dtype=torch.int32)
    order = blocks.byte().argsort(dim=-1, descending=True, stable=True).int()
    return counts[None, None].to(device), order[None, None].to(device)
