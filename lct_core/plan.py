"""``AttentionPlan``: which queries see which keys, as ranges of tokens, and the forms in which kernels take it.

Whatever LCT attends to is a union of rectangles: some consecutive queries, and the ranges of keys that all of them see.
So a plan costs memory and time per shot, never per token, and no kernel needs a dense mask.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lct_core.layout import Range, consecutive

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Form = Literal["dense", "packed", "overlapping", "gathered"]


class Segment(NamedTuple):
    """Consecutive queries and the ranges of keys that every one of them sees."""

    queries: Range
    keys: tuple[Range, ...]

    @property
    def num_keys(self) -> int:
        """How many keys each of the queries sees."""
        return sum(keys.size for keys in self.keys)


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
