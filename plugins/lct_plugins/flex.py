"""FlexAttention: one compiled kernel for any plan, on a block mask built from the plan's ranges.

Dong et al., arXiv 2412.05496. Always compiled: uncompiled FlexAttention materialises the scores. The mask is made once
for each plan, device and block size. On a CPU it is compiled for inference only.

``flex`` is torch's own backend, Triton's on a GPU. ``flex-flash`` has the same masks run by FlashAttention-4. That one
was not yet run on a GPU: it is opt-in until measured.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lct_core import AttentionPlan, Kernel, KernelRequest, KernelSpec
from lct_plugins.flash4 import refusals as flash4_refusals

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_LAST = 2**31 - 1  # what an int32 offset reaches


def flex(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """FlexAttention over the plan's block mask, by torch's own backend."""
    return _run(q, k, v, plan, scale, (128, 128), "AUTO")


def flex_flash(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """FlexAttention over the plan's block mask, by FlashAttention-4."""
    block = _flash_block(torch.cuda.get_device_capability(q.device)[0], q.shape[-1])
    return _run(q, k, v, plan, scale, block, "FLASH")


def _flash_block(major: int, head_dim: int) -> tuple[int, int]:
    """Queries and keys of a block of the mask, multiples of the tiles that FlashAttention-4 prefers.

    On Hopper 192 queries forward where heads are small, unless the blocks do not allow it, and 128 or 64 backward; on
    Blackwell two tiles of 128 forward. From its ``flash_attn.cute.interface`` (4.0.0b36).
    """
    if major == 9:
        return (384, 128) if head_dim <= 96 else (128, 128)
    return (256, 128)


def _run(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, block: tuple[int, int], backend: str
) -> Tensor:
    if len(q) > 1 and max(q.numel(), k.numel()) > _LAST:
        entries = zip(q.split(1), k.split(1), v.split(1), strict=True)
        return torch.cat([_run(*entry, plan, scale, block, backend) for entry in entries])
    q, k, v = (x if _reach(x) <= _LAST else x.contiguous() for x in (q, k, v))
    with _many_shapes():
        out = _compiled(None if backend == "AUTO" and q.device.type == "cuda" else False)(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            block_mask=_block_mask(plan, q.device, block),
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
            kernel_options={"BACKEND": backend},
        )
    return out.transpose(1, 2)


def _reach(x: Tensor) -> int:
    """The largest offset of an element: more than its size where it is a view, of fused projections or of a cache."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


@cache
def _compiled(dynamic: bool | None) -> Callable[..., Tensor]:
    """Compiled whole: torch then raises where it would run uncompiled. Only its Triton backend has dynamic shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=dynamic)


def _many_shapes() -> AbstractContextManager[None]:
    """Room for as many compiled shapes as torch allows in all, not for its default of eight."""
    from torch._dynamo import config

    return config.patch(recompile_limit=config.accumulated_recompile_limit)


@lru_cache(maxsize=8)
def _block_mask(plan: AttentionPlan, device: torch.device, block_size: tuple[int, int]) -> "BlockMask":
    """The mask, always with the plan itself as its ``mask_mod``: FLASH drops a mask whose own is trivial."""
    return plan.block_mask(block_size=block_size, device=device)


def _load() -> Kernel:
    return flex


def _load_flash() -> Kernel:
    return flex_flash


def _too_large(request: KernelRequest) -> list[str]:
    """Torch's templates had offsets in int32, at least backward (pytorch/pytorch#190857)."""
    plan = request.plan
    size = request.head_dim * max(plan.queries * request.heads, plan.keys * request.kv_heads)
    return [] if size <= _LAST else [f"q, k, v: {size} elements in one entry of the batch: expected at most {_LAST}"]


def _refusals(request: KernelRequest) -> list[str]:
    reasons = []
    if request.device.type not in ("cpu", "cuda"):
        reasons.append(f"device {request.device.type}: compiled FlexAttention runs on cpu and cuda")
    compiler = os.environ.get("CXX", "g++")
    if request.device.type == "cpu" and shutil.which(compiler) is None:
        reasons.append(
            f"no C++ compiler {compiler!r}: torch compiles FlexAttention with one on a cpu; install it or set CXX"
        )
    if request.device.type == "cuda" and find_spec("triton") is None:
        reasons.append("no package triton: torch compiles FlexAttention with it on a GPU; install it")
    if request.device.type == "cpu" and request.grad:
        reasons.append("gradients on a cpu: FlexAttention is compiled for inference only there")
    if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"dtype {request.dtype}: expected float32, float16 or bfloat16")
    if request.head_dim < 16:
        reasons.append(f"head_dim {request.head_dim}: expected at least 16")
    return reasons + _too_large(request)


def _flash_refusals(request: KernelRequest) -> list[str]:
    reasons = flash4_refusals(request)
    if request.grad and request.hardware == "sm_90" and request.head_dim <= 96:
        reasons.append(
            f"gradients of head_dim {request.head_dim} on sm_90: FlashAttention-4's were wrong there without a word on "
            "block-sparse masks (Dao-AILab/flash-attention#2623), and nobody measured a version that mends it; use flex"
        )
    return reasons + _too_large(request)


SPEC = KernelSpec(
    name="flex",
    summary="compiled FlexAttention on a block mask built from ranges; compiles for each new shape",
    load=_load,
    refusals=_refusals,
)

FLASH = KernelSpec(
    name="flex-flash",
    summary="FlexAttention run by FlashAttention-4; opt-in, not yet measured",
    load=_load_flash,
    refusals=_flash_refusals,
)
