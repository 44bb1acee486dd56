"""Conformance of an attention kernel: outputs and gradients against the definition."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lct_core.attention import attend
from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, own_and_global_text, selected_history
from lct_core.plan import AttentionPlan
from lct_core.plugins import KernelRequest, registry
from lct_core.testing.findings import Finding, short
from lct_core.testing.tolerances import BOUNDS, error

_SCALE = 0.3


def kernel_conformance(
    name: str,
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    head_dim: int = 32,
    grad: bool = True,
) -> Iterator[Finding]:
    """Measure a kernel's outputs and gradients against the reference, over plans of every kind, grouped heads included.

    The plans cover several of a kernel's usual blocks of 128, and the scale is not the default one. Bounds
    are multiples of what plain eager attention with a dense mask errs in the same dtype (9: nothing degrades).
    What the kernel refuses is left out; the findings' cases say what was measured.

    Raises:
        ValueError: for a dtype of which the kernel refuses every plan, with its reasons.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes:
        served, reasons = 0, list[str]()
        for case, plan in _plans().items():
            for heads, kv_heads in ((4, 4), (4, 2)):
                request = KernelRequest(plan, torch.device(device), dtype, heads, kv_heads, head_dim, grad)
                if refusals := registry().refusals(name, request):
                    reasons += refusals
                    continue
                served += 1
                shapes = [
                    (2, n, h, head_dim)
                    for n, h in ((plan.queries, heads), (plan.keys, kv_heads), (plan.keys, kv_heads))
                ]
                inputs = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_(grad) for s in shapes]
                gradient = torch.randn(shapes[0], generator=generator).to(device, dtype)
                exact = [x.detach().double().requires_grad_(grad) for x in inputs]
                truth = _run(partial(attend, plan=plan, kernel="reference", scale=_SCALE), exact, gradient.double())
                plain = _run(partial(_eager, plan=plan, scale=_SCALE), inputs, gradient)
                got = _run(partial(attend, plan=plan, kernel=name, scale=_SCALE), inputs, gradient)
                of_output, *of_gradients = (error(p, x) for p, x in zip(plain, truth, strict=True))
                for what, g, x in zip(("output", "dq", "dk", "dv"), got, truth, strict=False):
                    bound, own = ("kernel", of_output) if what == "output" else ("kernel gradients", max(of_gradients))
                    yield Finding(
                        9,
                        f"{name}: {what}",
                        f"{case}, {heads}:{kv_heads} heads, {short(dtype)}",
                        error(g, x),
                        BOUNDS[dtype][bound].given(own),
                    )
        if not served:
            raise ValueError(f"{name}: it refuses every plan in {short(dtype)}: {'; '.join(dict.fromkeys(reasons))}")


def _plans() -> dict[str, AttentionPlan]:
    layout = Layout(
        [
            [Shot(4, (1, 2, 3), role="global"), Shot(7, (5, 6, 7)), Shot(0, (1, 1, 1)), Shot(2, (4, 5, 6))],
            [Shot(3, (4, 4, 4))],
        ]
    )
    return {
        "bidirectional": bidirectional(layout),
        "context-causal": context_causal(layout),
        "history with gaps": selected_history(layout, [[], [0], [1], [0, 2], []]),
        "own and global text": own_and_global_text(Layout(layout.scenes[:1])),
        "behind a history": context_causal(layout).rows(Range(layout.spans[2].start, layout.tokens)),
        "one shot behind its history": context_causal(layout).rows(layout.spans[3]),
    }


def _eager(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Plain attention in the dtype of its inputs, with a dense mask."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.movedim(2, 1).repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.movedim(2, 1) @ keys.mT * scale
    return (scores.masked_fill(~plan.dense(device=q.device), float("-inf")).softmax(dim=-1) @ values).movedim(1, 2)


def _run(attention: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients where there are any."""
    out = attention(*inputs)
    return (out, *torch.autograd.grad(out, inputs, gradient)) if out.requires_grad else (out,)
