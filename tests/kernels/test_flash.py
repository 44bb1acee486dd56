"""The flash-attention libraries: what they are called with, what is refused, and on a GPU."""

import ctypes
import importlib
import sys
import types

import pytest
import torch
from torch.library import Library

from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import context_causal
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins.hooks import KernelRequest
from lct_core.plugins.torch_kernels import reference
from lct_core.testing.tolerances import BOUNDS, error
from lct_plugins import flash, varlen, varlen_naive
from tests.kernels.plans import CAUSAL, PLANS, check, draw, forget, plans, scheduled, schedules


@pytest.fixture(autouse=True)
def _no_tables_of_other_tests():
    forget()
    yield
    forget()


# what the libraries are called with, their operators and functions played by the readable provider


FWD3 = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0., bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BWD3 = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0., bool deterministic=False, int sm_margin=0) -> "
)
RETURNS3 = {
    "xformers 0.0.34": "(Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)",
    "flash-attention since 2025-11": "(Tensor, Tensor, Tensor, Tensor, Tensor)",
}
USED3 = {
    *("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"),
    *("max_seqlen_q", "max_seqlen_k", "softmax_scale", "num_splits", "deterministic"),
}


def played(sequences):
    """Sequences as a library got them, or None for a dense call."""
    return None if sequences[0] is None else varlen.Sequences(*sequences)


@pytest.fixture(params=RETURNS3)
def flash3(request):
    """FA3's operators on a CPU, as two builds declare them; yields its splits of keys and its rows backward by call."""
    calls = types.SimpleNamespace(splits=[], rows=[])

    def given(operator, args):
        """The arguments by name; those that are not looked at must be the defaults."""
        declared = getattr(torch.ops.flash_attn_3, operator).default._schema.arguments
        values = {x.name: x.default_value for x in declared} | dict(zip([x.name for x in declared], args, strict=False))
        assert all(values[x.name] == x.default_value for x in declared if x.name not in USED3)
        where = "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q", "max_seqlen_k"
        return types.SimpleNamespace(**values), played([values[name] for name in where])

    def fwd(*args):
        x, sequences = given("fwd", args)
        calls.splits.append(x.num_splits)
        out, lse = varlen_naive.forward(x.q, x.k, x.v, sequences, x.softmax_scale)
        return out, lse, out.new_empty(0), out.new_empty(0)

    def bwd(*args):
        x, sequences = given("bwd", args)
        assert x.deterministic == torch.are_deterministic_algorithms_enabled()
        assert x.seqused_k is None
        calls.rows.append(len(x.q))
        shares = varlen_naive.backward(x.dout, x.q, x.k, x.v, x.out, x.softmax_lse, sequences, x.softmax_scale)
        for gradient, share in zip((x.dq, x.dk, x.dv), shares, strict=True):
            gradient.copy_(share)
        more = len(torch.ops.flash_attn_3.bwd.default._schema.returns) - 5
        return *(x.dq, x.dk, x.dv)[:more], *(share.new_empty(0) for _ in range(5))

    library = Library("flash_attn_3", "FRAGMENT")
    if not flash._has_flash3():
        library.define(FWD3)
        library.define(BWD3 + RETURNS3[request.param])
    library.impl("fwd", fwd, "CPU")
    library.impl("bwd", bwd, "CPU")
    yield calls
    library._destroy()


@pytest.fixture
def flash2(monkeypatch):
    """The functions of flash-attn 2.8.3 that are called, with their signatures."""
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        options = dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
        assert options == (0.0, False, -1, -1, 0.0, None, False)
        return *varlen_naive.forward(q, k, v, None, softmax_scale), None, None

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        options = dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
        assert options == (0.0, False, -1, -1, 0.0, None, False)
        sequences = varlen.Sequences(cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k)
        return *varlen_naive.forward(q, k, v, sequences, softmax_scale), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        options = dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic
        assert options == (0.0, False, -1, -1, 0.0, None, torch.are_deterministic_algorithms_enabled())
        shares = varlen_naive.backward(dout, q, k, v, out, softmax_lse, None, softmax_scale)
        for gradient, share in zip((dq, dk, dv), shares, strict=True):
            gradient.copy_(share)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        options = dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic
        assert options == (0.0, False, -1, -1, 0.0, None, torch.are_deterministic_algorithms_enabled())
        sequences = varlen.Sequences(cu_seqlens_q, cu_seqlens_k, None, max_seqlen_q, max_seqlen_k)
        shares = varlen_naive.backward(dout, q, k, v, out, softmax_lse, sequences, softmax_scale)
        for gradient, share in zip((dq, dk, dv), shares, strict=True):
            gradient.copy_(share)

    for function in (
        _flash_attn_forward,
        _flash_attn_varlen_forward,
        _flash_attn_backward,
        _flash_attn_varlen_backward,
    ):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    monkeypatch.setattr(flash.metadata, "version", lambda name: "2.8.3.post1")


@pytest.fixture
def flash_torch():
    """Torch's own operators, which have no CPU implementation."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, debug, *, scale, seqused_k=None):
        assert (dropout_p, is_causal, debug) == (0.0, False, False)
        sequences = played([cu_q, cu_k, seqused_k, max_q, max_k])
        return *varlen_naive.forward(q, k, v, sequences, scale), *(q.new_empty(0) for _ in range(3))

    def backward(
        dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale
    ):  # fmt: skip
        assert (dropout_p, is_causal) == (0.0, False)
        return varlen_naive.backward(
            dout, q, k, v, out, lse, played([cu_q, cu_k, None, max_q, max_k]), scale
        )  # fmt: skip

    library = Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", forward)
    library.impl("_flash_attention_backward", backward)
    yield
    library._destroy()


@plans
def test_flash3_is_called_by_its_schema(plan, flash3):
    check(flash.FLASH3.load(), draw(plan), plan)


@plans
def test_flash2_is_called_by_its_signatures(plan, flash2):
    check(flash.FLASH2.load(), draw(plan), plan)


@plans
def test_flash_torch_is_called_by_its_schema(plan, flash_torch):
    check(flash.FLASH_TORCH.load(), draw(plan), plan)


def test_deterministic_gradients_are_asked_for(flash3, flash2):
    torch.use_deterministic_algorithms(True)
    try:
        for plan in PLANS.values():
            check(flash.FLASH3.load(), draw(plan), plan)
            check(flash.FLASH2.load(), draw(plan), plan)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def processors(monkeypatch):
    """As many multiprocessors as the test says, 132 without a word: those of an H100, H200 or H800."""

    def there_are(number):
        monkeypatch.setattr(flash, "_processors", lambda device: number)

    there_are(132)
    return there_are


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "head_dim", "splits"),
    [
        (1800, 16_200, 24, 128, 1),  # benchmarks: C1, 2.7 waves
        (29_400, 264_600, 24, 128, 1),  # C2
        (29_400, 588_000, 16, 128, 1),  # C3
        (1500, 300_000, 16, 128, 2),  # C4, 1.45 waves
        (1500, 300_000, 16, 64, 1),  # 0.97 waves of larger tiles
        (128, 300_000, 16, 128, 7),
        (128, 8 * 4096 - 1, 16, 128, 6),
        (1500, 2 * 4096 - 1, 16, 128, 1),  # too few keys to split
    ],
)
def test_flash3_splits_the_keys_until_few_processors_idle(queries, keys, heads, head_dim, splits, processors):
    for batch in (1, 2):
        q = torch.empty(batch, queries, heads // batch, head_dim, device="meta")
        assert flash.splits(q, keys) == splits


def test_flash3_splits_dense_calls_alone(flash3, processors):
    processors(2)
    both = AttentionPlan(3, 8192, (Segment(Range(0, 2), (Range(0, 8191),)), Segment(Range(2, 3), (Range(0, 8192),))))
    with torch.no_grad():
        for plan in (both, both.rows(Range(0, 2)), both.rows(Range(2, 3))):
            flash.FLASH3.load()(*draw(plan, 3, 1, 2, batch=1), plan, 1.0)
    assert flash3.splits == [1, 1, 2]


def test_flash3_batches_stay_below_int32(flash3, monkeypatch):
    plan = PLANS["one scene"]
    distance = (plan.queries + 128) * 4 * 256
    for last in (distance, distance - 1):
        monkeypatch.setattr(flash, "_LAST", last)
        check(flash.FLASH3.load(), draw(plan), plan)
    assert flash3.rows == [2, 1, 1]


@plans
@schedules
def test_flash_torch_never_waits_for_the_device(plan, schedule):
    # torch's own operators as they are, on tensors without values: to read one would raise
    with scheduled(schedule):
        tensors = [
            torch.empty(2, n, h, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
            for n, h in ((plan.queries, 4), (plan.keys, 2), (plan.keys, 2))
        ]
        out = flash.FLASH_TORCH.load()(*tensors, plan, 0.125)
        gradients = torch.autograd.grad(out, tensors, torch.empty_like(out))
    for got, like in zip((out, *gradients), (tensors[0], *tensors), strict=True):
        assert (got.shape, got.dtype, got.device) == (like.shape, like.dtype, like.device)


# refusals


@pytest.fixture
def on(monkeypatch):
    """Ask for a kernel's refusals on some hardware."""

    def refusals(spec, hardware, head_dim=128, dtype=torch.bfloat16, grad=True):
        monkeypatch.setattr("lct_core.plugins.hooks._hardware", lambda device: hardware)
        return spec.refusals(KernelRequest(CAUSAL, torch.device("cuda", 0), dtype, 4, 2, head_dim, grad))

    return refusals


@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_they_serve(head_dim, on, flash3, flash2):
    for dtype in (torch.float16, torch.bfloat16):
        assert on(flash.FLASH3, "sm_90", head_dim, dtype) == []
        for hardware in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"):
            assert on(flash.FLASH2, hardware, head_dim, dtype) == []
            assert on(flash.FLASH_TORCH, hardware, head_dim, dtype) == []


@pytest.mark.parametrize("spec", [flash.FLASH3, flash.FLASH2, flash.FLASH_TORCH], ids=lambda spec: spec.name)
def test_they_refuse(spec, on, flash3, flash2):
    expected = "a Hopper GPU (sm_90)" if spec is flash.FLASH3 else "an NVIDIA GPU from sm_80 on"
    for hardware in ("cpu", "cuda", "mps", "sm_75"):  # "cuda" without a capability is a torch for ROCm
        assert on(spec, hardware) == [f"hardware {hardware}: expected {expected}; use sdpa"]
    cast = "cast q, k and v or use sdpa"
    assert on(spec, "sm_90", dtype=torch.float32) == [f"dtype torch.float32: expected float16 or bfloat16; {cast}"]
    for head_dim in (60, 264):
        assert on(spec, "sm_90", head_dim) == [f"head_dim {head_dim}: expected a multiple of 8, at most 256; use sdpa"]
    assert len(on(spec, "cpu", 60, torch.float64)) == 3


def test_flash3_is_for_hopper_alone(on, flash3):
    for hardware in ("sm_80", "sm_100", "sm_120"):
        assert on(flash.FLASH3, hardware) == [f"hardware {hardware}: expected a Hopper GPU (sm_90); use sdpa"]


def test_flash3_refuses_deterministic_large_heads(on, flash3):
    torch.use_deterministic_algorithms(True)
    try:
        (reason,) = on(flash.FLASH3, "sm_90", 256)
        assert reason == "head_dim 256: expected at most 192 for deterministic gradients; use flash2 or sdpa"
        assert on(flash.FLASH3, "sm_90", 192) == on(flash.FLASH3, "sm_90", 256, grad=False) == []
    finally:
        torch.use_deterministic_algorithms(False)


def test_flash_torch_refuses_a_torch_without_it(on, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert on(flash.FLASH_TORCH, "sm_90") == [
        f"torch {torch.__version__} is built without FlashAttention: install one for CUDA"
    ]


@pytest.mark.parametrize("version", [None, "2.7.4.post1", "2.8.3", "4.0"])
def test_flash2_refuses_what_is_missing_old_or_broken(version, on, monkeypatch):
    def installed(name):
        if version is None:
            raise flash.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(flash.metadata, "version", installed)
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    (reason,) = on(flash.FLASH2, "sm_90")
    if version is None:
        assert reason == "flash-attn is not installed: pip install lct-core[flash-attn]"
    elif version.startswith("2.7"):
        assert reason == "flash-attn 2.7.4.post1: expected 2.8 or newer; pip install -U flash-attn"
    else:
        assert reason.startswith("it cannot be loaded: ModuleNotFoundError: ")
        assert reason.endswith(f"install what is missing, or a build for torch {torch.__version__}")


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """A folder to install packages in, on a machine without FA3."""
    monkeypatch.setattr(flash, "_has_flash3", lambda: False)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn_3", "xformers", "nvidia"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()  # before those that the machine may have

    def install(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not a library")
        importlib.invalidate_caches()
        return path

    return install


def test_flash3_refuses_where_it_is_not_installed(packages, on, monkeypatch):
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    (reason,) = on(flash.FLASH3, "sm_90")
    assert reason.startswith("FlashAttention-3 is not installed: build flash_attn_3 ")
    assert len(on(flash.FLASH3, "sm_80", 60)) == 3
    with pytest.raises(ImportError, match=r"^FlashAttention-3 is not installed"):
        flash.FLASH3.load()


def test_flash3_refuses_a_library_that_cannot_be_loaded(packages, on):
    library = packages("flash_attn_3/_C.abi3.so")
    (reason,) = on(flash.FLASH3, "sm_90")
    assert reason.startswith("it cannot be loaded: OSError: ")
    assert str(library) in reason
    (reason,) = on(flash.FLASH3, "cpu")  # it is not even tried
    assert reason.startswith("hardware cpu: ")


def test_any_error_in_loading_is_a_refusal(packages, on, monkeypatch):
    def load(path):
        raise AttributeError("a build for another torch")

    packages("flash_attn_3/_C.abi3.so")
    monkeypatch.setattr(torch.ops, "load_library", load)
    (reason,) = on(flash.FLASH3, "sm_90")
    assert reason.startswith("it cannot be loaded: AttributeError: a build for another torch; install what is missing")


def test_where_flash3_is_loaded_from(packages, monkeypatch):
    loaded = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode: loaded.append((path, mode)))
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    bundled = packages("xformers/flash_attn_3/_C.so")
    flash.FLASH3.load()
    runtime = packages("nvidia/cuda_runtime/lib/libcudart.so.12")
    flash.FLASH3.load()
    own = packages("flash_attn_3/_C.cpython-311-x86_64-linux-gnu.so")
    flash.FLASH3.load()
    preloaded = (str(runtime), ctypes.RTLD_GLOBAL)
    assert loaded == [bundled, preloaded, bundled, preloaded, own]


# on a GPU


@pytest.fixture(params=[flash.FLASH3, flash.FLASH2, flash.FLASH_TORCH], ids=lambda spec: spec.name)
def on_gpu(request):
    """Each of the three that this machine can run."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    asked = KernelRequest(CAUSAL, torch.device("cuda", 0), torch.bfloat16, 4, 2, 128, True)
    if reasons := request.param.refusals(asked):
        pytest.skip("; ".join(reasons))
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@schedules
def test_gpu_kernels_and_their_gradients(on_gpu, head_dim, dtype, schedule, conforms):
    with scheduled(schedule):
        conforms(on_gpu, device="cuda", dtypes=[dtype], head_dim=head_dim)


LONG = context_causal(Layout([[Shot(0, (1, 1, n)) for n in (700, 33, 1, 1290, 128, 257)], [Shot(0, (1, 1, 500))]]))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gpu_overlapping_keys_equal_dense_calls(on_gpu, head_dim):
    # no library documents that key ranges may overlap where seqused_k is given
    kernel = on_gpu.load()
    q, k, v = (x.detach() for x in draw(LONG, 8, 2, head_dim, dtype=torch.bfloat16, device="cuda"))
    alone = []
    for queries, keys in LONG.segments:
        shot = AttentionPlan(queries.size, LONG.keys, (Segment(Range(0, queries.size), keys),))
        alone.append(kernel(q[:, queries.slice], k, v, shot, 0.1))
    truth = reference(q.double(), k.double(), v.double(), LONG, 0.1)
    bound = BOUNDS[torch.bfloat16]["kernel"].given(error(torch.cat(alone, dim=1), truth))
    assert error(kernel(q, k, v, LONG, 0.1), truth) <= bound


@pytest.mark.gpu
def test_gpu_later_shots_change_nothing(on_gpu):
    kernel = on_gpu.load()
    q, k, v = (x.detach() for x in draw(LONG, 8, 2, 128, dtype=torch.bfloat16, device="cuda"))
    out = kernel(q, k, v, LONG, 0.1)
    for queries, (keys,) in LONG.segments[:-1]:
        poisoned = k.clone(), v.clone()
        for x in poisoned:
            x[:, keys.stop :] = torch.finfo(x.dtype).max
        assert torch.equal(kernel(q, *poisoned, LONG, 0.1)[:, queries.slice], out[:, queries.slice])


@pytest.mark.gpu
@schedules
def test_gpu_a_warm_call_never_waits_for_the_device(on_gpu, schedule):
    kernel, mode = on_gpu.load(), torch.cuda.get_sync_debug_mode()
    with scheduled(schedule):
        for plan in PLANS.values():
            tensors = draw(plan, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
            gradient = torch.zeros_like(tensors[0])
            torch.autograd.grad(kernel(*tensors, plan, 0.1), tensors, gradient)  # makes the tables
            torch.cuda.set_sync_debug_mode("error")
            try:
                torch.autograd.grad(kernel(*tensors, plan, 0.1), tensors, gradient)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
