from math import prod

import pytest
import torch

from lct_core.attention import attend
from lct_core.layout import Layout, Shot
from lct_core.patterns import context_causal, selected_history
from lct_core.plugins import hooks
from lct_core.plugins.hooks import KernelRequest
from lct_core.testing import kernels
from lct_core.testing.tolerances import BOUNDS, error
from lct_plugins import flex

pytestmark = pytest.mark.internals

SCENE = Layout([[Shot(3, (1, 2, 2)), Shot(0, (2, 3, 3)), Shot(5, (1, 1, 1)), Shot(1, (1, 4, 3))], [Shot(2, (1, 3, 3))]])
GAPS = selected_history(SCENE, [[], [0], [0], [0, 2], []])


def draw(plan, heads=2, kv_heads=2, head_dim=16, *, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, h, head_dim) for n, h in ((plan.queries, heads), (plan.keys, kv_heads), (plan.keys, kv_heads))]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def request(plan=GAPS, *, device="cpu", dtype=torch.bfloat16, heads=2, kv_heads=2, head_dim=64, grad=False):
    return KernelRequest(plan, torch.device(device), dtype, heads, kv_heads, head_dim, grad)


def test_it_conforms_on_a_cpu(monkeypatch):
    # one plan, two compilations; it has several blocks: full ones, partial ones, unseen ones, and a tail
    shots = [Shot(17, (1, 11, 13)), Shot(0, (1, 20, 15)), Shot(9, (2, 7, 9))]
    plan = selected_history(Layout([shots]), [[], [], [0]])
    mask = plan.block_mask()
    assert mask.kv_num_blocks.sum() > 0
    assert mask.full_kv_num_blocks.sum() > 0
    assert not mask.to_dense().all()
    monkeypatch.setattr(kernels, "_plans", lambda: {"history with gaps": plan})
    findings = list(kernels.kernel_conformance("flex", dtypes=[torch.float32], grad=False))
    assert len(findings) == 2
    for finding in findings:
        assert finding.holds, finding


def test_it_refuses_a_cpu_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no C.. compiler 'no-such-compiler'"):
        attend(*draw(GAPS), GAPS, kernel="flex")


def test_it_refuses_a_gpu_without_triton(monkeypatch):
    assert flex.SPEC.refusals(request(device="cuda", grad=True)) == []
    monkeypatch.setattr(flex, "find_spec", lambda name: None)
    (reason,) = flex.SPEC.refusals(request(device="cuda", grad=True))
    assert reason.startswith("no package triton: ")


def test_it_takes_another_shape_and_scale_on_a_cpu():
    # torch's own dynamic shapes do not compile there: another shape must be another compilation
    for text in (0, 1):
        plan = context_causal(Layout([[Shot(3, (1, 5, 6)), Shot(text, (2, 7, 8))]]))
        q, k, v = draw(plan)
        truth = attend(q.double(), k.double(), v.double(), plan, kernel="reference", scale=0.7)
        assert error(attend(q, k, v, plan, kernel="flex", scale=0.7), truth) <= BOUNDS[torch.float32]["kernel"].given(
            0.0
        )


def test_it_raises_rather_than_run_uncompiled():
    with (
        torch._dynamo.config.patch(accumulated_recompile_limit=0),
        pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        attend(*draw(GAPS, head_dim=48), GAPS, kernel="flex")


# masks


@pytest.mark.parametrize(
    ("major", "head_dim", "tiles"),
    [(9, 64, (192, 128)), (9, 96, (192, 128)), (9, 128, (128, 128)), (10, 64, (256, 128))],
)
def test_blocks_of_flash_attention_4_hold_whole_tiles(major, head_dim, tiles):
    # and 128 queries backward
    block = flex._flash_block(major, head_dim)
    assert [size % tile for size, tile in zip(block, tiles, strict=True)] == [0, 0]
    assert block[0] % 128 == 0


def test_a_mask_is_made_once_for_each_plan_and_block_size(monkeypatch):
    made = []
    true = type(GAPS).block_mask
    monkeypatch.setattr(type(GAPS), "block_mask", lambda plan, **how: made.append(how) or true(plan, **how))
    flex._block_mask.cache_clear()
    again = selected_history(SCENE, [[], [0], [0], [0, 2], []])
    for plan, block in ((GAPS, (128, 128)), (again, (128, 128)), (GAPS, (384, 128)), (GAPS, (128, 128))):
        flex._block_mask(plan, torch.device("cpu"), block)
    assert [how["block_size"] for how in made] == [(128, 128), (384, 128)]


# what torch is asked for


@pytest.fixture
def asked(monkeypatch):
    """What reaches torch's ``flex_attention``; the answer is the plan's reference."""
    calls = []

    def compiled(dynamic):
        def attention(q, k, v, *, block_mask, scale, enable_gqa, kernel_options):
            calls.append((dynamic, q, k, v, block_mask.BLOCK_SIZE, enable_gqa, kernel_options))
            return attend(*(x.transpose(1, 2) for x in (q, k, v)), GAPS, scale=scale).transpose(1, 2)

        return attention

    monkeypatch.setattr(flex, "_compiled", compiled)
    return calls


@pytest.mark.parametrize(("capability", "head_dim", "block"), [((9, 0), 64, (384, 128)), ((10, 0), 64, (256, 128))])
def test_flash_is_asked_for_by_name_with_blocks_of_its_own(asked, monkeypatch, capability, head_dim, block):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q, k, v = draw(GAPS, 4, 2, head_dim)
    got = flex.flex_flash(q, k, v, GAPS, 0.3)
    ((dynamic, *_, asked_block, gqa, options),) = asked
    assert (dynamic, asked_block, gqa, options) == (False, block, True, {"BACKEND": "FLASH"})
    assert torch.equal(got, attend(q, k, v, GAPS, scale=0.3))


def test_entries_that_together_are_beyond_int32_go_one_by_one(asked, monkeypatch):
    q, k, v = draw(GAPS, batch=3)
    monkeypatch.setattr(flex, "_LAST", 2 * q[0].numel())
    got = flex.flex(q, k, v, GAPS, 0.3)
    assert [len(call[1]) for call in asked] == [1, 1, 1]
    assert torch.equal(got, attend(q, k, v, GAPS, scale=0.3))


def test_views_that_reach_beyond_int32_are_copied(asked, monkeypatch):
    fused = torch.stack(draw(GAPS, batch=1), dim=2)
    q, k, v = fused.unbind(2)
    flex.flex(q, k, v, GAPS, 0.3)
    monkeypatch.setattr(flex, "_LAST", q.numel())
    flex.flex(q, k, v, GAPS, 0.3)
    views, copies = ([x.untyped_storage().data_ptr() == fused.data_ptr() for x in call[1:4]] for call in asked)
    assert all(views)
    assert not any(copies)


# what they refuse


def test_sizes_beyond_int32_are_refused():
    huge = context_causal(Layout([[Shot(0, (1, 1000, 420))]]))
    size = huge.queries * 40 * 128
    assert prod((420_000, 40, 128)) == size > 2**31 - 1
    (reason,) = flex.SPEC.refusals(request(huge, dtype=torch.float32, heads=40, kv_heads=40, head_dim=128))
    assert reason == f"q, k, v: {size} elements in one entry of the batch: expected at most {2**31 - 1}"
    assert flex.SPEC.refusals(request(huge, dtype=torch.float32, heads=39, kv_heads=39, head_dim=128)) == []


@pytest.mark.parametrize(
    ("hardware", "options", "expected"),
    [
        ("sm_90", {}, []),
        ("sm_90", {"grad": True, "head_dim": 128}, []),
        ("sm_90", {"grad": True}, ["gradients of head_dim 64 on sm_90"]),
        ("sm_100", {"grad": True}, []),
        ("sm_80", {"dtype": torch.float32}, ["hardware sm_80", "dtype torch.float32"]),
        ("sm_90", {"head_dim": 256}, ["head_dim 256"]),
    ],
)
def test_what_flash_refuses(monkeypatch, hardware, options, expected):
    monkeypatch.setattr(hooks, "_hardware", lambda device: hardware)
    monkeypatch.setattr("lct_plugins.flash4.version", lambda name: "4.0.0b36")
    reasons = flex.FLASH.refusals(request(device="cuda", **options))
    assert len(reasons) == len(expected)
    assert all(reason.startswith(start) for reason, start in zip(reasons, expected, strict=True))


def test_flash_refuses_where_flash_attention_4_is_not_installed():
    reasons = flex.FLASH.refusals(request())
    assert reasons[0] == "no package flash-attn-4: pip install --pre flash-attn-4"
    assert reasons[1].startswith("hardware cpu: expected one of sm_90")
