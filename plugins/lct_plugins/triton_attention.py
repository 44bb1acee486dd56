"""Our own Triton kernel: any plan in which every query sees one interval of keys, forward and backward.

Context-causal attention of ragged shots, packed scenes and a shot behind its history are one launch forward and three
backward, without a dense mask and without atomics. Queries are cut into tiles per scene, not per shot: packed or alone,
a scene has the same tiles and so the same bits. A table made once for each plan tells every tile which keys it walks
and which of these all of its queries see, and there the kernel has no mask at all. Heavy tiles run first, those of one
head side by side.

Arithmetic: products of the inputs' dtype accumulated in float32, softmax in float32 (FlashAttention-2, Dao, arXiv
2307.08691). :mod:`lct_plugins.triton_naive` is the same algorithm in plain torch, and the specification.

Triton's interpreter (``TRITON_INTERPRET=1``, which Triton reads when the kernels are defined) runs the kernels on a CPU
in float32 and float16.
"""

import importlib.util
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, pairwise
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lct_core import AttentionPlan, Kernel, KernelRequest, KernelSpec
from lct_core.layout import Range
from lct_core.plan import Segment

Direction = Literal["forward", "queries backward", "keys backward"]

_HEAD_DIMS = (16, 32, 64, 128)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ROOMY = ("sm_80", "sm_90", "sm_100", "sm_103")  # 160 KB of shared memory or more
_LARGEST_STRIDE = 2**23  # of tokens: the offsets within a tile, of at most 128, then fit int32


class Tiling(NamedTuple):
    """How a kernel is launched.

    Args:
        rows: Tokens of a program's own.
        columns: Tokens of a chunk that it walks over.
        warps: Warps of a program.
        stages: Chunks in flight.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them. Fused multiply-adds are asked for: its default is to change."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }


#: Launches in half precision by (head_dim, direction). Starting points, of the sizes that FlexAttention and Triton's
#: tutorial take on Hopper, of which those were kept that compile for sm_90 with hardly a register spilled. NOT
#: measured yet; ``benchmarks/tiles.py`` tries others.
TILES: dict[tuple[int, Direction], Tiling] = {
    (16, "forward"): Tiling(64, 64, 4, 3),
    (16, "queries backward"): Tiling(64, 64, 4, 3),
    (16, "keys backward"): Tiling(64, 64, 4, 3),
    (32, "forward"): Tiling(64, 64, 4, 3),
    (32, "queries backward"): Tiling(64, 64, 4, 3),
    (32, "keys backward"): Tiling(64, 64, 4, 3),
    (64, "forward"): Tiling(128, 128, 8, 3),
    (64, "queries backward"): Tiling(128, 64, 8, 3),
    (64, "keys backward"): Tiling(128, 64, 8, 3),
    (128, "forward"): Tiling(128, 64, 8, 3),
    (128, "queries backward"): Tiling(128, 64, 8, 3),
    (128, "keys backward"): Tiling(128, 64, 8, 3),
}

#: Launches in float32, which no tensor core multiplies exactly.
FLOAT32_TILES = Tiling(32, 32, 8, 2)


class Tile(NamedTuple):
    """What one program does.

    Args:
        own: Its tokens: queries, or keys for their gradients.
        seen: From the first to the last token of the other kind that any of ``own`` attends to or is attended by.
        full: Whole chunks, counted from ``seen.start``, in which all of ``own`` do; there is no mask.
    """

    own: Range
    seen: Range
    full: Range


def query_tiles(plan: AttentionPlan, rows: int, columns: int) -> list[Tile]:
    """Tiles of queries and the keys they see, heaviest first.

    They are cut anew only between segments that share no key, such as two scenes: no tile reads a key that none of its
    queries sees.
    """
    tiles = []
    for run in _sharing_keys(plan):
        for own in _cut(run[0].queries.start, run[-1].queries.stop, rows):
            keys = [k for q, (k,) in run if q.start < own.stop and own.start < q.stop]
            seen = Range(min(k.start for k in keys), max(k.stop for k in keys))
            common = Range(max(k.start for k in keys), min(k.stop for k in keys))
            tiles.append(Tile(own, seen, _whole_chunks(common, seen, columns)))
    return sorted(tiles, key=lambda tile: -tile.seen.size)


def key_tiles(plan: AttentionPlan, rows: int, columns: int) -> list[Tile]:
    """Tiles of keys and the queries that see them, heaviest first; ``seen`` is empty for keys that nobody sees.

    They are cut anew only where no query sees both sides, such as between two scenes.
    """
    tiles = []
    for together in _seen_together(plan):
        for own in _cut(*together, rows):
            seeing = [q for q, (k,) in plan.segments if k.start < own.stop and own.start < k.stop]
            seen = Range(seeing[0].start, seeing[-1].stop) if seeing else Range(0, 0)
            by_all = groupby(plan.segments, key=lambda s: s.keys[0].start <= own.start and own.stop <= s.keys[0].stop)
            runs = [[q for q, _ in run] for whole, run in by_all if whole]
            common = max((Range(run[0].start, run[-1].stop) for run in runs), key=lambda r: r.size, default=Range(0, 0))
            tiles.append(Tile(own, seen, _whole_chunks(common, seen, columns)))
    return sorted(tiles, key=lambda tile: -tile.seen.size)


def triton_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Attention over a plan of one key interval per query, in one launch; differentiable once."""
    return _Attention.apply(q, k, v, plan, scale)


def triton_attention_lse(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores, without gradients: what merging with other keys' attention needs.

    Args:
        q: ``[batch, queries, heads, head_dim]``.
        k: ``[batch, keys, kv_heads, head_dim]``.
        v: Like ``k``.
        plan: One key interval per query.
        scale: Factor on the scores.

    Returns:
        The output like ``q``, and the natural logarithm of the summed exponentials, float32
        ``[batch, heads, queries]``.
    """
    if scale < 0:  # the kernel takes the largest score before it scales it
        return triton_attention_lse(-q, k, v, plan, -scale)
    q, k, v = (_addressable(x) for x in (q, k, v))
    batch, queries, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    tiling = _tiling(q, "forward")
    tiles = _table(plan, q.device, "forward", tiling.rows, tiling.columns)
    with torch.cuda.device_of(q):
        _kernels().forward[len(tiles), batch * heads](
            q, k, v, out, lse, tiles, *intervals(plan, q.device), scale, queries, heads,
            **_strides(q=q, k=k, v=v), GROUP=heads // k.shape[2], HEAD_DIM=head_dim, **tiling.options,
        )  # fmt: skip
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        out, lse = triton_attention_lse(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        for_q, *for_kv = ctx.needs_input_grad[:3]
        dq, dk, dv = _backward(q, k, v, out, lse, dout, ctx.plan, ctx.scale, for_q=for_q, for_kv=any(for_kv))
        return dq, dk, dv, None, None


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    plan: AttentionPlan,
    scale: float,
    *,
    for_q: bool,
    for_kv: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    q, k, v, dout = (_addressable(x) for x in (q, k, v, dout))
    (batch, queries, heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
    delta = torch.empty_like(lse)
    dq = q.new_empty(q.shape) if for_q else None
    dk, dv = (k.new_empty(k.shape), v.new_empty(v.shape)) if for_kv else (None, None)
    shape = {"GROUP": heads // kv_heads, "HEAD_DIM": head_dim}
    strides = _strides(q=q, k=k, v=v, dout=dout)
    with torch.cuda.device_of(q):
        _kernels().row_sums[-(-queries // 64), batch * heads](
            out, dout, delta, queries, heads, **_strides(dout=dout), HEAD_DIM=head_dim, ROWS=64, enable_fp_fusion=True
        )
        if for_q:
            tiling = _tiling(q, "queries backward")
            tiles = _table(plan, q.device, "queries backward", tiling.rows, tiling.columns)
            _kernels().queries_backward[len(tiles), batch * heads](
                q, k, v, dout, lse, delta, dq, tiles, *intervals(plan, q.device), scale, queries, heads,
                **strides, **shape, **tiling.options,
            )  # fmt: skip
        if for_kv:
            tiling = _tiling(q, "keys backward")
            tiles = _table(plan, q.device, "keys backward", tiling.rows, tiling.columns)
            _kernels().keys_backward[len(tiles), batch * kv_heads](
                q, k, v, dout, lse, delta, dk, dv, tiles, *intervals(plan, q.device), scale, queries, keys, kv_heads,
                **strides, **shape, **tiling.options,
            )  # fmt: skip
    return dq, dk, dv


def _sharing_keys(plan: AttentionPlan) -> Iterator[list[Segment]]:
    """Runs of segments each of which sees some key that the one before it sees."""
    run: list[Segment] = []
    for segment in plan.segments:
        if run:
            (before,), (after,) = run[-1].keys, segment.keys
            if after.start >= before.stop or before.start >= after.stop:
                yield run
                run = []
        run.append(segment)
    yield run


def _seen_together(plan: AttentionPlan) -> Iterator[Range]:
    """The key space, cut wherever key intervals end and none goes on, and around keys that nobody sees."""
    end, cuts = 0, {0, plan.keys}
    for start, stop in sorted(keys for _, (keys,) in plan.segments):
        if start >= end:
            cuts |= {end, start}
        end = max(end, stop)
    return (Range(*cut) for cut in pairwise(sorted(cuts | {end})))


def _cut(start: int, stop: int, size: int) -> Iterator[Range]:
    return (Range(i, min(i + size, stop)) for i in range(start, stop, size))


def _whole_chunks(common: Range, seen: Range, size: int) -> Range:
    """The chunks, counted from the start of ``seen``, that lie in ``common``; an empty range there if none does."""
    start = seen.start + -(-(common.start - seen.start) // size) * size
    stop = start + (common.stop - start) // size * size
    return Range(start, stop) if start < stop else Range(seen.start, seen.start)


@lru_cache(maxsize=32)
def _table(plan: AttentionPlan, device: torch.device, direction: Direction, rows: int, columns: int) -> Tensor:
    """The tiles as the kernels read them: int32 ``[tiles, 6]``."""
    tiles = (key_tiles if direction == "keys backward" else query_tiles)(plan, rows, columns)
    numbers = [[*tile.own, *tile.seen, *tile.full] for tile in tiles]
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@lru_cache(maxsize=32)
def intervals(plan: AttentionPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where every query's keys start and stop: int32 ``[queries]`` each."""
    sizes = torch.tensor([q.size for q, _ in plan.segments], device=device)
    # two allocations: were stops a view behind starts, whether they are aligned, for which Triton compiles a kernel
    # of its own, would depend on the number of queries
    starts, stops = (
        torch.tensor(ends, dtype=torch.int32, device=device).repeat_interleave(sizes, output_size=plan.queries)
        for ends in zip(*(keys for _, (keys,) in plan.segments), strict=True)
    )
    return starts, stops


def _tiling(q: Tensor, direction: Direction) -> Tiling:
    return FLOAT32_TILES if q.dtype == torch.float32 else TILES[q.shape[3], direction]


def _addressable(x: Tensor) -> Tensor:
    """As the kernels read it: channels side by side, tokens not so far apart that a tile's offsets pass int32."""
    return x if x.stride(3) == 1 and x.stride(1) < _LARGEST_STRIDE else x.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    axes = ("batch", "token", "head")
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(axes)}


def _kernels() -> ModuleType:
    import lct_plugins._triton_kernels as kernels

    return kernels


def _load() -> Kernel:
    _kernels()
    return triton_attention


def _refusals(request: KernelRequest) -> list[str]:
    reasons = []
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        reasons.append("no triton: it comes with torch's CUDA builds; install it")
    hardware = request.hardware
    if interpreted:
        if request.dtype == torch.bfloat16:
            reasons.append("dtype torch.bfloat16: Triton's interpreter multiplies it wrongly; use float32 or float16")
    elif request.device.type != "cuda":
        reasons.append(
            f"device {request.device.type}: expected cuda, or Triton's interpreter (TRITON_INTERPRET=1 at the start)"
        )
    elif not hardware.startswith("sm_") or int(hardware[3:]) < 80:
        reasons.append(f"hardware {hardware}: expected an NVIDIA GPU of sm_80 or later; use sdpa")
    elif request.head_dim == 128 and hardware not in _ROOMY:
        reasons.append(
            f"hardware {hardware}: expected one of {', '.join(_ROOMY)} for the shared memory that head_dim 128 takes; "
            "use sdpa"
        )
    if request.dtype not in _DTYPES:
        reasons.append(f"dtype {request.dtype}: expected float32, float16 or bfloat16; cast q, k and v or use sdpa")
    if request.head_dim not in _HEAD_DIMS:
        reasons.append(f"head_dim {request.head_dim}: expected one of {_HEAD_DIMS}; use sdpa")
    if request.plan.form == "gathered":
        reasons.append(
            "gathered plan: expected one interval of keys for every query, and some query sees several; use sdpa"
        )
    return reasons


SPEC = KernelSpec(
    name="triton",
    summary="our own: one key interval per query, no mask in full tiles; forward and backward",
    load=_load,
    refusals=_refusals,
)
