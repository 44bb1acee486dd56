"""FlexAttention: one compiled kernel for any plan, on a block mask built from the plan's ranges.

Dong et al., arXiv 2412.05496. Always compiled: uncompiled FlexAttention materialises the scores. The mask is made once
for each plan and device. On a CPU it is compiled for inference only.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lct_core import AttentionPlan, Kernel, KernelRequest, KernelSpec

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def flex(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """FlexAttention over the plan's block mask."""
    with _many_shapes():
        out = _compiled(q.device.type)(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            block_mask=_block_mask(plan, q.device),
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return out.transpose(1, 2)


@cache
def _compiled(device_type: str) -> Callable[..., Tensor]:
    """Compiled whole: torch then raises where it would run uncompiled. On a CPU it has no dynamic shapes for it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False if device_type == "cpu" else None)


def _many_shapes() -> AbstractContextManager[None]:
    """Room for as many compiled shapes as torch allows in all, not for its default of eight."""
    from torch._dynamo import config

    return config.patch(recompile_limit=config.accumulated_recompile_limit)


@lru_cache(maxsize=8)
def _block_mask(plan: AttentionPlan, device: torch.device) -> "BlockMask":
    return plan.block_mask(device=device)


def _load() -> Kernel:
    return flex


def _refusals(request: KernelRequest) -> list[str]:
    reasons = []
    if request.device.type not in ("cpu", "cuda"):
        reasons.append(f"device {request.device.type}: compiled FlexAttention runs on cpu and cuda")
    compiler = os.environ.get("CXX", "g++")
    if request.device.type == "cpu" and shutil.which(compiler) is None:
        reasons.append(
            f"no C++ compiler {compiler!r}: torch compiles FlexAttention with one on a cpu; install it or set CXX"
        )
    if request.device.type == "cpu" and request.grad:
        reasons.append("gradients on a cpu: FlexAttention is compiled for inference only there")
    if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"dtype {request.dtype}: expected float32, float16 or bfloat16")
    if request.head_dim < 16:
        reasons.append(f"head_dim {request.head_dim}: expected at least 16")
    return reasons


SPEC = KernelSpec(
    name="flex",
    summary="compiled FlexAttention on a block mask built from ranges; compiles for each new shape",
    load=_load,
    refusals=_refusals,
)
