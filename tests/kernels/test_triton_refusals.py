"""What the Triton kernel refuses."""

import importlib.util
import sys

import pytest
import torch

from lct_core.layout import Layout, Shot
from lct_core.patterns import bidirectional, own_text, selected_history
from lct_core.plugins.hooks import KernelRequest
from lct_plugins.triton_attention import SPEC
from tests.kernels.triton_plans import CAUSAL, SCENES

pytestmark = pytest.mark.usefixtures("only_triton")

has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


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
