"""xformers' memory-efficient attention, with the operators that its build has for the hardware.

Shots behind their prefixes are one launch forward, by keys with gaps; backward xformers has none for such keys. Grouped
heads it has forward only, as an experiment: keys and values are repeated for each of q's heads instead. Whether
a build has an operator at all is asked of xformers itself, and its own reasons are handed on. Read at 0.0.34 and
0.0.35. It was not yet run on a GPU.
"""

from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lct_core import AttentionPlan, Kernel, KernelRequest, KernelSpec


class Blocks(NamedTuple):
    """Blocks of queries side by side, and the keys of each.

    Args:
        queries: Number of queries of each block.
        starts: Where the keys of each block start, and behind them the size of the key space.
        keys: Number of keys of each block.
    """

    queries: list[int]
    starts: list[int]
    keys: list[int]


def xformers(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """One launch for each entry of the batch, for all of them where every query sees the same keys."""
    from xformers.ops import fmha

    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    operator, _ = _operator(
        _kind(plan), q.device, q.dtype, q.shape[-1], grad, torch.are_deterministic_algorithms_enabled()
    )
    if plan.form != "overlapping":
        index = _visible(plan, q.device)
        k, v = (x[:, index] if isinstance(index, slice) else x.index_select(1, index) for x in (k, v))
    if q.shape[2] != k.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    bias = _bias(plan, q.device)
    rows = [(q, k, v)] if bias is None else zip(q.split(1), k.split(1), v.split(1), strict=True)
    outputs = [fmha.memory_efficient_attention(*row, attn_bias=bias, scale=scale, op=operator) for row in rows]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def visible(plan: AttentionPlan) -> slice | Tensor:
    """The keys of all segments end to end: a slice where they lie so already, else places to gather."""
    ranges = [keys for _, segment in plan.segments for keys in segment]
    if all(a.stop == b.start for a, b in pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    return torch.cat([torch.arange(*keys) for keys in ranges])


def blocks(plan: AttentionPlan) -> Blocks:
    """The plan over its key space where key ranges overlap, else over what :func:`visible` picks."""
    sizes = [segment.num_keys for segment in plan.segments]
    if plan.form == "overlapping":
        starts = [*(keys[0].start for _, keys in plan.segments), plan.keys]
    else:
        starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return Blocks([queries.size for queries, _ in plan.segments], starts, sizes)


@lru_cache(maxsize=64)
def _visible(plan: AttentionPlan, device: torch.device) -> slice | Tensor:
    keys = visible(plan)
    return keys if isinstance(keys, slice) else keys.to(device)


def _kind(plan: AttentionPlan) -> str | None:
    """The class of xformers' that says who sees whom, None where all see the same keys."""
    if len(plan.segments) == 1:
        return None
    return "BlockDiagonalGappyKeysMask" if plan.form == "overlapping" else "BlockDiagonalMask"


@lru_cache(maxsize=64)
def _bias(plan: AttentionPlan, device: torch.device) -> Any:
    return _mask(_kind(plan), blocks(plan), device)


def _mask(kind: str | None, blocks: Blocks, device: torch.device) -> Any:
    from xformers.ops.fmha import attn_bias

    if kind is None:
        return None
    if kind == "BlockDiagonalMask":
        return attn_bias.BlockDiagonalMask.from_seqlens(blocks.queries, blocks.keys, device=device)
    return attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(
        blocks.queries, kv_seqstarts=blocks.starts, kv_seqlen=blocks.keys, device=device
    )


@lru_cache(maxsize=64)
def _operator(
    kind: str | None, device: torch.device, dtype: torch.dtype, head_dim: int, grad: bool, deterministic: bool
) -> tuple[tuple[Any, Any] | None, tuple[str, ...]]:
    """The first pair of operators, forward and backward, that serves a mask of a kind, or every one's reasons.

    ``deterministic`` is torch's own setting, which xformers reads for itself: here it is but a part of the key.
    """
    try:
        from xformers.ops import fmha
    except Exception as error:  # whatever a build for another torch, or a half-installed flash_attn, makes of it
        why = f"xformers cannot be imported: {type(error).__name__}: {error}"
        return None, (f"{why}; install a build for torch {torch.__version__}",)
    token = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    inputs = fmha.Inputs(token, token, token, attn_bias=_mask(kind, Blocks([1], [0, 1], [1]), device), scale=1.0)
    reasons = []
    for family in (fmha.flash3, fmha.flash, fmha.cutlass):
        operators = (family.FwOp, family.BwOp)
        refused = {op.NAME: op.not_supported_reasons(inputs) for op in (operators if grad else operators[:1])}
        if not any(refused.values()):
            return operators, ()
        reasons += [f"{name}: {', '.join(why)}" for name, why in refused.items() if why]
    return None, tuple(reasons)


def _load() -> Kernel:
    return xformers


def _refusals(request: KernelRequest) -> list[str]:
    reasons = []
    if find_spec("xformers") is None:
        reasons.append("no package xformers: pip install xformers")
    if request.device.type != "cuda":
        reasons.append(f"device {request.device.type}: expected cuda; use sdpa")
    if request.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {request.dtype}: expected float16 or bfloat16; cast q, k and v or use sdpa")
    if request.grad and request.plan.form == "overlapping":
        reasons.append(
            "gradients where key ranges overlap: xformers' backward takes no keys with gaps, and copies of every "
            "prefix would grow with the square of the shots; use sdpa or triton"
        )
    if not reasons:
        _, why = _operator(
            _kind(request.plan),
            request.device,
            request.dtype,
            request.head_dim,
            request.grad,
            torch.are_deterministic_algorithms_enabled(),
        )
        reasons += why
    return reasons


SPEC = KernelSpec(
    name="xformers",
    summary="xformers' memory-efficient attention, where its build has an operator; context-causal forward only",
    load=_load,
    refusals=_refusals,
)
