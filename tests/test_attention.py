import gc
import math
import weakref
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lct_core import attention
from lct_core.attention import attend
from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, own_and_global_text, own_shot, selected_history
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins.hooks import KernelRequest, KernelSpec, PluginError, hookimpl
from lct_core.plugins.registry import Registry, registry
from lct_core.plugins.torch_kernels import reference, sdpa
from lct_core.testing import conformance as suite
from lct_core.testing import kernels
from lct_core.testing.strategies import layouts
from lct_core.testing.tolerances import BOUNDS, error

SCENE = Layout([[Shot(3, (1, 2, 2)), Shot(0, (2, 3, 3)), Shot(5, (1, 1, 1)), Shot(1, (1, 4, 3))], [Shot(2, (1, 3, 3))]])
GAPS = selected_history(SCENE, [[], [0], [0], [0, 2], []])
PLANS = {"bidirectional": bidirectional(SCENE), "context-causal": context_causal(SCENE), "history with gaps": GAPS}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def draw(plan, heads=2, kv_heads=2, head_dim=8, *, batch=2, dtype=torch.float32, grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, n, h, head_dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
        for n, h in ((plan.queries, heads), (plan.keys, kv_heads), (plan.keys, kv_heads))
    ]


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


def use(monkeypatch, *specs):
    """Let ``attend`` look its kernels up in a registry of its own: torch's, and these."""

    class Plugin:
        @hookimpl
        def lct_kernels(self):
            return list(specs)

    own = Registry()
    own.register(Plugin(), name="test")
    monkeypatch.setattr(attention, "registry", lambda: own)
    monkeypatch.setattr(suite, "registry", lambda: own)
    return own


def kernel_spec(name, kernel=sdpa, *, refusals=lambda request: [], rank=None):
    return KernelSpec(name=name, summary="for a test", load=lambda: kernel, refusals=refusals, rank=rank)


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


WRONG = {
    "sees everything": lambda q, k, v, plan, scale: sdpa(
        q,
        k,
        v,
        AttentionPlan(plan.queries, plan.keys, (Segment(Range(0, plan.queries), (Range(0, plan.keys),)),)),
        scale,
    ),
    "ignores the scale": lambda q, k, v, plan, scale: sdpa(q, k, v, plan, 1.05 * scale),
    "pairs the wrong heads": lambda q, k, v, plan, scale: sdpa(q, k.flip(2), v.flip(2), plan, scale),
    "accumulates in half": lambda q, k, v, plan, scale: sdpa(q.half(), k.half(), v.half(), plan, scale).to(q.dtype),
    "drops the keys' gradient": lambda q, k, v, plan, scale: sdpa(q, k.detach() + 0 * k, v, plan, scale),
    "not finite": lambda q, k, v, plan, scale: sdpa(q, k, v, plan, scale) * float("inf"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_conformance_suite_finds_a_wrong_kernel(name, monkeypatch):
    use(monkeypatch, kernel_spec("wrong", WRONG[name]))
    assert not all(finding.holds for finding in kernels.kernel_conformance("wrong", dtypes=[torch.float32]))


def test_the_conformance_suite_leaves_out_what_a_kernel_refuses(monkeypatch):
    def refusals(request):
        return ["gradients"] if request.grad else ["gaps"] if request.plan.form == "gathered" else []

    use(monkeypatch, kernel_spec("mine", refusals=refusals))
    findings = list(kernels.kernel_conformance("mine", dtypes=[torch.float32], grad=False))
    assert len(findings) == 4 * 2
    assert not any("gaps" in finding.case for finding in findings)
    with pytest.raises(ValueError, match=r"^mine: it refuses every plan in float32: gradients$"):
        list(kernels.kernel_conformance("mine", dtypes=[torch.float32]))


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
def test_one_dense_call_for_every_segment_on_views_where_keys_lie_together(plan, monkeypatch):
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
def test_strided_and_cached_inputs_give_the_bits_of_contiguous_ones(dtype):
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


def test_keys_may_be_used_elsewhere_too_and_backward_runs_twice():
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


# head groups


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 4), (4, 2)])
def test_every_group_of_heads_has_its_own_plan(kernel, heads, kv_heads):
    groups = [context_causal(SCENE), GAPS]
    q, k, v = draw(GAPS, heads, kv_heads)
    got = attend(q, k, v, groups, kernel=kernel, scale=0.2)
    for i, plan in enumerate(groups):
        mine, its = (slice(i * n // 2, (i + 1) * n // 2) for n in (heads, kv_heads))
        alone = attend(q[:, :, mine], k[:, :, its], v[:, :, its], plan, kernel=kernel, scale=0.2)
        assert torch.equal(got[:, :, mine], alone)
    assert not torch.equal(got, attend(q, k, v, groups[::-1], kernel=kernel, scale=0.2))


def test_one_group_is_one_plan():
    q, k, v = draw(GAPS)
    assert torch.equal(attend(q, k, v, [GAPS]), attend(q, k, v, GAPS))
    assert torch.equal(attend(q, k, v, (p for p in (GAPS, GAPS))), attend(q, k, v, GAPS))


@pytest.mark.parametrize(("heads", "kv_heads", "count"), [(4, 4, 0), (4, 4, 3), (4, 2, 4), (6, 2, 3)])
def test_head_groups_that_do_not_divide_the_heads_are_an_error(heads, kv_heads, count):
    q, k, v = draw(GAPS, heads, kv_heads)
    with pytest.raises(ValueError, match=rf"^plan: got {count} plans for q \[2, 55, {heads}, 8\] and k .* head groups"):
        attend(q, k, v, [GAPS] * count)


# which kernel


@pytest.mark.parametrize(
    ("head_dim", "dtype", "grad", "reasons"),
    [
        (32, torch.float32, True, ["gradients on a cpu"]),
        (32, torch.float64, False, ["dtype torch.float64: expected float32, float16 or bfloat16"]),
        (8, torch.float32, False, ["head_dim 8: expected at least 16"]),
        (8, torch.float64, True, ["gradients on a cpu", "dtype torch.float64", "head_dim 8"]),
    ],
)
def test_a_kernel_asked_for_by_name_is_never_replaced(head_dim, dtype, grad, reasons, monkeypatch):
    def other(*args, **options):
        raise AssertionError("another kernel ran")

    monkeypatch.setattr(F, "scaled_dot_product_attention", other)
    q, k, v = draw(GAPS, head_dim=head_dim, dtype=dtype, grad=grad)
    with pytest.raises(
        ValueError, match=r"^kernel: no kernel for .*'flex' was asked for, and refuses:\n  flex: "
    ) as caught:
        attend(q, k, v, GAPS, kernel="flex")
    listed = str(caught.value).splitlines()
    assert len(listed) == 2
    assert listed[1].count("; ") == len(reasons) - 1
    assert all(reason in listed[1] for reason in reasons)
    assert ("with gradients" in listed[0]) == grad
    assert f"{dtype} on cpu, 2:2 heads of {head_dim}" in listed[0]


@pytest.mark.parametrize("name", ["flash9", "", "SDPA"])
def test_an_unknown_kernel_is_an_error(name):
    with pytest.raises(ValueError, match=rf"^kernel: got '{name}', expected \"auto\" or one of \[.*'flex', .*'sdpa'"):
        attend(*draw(GAPS), GAPS, kernel=name)


def test_auto_takes_the_first_in_order_that_does_not_refuse(monkeypatch):
    def refuses(request):
        return ["too odd"] if request.head_dim % 2 else []

    mine = use(
        monkeypatch,
        kernel_spec("late", lambda *a: pytest.fail("late"), rank=101),
        kernel_spec("unranked", lambda *a: pytest.fail("unranked")),
        kernel_spec("early", lambda q, k, v, plan, scale: q * 0 + scale, refusals=refuses, rank=1),
    )
    request = KernelRequest(GAPS, torch.device("cpu"), torch.float32, 2, 2, 8, False)
    ranks = {"early": 1, "sdpa": 100, "late": 101, "reference": None, "unranked": None}
    assert list(mine.ranks(request).items()) == list(ranks.items())
    even, odd = draw(GAPS, head_dim=4), draw(GAPS, head_dim=3)
    assert (attend(*even, GAPS) == 0.5).all()
    assert torch.equal(attend(*odd, GAPS), attend(*odd, GAPS, kernel="sdpa"))
    with pytest.raises(ValueError, match=r"'early' was asked for, and refuses:\n  early: too odd$"):
        attend(*odd, GAPS, kernel="early")


def test_a_rank_may_depend_on_the_request(monkeypatch):
    mine = use(
        monkeypatch,
        kernel_spec("wide", lambda q, k, v, plan, scale: q * 0 + 2, rank=lambda request: 100 - request.head_dim),
        kernel_spec("narrow", lambda q, k, v, plan, scale: q * 0 + 3, rank=lambda r: 95 if r.head_dim < 8 else None),
    )
    assert (attend(*draw(GAPS, head_dim=4), GAPS) == 3).all()
    assert (attend(*draw(GAPS, head_dim=8), GAPS) == 2).all()
    request = KernelRequest(GAPS, torch.device("cpu"), torch.float32, 2, 2, 8, False)
    assert mine.ranks(request) == {"wide": 92, "sdpa": 100, "narrow": None, "reference": None}


def test_a_rank_that_crashes_is_its_plugins():
    own = Registry()

    class Plugin:
        @hookimpl
        def lct_kernels(self):
            return [kernel_spec("broken", rank=lambda request: request.no_such)]

    own.register(Plugin(), name="test")
    request = KernelRequest(GAPS, torch.device("cpu"), torch.float32, 2, 2, 8, False)
    with pytest.raises(PluginError, match=r"^kernel 'broken' is broken: AttributeError: .*no_such"):
        own.kernel("auto", request)
    assert own.kernel("sdpa", request) is sdpa  # asked for by name, it is nobody else's trouble


def test_turning_determinism_on_asks_the_kernels_again(monkeypatch):
    def refusals(request):
        return ["not deterministic"] if torch.are_deterministic_algorithms_enabled() else []

    mine = use(monkeypatch, kernel_spec("mine", lambda q, k, v, plan, scale: q * 0, refusals=refusals, rank=1))
    request = KernelRequest(GAPS, torch.device("cpu"), torch.float32, 2, 2, 8, False)
    assert mine.kernel("auto", request) is not sdpa
    torch.use_deterministic_algorithms(True)
    try:
        assert mine.kernel("auto", request) is sdpa
    finally:
        torch.use_deterministic_algorithms(False)


def test_auto_lists_every_candidates_reasons():
    own = Registry()

    def refusing(name, rank, *reasons):
        return kernel_spec(name, refusals=lambda request: list(reasons), rank=rank)

    class Plugin:
        @hookimpl
        def lct_kernels(self):
            return [
                refusing("one", 1, "no"),
                refusing("two", 2, "never", "ever"),
                refusing("by name only", None, "hush"),
            ]

    own.register(Plugin(), name="test")
    own._kernels.pop("sdpa")
    request = KernelRequest(GAPS, torch.device("cpu"), torch.float32, 2, 2, 8, False)
    with pytest.raises(ValueError, match=r"'auto' was asked for, and refuses:\n  one: no\n  two: never; ever$"):
        own.kernel("auto", request)


def test_a_kernel_is_told_what_it_must_serve_and_asked_once_for_each_kind(monkeypatch):
    asked = []

    def refusals(request):
        asked.append(request)
        return []

    use(monkeypatch, kernel_spec("mine", refusals=refusals))
    tensors = draw(GAPS, 4, 2, dtype=torch.bfloat16)
    for _ in range(3):
        attend(*tensors, selected_history(SCENE, [[], [0], [0], [0, 2], []]), kernel="mine")  # an equal plan
    assert asked == [KernelRequest(GAPS, torch.device("cpu"), torch.bfloat16, 4, 2, 8, False)]
    for i in range(3):
        mixed = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors)]
        plan = bidirectional(Layout([[Shot(0, (1, 5, 11 * (i + 1)))]]))
        mixed = [x.repeat(1, i + 1, 1, 1) for x in mixed]
        with torch.no_grad():
            attend(*mixed, plan, kernel="mine")
        assert not asked[-1].grad
        attend(*mixed, plan, kernel="mine")
        assert asked[-1].grad
    assert [request.grad for request in asked] == [False] + [False, True] * 3
    attend(*tensors, own_shot(SCENE), kernel="mine")
    assert asked[-1].plan == own_shot(SCENE)


def test_plans_that_are_gone_are_not_kept_for_ever():
    # a run with other scenes in every row has no end of plans
    own, alive = Registry(), []
    for size in range(1, 3001):
        plan = AttentionPlan(size, size, (Segment(Range(0, size), (Range(0, size),)),))
        own.kernel("auto", KernelRequest(plan, torch.device("cpu"), torch.float32, 2, 2, 8, False))
        alive.append(weakref.ref(plan))
    del plan
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 1024


# what attend refuses


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 55, 16), (2, 55, 2, 8), (2, 55, 2, 8)], r"^q, k, v: got q \[2, 55, 16\], k .*expected \[batch"),
        ([(2, 55, 2, 8), (2, 55, 16), (2, 55, 16)], r"^q, k, v: got .*k \[2, 55, 16\]"),
        ([(2, 55, 2, 8), (2, 55, 2, 8), (2, 55, 2, 7)], r"^q, k, v: got .*v \[2, 55, 2, 7\], expected .*k and v alike"),
        ([(2, 55, 2, 8), (2, 55, 2, 8), (2, 54, 2, 8)], r"^q, k, v: got .*v \[2, 54, 2, 8\], expected .*k and v alike"),
        ([(2, 55, 2, 8), (2, 55, 2, 8), (2, 55)], r"^q, k, v: got .*v \[2, 55\], expected .*k and v alike"),
        ([(2, 55, 4, 8), (2, 55, 4, 8), (2, 55, 2, 8)], r"^q, k, v: got .*v \[2, 55, 2, 8\], expected .*k and v alike"),
        ([(2, 55, 2, 8), (1, 55, 2, 8), (1, 55, 2, 8)], r"^q, k, v: got .*with the batch and head_dim of q"),
        ([(2, 55, 2, 8), (2, 55, 2, 4), (2, 55, 2, 4)], r"^q, k, v: got .*with the batch and head_dim of q"),
        ([(2, 55, 4, 8), (2, 55, 3, 8), (2, 55, 3, 8)], r"^k, v: got 3 heads for the 4 of q, expected a divisor"),
        ([(2, 55, 2, 8), (2, 55, 4, 8), (2, 55, 4, 8)], r"^k, v: got 4 heads for the 2 of q, expected a divisor"),
        ([(2, 55, 2, 8), (2, 55, 0, 8), (2, 55, 0, 8)], r"^k, v: got 0 heads for the 2 of q"),
        (
            [(2, 54, 2, 8), (2, 55, 2, 8), (2, 55, 2, 8)],
            r"^plan: it has 55 queries and 55 keys, but got q \[2, 54, [12], 8\]",
        ),
        ([(2, 55, 2, 8), (2, 56, 2, 8), (2, 56, 2, 8)], r"^plan: it has 55 queries .*k \[2, 56, [12], 8\]; build"),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_shapes_that_do_not_fit_are_an_error(shapes, message, groups):
    with pytest.raises(ValueError, match=message):
        attend(*map(torch.zeros, shapes), GAPS if groups == 1 else [GAPS] * groups)


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16", "bfloat16"), ("float32", "float32", "float16"), ["int64"] * 3]
)
def test_dtypes_that_do_not_fit_are_an_error(dtypes):
    tensors = [x.to(getattr(torch, name)) for x, name in zip(draw(GAPS), dtypes, strict=True)]
    expected = ", ".join(f"torch.{name}" for name in dtypes)
    with pytest.raises(ValueError, match=f"^q, k, v: got dtypes {expected}, expected one floating-point dtype"):
        attend(*tensors, GAPS)


def test_devices_that_do_not_fit_are_an_error():
    q, k, v = draw(GAPS)
    with pytest.raises(ValueError, match=r"^q, k, v: got devices cpu, cpu, meta, expected one device"):
        attend(q, k, v.to("meta"), GAPS)


def test_cross_attention_spaces_may_differ():
    plan = own_and_global_text(Layout([[Shot(3, (1, 1, 2), role="global"), Shot(2, (1, 2, 2)), Shot(0, (1, 1, 3))]]))
    q, k, v = draw(plan, 4, 2, dtype=torch.float64)
    assert (plan.queries, plan.keys) == (9, 5)
    torch.testing.assert_close(attend(q, k, v, plan), reference(q, k, v, plan, 8**-0.5), rtol=0, atol=1e-14)


def test_the_installed_registry_serves_the_kernels_that_come_with_the_library():
    assert {"sdpa", "reference", "flex"} <= set(registry().kernels)
