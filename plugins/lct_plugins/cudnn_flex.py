"""cuDNN's FlexAttention: any plan in one launch, forward and backward, from intervals of keys for every query.

The API is experimental in cuDNN's frontend (written against 1.32.0). It was not yet run on a GPU: it is opt-in until
measured.
"""

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lct_core import AttentionPlan, Kernel, KernelRequest, KernelSpec
from lct_plugins._limits import cute_limits

_LEAST = (1, 29)  # the first frontend with Hopper's kernels


def cudnn_flex(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """One launch for all queries, heads and entries of the batch."""
    from cudnn.flex_attention import flex_attn_func

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    mask = _mask_plan(plan, len(q), q.shape[2], k.shape[2], q.shape[3], q.dtype, q.device, grad)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flex_attn_func(q, k, v, mask_plan=mask, softmax_scale=scale, deterministic=deterministic)


def intervals(plan: AttentionPlan) -> Int[Tensor, "ends queries"]:
    """The keys that each query sees as cuDNN takes them: ``[0, e0) ∪ [e1, e2) ∪ ...``, an odd number of ends.

    Keys that start at 0, a scene's own prefix, need one end; scenes side by side three; a history with gaps more.
    """
    ends = [[end for r in keys for end in r] for _, keys in plan.segments]
    ends = [own[1:] if own[0] == 0 else [0, *own] for own in ends]
    most = max(map(len, ends))
    table = torch.tensor([own + [own[-1]] * (most - len(own)) for own in ends], dtype=torch.int32)
    return table.repeat_interleave(torch.tensor([q.size for q, _ in plan.segments]), dim=0).T


@lru_cache(maxsize=8)
def _mask_plan(
    plan: AttentionPlan,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    grad: bool,
) -> Any:
    from cudnn.flex_attention import create_mask_plan

    def like(tokens: int, heads: int) -> Tensor:  # what is asked of these is shape, dtype and device
        return torch.empty(head_dim, dtype=dtype, device=device).expand(batch, tokens, heads, head_dim)

    keys = like(plan.keys, kv_heads)
    return create_mask_plan(
        intervals(plan).repeat(1, batch)[None].contiguous().to(device),
        like(plan.queries, heads),
        keys,
        keys,
        build_backward=grad,
    )


def _load() -> Kernel:
    return cudnn_flex


def _refusals(request: KernelRequest) -> list[str]:
    reasons = []
    try:
        found = version("nvidia-cudnn-frontend")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or tuple(map(int, found.split(".")[:2])) < _LEAST:
        reasons.append(
            f"nvidia-cudnn-frontend: found {found}, expected {'.'.join(map(str, _LEAST))} or later; "
            "pip install nvidia-cudnn-frontend"
        )
    return reasons + cute_limits(request)


SPEC = KernelSpec(
    name="cudnn-flex",
    summary="cuDNN's FlexAttention on intervals, one launch for any plan; opt-in, not yet measured",
    load=_load,
    refusals=_refusals,
)
