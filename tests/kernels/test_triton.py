"""The Triton kernel: interpreted, compiled, and on a GPU."""

import os
import re
import sys

import pytest
import torch

from lct_core.attention import attend
from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, own_shot
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins.torch_kernels import reference
from lct_core.testing import kernels
from lct_core.testing.tolerances import BOUNDS, error
from lct_plugins import triton_attention
from lct_plugins.triton_attention import TILES, Tiling
from tests.kernels.triton_plans import CAUSAL, SCENES, draw, lse_of

pytestmark = [pytest.mark.internals, pytest.mark.usefixtures("only_triton")]

KERNELS = "lct_plugins._triton_kernels"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
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

    def test_unseen_keys_are_not_read_and_all_outputs_are_written(self):
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
    def test_packing_changes_no_bit_of_a_scene(self, pattern):
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
    def test_packing_changes_no_bit_of_a_scene(self, head_dim):
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
def test_launches_compile_well_for_sm_90(head_dim, launched, monkeypatch, capsys):
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
