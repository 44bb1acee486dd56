"""The lowering of plans to variable-length attention: the definition, its cost, its gradients."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, own_shot, selected_history
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins.hooks import KernelSpec
from lct_core.plugins.torch_kernels import reference
from lct_core.testing.strategies import layouts
from lct_plugins import varlen, varlen_naive
from lct_plugins.varlen import Provider
from tests.kernels.plans import CAUSAL, GAPS, PLANS, SCENES, check, draw, forget, plans, run, scheduled, schedules


@pytest.fixture(autouse=True)
def _no_tables_of_other_tests():
    forget()
    yield
    forget()


class Recorder:
    """The readable provider, and what it was called with."""

    def __init__(self):
        self.forwards, self.backwards, self.shares = [], [], []
        self.provider = Provider(self.forward, self.backward)

    def forward(self, *args):
        self.forwards.append(args)
        return varlen_naive.forward(*args)

    def backward(self, *args):
        self.backwards.append(args)
        self.shares.append(varlen_naive.backward(*args))
        return self.shares[-1]


def naive(recorder=None):
    return partial(varlen.attention, provider=recorder.provider if recorder else varlen_naive.PROVIDER)


# the lowering against the definition


def test_the_plans_are_of_every_form():
    assert {plan.form for plan in PLANS.values()} == {"dense", "packed", "overlapping", "gathered"}


@plans
@schedules
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_the_definition(plan, schedule, heads, batch):
    with scheduled(schedule):
        check(naive(), draw(plan, *heads, batch=batch), plan)


@given(st.data())
def test_it_is_the_definition_on_any_layout(data):
    layout = data.draw(layouts(max_shots=6, max_text=2, max_grid=(1, 2, 2)))
    history = [
        data.draw(st.sets(st.sampled_from(range(scene.start, shot)))) if shot > scene.start else ()
        for scene in layout.scene_shots
        for shot in scene
    ]
    pattern = data.draw(
        st.sampled_from([bidirectional, own_shot, context_causal, partial(selected_history, history=history)])
    )
    plan = pattern(layout)
    start = data.draw(st.integers(0, plan.queries - 1))
    plan = data.draw(st.sampled_from([plan, plan.rows(Range(start, plan.queries))]))
    with scheduled(data.draw(st.sampled_from(["by_segment", "log_depth"]))):
        check(naive(), draw(plan, batch=data.draw(st.integers(1, 2)), head_dim=2), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@schedules
def test_it_errs_no_more_than_a_kernel_may(dtype, schedule, conforms):
    with scheduled(schedule):
        conforms(KernelSpec(name="naive", summary="", load=naive, refusals=lambda request: []), dtypes=[dtype])


@plans
@pytest.mark.parametrize("needed", range(1, 7))
def test_gradients_of_some_inputs_alone(plan, needed):
    tensors = [x.requires_grad_(bool(needed >> i & 1)) for i, x in enumerate(draw(plan))]
    check(naive(), tensors, plan)


def test_a_negative_scale_is_taken_to_the_queries():
    recorder = Recorder()
    check(naive(recorder), draw(CAUSAL), CAUSAL, scale=-0.4)
    assert {args[4] for args in recorder.forwards} | {args[7] for args in recorder.backwards} == {0.4}


def test_without_gradients():
    q, k, v = (x.detach() for x in draw(GAPS))
    out = naive()(q, k, v, GAPS, 0.4)
    assert not out.requires_grad
    torch.testing.assert_close(out, reference(q, k, v, GAPS, 0.4), rtol=0, atol=1e-12)


@plans
def test_inputs_and_gradients_may_be_strided(plan):
    q, k, v = draw(plan, 2, 2)
    fused = torch.cat([k, v, k], dim=2)  # k and v of one projection: views of it
    parts = fused.detach().requires_grad_().unflatten(2, (3, 2)).unbind(2)[:2]
    across = q.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
    assert across.stride(-1) != 1
    out = naive()(across, *parts, plan, 0.4)
    expected = reference(across, *parts, plan, 0.4)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    got = torch.autograd.grad(out.sum(), [across, *parts])  # a gradient of stride 0
    wanted = torch.autograd.grad(expected.sum(), [across, *parts])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# what it costs


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shots", [*range(1, 10), 16, 17, 20])
def test_launches_of_a_context_causal_scene(shots, batch):
    plan = context_causal(Layout([[Shot(1, (1, 1, 1 + i % 3)) for i in range(shots)]]))
    for schedule, launches in (("log_depth", 1 + math.ceil(math.log2(shots))), ("by_segment", shots)):
        recorder = Recorder()
        with scheduled(schedule):
            run(naive(recorder), draw(plan, head_dim=2, batch=batch), plan)
        assert (len(recorder.forwards), len(recorder.backwards)) == (1, launches)


@pytest.mark.parametrize("tokens", [4095, 4096])
def test_long_shots_are_launched_one_by_one(tokens):
    plan = context_causal(Layout([[Shot(0, (1, 1, tokens))] * 8]))
    assert len(varlen._schedule(plan, 1, torch.device("cpu")).launches) == (8 if tokens == 4096 else 4)


def test_dense_calls_see_the_cache_itself():
    plan = PLANS["keys that nobody sees"]
    q, k, v = draw(plan)
    recorder = Recorder()
    run(naive(recorder), (q, k, v), plan)
    for call, at in ((recorder.forwards[0], 1), (recorder.backwards[0], 2)):
        assert call[at].data_ptr() == k[:, 7].data_ptr()
        assert call[at].shape == (2, 23, 2, 8)
        assert call[at + 1].data_ptr() == v[:, 7].data_ptr()
    assert recorder.shares[0][1].shape == (2, 23, 2, 8)


def test_packed_calls_copy_nothing():
    q, *_ = draw(CAUSAL, batch=1)
    k, v = torch.randn(1, CAUSAL.keys, 2, 2, 8, dtype=torch.float64).requires_grad_().unbind(2)
    recorder = Recorder()
    run(naive(recorder), (q, k, v), CAUSAL)
    assert [x.data_ptr() for x in recorder.forwards[0][:3]] == [x.data_ptr() for x in (q, k, v)]
    assert {x.untyped_storage().data_ptr() for _, a, b, c, *_ in recorder.backwards for x in (a, b, c)} == {
        x.untyped_storage().data_ptr() for x in (q, k)
    }


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("seen", "launches"), [(Range(5, 9), 1), (Range(0, 5), 3)])
def test_keys_with_gaps_are_gathered_up_to_a_limit(seen, launches, batch):
    gap = (Range(0, 3), Range(5, 9))
    plan = AttentionPlan(9, 9, (Segment(Range(0, 3), gap), Segment(Range(3, 5), (seen,)), Segment(Range(5, 9), gap)))
    tensors, recorder = draw(plan, batch=batch), Recorder()
    check(naive(recorder), tensors, plan)
    assert len(recorder.forwards) == launches
    if launches == 3:
        assert recorder.forwards[1][1].data_ptr() == tensors[1].data_ptr()  # one range is where it is


def test_a_packed_row_is_one_launch_each_way():
    recorder = Recorder()
    _, *gradients = run(naive(recorder), draw(PLANS["two scenes"]), PLANS["two scenes"])
    assert (len(recorder.forwards), len(recorder.backwards)) == (1, 1)
    assert [x.data_ptr() for x in gradients] == [x.data_ptr() for x in recorder.shares[0]]


def test_tables_are_made_once_for_a_plan():
    for _ in range(3):
        run(naive(), draw(GAPS), GAPS)
    assert varlen._one_launch.cache_info().misses == varlen._schedule.cache_info().misses == 1


def test_the_tables_of_a_launch_are_one_tensor():
    device = torch.device("cpu")
    launches = [varlen._one_launch(CAUSAL, 2, device), *varlen._schedule(CAUSAL, 2, device).launches]
    packed = [launch[-1] for launch in launches if launch[-1] is not None]
    assert len(packed) > 1
    for sequences in packed:
        tables = [x for x in sequences if isinstance(x, torch.Tensor)]
        assert len({x.untyped_storage().data_ptr() for x in tables}) == 1
        assert all(x.is_contiguous() for x in tables)


# backward


@schedules
def test_shares_are_added_up_in_float32_and_rounded_once(schedule):
    plan = context_causal(Layout([[Shot(0, (1, 1, 3))] * 20]))
    tensors, recorder = draw(plan, dtype=torch.bfloat16, batch=1), Recorder()
    with scheduled(schedule):
        gradients = run(naive(recorder), tensors, plan)[1:]
        launches = varlen._schedule(plan, 1, torch.device("cpu")).launches
    for i, axis in enumerate((0, 1, 1)):
        expected = torch.zeros(gradients[i].shape)
        for shares, launch in zip(recorder.shares, launches, strict=True):
            share = shares[i].view(-1, *shares[i].shape[-2:])
            start = (launch.queries, launch.keys)[axis].start
            for rectangle in launch.rectangles:
                r = rectangle[axis]
                expected[0, r.slice] += share[r.start - start : r.stop - start]
        assert torch.equal(gradients[i], expected.bfloat16())


@pytest.mark.parametrize(
    ("plan", "schedule", "buffers"),
    [
        ("context-causal", "log_depth", ["float32 zeros"] * 3),
        ("context-causal", "by_segment", ["empty", "float32 zeros", "float32 zeros"]),  # queries are in one rectangle
        ("history with gaps", "by_segment", ["float32 zeros"] * 3),
        ("keys that nobody sees", "log_depth", ["empty", "zeros", "zeros"]),
        ("packed keys out of order", "by_segment", ["empty", "zeros", "zeros"]),
        ("all keys out of order", "by_segment", ["empty", "empty", "empty"]),
        ("two scenes", "log_depth", []),
    ],
)
def test_float32_buffers_and_zeros_only_where_needed(plan, schedule, buffers):
    made = []
    names = {torch.ops.aten.new_zeros.default: "zeros", torch.ops.aten.new_empty.default: "empty"}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in names:
                wide = (kwargs or {}).get("dtype") == torch.float32
                made.append("float32 " * wide + names[function])
            return function(*args, **kwargs or {})

    out = naive()(*draw(PLANS[plan], dtype=torch.bfloat16), PLANS[plan], 0.4)
    with scheduled(schedule), Watch():
        out.sum().backward()
    assert made == buffers


def test_what_a_launch_leaves_in_its_gaps_does_not_matter():
    recorder = Recorder()
    with scheduled("log_depth"):
        _, *gradients = run(naive(recorder), draw(CAUSAL), CAUSAL)
    assert any(share.isnan().any() for shares in recorder.shares for share in shares)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_overlapping_sequences_would_be_wrong_backward():
    # why there are rectangles: gradients of keys are stored, by the last sequence that sees them
    q, k, v = draw(CAUSAL, batch=1)
    _, _, dk, _ = run(reference, (q, k, v), CAUSAL)
    _, sequences = varlen._one_launch(CAUSAL, 1, q.device)
    q, k, v = (x.detach()[0] for x in (q, k, v))
    out, lse = varlen_naive.forward(q, k, v, sequences, 0.4)
    dout = torch.randn(out[None].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)[0]
    _, stored, _ = varlen_naive.backward(dout, q, k, v, out, lse, sequences, 0.4)
    last = SCENES.spans[3].slice  # no other shot sees the last one's keys
    torch.testing.assert_close(stored[last], dk[0, last], rtol=0, atol=1e-12)
    assert (stored[:7] - dk[0, :7]).abs().max() > 0.1
