"""Plans of every form, and the definition that the flash-attention kernels are held against."""

import math
from contextlib import contextmanager

import pytest
import torch

from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, own_and_global_text, own_shot, selected_history
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins.torch_kernels import reference
from lct_plugins import varlen

SHOTS = [Shot(3, (1, 2, 2)), Shot(0, (2, 3, 3)), Shot(5, (1, 1, 1)), Shot(1, (1, 4, 3))]
SCENES = Layout([SHOTS, [Shot(2, (1, 3, 3)), Shot(0, (1, 1, 1))]])
GAPS = selected_history(SCENES, [[], [0], [0], [0, 2], [], []])
CAUSAL = context_causal(SCENES)
PLANS = {
    "one scene": bidirectional(Layout([SHOTS])),
    "two scenes": bidirectional(SCENES),
    "single shots": own_shot(SCENES),
    "context-causal": CAUSAL,
    "history with gaps": GAPS,
    "the last shot behind its history": CAUSAL.rows(Range(30, 43)),
    "the last shot behind some of its history": GAPS.rows(Range(30, 43)),
    "keys that nobody sees": AttentionPlan(5, 40, (Segment(Range(0, 5), (Range(7, 30),)),)),
    "more to gather than there is": selected_history(
        Layout([[Shot(0, (1, 1, 1 + i % 3)) for i in range(8)]]), [range(0, i - 1) for i in range(8)]
    ),
    "all keys out of order": AttentionPlan(
        9, 20, (Segment(Range(0, 4), (Range(9, 20),)), Segment(Range(4, 9), (Range(0, 9),)))
    ),
    "packed keys out of order": AttentionPlan(
        9, 20, (Segment(Range(0, 4), (Range(11, 18),)), Segment(Range(4, 9), (Range(2, 9),)))
    ),
    "cross-attention": own_and_global_text(
        Layout([[Shot(3, (1, 1, 2), role="global"), Shot(2, (1, 2, 2)), Shot(1, (1, 1, 3))]])
    ),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
schedules = pytest.mark.parametrize("schedule", ["by_segment", "log_depth"])


def forget():
    varlen._one_launch.cache_clear()
    varlen._schedule.cache_clear()


@contextmanager
def scheduled(name):
    """Run every backward pass in the rounds for long shots, or in those for short ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "_LONG_SHOT", {"by_segment": 0, "log_depth": math.inf}[name])
        forget()
        yield
    forget()


def draw(plan, heads=4, kv_heads=2, head_dim=8, *, batch=2, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, n, h, head_dim, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for n, h in ((plan.queries, heads), (plan.keys, kv_heads), (plan.keys, kv_heads))
    ]


def run(kernel, tensors, plan, scale=0.4):
    """The output, and the gradients of those tensors that require one."""
    out = kernel(*tensors, plan, scale)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, [x for x in tensors if x.requires_grad], gradient.to(out))]


def check(kernel, tensors, plan, atol=1e-12, scale=0.4):
    for got, expected in zip(run(kernel, tensors, plan, scale), run(reference, tensors, plan, scale), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)
