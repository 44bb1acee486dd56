"""What kernels for half precision on NVIDIA GPUs refuse alike."""

import torch

from lct_core import KernelRequest


def limits(request: KernelRequest, *, hardware: str, head_dim: str, runs: bool, fits: bool) -> list[str]:
    """Refusals of a request's hardware, dtype and head_dim.

    Args:
        request: The request.
        hardware: What the kernel runs on, in words.
        head_dim: What it takes, in words.
        runs: Whether it runs on the request's hardware.
        fits: Whether it takes the request's head_dim.
    """
    reasons = []
    if not runs:
        reasons.append(f"hardware {request.hardware}: expected {hardware}; use sdpa")
    if request.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {request.dtype}: expected float16 or bfloat16; cast q, k and v or use sdpa")
    if not fits:
        reasons.append(f"head_dim {request.head_dim}: expected {head_dim}; use sdpa")
    return reasons


def cute_limits(request: KernelRequest) -> list[str]:
    """Refusals of kernels written in CuTe, which run on Hopper and on the Blackwell of data centres."""
    served = ("sm_90", "sm_100", "sm_103")
    return limits(
        request,
        hardware=f"one of {', '.join(served)}",
        head_dim="a multiple of 8, up to 128",
        runs=request.hardware in served,
        fits=request.head_dim % 8 == 0 and 8 <= request.head_dim <= 128,
    )
