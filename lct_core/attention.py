"""Attention over a plan: what comes in is checked, and the kernel that the registry chooses computes it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from lct_core._describe import describe
from lct_core.plan import AttentionPlan
from lct_core.plugins import KernelRequest, registry


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
