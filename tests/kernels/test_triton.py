import importlib.util
import os
import re
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lct_core import attention
from lct_core.attention import attend
from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, own_shot, own_text, selected_history
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins.hooks import KernelRequest, hookimpl
from lct_core.plugins.registry import Registry
from lct_core.plugins.torch_kernels import reference
from lct_core.testing import kernels
from lct_core.testing.strategies import layouts
from lct_core.testing.tolerances import BOUNDS, error
from lct_plugins import triton_attention, triton_naive
from lct_plugins.triton_attention import SPEC, TILES, Tiling, key_tiles, query_tiles

pytestmark = pytest.mark.internals

KERNELS = "lct_plugins._triton_kernels"
has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# two packed scenes; shots of one token, and none a multiple of a tile
SCENES = Layout(
    [[Shot(3, (1, 4, 5)), Shot(0, (1, 1, 1)), Shot(5, (2, 3, 4)), Shot(0, (1, 1, 1))], [Shot(2, (1, 3, 7))]]
)
CAUSAL = context_causal(SCENES)
GAP = AttentionPlan(
    50,
    90,
    (
        Segment(Range(0, 20), (Range(3, 30),)),
        Segment(Range(20, 41), (Range(60, 85),)),
        Segment(Range(41, 50), (Range(20, 70),)),
    ),
)
PLANS = {
    "bidirectional": bidirectional(SCENES),
    "context-causal": CAUSAL,
    "a shot behind its history": CAUSAL.rows(SCENES.spans[2]),
    "two shots behind their history": CAUSAL.rows(Range(SCENES.spans[2].start, SCENES.spans[4].start)),
    "keys that nobody sees": GAP,
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


@st.composite
def interval_plans(draw):
    """Plans of one key interval for each query: LCT's, and any other."""
    if draw(st.booleans()):
        layout = draw(layouts(with_global=False))
        plan = draw(st.sampled_from([bidirectional, context_causal, own_shot]))(layout)
        start = draw(st.integers(0, plan.queries - 1))
        return plan.rows(Range(start, draw(st.integers(start + 1, plan.queries))))
    keys = draw(st.integers(1, 60))
    segments, end = [], 0
    for size in draw(st.lists(st.integers(1, 20), min_size=1, max_size=5)):
        first = draw(st.integers(0, keys - 1))
        segments.append(Segment(Range(end, end := end + size), (Range(first, draw(st.integers(first + 1, keys))),)))
    return AttentionPlan(end, keys, tuple(segments))


tile_sizes = st.tuples(st.sampled_from([1, 4, 7, 16]), st.sampled_from([2, 4, 8, 16]))


# the tables


def bounds(visible):
    """The first and the last place where a vector is true."""
    places = visible.nonzero().flatten().tolist()
    return Range(places[0], places[-1] + 1) if places else Range(0, 0)


def longest_run(visible):
    best = run = 0
    for one in visible.tolist():
        run = run + 1 if one else 0
        best = max(best, run)
    return best


def check_tiles(tiles, visible, rows, columns):
    assert [i for tile in sorted(tiles) for i in range(*tile.own)] == list(range(len(visible)))
    assert all(a.seen.size >= b.seen.size for a, b in pairwise(tiles))
    alone = ~visible.any(1)
    joined = (visible[1:] & visible[:-1]).any(1) | (alone[1:] & alone[:-1])  # two neighbours, by what they see
    for own, seen, full in tiles:
        assert 0 < own.size <= rows
        assert joined[own.start : own.stop - 1].all()
        assert own.size == rows or own.stop == len(visible) or not joined[own.stop - 1]
        assert seen == bounds(visible[own.slice].any(0))
        assert seen.start <= full.start <= full.stop <= seen.stop
        assert visible[own.slice, full.slice].all()
        assert (full.start - seen.start) % columns == full.size % columns == 0
        unmasked = longest_run(visible[own.slice].all(0))
        assert full.size > unmasked - 2 * columns  # what rounding to chunks costs, and no more
        if visible[own.slice, seen.slice].all():
            assert full.size > seen.size - columns


@given(interval_plans(), tile_sizes)
def test_a_query_tile_walks_over_what_its_rows_see_and_is_unmasked_where_all_do(plan, sizes):
    tiles = query_tiles(plan, *sizes)
    check_tiles(tiles, plan.dense(), *sizes)
    assert all(plan.dense()[own.slice, seen.slice].any(0).all() for own, seen, _ in tiles)  # no gap is read


@given(interval_plans(), tile_sizes)
def test_a_key_tile_walks_over_the_rows_that_see_it_and_is_unmasked_where_they_see_all_of_it(plan, sizes):
    check_tiles(key_tiles(plan, *sizes), plan.dense().T, *sizes)


@given(interval_plans(), tile_sizes)
def test_chunks_cover_what_a_tile_sees_once(plan, sizes):
    for tile in (*query_tiles(plan, *sizes), *key_tiles(plan, *sizes)):
        walked = [(place, masked) for chunk, masked in triton_naive.chunks(tile, sizes[1]) for place in range(*chunk)]
        assert [place for place, _ in walked] == list(range(*tile.seen))
        assert [place for place, masked in walked if not masked] == list(range(*tile.full))


@given(interval_plans())
def test_the_intervals_are_the_plan(plan):
    start, stop = triton_attention._intervals(plan, torch.device("cpu"))
    key = torch.arange(plan.keys)
    assert torch.equal((key >= start[:, None]) & (key < stop[:, None]), plan.dense())
    assert start.dtype == stop.dtype == torch.int32
    assert start.data_ptr() % 16 == stop.data_ptr() % 16 == 0


def test_tiles_of_packed_scenes_are_cut_per_scene_and_not_per_shot():
    plan = context_causal(Layout([[Shot(0, (1, 1, 10))] * 3, [Shot(0, (1, 1, 10))] * 3]))
    for tiles in (query_tiles(plan, 16, 8), key_tiles(plan, 16, 8)):
        assert sorted(tile.own for tile in tiles) == [(0, 16), (16, 30), (30, 46), (46, 60)]
    assert max(query_tiles(plan, 16, 8)) == ((46, 60), (30, 60), (30, 46))
    assert max(key_tiles(plan, 16, 8)) == ((46, 60), (40, 60), (40, 40))


# the specification


def lse_of(q, k, plan, scale):
    keys = k.double().repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q.double(), keys)
    return scores.masked_fill(~plan.dense(device=q.device), float("-inf")).logsumexp(-1)


def draw(plan, heads=2, kv_heads=1, head_dim=16, *, batch=2, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((plan.queries, heads), (plan.keys, kv_heads), (plan.keys, kv_heads), (plan.queries, heads))
    return [torch.randn(batch, n, h, head_dim, generator=generator).to(device, dtype) for n, h in shapes]


@given(interval_plans(), tile_sizes, st.sampled_from([(1, 1), (4, 2)]), st.sampled_from([0.0, 0.4, -0.3]))
def test_the_specification_is_the_reference_in_float64(plan, sizes, heads, scale):
    q, k, v, dout = draw(plan, *heads, 4, dtype=torch.float64)
    rows, columns = sizes
    out, lse = triton_naive.forward(q, k, v, plan, scale, rows=rows, columns=columns)
    got = triton_naive.backward(q, k, v, out, lse, dout, plan, scale, rows=rows, columns=columns)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = kernels._run(lambda *x: reference(*x, plan, scale), inputs, dout)
    for g, e in zip((out, *got), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, lse_of(q, k, plan, scale), rtol=0, atol=1e-12)


# the kernels, under Triton's interpreter


def check_packing(pattern, scenes, **options):
    """Every scene alone has the bits that it has in a row, also where all else in the row is NaN."""
    layout = Layout(scenes)
    row = pattern(layout)
    tensors = draw(row, **options)

    def run(plan, tensors):
        inputs = [x.detach().requires_grad_() for x in tensors[:3]]
        return kernels._run(lambda *x: attend(*x, plan, kernel="triton"), inputs, tensors[3])

    packed = run(row, tensors)
    for scene, span in zip(scenes, layout.scene_spans, strict=True):
        poisoned = [torch.full_like(x, float("nan")) for x in tensors]
        for x, clean in zip(poisoned, tensors, strict=True):
            x[:, span.slice] = clean[:, span.slice]
        alone = run(pattern(Layout([scene])), [x[:, span.slice].contiguous() for x in tensors])
        for a, p, q in zip(alone, packed, run(row, poisoned), strict=True):
            assert a.isfinite().all()
            assert torch.equal(p[:, span.slice], a)
            assert torch.equal(q[:, span.slice], a)


@pytest.fixture(scope="class")
def interpreter():
    """Triton decides whether to interpret a kernel when it is defined: for these tests ours, and its own, are anew."""
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, the kernels run on it")
    tl = pytest.importorskip("triton.language")
    compiled = sys.modules.pop(KERNELS, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name, step in (("max", tl.standard._elementwise_max), ("sum", tl.standard._sum_combine)):
            patch.setattr(tl, name, lambda x, axis, step=step: tl.reduce(x, axis, step))
        patch.setattr(triton_attention, "FLOAT32_TILES", Tiling(32, 16, 4, 1))
        for key in TILES:
            patch.setitem(TILES, key, Tiling(32, 16, 4, 1))
        yield
    sys.modules.pop(KERNELS, None)
    if compiled is not None:
        sys.modules[KERNELS] = compiled


@pytest.fixture(autouse=True)
def announced(monkeypatch):
    """A registry of torch's kernels and ours alone, which forgets what it resolved."""

    class Plugin:
        @hookimpl
        def lct_kernels(self):
            return [SPEC]

    own = Registry()
    own.register(Plugin(), name="test")
    monkeypatch.setattr(attention, "registry", lambda: own)


def check(plan, tensors, scale=0.3):
    """Output and gradients are as near to float64's as the table of tolerances asks."""
    *inputs, dout = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = kernels._run(lambda *x: reference(*x, plan, scale), exact, dout.double())
    plain = kernels._run(lambda *x: kernels._eager(*x, plan, scale), inputs, dout)
    got = kernels._run(lambda *x: attend(*x, plan, kernel="triton", scale=scale), inputs, dout)
    for name, g, p, t in zip(("out", "dq", "dk", "dv"), got, plain, truth, strict=True):
        bound = BOUNDS[g.dtype]["kernel" if name == "out" else "kernel gradients"].given(error(p, t))
        assert error(g, t) <= bound, name
    return got


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @plans
    def test_outputs_and_gradients(self, plan):
        check(plan, draw(plan))

    @pytest.mark.parametrize("plan", [CAUSAL, GAP], ids=["context-causal", "gap"])
    def test_outputs_and_gradients_in_float16(self, plan):
        check(plan, draw(plan, batch=1, dtype=torch.float16))

    @pytest.mark.parametrize("head_dim", [32, 64, 128])
    def test_grouped_heads_of_every_size(self, head_dim, monkeypatch):
        plan = CAUSAL.rows(Range(20, 40))
        monkeypatch.setattr(triton_attention, "FLOAT32_TILES", Tiling(16, 32, 4, 1))
        check(plan, draw(plan, 4, 2, head_dim, batch=1))

    @plans
    def test_log_sum_exp(self, plan):
        q, k, v, _ = draw(plan, batch=1)
        out, lse = triton_attention.triton_attention_lse(q, k, v, plan, 0.3)
        assert (lse.dtype, lse.shape) == (torch.float32, (1, 2, plan.queries))
        assert error(lse, lse_of(q, k, plan, 0.3)) <= 1e-6
        assert torch.equal(out, attend(q, k, v, plan, kernel="triton", scale=0.3))

    @pytest.mark.parametrize("scale", [-0.3, 0.0])
    def test_scales_that_turn_or_level_the_order_of_scores(self, scale):
        plan = PLANS["two shots behind their history"]
        tensors = draw(plan, batch=1)
        check(plan, tensors, scale)
        _, lse = triton_attention.triton_attention_lse(*tensors[:3], plan, scale)
        assert error(lse, lse_of(*tensors[:2], plan, scale)) <= 1e-6

    def test_a_large_negative_scale_does_not_overflow(self):
        plan = PLANS["two shots behind their history"]
        q, k, v, _ = draw(plan, batch=1)
        exact = reference(q.double(), k.double(), v.double(), plan, -20.0)
        bound = BOUNDS[torch.float32]["kernel"].given(error(kernels._eager(q, k, v, plan, -20.0), exact))
        assert error(attend(q, k, v, plan, kernel="triton", scale=-20.0), exact) <= bound
        assert error(triton_attention.triton_attention_lse(q, k, v, plan, -20.0)[0], exact) <= bound

    def test_strided_inputs_give_the_bits_of_contiguous_ones(self):
        plan = own_shot(Layout([[Shot(0, (1, 1, 21)), Shot(0, (1, 1, 9))]]))
        q, k, v, dout = draw(plan, 2, 2, batch=1)
        expected = check(plan, (q, k, v, dout))
        fused = torch.stack((q, k, v), dim=2).unbind(2)
        heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        channels_apart = [x.mT.contiguous().mT for x in (q, k, v)]
        for views in (fused, heads_first, channels_apart):
            assert not any(x.is_contiguous() for x in views)
            got = check(plan, (*views, dout.mT.contiguous().mT))
            assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))

    def test_a_gradient_that_is_one_number_for_all(self):
        plan = PLANS["a shot behind its history"]
        q, k, v, dout = draw(plan, batch=1)
        check(plan, (q, k, v, torch.ones(()).expand_as(dout)))

    def test_keys_that_nobody_sees_are_never_read_and_every_output_is_written(self):
        unseen = ~GAP.dense().any(0)
        q, k, v, dout = draw(GAP, batch=1)
        expected = check(GAP, (q, k, v, dout))
        room = [torch.full((1, GAP.keys + 40, 1, 16), float("nan")) for _ in range(2)]
        for buffer, x in zip(room, (k, v), strict=True):
            x[:, unseen] = float("nan")
            buffer[:, 20 : 20 + GAP.keys] = x
        k, v = (buffer[:, 20 : 20 + GAP.keys].detach().requires_grad_() for buffer in room)
        try:
            torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
            assert q.new_empty(3).isnan().all()
            out = attend(q.requires_grad_(), k, v, GAP, kernel="triton", scale=0.3)
            got = (out, *torch.autograd.grad(out, (q, k, v), dout))
        finally:
            torch.use_deterministic_algorithms(False)
        for g, e in zip(got, expected, strict=True):
            assert torch.equal(g, e)
        for gradient in got[2:]:
            assert (gradient[:, unseen] == 0).all()

    @pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's, of the scenes that are NaN
    @pytest.mark.parametrize("pattern", [bidirectional, context_causal])
    def test_packing_changes_no_bit_of_a_scene_and_brings_it_no_nan(self, pattern):
        scenes = [[Shot(0, (1, 1, n)) for n in shots] for shots in ((5, 35), (18,), (33, 4))]
        check_packing(pattern, scenes, batch=1)

    def test_a_shot_does_not_change_by_a_bit_when_later_shots_do(self):
        q, k, v, _ = draw(CAUSAL, batch=1)
        before = attend(q, k, v, CAUSAL, kernel="triton")
        last = CAUSAL.segments[2].queries.slice
        for x in (q, k, v):
            x[:, last] += 1
        after = attend(q, k, v, CAUSAL, kernel="triton")
        untouched = torch.ones(CAUSAL.queries, dtype=torch.bool)
        untouched[last.start : SCENES.scene_spans[0].stop] = False
        assert torch.equal(after[:, untouched], before[:, untouched])
        assert not torch.equal(after[:, last], before[:, last])

    def test_gradients_of_some_inputs_are_those_of_all(self):
        plan = PLANS["a shot behind its history"]
        *inputs, dout = draw(plan, batch=1)
        every = check(plan, (*inputs, dout))[1:]
        for wanted in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)):
            some = [x.detach().requires_grad_(bool(w)) for x, w in zip(inputs, wanted, strict=True)]
            out = attend(*some, plan, kernel="triton", scale=0.3)
            got = torch.autograd.grad(out, [x for x in some if x.requires_grad], dout)
            expected = [g for g, w in zip(every, wanted, strict=True) if w]
            assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True)), wanted

    def test_no_kernel_runs_for_a_gradient_that_nobody_wants(self, monkeypatch):
        plan = PLANS["a shot behind its history"]
        q, k, v, dout = draw(plan, batch=1)
        kernels = triton_attention._kernels()
        monkeypatch.setattr(kernels, "keys_backward", None)
        out = attend(q.requires_grad_(), k, v, plan, kernel="triton")
        (dq,) = torch.autograd.grad(out, q, dout)
        monkeypatch.undo()
        assert dq.isfinite().all()

    def test_offsets_beyond_int32(self):
        # rows of 2²² channels of which a few are used: 5 GB of addresses, of which hardly any memory is touched
        plan = context_causal(Layout([[Shot(0, (1, 1, 300)), Shot(0, (1, 1, 230))]]))
        wide = torch.empty(1, plan.queries, 1, 2**22, dtype=torch.float16)
        assert wide.numel() > 2**31
        *inputs, dout = draw(plan, 1, 1, batch=1, dtype=torch.float16)
        for i, x in enumerate(inputs):
            wide[..., 16 * i : 16 * i + 16] = x
        with pytest.MonkeyPatch.context() as patch:
            for key in TILES:
                patch.setitem(TILES, key, Tiling(128, 128, 4, 1))
            check(plan, (*wide[..., :48].split(16, dim=3), dout))

    def test_conformance(self, monkeypatch):
        served = {"behind": PLANS["two shots behind their history"]}
        monkeypatch.setattr(kernels, "_plans", lambda: served)
        findings = list(kernels.kernel_conformance("triton", dtypes=[torch.float32]))
        assert len(findings) == 2 * 4  # head counts; output and three gradients
        for finding in findings:
            assert finding.holds, finding

    def test_a_table_is_made_once_for_a_plan(self):
        triton_attention._table.cache_clear()
        plan = PLANS["a shot behind its history"]
        tensors = draw(plan, batch=1)
        for _ in range(2):
            check(plan, tensors)
        assert triton_attention._table.cache_info().misses == 3

    def test_bfloat16_is_refused(self):
        q, k, v, _ = draw(CAUSAL, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"dtype torch\.bfloat16: Triton's interpreter"):
            attend(q, k, v, CAUSAL, kernel="triton")


# what it refuses

TOLD = Layout([[Shot(3, (1, 4, 5)), Shot(2, (2, 3, 4))]])


def request(plan=CAUSAL, device="cuda", dtype=torch.bfloat16, head_dim=128):
    return KernelRequest(plan, torch.device(device), dtype, 4, 4, head_dim, True)


REFUSED = {
    "device cpu: expected cuda": ("cpu", request(device="cpu", dtype=torch.float32)),
    "hardware sm_75: expected an NVIDIA GPU of sm_80 or later; use sdpa": ("sm_75", request()),
    "hardware cuda: expected an NVIDIA GPU": ("cuda", request()),
    "dtype torch.float64": ("sm_90", request(dtype=torch.float64)),
    "hardware sm_89: expected one of sm_80, sm_90, sm_100, sm_103 for the shared memory": (
        "sm_89",
        request(),
    ),
    "head_dim 96: expected one of (16, 32, 64, 128)": ("sm_90", request(head_dim=96)),
    "gathered plan": ("sm_90", request(plan=selected_history(SCENES, [[], [0], [0], [0, 2], []]))),
}


@has_triton
@pytest.mark.parametrize("reason", REFUSED)
def test_it_refuses_with_the_reason(reason, monkeypatch):
    hardware, asked = REFUSED[reason]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(KernelRequest, "hardware", hardware)
    (refusal,) = SPEC.refusals(asked)
    assert refusal.startswith(reason)


@has_triton
@pytest.mark.parametrize("hardware", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_serves_what_every_query_sees_one_interval_of(hardware, dtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(KernelRequest, "hardware", hardware)
    for plan in (bidirectional(SCENES), CAUSAL, own_text(TOLD), CAUSAL.rows(SCENES.spans[1])):
        assert SPEC.refusals(request(plan=plan, dtype=dtype, head_dim=64)) == []


def test_it_refuses_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(KernelRequest, "hardware", "sm_90")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert any(reason.startswith("no triton") for reason in SPEC.refusals(request()))


# the kernels, on a GPU

RAGGED_SCENES = [[Shot(0, (1, 1, n)) for n in shots] for shots in ((700, 1, 333, 512), (90, 260))]
RAGGED = context_causal(Layout(RAGGED_SCENES))


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("plan", [RAGGED, RAGGED.rows(Range(701, 1546)), GAP], ids=["scenes", "behind", "gap"])
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_outputs_and_gradients(self, plan, head_dim, dtype):
        check(plan, draw(plan, 4, 2, head_dim, dtype=dtype, device="cuda"), head_dim**-0.5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_conformance(self, dtype, monkeypatch):
        served = {name: plan for name, plan in kernels._plans().items() if plan.form != "gathered"}
        monkeypatch.setattr(kernels, "_plans", lambda: served)
        for finding in kernels.kernel_conformance("triton", device="cuda", dtypes=[dtype]):
            assert finding.holds, finding

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_log_sum_exp(self, dtype):
        q, k, v, _ = draw(RAGGED, head_dim=64, dtype=dtype, device="cuda")
        _, lse = triton_attention.triton_attention_lse(q, k, v, RAGGED, 0.125)
        assert error(lse, lse_of(q, k, RAGGED, 0.125)) <= 1e-5

    def test_runs_give_the_same_bits(self):
        tensors = draw(RAGGED, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
        first, second = (check(RAGGED, tensors) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_packing_changes_no_bit_of_a_scene_and_brings_it_no_nan(self, head_dim):
        check_packing(context_causal, RAGGED_SCENES, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")

    def test_a_second_call_waits_for_no_copy(self):
        *inputs, dout = draw(RAGGED, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
        inputs = [x.requires_grad_() for x in inputs]

        def run():
            return torch.autograd.grad(attend(*inputs, RAGGED, kernel="triton"), inputs, dout)

        run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_on_a_device_that_is_not_the_current_one(self):
        check(RAGGED, draw(RAGGED, 4, 2, 64, dtype=torch.bfloat16, device="cuda:1"))

    def test_offsets_beyond_int32(self):
        if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
            pytest.skip("needs 40 GB of memory")
        plan = context_causal(Layout([[Shot(0, (1, 1, 600)), Shot(0, (1, 1, 500))]]))
        wide = torch.empty(1, plan.queries, 1, 2**22, dtype=torch.bfloat16, device="cuda")
        assert wide.numel() > 2**31
        *inputs, dout = draw(plan, 1, 1, 64, batch=1, dtype=torch.bfloat16, device="cuda")
        for i, x in enumerate(inputs):
            wide[..., 64 * i : 64 * i + 64] = x
        check(plan, (*wide[..., :192].split(64, dim=3), dout))


# the kernels, launched on a Hopper GPU that need not be there

#: Bytes of registers that a thread spills; the other kernels spill none.
SPILLED = {(128, "keys_backward"): 32}


class _Hopper:
    """A driver of Triton's that knows what to compile for, and no more."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """The kernels that were compiled because they were to be launched, by name; none of them runs."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("all of this run's kernels are interpreted")
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", _Hopper())
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    kernels, run = {}, triton.JITFunction.run

    def compile_only(self, *args, warmup, **options):
        kernels[self.fn.__name__] = run(self, *args, warmup=True, **options)

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    yield kernels
    sys.modules.pop(KERNELS, None)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_launches_compile_for_sm_90_with_tensor_cores_that_never_wait_and_hardly_a_spill(
    head_dim, launched, monkeypatch, capsys
):
    import triton

    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    fused = torch.randn(1, CAUSAL.queries, 3, 24, head_dim, dtype=torch.bfloat16, requires_grad=True)
    out = triton_attention.triton_attention(*fused.unbind(2), CAUSAL, head_dim**-0.5)
    out.backward(torch.ones_like(out))
    log = capsys.readouterr().out
    stacks = dict(re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame", log, re.DOTALL))
    assert launched.keys() == stacks.keys() == {"forward", "row_sums", "queries_backward", "keys_backward"}
    assert "wgmma" not in log  # no word that it was put in line or made to wait
    for name, kernel in launched.items():
        assert int(stacks[name]) <= SPILLED.get((head_dim, name), 0)
        assert kernel.metadata.shared <= 227 * 1024
        assert name == "row_sums" or "wgmma.mma_async" in kernel.asm["ptx"]
        assert name == "row_sums" or "cp.async" in kernel.asm["ptx"]
