"""Rotation of queries and keys in one Triton kernel, together with what stands beside it.

``rotate_into`` reads every query or key once and writes it once, rotated, to its place in the packed row or in the slot
of a cache: no join, no copy, nothing in float32 in between. A scene model does so where it is asked to::

    model = retrofit(dit, rotary=lct_plugins.triton_rotary.rotate_into)

``norm_rotate`` also has the RMS norm before it. It is for adapters and models to call: an adapter hands its queries and
keys to the engine normed.

Neither has run on a GPU yet, so that nothing chooses them by itself. Triton's interpreter (``TRITON_INTERPRET=1``,
which Triton reads when kernels are defined) runs them on a CPU; its casts to bfloat16 cut where they should round.
"""

import importlib.util
import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lct_core.rope import Rotation, check_into, rotate

Tokens = Float[Tensor, "batch tokens heads head_dim"]


def rotate_into(x: Tokens, by: Rotation, out: Tokens) -> None:
    """As :func:`lct_core.rope.rotate_into`, with the same roundings, in one kernel.

    Raises:
        ValueError: for tensors that do not fit each other, and where there is no GPU or no Triton.
    """
    _turn(x, by, out)


def norm_rotate(
    x: Tokens,
    by: Rotation,
    weight: Float[Tensor, "*heads head_dim"] | None = None,
    *,
    eps: float,
    across_heads: bool = False,
) -> Tokens:
    """The RMS norm of queries or keys, then their rotation, in one pass forward; rounded once, at the end.

    What :func:`naive_norm_rotate` gives, with gradients for ``x`` and ``weight``. For adapters and models to call: the
    engine, whose queries and keys come normed, never does.

    Args:
        x: Queries or keys, with any strides.
        by: A rotation for every token; without gradients.
        weight: Of the norm: ``[head_dim]``, or ``[heads, head_dim]`` where every head has its own (default: none).
        eps: Added to the mean of squares.
        across_heads: Whether the mean is over all heads of a token (default: over each by itself).

    Raises:
        ValueError: as :func:`rotate_into`, for a weight of another shape, and for angles that want gradients.
    """
    if weight is not None and weight.shape not in (x.shape[3:], x.shape[2:]):
        raise ValueError(
            f"weight: got {list(weight.shape)}, expected {list(x.shape[3:])}, or {list(x.shape[2:])} where every head "
            "has its own"
        )
    if by.cos.requires_grad or by.sin.requires_grad:
        raise ValueError("by: its angles want gradients, which there are none for; detach them")
    out: Tensor = _NormRotate.apply(x, weight, by, eps, across_heads)
    return out


def naive_norm_rotate(
    x: Tokens,
    by: Rotation,
    weight: Float[Tensor, "*heads head_dim"] | None = None,
    *,
    eps: float,
    across_heads: bool = False,
) -> Tokens:
    """The definition of :func:`norm_rotate`: in the rotation's precision or that of ``x``, whichever is finer."""
    normed, _ = _norm(_exact(x, by), eps, across_heads)
    return rotate(normed if weight is None else normed * weight, by).to(x.dtype)


class _NormRotate(torch.autograd.Function):
    """Backward, the kernel turns the gradient back, and torch goes on through the norm in closed form.

    That sums the gradient of the weight in a fixed order, where a kernel for all of it would need atomics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, by: Rotation, eps: float, across_heads: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by, ctx.norm = by, (eps, across_heads)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _turn(x, by, out, weight, ctx.norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = _exact(grad, ctx.by)
        back = torch.empty_like(grad)
        _turn(grad, ctx.by._replace(sin=-ctx.by.sin), back)
        normed, scale = _norm(_exact(x, ctx.by), *ctx.norm)
        of_weight = None
        if weight is not None:
            of_weight = (back * normed).sum_to_size(weight.shape).to(weight.dtype)
            back *= weight
        mean = (back * normed).mean(_axes(ctx.norm[1]), keepdim=True)
        return ((back - normed * mean) * scale).to(x.dtype), of_weight, None, None, None


def _norm(x: Tensor, eps: float, across_heads: bool) -> tuple[Tensor, Tensor]:
    """The normed, and what they were multiplied by."""
    scale = (x.square().mean(_axes(across_heads), keepdim=True) + eps).rsqrt()
    return x * scale, scale


def _axes(across_heads: bool) -> tuple[int, ...]:
    return (-2, -1) if across_heads else (-1,)


def _exact(x: Tensor, by: Rotation) -> Tensor:
    return x.to(torch.promote_types(x.dtype, by.cos.dtype))


def _turn(
    x: Tensor, by: Rotation, out: Tensor, weight: Tensor | None = None, norm: tuple[float, bool] | None = None
) -> None:
    _check(x, by, out)
    if not x.numel():
        return
    import triton
    import triton.language as tl

    from lct_plugins._triton_rotary import turn

    (batch, tokens, heads, head_dim), pairs = x.shape, by.cos.shape[-1]
    shape = (tokens, heads, pairs)
    cos, sin = by.cos.expand(shape), by.sin.expand(shape)  # strides of 0 where one serves all heads
    tensors = x, cos, sin, x if weight is None else weight.expand(heads, head_dim), out
    eps, across_heads = norm or (0.0, False)
    rows, columns = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim)
    with torch.cuda.device_of(x):
        turn[tokens, batch](
            *tensors,
            eps,
            *(tuple(tensor.stride()) for tensor in tensors),
            HEADS=heads,
            HEAD_DIM=head_dim,
            PAIRS=pairs,
            DISTANCE=by.distance,
            ROWS=rows,
            COLUMNS=columns,
            NORM=norm is not None,
            WEIGHT=weight is not None,
            ACROSS=across_heads,
            EXACT=tl.float64 if torch.float64 in (x.dtype, cos.dtype) else tl.float32,
            num_warps=min(16, max(1, rows * columns // 512)),  # 16 elements of each thread: none spill
            enable_fp_fusion=False,  # rounds as torch does
        )


def _check(x: Tensor, by: Rotation, out: Tensor) -> None:
    check_into(x, by, out)
    if importlib.util.find_spec("triton") is None:
        raise ValueError("rotary: there is no triton; it comes with torch's CUDA builds: install it, or leave this out")
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"x: got a tensor on {x.device}, expected one on cuda, or Triton's interpreter (TRITON_INTERPRET=1 at the "
            "start); elsewhere leave this rotary out"
        )
    if any(tensor.stride(-1) * x.shape[-1] >= 2**31 for tensor in (x, out)):
        raise ValueError("x, out: one head spans 2^31 elements or more, expected its channels close together; copy it")
    devices = {tensor.device for tensor in (x, by.cos, by.sin, out)}
    if len(devices) > 1:
        raise ValueError(f"x, by, out: got devices {sorted(map(str, devices))}, expected one")
