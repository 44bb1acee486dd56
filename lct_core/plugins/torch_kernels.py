"""The kernels that need nothing but torch: the readable reference that defines attention, and SDPA."""

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lct_core.layout import Range
from lct_core.plan import AttentionPlan
from lct_core.plugins.hooks import Kernel, KernelRequest, KernelSpec, hookimpl


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
        return k, v, gather(k, ranges), gather(v, ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        wholes, parts = grads[:2], grads[2:]
        dk, dv = (
            _scatter_add(whole, part, ctx.ranges, shape)
            for whole, part, shape in zip(wholes, parts, ctx.shapes, strict=True)
        )
        return dk, dv, None


def gather(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """Some ranges of keys: a view where they are one."""
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
