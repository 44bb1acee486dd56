"""Kernels that are opt-in until somebody ran them: what they hand to libraries that are not here.

The libraries are stood in for by modules with their signatures and the semantics that they document.
"""

import sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given

from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, own_and_global_text, selected_history
from lct_core.plugins import hooks
from lct_core.plugins.hooks import KernelRequest
from lct_core.plugins.torch_kernels import reference
from lct_plugins import cudnn_flex, flash4, magi, varlen_naive
from lct_plugins.varlen import Sequences
from tests.test_rectangles import plans

SCENE = [Shot(3, (1, 2, 2), role="global"), Shot(2, (1, 2, 2)), Shot(0, (2, 3, 3)), Shot(5, (1, 1, 1))]
ROW = Layout([SCENE, [Shot(2, (1, 3, 3)), Shot(1, (1, 1, 1))]])
PLANS = {
    "one scene": bidirectional(Layout([SCENE])),
    "bidirectional": bidirectional(ROW),
    "context-causal": context_causal(ROW),
    "behind a history": context_causal(ROW).rows(Range(ROW.spans[2].start, ROW.tokens)),
    "history with gaps": selected_history(ROW, [[], [0], [0], [0, 2], [], [4]]),
    "own and global text": own_and_global_text(Layout([SCENE])),
}
CPU = torch.device("cpu")
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
grouped = pytest.mark.parametrize("kv_heads", [4, 2])


def check(kernel, plan, kv_heads, batch=2):
    """Output and gradients against the reference, in float64, on tensors whose last axis has any stride."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, h, 8) for n, h in ((plan.queries, 4), (plan.keys, kv_heads), (plan.keys, kv_heads))]
    tensors = [torch.randn(s[::-1], generator=generator, dtype=torch.float64).permute(3, 2, 1, 0) for s in shapes]
    tensors = [x.requires_grad_() for x in tensors]
    gradient = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    got, expected = (run(*tensors, plan, 0.3) for run in (kernel, reference))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    for g, e in zip(*(torch.autograd.grad(out, tensors, gradient) for out in (got, expected)), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-13)


def masked(q, k, v, mask, scale):
    """Attention written out, for ``[batch, tokens, heads, head_dim]`` and any mask ``[batch, queries, keys]``."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def install(monkeypatch, path, **attributes):
    """A module for this test, with all of its parents."""
    names = path.split(".")
    for i in range(len(names)):
        monkeypatch.setitem(sys.modules, ".".join(names[: i + 1]), ModuleType(names[i]))
    vars(sys.modules[path]).update(attributes)


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def request(*, plan=PLANS["one scene"], dtype=torch.bfloat16, head_dim=64, grad=True):
    return KernelRequest(plan, CPU, dtype, 4, 4, head_dim, grad)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(hooks, "_hardware", lambda device: "sm_90")


# cuDNN


def seen(ends, keys):
    """cuDNN's documented semantics: ``[0, e0) ∪ [e1, e2) ∪ ...`` for every query, for ``[ends, queries]``."""
    place = torch.arange(keys)
    mask = place < ends[0, :, None]
    for start, stop in zip(ends[1::2], ends[2::2], strict=True):
        mask |= (start[:, None] <= place) & (place < stop[:, None])
    return mask


@given(plans())
def test_intervals_are_the_plan(plan):
    ends = cudnn_flex.intervals(plan)
    assert ends.dtype == torch.int32
    assert len(ends) % 2 == 1
    assert torch.equal(seen(ends.long(), plan.keys), plan.dense())


def test_a_scene_takes_one_end_and_scenes_side_by_side_three():
    numbers = {name: len(cudnn_flex.intervals(plan)) for name, plan in PLANS.items()}
    assert numbers == {
        "one scene": 1,
        "bidirectional": 3,
        "context-causal": 3,
        "behind a history": 3,
        "history with gaps": 3,
        "own and global text": 3,
    }
    assert len(cudnn_flex.intervals(context_causal(Layout([SCENE])))) == 1


@pytest.fixture
def cudnn(monkeypatch):
    """``cudnn.flex_attention`` of nvidia-cudnn-frontend 1.32.0."""
    made = []

    def create_mask_plan(
        mask_func,
        q,
        k,
        v,
        *,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        pack_gqa=None,
        build_backward=None,
        _fwd_variant=None,
    ):
        batch, queries = q.shape[:2]
        assert mask_func.dtype == torch.int32
        assert mask_func.is_contiguous()
        assert mask_func.shape[::2] == (1, batch * queries)
        assert mask_func.shape[1] % 2 == 1
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        mask = seen(mask_func[0], k.shape[1]).unflatten(0, (batch, queries))
        made.append(SimpleNamespace(mask=mask, backward=build_backward, of=[(*x.shape, x.dtype) for x in (q, k, v)]))
        return made[-1]

    def flex_attn_func(
        q, k, v, *, mask_plan, softmax_scale=None, deterministic=False, return_lse=False, return_max_logit=False
    ):
        assert mask_plan.of == [(*x.shape, x.dtype) for x in (q, k, v)]
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert mask_plan.backward or not (torch.is_grad_enabled() and q.requires_grad)
        return masked(q, k, v, mask_plan.mask, softmax_scale)

    install(monkeypatch, "cudnn.flex_attention", create_mask_plan=create_mask_plan, flex_attn_func=flex_attn_func)
    cudnn_flex._mask_plan.cache_clear()
    yield made
    cudnn_flex._mask_plan.cache_clear()


@every_plan
@grouped
def test_cudnn_flex(cudnn, deterministic, plan, kv_heads):
    check(cudnn_flex.SPEC.load(), plan, kv_heads)


def test_cudnn_plans_are_made_once(cudnn):
    plan = PLANS["context-causal"]
    q, k, v = (torch.zeros(2, plan.keys, 4, 8).requires_grad_() for _ in range(3))
    for _ in range(2):
        cudnn_flex.cudnn_flex(q, k, v, plan, 0.3)
        with torch.no_grad():
            cudnn_flex.cudnn_flex(q, k, v, plan, 0.3)
    assert [made.backward for made in cudnn] == [True, False]


@pytest.mark.parametrize(("found", "refused"), [("1.28.9", True), ("1.29.0", False), ("1.32.0", False), ("2.0", False)])
def test_cudnn_flex_needs_a_frontend_with_the_kernels(monkeypatch, hopper, found, refused):
    monkeypatch.setattr(cudnn_flex, "version", lambda name: found)
    reasons = cudnn_flex.SPEC.refusals(request())
    assert len(reasons) == refused
    assert all(r.startswith(f"nvidia-cudnn-frontend: found {found}, expected 1.29 or later; pip") for r in reasons)


# MagiAttention


@given(plans())
def test_pairs_of_ranges_are_the_plan(plan):
    counts = torch.zeros(plan.queries, plan.keys, dtype=torch.int64)
    q_ranges, k_ranges = magi.pairs(plan, CPU)
    assert q_ranges.dtype == k_ranges.dtype == torch.int32
    for queries, keys in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        counts[slice(*queries), slice(*keys)] += 1
    assert torch.equal(counts, plan.dense().long())


@pytest.fixture
def magi_attention(monkeypatch):
    """``magi_attention.functional`` at 2c641357."""
    calls = []

    def flex_flash_attn_func(
        q,
        k,
        v,
        q_ranges=None,
        k_ranges=None,
        attn_type_map=None,
        *,
        index_attn_indices=None,
        q_block_size=1,
        k_block_size=1,
        sink=None,
        sink_layout="sh",
        softmax_scale=None,
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
        disable_fwd_atomic_reduction=False,
        disable_bwd_dkv_atomic_reduction=False,
        ref_block_size=None,
        max_seqlen_q=None,
        auto_range_merge=False,
        swap_ab=False,
        pack_gqa=False,
        cat_gqa=False,
        sparse_load=False,
        index_attn=False,
        swap_bwd_qk_loop=False,
        return_max_logits=False,
    ):
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        mask = torch.zeros(1, len(q), len(k), dtype=torch.bool)
        for queries, keys in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
            mask[0, slice(*queries), slice(*keys)] = True
        repeated = len(q_ranges.unique(dim=0)) < len(q_ranges)
        assert not (disable_fwd_atomic_reduction and repeated)
        assert attn_type_map is None  # every query of a pair sees every key
        out = masked(q[None], k[None], v[None], mask, softmax_scale)[0]
        calls.append(SimpleNamespace(without_atomics=disable_fwd_atomic_reduction, out=out))
        return out, SimpleNamespace(lse=None, max_logits=None)

    install(monkeypatch, "magi_attention.functional", flex_flash_attn_func=flex_flash_attn_func)
    return calls


@every_plan
@grouped
@pytest.mark.parametrize("batch", [1, 2])
def test_magi(magi_attention, deterministic, plan, kv_heads, batch):
    check(magi.SPEC.load(), plan, kv_heads, batch)
    assert [call.without_atomics for call in magi_attention] == [plan.form != "gathered"] * batch


def test_magi_copies_no_output_of_a_single_entry(magi_attention):
    plan = PLANS["one scene"]
    q, k, v = (torch.zeros(1, plan.keys, 4, 8) for _ in range(3))
    out = magi.magi(q, k, v, plan, 0.3)
    assert out.data_ptr() == magi_attention[0].out.data_ptr()


def test_the_placeholder_of_magi_attention_is_refused(monkeypatch, hopper, tmp_path):
    monkeypatch.setattr(magi, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    (reason,) = magi.SPEC.refusals(request())
    assert reason.startswith("no magi_attention with its kernels")
    (tmp_path / "functional").mkdir()
    assert magi.SPEC.refusals(request()) == []


# FlashAttention-4


@pytest.fixture
def flash_attn(monkeypatch):
    """``flash_attn.cute.interface`` of flash-attn-4 4.0.0b36: its arguments in order, and of later ones some.

    It compiles for, and launches on, the current device.
    """
    current = []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)

    def sequences(cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k):
        if cu_seqlens_q is None:
            return None
        return Sequences(cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k)

    def _flash_attn_fwd(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        softcap=None,
        *,
        return_lse=False,
    ):
        assert return_lse
        assert current == [q.device]
        packed = sequences(cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k)
        return *varlen_naive.forward(q, k, v, packed, softmax_scale), None, None, None

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        *,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        deterministic=False,
    ):
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert current == [q.device]
        packed = sequences(cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k)
        return varlen_naive.backward(dout, q, k, v, out, lse, packed, softmax_scale)

    install(monkeypatch, "flash_attn.cute.interface", _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)


@every_plan
@grouped
def test_flash4(flash_attn, deterministic, plan, kv_heads):
    check(flash4.SPEC.load(), plan, kv_heads)


# what they refuse

SPECS = {"cudnn-flex": cudnn_flex.SPEC, "magi": magi.SPEC, "flash4": flash4.SPEC}


@pytest.fixture
def installed(monkeypatch, tmp_path):
    (tmp_path / "functional").mkdir()
    monkeypatch.setattr(magi, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    monkeypatch.setattr(cudnn_flex, "version", lambda name: "1.32.0")
    monkeypatch.setattr(flash4, "version", lambda name: "4.0.0b36")


@pytest.mark.parametrize("name", SPECS)
def test_each_is_asked_for_by_its_name_alone(name):
    assert SPECS[name].name == name
    assert SPECS[name].rank is None


@every_plan
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_each_serves_every_plan_on_hopper(installed, hopper, name, plan, head_dim):
    assert SPECS[name].refusals(request(plan=plan, head_dim=head_dim)) == []


@pytest.mark.parametrize("name", SPECS)
def test_each_says_what_is_missing(monkeypatch, name):
    def missing(name):
        raise PackageNotFoundError(name)

    for module in (cudnn_flex, flash4):
        monkeypatch.setattr(module, "version", missing)
    monkeypatch.setattr(magi, "find_spec", lambda name: None)
    package, hardware, dtype, head_dim = SPECS[name].refusals(request(dtype=torch.float32, head_dim=12))
    assert "install" in package or "build it from" in package
    assert hardware.startswith("hardware cpu: expected")
    assert "sm_90" in hardware
    assert hardware.endswith("; use sdpa")
    assert dtype == "dtype torch.float32: expected float16 or bfloat16; cast q, k and v or use sdpa"
    assert head_dim.startswith("head_dim 12: expected")
    assert head_dim.endswith("; use sdpa")


def test_who_serves_what_beyond_that(installed, monkeypatch):
    served = {}
    for hardware in ("sm_80", "sm_90", "sm_100", "sm_120"):
        monkeypatch.setattr(hooks, "_hardware", lambda device, hardware=hardware: hardware)
        for name, spec in SPECS.items():
            fits = [d for d in (8, 64, 96, 128, 136, 256) if not spec.refusals(request(head_dim=d))]
            served.setdefault(name, {})[hardware] = fits
    most = {"sm_80": [], "sm_90": [8, 64, 96, 128], "sm_100": [8, 64, 96, 128], "sm_120": []}
    assert served == {
        "cudnn-flex": most,
        "magi": {"sm_80": [], "sm_90": [64, 128], "sm_100": [], "sm_120": []},
        "flash4": most,
    }
