"""What the Triton kernels compute, in plain torch: the same tiles, chunks and steps, for reading and for tests.

FlashAttention-2 (Dao, arXiv 2307.08691) where every query sees one interval of keys. A tile of tokens walks over what
it sees in chunks. Most chunks are seen by all of the tile and need no mask; those before and after are masked, half as
long. Forward is an online softmax, which leaves the log-sum-exp. Backward computes the weights anew from it, once over
tiles of queries and once over tiles of keys, so that every gradient has one writer.

Arithmetic is float64 for float64 and float32 for all else; weights and their gradients are rounded to the inputs' dtype
before they are multiplied, as the kernels do.
"""

from collections.abc import Iterator

import torch
from einops import rearrange, repeat
from torch import Tensor

from lct_core import AttentionPlan
from lct_core.layout import Range
from lct_plugins.triton_attention import Tile, intervals, key_tiles, query_tiles


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, *, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as :func:`lct_plugins.triton_attention.triton_attention_lse` gives them.

    Args:
        q: ``[batch, queries, heads, head_dim]``.
        k: ``[batch, keys, kv_heads, head_dim]``.
        v: Like ``k``.
        plan: One key interval per query.
        scale: Factor on the scores.
        rows: Queries of a tile.
        columns: Keys of a chunk.
    """
    start, stop = intervals(plan, q.device)
    queries, keys, values = _by_head(q, k, v)
    out = queries.new_empty(queries.shape)
    lse = queries.new_empty(queries.shape[:3])
    for tile in query_tiles(plan, rows, columns):
        own = tile.own.slice
        acc = queries.new_zeros(queries[:, :, own].shape)
        total = queries.new_zeros(lse[:, :, own].shape)
        top = torch.full_like(total, float("-inf"))
        for chunk, masked in chunks(tile, columns):
            scores = scale * queries[:, :, own] @ keys[:, :, chunk.slice].mT
            if masked:
                key = torch.arange(*chunk)
                seen = (key >= start[own, None]) & (key < stop[own, None])
                scores = scores.masked_fill(~seen, float("-inf"))
            higher = torch.maximum(top, scores.amax(-1))
            reached = higher.nan_to_num(neginf=0.0)  # of rows that have seen no key yet
            p = (scores - reached[..., None]).exp()
            shrink = (top - reached).exp()
            top, total = higher, total * shrink + p.sum(-1)
            acc = acc * shrink[..., None] + _rounded(p, q) @ values[:, :, chunk.slice]
        out[:, :, own] = acc / total[..., None]
        lse[:, :, own] = top + total.log()
    return rearrange(out, "b h s d -> b s h d").to(q.dtype), lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    plan: AttentionPlan,
    scale: float,
    *,
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, from the output, its log-sum-exp and its gradient."""
    start, stop = intervals(plan, q.device)
    queries, keys, values = _by_head(q, k, v)
    outs, douts = _by_head(out, dout)
    delta = (outs * douts).sum(-1)
    dq, dk, dv = (torch.zeros_like(x) for x in (queries, keys, values))

    def weights(query: Range, key: Range, masked: bool) -> tuple[Tensor, Tensor]:
        """The weights of some queries and keys, and the gradients of their scores."""
        at, of = query.slice, key.slice
        p = (scale * queries[:, :, at] @ keys[:, :, of].mT - lse[:, :, at, None]).exp()
        dp = douts[:, :, at] @ values[:, :, of].mT
        ds = p * (dp - delta[:, :, at, None])
        if masked:
            place = torch.arange(*key)
            unseen = (place < start[at, None]) | (place >= stop[at, None])
            p, ds = p.masked_fill(unseen, 0.0), ds.masked_fill(unseen, 0.0)
        return _rounded(p, q), _rounded(ds, q)

    for tile in query_tiles(plan, rows, columns):
        for chunk, masked in chunks(tile, columns):
            _, ds = weights(tile.own, chunk, masked)
            dq[:, :, tile.own.slice] += ds @ keys[:, :, chunk.slice]
    for tile in key_tiles(plan, rows, columns):
        for chunk, masked in chunks(tile, columns):
            p, ds = weights(chunk, tile.own, masked)
            dk[:, :, tile.own.slice] += ds.mT @ queries[:, :, chunk.slice]
            dv[:, :, tile.own.slice] += p.mT @ douts[:, :, chunk.slice]
    dk, dv = (x.unflatten(1, (k.shape[2], -1)).sum(2) for x in (scale * dk, dv))
    return tuple(rearrange(x, "b h s d -> b s h d").to(q.dtype) for x in (scale * dq, dk, dv))  # type: ignore[return-value]


def chunks(tile: Tile, columns: int) -> Iterator[tuple[Range, bool]]:
    """What a tile walks over, in order, each with whether it is masked."""
    before, after = Range(tile.seen.start, tile.full.start), Range(tile.full.stop, tile.seen.stop)
    for part, size, masked in ((before, columns // 2, True), (tile.full, columns, False), (after, columns // 2, True)):
        for start in range(part.start, part.stop, size):
            yield Range(start, min(start + size, part.stop)), masked


def _by_head(q: Tensor, *others: Tensor) -> list[Tensor]:
    """``[batch, heads, tokens, head_dim]`` in the dtype of the arithmetic; keys and values for every query head."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return [repeat(x.to(dtype), "b s h d -> b (h g) s d", g=q.shape[2] // x.shape[2]) for x in (q, *others)]


def _rounded(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).to(x.dtype)
