"""Attention over a plan: validation, the readable reference that defines it, and the kernel that runs everywhere."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lct_core.backbone import Kernel, KernelRequest, KernelSpec, describe
from lct_core.layout import Range
from lct_core.masks import AttentionPlan
from lct_core.plugins import hookimpl, registry


def attend(
    q: Float[Tensor, "batch queries heads head_dim"],
    k: Float[Tensor, "batch keys kv_heads head_dim"],
    v: Float[Tensor, "batch keys kv_heads head_dim"],
    plan: AttentionPlan | Sequence[AttentionPlan],
    *,
    kernel: str = "auto",
    scale: float | None = None,
) -> Float[Tensor, "batch queries heads head_dim"]:
    """Softmax attention in which every query sees the keys that the plan gives it.

    Args:
        q: ``[batch, queries, heads, head_dim]``, floating point.
        k: ``[batch, keys, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        v: Like ``k``.
        plan: Who sees whom; a sequence of plans gives one to each of as many equal groups of heads.
        kernel: A kernel's name, which is then used or refused with its reasons, never replaced; ``"auto"`` takes the
            first in the documented order that does not refuse (``lct kernels`` shows it).
        scale: Factor on the scores (default: ``head_dim ** -0.5``, upstream).

    Returns:
        Like ``q``. Arithmetic and accumulation are the kernel's: float32 at least in all that come with the library.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit each other or the plan, and for a kernel that is
            unknown or refuses.
    """
    _check(q, k, v)
    if not isinstance(plan, AttentionPlan):
        return _by_head_groups(q, k, v, tuple(plan), kernel, scale)
    _check_plan(q, k, plan)
    if not plan.queries:
        return q  # a global prompt without video, behind a cache
    request = KernelRequest(
        plan,
        q.device,
        q.dtype,
        q.shape[2],
        k.shape[2],
        q.shape[3],
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )
    chosen = registry().kernel(kernel, request)
    with without_autocast(q.device):  # the kernel was chosen for this dtype
        return chosen(q, k, v, plan, q.shape[-1] ** -0.5 if scale is None else scale)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which tensors keep the dtype they have, on devices with and without autocast."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def reference(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """The definition, in float64 with a dense mask: softmax(scale q kᵀ, over the keys that the plan shows) v."""
    group = q.shape[2] // k.shape[2]
    queries = rearrange(q.double(), "b s h d -> b h s d")
    keys, values = (repeat(x.double(), "b s h d -> b (h g) s d", g=group) for x in (k, v))
    scores = scale * queries @ keys.mT
    weights = scores.masked_fill(~plan.dense(device=q.device), float("-inf")).softmax(dim=-1)
    return rearrange(weights @ values, "b h s d -> b s h d").to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """One dense call of torch's ``scaled_dot_product_attention`` for every segment of the plan; no mask anywhere.

    Contiguous keys are a view, disjoint ranges are gathered. Gradients of keys and values are added up in one buffer.
    """
    outputs = []
    for queries, (_, ranges) in zip(
        q.split([s.queries.size for s in plan.segments], dim=1), plan.segments, strict=True
    ):
        k, v, keys, values = _Visible.apply(k, v, ranges)
        outputs.append(
            F.scaled_dot_product_attention(
                queries.transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                scale=scale,
                enable_gqa=q.shape[2] != k.shape[2],
            ).transpose(1, 2)
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class _Visible(torch.autograd.Function):
    """The keys and values of some ranges, and the whole of them handed on to the next segment.

    Handing them on makes a chain of the segments: backward, the gradient buffer of all keys is allocated once, by the
    last segment, and every segment adds its share to it in place. Plain slicing would fill a full-size zero gradient
    for every segment.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, ranges: tuple[Range, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.ranges, ctx.shapes = ranges, (k.shape, v.shape)
        ctx.set_materialize_grads(False)
        return k, v, _gather(k, ranges), _gather(v, ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        wholes, parts = grads[:2], grads[2:]
        dk, dv = (
            _scatter_add(whole, part, ctx.ranges, shape)
            for whole, part, shape in zip(wholes, parts, ctx.shapes, strict=True)
        )
        return dk, dv, None


def _gather(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    parts = [x[:, r.slice] for r in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _scatter_add(
    whole: Tensor | None, part: Tensor | None, ranges: tuple[Range, ...], shape: torch.Size
) -> Tensor | None:
    if part is None:
        return whole
    if whole is None:
        whole = part.new_zeros(shape)
    for r, piece in zip(ranges, part.split([r.size for r in ranges], dim=1), strict=True):
        whole[:, r.slice] += piece
    return whole


def _by_head_groups(
    q: Tensor, k: Tensor, v: Tensor, plans: tuple[AttentionPlan, ...], kernel: str, scale: float | None
) -> Tensor:
    if not plans or q.shape[2] % len(plans) or k.shape[2] % len(plans):
        raise ValueError(
            f"plan: got {len(plans)} plans for q {describe(q)} and k {describe(k)}, expected a number of "
            "head groups that divides both their numbers of heads (the third axis)"
        )
    groups = zip(*(x.chunk(len(plans), dim=2) for x in (q, k, v)), plans, strict=True)
    return torch.cat([attend(*group, kernel=kernel, scale=scale) for group in groups], dim=2)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {describe(q)}, k {describe(k)}, v {describe(v)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or len(q) != len(k) or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k, v: got {shapes}, expected [batch, tokens, heads, head_dim], k and v alike, "
            "with the batch and head_dim of q"
        )
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"k, v: got {k.shape[2]} heads for the {q.shape[2]} of q, expected a divisor of them")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v: got dtypes {q.dtype}, {k.dtype}, {v.dtype}, expected one floating-point dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v: got devices {q.device}, {k.device}, {v.device}, expected one device")


def _check_plan(q: Tensor, k: Tensor, plan: AttentionPlan) -> None:
    if q.shape[1] != plan.queries or k.shape[1] != plan.keys:
        raise ValueError(
            f"plan: it has {plan.queries} queries and {plan.keys} keys, but got q {describe(q)} and k {describe(k)}; "
            "build the plan from the layout of these tokens"
        )


def _load_reference() -> Kernel:
    return reference


def _load_sdpa() -> Kernel:
    return sdpa


def _serves_all(request: KernelRequest) -> list[str]:
    return []


@hookimpl
def lct_kernels() -> list[KernelSpec]:
    """The kernels that need nothing but torch."""
    return [
        KernelSpec(
            name="sdpa",
            summary="torch's scaled_dot_product_attention, one dense call per query range; runs everywhere",
            load=_load_sdpa,
            refusals=_serves_all,
            rank=100,
        ),
        KernelSpec(
            name="reference",
            summary="the definition: float64 with a dense mask, for tests",
            load=_load_reference,
            refusals=_serves_all,
        ),
    ]
