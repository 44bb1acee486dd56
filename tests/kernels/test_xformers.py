import sys
from itertools import accumulate
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given

from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, selected_history
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins import hooks
from lct_core.plugins.hooks import KernelRequest
from lct_core.plugins.torch_kernels import reference
from lct_plugins import xformers as ours
from tests.test_rectangles import plans

SCENE = Layout([[Shot(3, (1, 2, 2)), Shot(0, (2, 3, 3)), Shot(5, (1, 1, 1))], [Shot(2, (1, 3, 3))]])
PLANS = {
    "one scene": bidirectional(Layout(SCENE.scenes[:1])),
    "bidirectional": bidirectional(SCENE),
    "context-causal": context_causal(SCENE),
    "history with gaps": selected_history(SCENE, [[], [0], [0], []]),
    "packed out of order": AttentionPlan(
        5, 9, (Segment(Range(0, 2), (Range(5, 8),)), Segment(Range(2, 5), (Range(1, 4),)))
    ),
}
CPU = torch.device("cpu")
EMPTY = torch.empty


def draw(plan, heads=4, kv_heads=4, *, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, h, 8) for n, h in ((plan.queries, heads), (plan.keys, kv_heads), (plan.keys, kv_heads))]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(grad) for s in shapes]


# who sees whom


def dense(plan):
    """Blocks written out: a mask over the keys that were picked, and with it one over all keys."""
    blocks, picked = ours.blocks(plan), torch.arange(plan.keys)
    if plan.form != "overlapping":
        picked = picked[ours.visible(plan)]
    mask = torch.zeros(plan.queries, plan.keys, dtype=torch.bool)
    ends = list(accumulate(blocks.queries))
    for queries, end, start, keys in zip(blocks.queries, ends, blocks.starts, blocks.keys, strict=False):
        places = picked[start : start + keys]
        assert len(places.unique()) == keys  # no key counts twice
        mask[end - queries : end, places] = True
    assert (ends[-1], blocks.starts[-1]) == (plan.queries, len(picked))
    return mask


@given(plans())
def test_blocks_are_the_plan(plan):
    assert torch.equal(dense(plan), plan.dense())


def test_keys_that_lie_end_to_end_are_not_copied():
    kinds = {name: isinstance(ours.visible(plan), slice) for name, plan in PLANS.items()}
    assert kinds.pop("context-causal") is False  # not asked for there: overlapping ranges are left where they are
    assert kinds == {
        "one scene": True,
        "bidirectional": True,
        "history with gaps": False,
        "packed out of order": False,
    }


@given(plans())
def test_the_masks_of_xformers_are_the_plan(plan):
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="needs xformers")
    mask = ours._mask(ours._kind(plan), ours.blocks(plan), CPU)
    keys = torch.arange(plan.keys)
    if plan.form != "overlapping":
        keys = keys[ours.visible(plan)]
    own = torch.zeros(plan.queries, len(keys))
    if mask is not None:
        assert type(mask) is getattr(attn_bias, ours._kind(plan))
        own = mask.materialize((plan.queries, len(keys)))
    seen = torch.zeros(plan.queries, plan.keys, dtype=torch.bool)
    queries, places = (own == 0).nonzero(as_tuple=True)
    seen[queries, keys[places]] = True
    assert torch.equal(seen, plan.dense())


# what xformers is asked for


class Operator:
    """One of xformers' operators, that refuses as it is told."""

    def __init__(self, name):
        self.NAME, self.reasons, self.asked, self.IS_DETERMINISTIC = name, [], [], True

    def not_supported_reasons(self, d):
        self.asked.append(d)
        random = torch.are_deterministic_algorithms_enabled() and not self.IS_DETERMINISTIC
        return self.reasons + ["operator is non-deterministic"] * random


class Blocked(SimpleNamespace):
    """A mask that knows its arguments."""

    def visible(self, queries, keys):
        starts = getattr(self, "kv_seqstarts", [0, *accumulate(self.kv_seqlen)])
        mask, end = torch.zeros(queries, keys, dtype=torch.bool), 0
        for size, start, used in zip(self.q_seqlen, starts, self.kv_seqlen, strict=False):
            mask[end : (end := end + size), start : start + used] = True
        assert (end, starts[-1]) == (queries, keys)
        return mask


@pytest.fixture
def xformers(monkeypatch):
    """Modules with the signatures of xformers 0.0.34 and 0.0.35, and attention written out."""

    class BlockDiagonalMask(Blocked):
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            return cls(q_seqlen=q_seqlen, kv_seqlen=kv_seqlen)

    class BlockDiagonalGappyKeysMask(Blocked):
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqstarts, kv_seqlen, *, device=None):
            return cls(q_seqlen=q_seqlen, kv_seqstarts=kv_seqstarts, kv_seqlen=kv_seqlen)

    class Inputs:
        def __init__(self, query, key, value, attn_bias=None, p=0.0, scale=None, output_dtype=None, is_partial=False):
            self.query, self.key, self.value, self.attn_bias = query, key, value, attn_bias

    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert query.shape[2] == key.shape[2]
        assert attn_bias is None or len(query) == 1
        calls.append({"op": op, "attn_bias": attn_bias, "key": key})
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
        if attn_bias is not None:
            scores = scores.masked_fill(~attn_bias.visible(query.shape[1], key.shape[1]), float("-inf"))
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)

    families = {
        name: SimpleNamespace(FwOp=Operator(f"{name}F"), BwOp=Operator(f"{name}B"))
        for name in ("flash3", "flash", "cutlass")
    }
    bias = SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask, BlockDiagonalGappyKeysMask=BlockDiagonalGappyKeysMask)
    fmha = SimpleNamespace(
        Inputs=Inputs, memory_efficient_attention=memory_efficient_attention, attn_bias=bias, **families
    )
    for name, attributes in (("xformers", {}), ("xformers.ops", {"fmha": fmha}), ("xformers.ops.fmha", vars(fmha))):
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    caches = ours._operator, ours._bias, ours._visible
    for cached in caches:
        cached.cache_clear()
    yield SimpleNamespace(calls=calls, **families)
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_output_and_gradients(xformers, plan, kv_heads):
    tensors = draw(plan, 4, kv_heads, grad=plan.form != "overlapping")
    got, expected = (run(*tensors, plan, 0.3) for run in (ours.xformers, reference))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    if got.requires_grad:
        gradient = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
        for g, e in zip(*(torch.autograd.grad(out, tensors, gradient) for out in (got, expected)), strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=1e-13)


def test_one_launch_for_each_entry_on_keys_where_they_are(xformers):
    plan = PLANS["context-causal"]
    q, k, v = draw(plan)
    ours.xformers(q, k, v, plan, 0.3)
    assert len(xformers.calls) == 2
    for call, entry in zip(xformers.calls, k, strict=True):
        assert type(call["attn_bias"]).__name__ == "BlockDiagonalGappyKeysMask"
        assert call["key"].data_ptr() == entry.data_ptr()
        assert call["op"] == (xformers.flash3.FwOp, xformers.flash3.BwOp)


def test_equal_keys_are_one_launch_without_a_mask(xformers):
    plan = context_causal(SCENE).rows(SCENE.spans[1])
    assert plan.form == "dense"
    ours.xformers(*draw(plan), plan, 0.3)
    (call,) = xformers.calls
    assert call["attn_bias"] is None
    assert call["key"].shape[:2] == (2, plan.segments[0].num_keys)


def test_gathering_has_a_gradient_that_adds_up_rows(xformers):
    # that of index_select; an index in brackets is sorted for its gradient
    for plan in (PLANS["history with gaps"], PLANS["packed out of order"]):
        q, k, v = draw(plan, grad=True)
        ours.xformers(q, k, v, plan, 0.3)
        assert type(xformers.calls[0]["key"].grad_fn).__name__ == "SplitBackward0"
        node, _ = xformers.calls[0]["key"].grad_fn.next_functions[0]
        assert node.name() == "IndexSelectBackward0"


# what it refuses


def ask(monkeypatch, plan, *, hardware="sm_90", dtype=torch.bfloat16, grad=False, device="cpu"):
    monkeypatch.setattr(ours, "find_spec", lambda name: name)
    monkeypatch.setattr(hooks, "_hardware", lambda device: hardware)
    request = KernelRequest(plan, torch.device(device), dtype, 4, 4, 8, grad)
    if device == "cuda":  # what is asked of the operators is asked on this machine
        monkeypatch.setattr(torch, "empty", lambda *shape, device, **options: EMPTY(*shape, **options))
    return ours.SPEC.refusals(request)


def test_it_refuses_where_xformers_is_not_there(monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    request = KernelRequest(PLANS["one scene"], CPU, torch.float32, 4, 4, 8, False)
    assert ours.SPEC.refusals(request) == [
        "no package xformers: pip install xformers",
        "device cpu: expected cuda; use sdpa",
        "dtype torch.float32: expected float16 or bfloat16; cast q, k and v or use sdpa",
    ]


def test_it_refuses_gradients_of_overlapping_ranges_alone(xformers, monkeypatch):
    for name, plan in PLANS.items():
        assert ask(monkeypatch, plan, device="cuda") == []
        reasons = ask(monkeypatch, plan, grad=True, device="cuda")
        assert [r.split(":")[0] for r in reasons] == ["gradients where key ranges overlap"] * (name == "context-causal")


def test_the_first_operator_that_serves_is_taken(xformers, monkeypatch):
    xformers.flash3.BwOp.reasons = ["too old"]
    for grad, taken in ((False, xformers.flash3), (True, xformers.flash)):
        assert ask(monkeypatch, PLANS["bidirectional"], grad=grad, device="cuda") == []
        operators, _ = ours._operator("BlockDiagonalMask", torch.device("cuda"), torch.bfloat16, 8, grad, False)
        assert operators == (taken.FwOp, taken.BwOp)
        assert type(taken.FwOp.asked[-1].attn_bias).__name__ == "BlockDiagonalMask"
        assert taken.FwOp.asked[-1].query.shape == (1, 1, 1, 8)


def test_determinism_is_asked_for_anew_when_it_changes(xformers, monkeypatch):
    for family in (xformers.flash3, xformers.flash, xformers.cutlass):
        family.BwOp.IS_DETERMINISTIC = False
    plan = PLANS["one scene"]
    assert ask(monkeypatch, plan, grad=True, device="cuda") == []
    torch.use_deterministic_algorithms(True)
    try:
        reasons = ask(monkeypatch, plan, grad=True, device="cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert reasons == [f"{name}B: operator is non-deterministic" for name in ("flash3", "flash", "cutlass")]
    assert ask(monkeypatch, plan, grad=True, device="cuda") == []


def test_a_build_without_operators_is_refused(xformers, monkeypatch):
    for family in (xformers.flash3, xformers.flash, xformers.cutlass):
        family.FwOp.reasons = ["xFormers wasn't build with CUDA support", "operator wasn't built"]
    reasons = ask(monkeypatch, PLANS["one scene"], device="cuda")
    assert [r.split(": ") for r in reasons] == [
        [f"{name}F", "xFormers wasn't build with CUDA support, operator wasn't built"]
        for name in ("flash3", "flash", "cutlass")
    ]


def test_a_build_that_cannot_be_imported_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    ours._operator.cache_clear()
    (reason,) = ask(monkeypatch, PLANS["one scene"], device="cuda")
    ours._operator.cache_clear()
    assert reason.startswith("xformers cannot be imported: ModuleNotFoundError")
    assert reason.endswith(f"install a build for torch {torch.__version__}")
