"""attend: which kernel serves, what it is told, and which inputs are refused."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from lct_core.attention import attend
from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import bidirectional, context_causal, own_and_global_text, own_shot, selected_history
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins import registry
from lct_core.plugins.hooks import KernelRequest, PluginError, hookimpl
from lct_core.plugins.registry import Registry
from lct_core.plugins.torch_kernels import reference, sdpa
from tests.attention_plans import GAPS, SCENE, draw, kernel_spec, use

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


def test_a_kernel_is_asked_once_per_kind_of_request(monkeypatch):
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


def test_the_librarys_own_kernels_are_registered():
    assert {"sdpa", "reference", "flex"} <= set(registry().kernels)
