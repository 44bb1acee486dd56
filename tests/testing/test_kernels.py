"""The conformance suite of kernels finds what is wrong."""

import pytest
import torch

from lct_core.layout import Range
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins.torch_kernels import sdpa
from lct_core.testing import kernels
from tests.attention_plans import kernel_spec, use

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
