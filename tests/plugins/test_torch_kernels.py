"""The two kernels in torch: the reference and sdpa."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lct_core.attention import attend
from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, selected_history
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins.torch_kernels import reference, sdpa
from lct_core.testing import kernels
from lct_core.testing.strategies import layouts
from lct_core.testing.tolerances import BOUNDS, error
from tests.attention_plans import GAPS, SCENE, draw

PLANS = {"bidirectional": bidirectional(SCENE), "context-causal": context_causal(SCENE), "history with gaps": GAPS}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def token_by_token(q, k, v, plan, scale):
    """Attention written out: a loop over batch, heads and queries, and sums over the keys that each one sees."""
    out, group = torch.zeros_like(q), q.shape[2] // k.shape[2]
    visible = plan.dense()
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            keys, values = k[b, :, h // group], v[b, :, h // group]
            for i in range(plan.queries):
                seen = [j for j in range(plan.keys) if visible[i, j]]
                weights = [
                    math.exp(scale * sum(x * y for x, y in zip(q[b, i, h].tolist(), keys[j].tolist(), strict=True)))
                    for j in seen
                ]
                out[b, i, h] = sum(w * values[j] for w, j in zip(weights, seen, strict=True)) / sum(weights)
    return out


def by_slicing(q, k, v, plan, scale):
    """What autograd makes of plain slices."""
    parts = []
    for queries, ranges in plan.segments:
        keys, values = (torch.cat([x[:, r.slice] for r in ranges], dim=1).transpose(1, 2) for x in (k, v))
        parts.append(F.scaled_dot_product_attention(q[:, queries.slice].transpose(1, 2), keys, values, scale=scale))
    return torch.cat(parts, dim=2).transpose(1, 2)


def gradients(attention, tensors, seed=9):
    out = attention(*tensors)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, [x for x in tensors if x.requires_grad], gradient)


# the definition


@given(
    layouts(max_scenes=2, max_shots=2, max_text=2, max_grid=(1, 2, 2)),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([None, 0.0, 1.5]),
)
def test_the_reference_is_attention_token_by_token(layout, heads, scale):
    plan = context_causal(layout)
    q, k, v = draw(plan, *heads, 4, batch=1, dtype=torch.float64)
    got = attend(q, k, v, plan, kernel="reference", scale=scale)
    expected = token_by_token(q, k, v, plan, 0.5 if scale is None else scale)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


@plans
def test_the_reference_computes_in_float64(plan):
    q, k, v = draw(plan, dtype=torch.bfloat16)
    got = reference(q, k, v, plan, 0.25)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, reference(q.double(), k.double(), v.double(), plan, 0.25).bfloat16())


# kernels against it


def test_sdpa_conforms():
    findings = list(kernels.kernel_conformance("sdpa", dtypes=(torch.float32, torch.bfloat16, torch.float16)))
    assert len(findings) == 3 * 6 * 2 * 4  # dtypes, plans, head counts; output and three gradients
    for finding in findings:
        assert finding.holds, finding


@plans
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_like_q(plan, dtype):
    q, k, v = draw(plan, 4, 2, dtype=dtype)
    got = attend(q, k, v, plan)
    assert (got.shape, got.dtype) == (q.shape, dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(got, reference(q, k, v, plan, 8**-0.5), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_scale(kernel):
    q, k, v = draw(GAPS, dtype=torch.float64)
    default = attend(q, k, v, GAPS, kernel=kernel)
    torch.testing.assert_close(default, attend(8**-0.5 * q, k, v, GAPS, kernel=kernel, scale=1.0), rtol=0, atol=1e-14)
    uniform = attend(q, k, v, GAPS, kernel=kernel, scale=0.0)
    visible = GAPS.dense().double()
    mean = torch.einsum("qk,bkhd->bqhd", visible / visible.sum(1, keepdim=True), v)
    torch.testing.assert_close(uniform, mean, rtol=0, atol=1e-14)


# how sdpa runs a plan


@plans
def test_one_dense_call_on_views_per_segment(plan, monkeypatch):
    calls = []
    true_sdpa = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        calls.append((q, k, v))
        assert "attn_mask" not in options
        return true_sdpa(q, k, v, **options)

    q, k, v = draw(plan)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attend(q, k, v, plan, kernel="sdpa")
    assert len(calls) == len(plan.segments)
    storages = [x.untyped_storage().data_ptr() for x in (q, k, v)]
    for segment, call in zip(plan.segments, calls, strict=True):
        assert [x.shape[2] for x in call] == [segment.queries.size, segment.num_keys, segment.num_keys]
        views = [x.untyped_storage().data_ptr() == storage for x, storage in zip(call, storages, strict=True)]
        assert views == [True] + [len(segment.keys) == 1] * 2


LONG = context_causal(Layout([[Shot(33, (2, 9, 10)), Shot(0, (1, 1, 1)), Shot(12, (3, 11, 7))]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_give_the_same_bits(dtype):
    q, k, v = draw(LONG, 4, 4, 32, dtype=dtype)
    expected = attend(q, k, v, LONG, kernel="sdpa")
    fused = torch.stack((q, k, v), dim=2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    room = [torch.full((2, LONG.keys + 77, 4, 32), float("nan"), dtype=dtype) for _ in range(2)]
    for buffer, x in zip(room, (k, v), strict=True):
        buffer[:, 20 : 20 + LONG.keys] = x
    cached = [q, *(buffer[:, 20 : 20 + LONG.keys] for buffer in room)]
    for views in (fused.unbind(2), heads_first, cached):
        assert not views[1].is_contiguous()
        assert torch.equal(attend(*views, LONG, kernel="sdpa"), expected)


def test_a_shot_does_not_change_by_a_bit_when_later_shots_do():
    q, k, v = draw(LONG, 4, 4, 32)
    before = attend(q, k, v, LONG, kernel="sdpa")
    last = LONG.segments[-1].queries.slice
    for x in (q, k, v):
        x[:, last] += 1
    after = attend(q, k, v, LONG, kernel="sdpa")
    assert torch.equal(after[:, : last.start], before[:, : last.start])
    assert not torch.equal(after[:, last], before[:, last])
    first_two = AttentionPlan(last.start, last.start, LONG.segments[:-1])
    assert torch.equal(
        attend(*(x[:, : last.start] for x in (q, k, v)), first_two, kernel="sdpa"), before[:, : last.start]
    )


def test_keys_that_a_query_does_not_see_are_never_touched():
    plan = AttentionPlan(5, 9, (Segment(Range(0, 2), (Range(1, 3), Range(5, 6))), Segment(Range(2, 5), (Range(2, 6),))))
    unseen = ~plan.dense().any(0)
    assert unseen.tolist() == [True, False, False, False, False, False, True, True, True]
    q, k, v = draw(plan)
    expected = attend(q, k, v, plan, kernel="sdpa")
    for x in (k, v):
        x[:, unseen] = float("nan")
        x.requires_grad_()
    assert torch.equal(attend(q, k, v, plan, kernel="sdpa"), expected)
    for gradient in gradients(lambda *x: attend(*x, plan, kernel="sdpa"), [q, k, v]):
        assert (gradient[:, unseen] == 0).all()
        assert gradient[:, ~unseen].isfinite().all()
        assert (gradient[:, ~unseen] != 0).any(-1).all()


# gradients


@plans
def test_gradients_equal_those_of_plain_slices(plan):
    tensors = draw(plan, dtype=torch.float64, grad=True)
    got = gradients(lambda q, k, v: attend(q, k, v, plan, kernel="sdpa"), tensors)
    expected = gradients(lambda q, k, v: by_slicing(q, k, v, plan, 8**-0.5), tensors)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-14)


def test_gradients_equal_finite_differences():
    plan = selected_history(Layout([[Shot(1, (1, 1, 1)), Shot(0, (1, 1, 2)), Shot(2, (1, 1, 1))]]), [[], [], [0]])
    tensors = draw(plan, 2, 1, 3, batch=1, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, plan, kernel="sdpa"), tensors, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, plan, kernel="reference"), tensors, fast_mode=True)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)])
def test_gradients_of_some_inputs_are_those_of_all(wanted):
    every = gradients(lambda *x: attend(*x, GAPS, kernel="sdpa"), draw(GAPS, grad=True))
    tensors = [x.requires_grad_(bool(w)) for x, w in zip(draw(GAPS), wanted, strict=True)]
    some = gradients(lambda *x: attend(*x, GAPS, kernel="sdpa"), tensors)
    assert len(some) == sum(wanted)
    for got, expected in zip(some, [g for g, w in zip(every, wanted, strict=True) if w], strict=True):
        assert torch.equal(got, expected)


def test_backward_runs_twice_and_with_keys_used_elsewhere():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    q, x, v = draw(GAPS, dtype=torch.float64)

    def loss(attention):
        k = x @ weight
        return attention(q, k, v, GAPS, 0.3).square().sum() + attention(q, k, k, GAPS, 0.3).sum() + k.sin().sum()

    (expected,) = torch.autograd.grad(loss(by_slicing), weight)
    total = loss(sdpa)
    for retain in (True, False):
        (got,) = torch.autograd.grad(total, weight, retain_graph=retain)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


class _Zeros(TorchDispatchMode):
    """Counts tensors of one shape that are made full of zeros, by whichever operation."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.made = shape, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if (
            isinstance(out, torch.Tensor)
            and out.shape == self.shape
            and ("zeros" in name or name.endswith("_backward"))
        ):
            self.made[name] += 1
        return out


@pytest.mark.parametrize("shots", [1, 2, 5, 9])
def test_gradient_buffers_are_filled_once_however_many_segments(shots):
    plan = context_causal(Layout([[Shot(2, (1, 2, 3))] * shots + [Shot(1, (1, 1, 1))]]))
    made = []
    for run in (sdpa, by_slicing):
        q, k, v = draw(plan, 3, 3, grad=True)
        out = run(q, k, v, plan, 0.5).sum()
        with _Zeros(k.shape) as zeros:
            out.backward()
        made.append(zeros.made)
    assert made[0] == {"new_zeros": 2}  # one for k, one for v
    assert made[1].total() >= 2 * shots  # what plain slices would fill: else this counts nothing


@plans
def test_checkpointing_changes_no_gradient(plan):
    tensors = draw(plan, dtype=torch.bfloat16, grad=True)
    plain = gradients(lambda *x: attend(*x, plan, kernel="sdpa"), tensors)
    recomputed = gradients(
        lambda *x: checkpoint(lambda *y: attend(*y, plan, kernel="sdpa"), *x, use_reentrant=False), tensors
    )
    for p, r in zip(plain, recomputed, strict=True):
        assert torch.equal(p, r)


def test_many_shots_add_their_gradients_up_within_the_bound():
    # every one of 40 segments adds its share to the gradient of the first keys, in bfloat16
    plan = context_causal(Layout([[Shot(1, (1, 2, 3))] * 40]))
    tensors = draw(plan, dtype=torch.bfloat16, grad=True)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    truth = gradients(lambda *x: attend(*x, plan, kernel="reference"), exact)
    plain = gradients(lambda *x: kernels._eager(*x, plan, x[0].shape[-1] ** -0.5), tensors)
    for g, p, t in zip(gradients(lambda *x: attend(*x, plan), tensors), plain, truth, strict=True):
        assert error(g, t) <= BOUNDS[torch.bfloat16]["kernel"].given(error(p, t))
