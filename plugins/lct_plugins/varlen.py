"""Attention over a plan by flash-attention's variable-length kernels, whoever provides them.

Forward, a plan is one launch: a dense call where there is one segment, else one sequence for each. A sequence's keys
start at its entry of ``cu_seqlens_k`` and are as many as its entry of ``seqused_k``, so the key ranges of different
sequences may overlap and nothing is copied; only ranges with gaps are gathered, segment by segment in dense calls where
all of them together would be more than twice the key space. No library documents the overlap: tests marked ``gpu`` pin
it. A kernel may read whole tiles, of which what lies behind a sequence's end gets weight 0: it cannot change the output
while it is finite.

Backward, kernels store the gradients of keys and values and do not add to what is there, so overlapping sequences
would race. Instead the plan runs as rounds of rectangles (:mod:`lct_core.rectangles`), one launch each, with the output
and the log-sum-exp of the whole softmax; their shares are added up in float32. A round is a variable-length call, in
which gaps are sequences without keys or without queries, or a dense call where it is a single rectangle.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lct_core.layout import Range
from lct_core.plan import AttentionPlan
from lct_core.plugins.torch_kernels import gather
from lct_core.rectangles import Rectangle, Round, by_segment, log_depth

_LONG_SHOT = 4096  # tokens from which on a launch for every shot is thought to pay: modelled, not yet measured
_MOST_GATHERED = 2  # times the key space that are gathered at once (ours): copies for all segments grow with the square
_PLANS = 32  # whose tables are kept


class Sequences(NamedTuple):
    """Where the sequences of a packed call lie; int32, on the device of the tensors.

    Sequence ``i`` has the queries ``cu_seqlens_q[i] : cu_seqlens_q[i + 1]``, and the keys from ``cu_seqlens_k[i]`` on:
    ``seqused_k[i]`` of them, or without it those up to ``cu_seqlens_k[i + 1]``.
    """

    cu_seqlens_q: Int[Tensor, " sequences+1"]
    cu_seqlens_k: Int[Tensor, " sequences+1"]
    seqused_k: Int[Tensor, " sequences"] | None
    max_seqlen_q: int
    max_seqlen_k: int


def packed(sequences: Sequences | None) -> dict[str, Any]:
    """The sequences as arguments of a packed call, none of a dense one."""
    return {} if sequences is None else sequences._asdict()


class Provider(NamedTuple):
    """Two functions of a flash-attention library, for packed and for dense calls.

    Packed, with ``sequences``: tensors are ``[tokens, heads, head_dim]`` and the log-sum-exp is ``[heads, tokens]``.
    Dense, where ``sequences`` is None: ``[batch, tokens, heads, head_dim]`` and ``[batch, heads, tokens]``, all queries
    of an entry see all its keys. Keys and values may have fewer heads. Every last axis has stride 1, the others any
    stride; the log-sum-exp is contiguous.

    Args:
        forward: ``forward(q, k, v, sequences, scale) -> (out, lse)``; the log-sum-exp of the scaled scores is float32
            at least. Honours ``seqused_k``.
        backward: ``backward(dout, q, k, v, out, lse, sequences, scale) -> (dq, dk, dv)``. Called without
            ``seqused_k``, with sequences that may lack queries or keys; what it returns for these is not read.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Sequences | None, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, *, provider: Provider) -> Tensor:
    """Attention over any plan, with gradients, by a provider's kernels.

    Shapes are those of :func:`lct_core.attend`; the arithmetic is the provider's, gradients are added up in float32 at
    least.
    """
    if scale < 0:  # kernels take the largest score before they scale it
        q, scale = -q, -scale
    out: Tensor = _Attention.apply(q, k, v, plan, scale, provider)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, provider: Provider
    ) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if plan.form != "dense":  # packing the batch is a view wherever possible, and from here on it always is
            q, k, v = (x.flatten(0, 1).unflatten(0, x.shape[:2]) for x in (q, k, v))
        out, lse = _forward(q, k, v, plan, scale, provider)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.provider = plan, scale, provider
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        schedule = _schedule(ctx.plan, q.shape[0], q.device)
        if schedule.complete:
            shares = _shares(schedule.launches[0], dout, q, k, v, out, lse, ctx.scale, ctx.provider)
            return *(share.view(x.shape) for share, x in zip(shares, (q, k, v), strict=True)), None, None, None
        wide = torch.promote_types(q.dtype, torch.float32)
        of = (0, 1, 1)  # the axis of a rectangle that each gradient lies along
        totals = [
            _buffer(x, wide, alone=schedule.alone[axis], seen=schedule.seen[axis]) if need else None
            for x, axis, need in zip((q, k, v), of, ctx.needs_input_grad[:3], strict=True)
        ]
        for launch in schedule.launches:
            shares = _shares(launch, dout, q, k, v, out, lse, ctx.scale, ctx.provider)
            for total, share, axis in zip(totals, shares, of, strict=True):
                if total is not None:
                    _put(total, share, launch, axis, alone=schedule.alone[axis])
            del shares  # before the next launch makes its own
        return *(None if total is None else total.to(q.dtype) for total in totals), None, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, provider: Provider
) -> tuple[Tensor, Tensor]:
    """The output, like q, and the log-sum-exp, ``[batch, heads, queries]``."""
    gathered = sum(segment.num_keys for segment in plan.segments) if plan.form == "gathered" else 0
    if len(plan.segments) == 1 or gathered > _MOST_GATHERED * plan.keys:
        calls = [
            provider.forward(q[:, queries.slice], gather(k, keys), gather(v, keys), None, scale)
            for queries, keys in plan.segments
        ]
        outputs, sums = zip(*calls, strict=True)
        return calls[0] if len(calls) == 1 else (torch.cat(outputs, dim=1), torch.cat(sums, dim=2))
    batch = q.shape[0]
    index, sequences = _one_launch(plan, batch, q.device)
    if index is not None:
        k, v = k.index_select(1, index), v.index_select(1, index)
    out, lse = provider.forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), sequences, scale)
    return out.unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1)


@lru_cache(maxsize=_PLANS)
def _one_launch(plan: AttentionPlan, batch: int, device: torch.device) -> tuple[Tensor | None, Sequences]:
    """The keys to gather, where there are gaps, and the sequences of a batch that is packed entry after entry."""
    one = plan.varlen()
    keys = plan.keys if one.key_index is None else len(one.key_index)
    entry = torch.arange(batch, dtype=torch.int32)[:, None]
    tables = (
        # the last entry of cu_seqlens_k is not read: seqused_k has the lengths
        F.pad((one.cu_seqlens_q[:-1] + entry * plan.queries).flatten(), (0, 1), value=batch * plan.queries),
        F.pad((one.cu_seqlens_k[:-1] + entry * keys).flatten(), (0, 1), value=batch * keys),
        one.seqused_k.repeat(batch),
    )
    cu_q, cu_k, used = torch.cat(tables).to(device).split([len(table) for table in tables])  # sent at once
    sequences = Sequences(cu_q, cu_k, used, one.max_seqlen_q, one.max_seqlen_k)
    return None if one.key_index is None else one.key_index.to(device), sequences


class _Launch(NamedTuple):
    """One round of rectangles: the spans from its first query and key to its last, and how it lies in them.

    Without ``sequences`` it is one rectangle, in every entry of the batch. With them, it is the rectangles of all
    entries, which are packed one after the other.
    """

    queries: Range
    keys: Range
    rectangles: Round
    sequences: Sequences | None


class _Schedule(NamedTuple):
    """The launches of a plan's backward pass.

    ``complete``: they are one, which leaves out no key. ``alone``: whether no query, and no key, is in two rectangles;
    ``seen``: whether, where none is, each of them is in one.
    """

    launches: tuple[_Launch, ...]
    complete: bool
    alone: tuple[bool, bool]
    seen: tuple[bool, bool]


@lru_cache(maxsize=_PLANS)
def _schedule(plan: AttentionPlan, batch: int, device: torch.device) -> _Schedule:
    long = plan.queries >= _LONG_SHOT * len(plan.segments)
    rounds = by_segment(plan) if long else log_depth(plan)
    queries, keys = (sum(r[axis].size for one in rounds for r in one) for axis in (0, 1))
    return _Schedule(
        tuple(_launch(one, plan, batch, device) for one in rounds),
        complete=len(rounds) == 1 and keys == plan.keys,
        alone=(queries == plan.queries, plan.form in ("dense", "packed")),  # every query sees some key
        seen=(True, keys == plan.keys),
    )


def _launch(rectangles: Round, plan: AttentionPlan, batch: int, device: torch.device) -> _Launch:
    if len(rectangles) == 1:
        return _Launch(*rectangles[0], rectangles, None)
    packed = tuple(
        Rectangle(_moved(queries, entry * plan.queries), _moved(keys, entry * plan.keys))
        for entry in range(batch)
        for queries, keys in rectangles
    )
    sizes = []
    end = packed[0].queries.start, packed[0].keys.start
    for queries, keys in packed:
        gaps = (queries.start - end[0], 0), (0, keys.start - end[1])
        sizes += [gap for gap in gaps if any(gap)] + [(queries.size, keys.size)]
        end = queries.stop, keys.stop
    of_queries, of_keys = zip(*sizes, strict=True)
    ends = [[*accumulate(of, initial=0)] for of in (of_queries, of_keys)]
    cu_q, cu_k = torch.tensor(ends, dtype=torch.int32, device=device)  # sent at once
    return _Launch(
        Range(packed[0].queries.start, end[0]),
        Range(packed[0].keys.start, end[1]),
        packed,
        Sequences(cu_q, cu_k, None, max(of_queries), max(of_keys)),
    )


def _moved(tokens: Range, by: int) -> Range:
    return Range(tokens.start + by, tokens.stop + by)


def _shares(
    launch: _Launch,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    provider: Provider,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a launch gives to the gradients of its spans."""
    if launch.sequences is not None:
        dout, q, k, v, out = (x.flatten(0, 1) for x in (dout, q, k, v, out))
        lse = lse.transpose(0, 1).flatten(1)
    dout, q, out = (_part(x, launch, launch.queries) for x in (dout, q, out))
    k, v = (_part(x, launch, launch.keys) for x in (k, v))
    lse = lse[..., launch.queries.slice].contiguous()
    return provider.backward(dout, q, k, v, out, lse, launch.sequences, scale)


def _part(x: Tensor, launch: _Launch, tokens: Range) -> Tensor:
    """Some tokens of a tensor: a view."""
    return x.narrow(1 if launch.sequences is None else 0, tokens.start, tokens.size)


def _buffer(x: Tensor, wide: torch.dtype, *, alone: bool, seen: bool) -> Tensor:
    """What shares of the gradient of a tensor are added up in, or, where each stands alone, copied to."""
    if not alone:
        return x.new_zeros(x.shape, dtype=wide)
    return x.new_empty(x.shape) if seen else x.new_zeros(x.shape)


def _put(total: Tensor, share: Tensor, launch: _Launch, axis: int, *, alone: bool) -> None:
    """Bring a launch's share into a gradient: its rectangles, and nothing of what the kernel left between them."""
    start = (launch.queries, launch.keys)[axis].start
    whole = total if launch.sequences is None else total.flatten(0, 1)
    for rectangle in launch.rectangles:
        tokens = rectangle[axis]
        here = _part(whole, launch, tokens)
        (here.copy_ if alone else here.add_)(_part(share, launch, _moved(tokens, -start)))
