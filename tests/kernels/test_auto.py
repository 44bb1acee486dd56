"""What ``kernel="auto"`` takes, by hardware and by how a plan's key ranges lie."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from lct_core.layout import Layout, Shot
from lct_core.patterns import bidirectional, context_causal, selected_history
from lct_core.plan import Form
from lct_core.plugins import hooks, registry
from lct_core.plugins.hooks import KernelRequest
from lct_plugins import auto

SCENE = Layout([[Shot(2, (1, 2, 3))] * 3])
PLANS = {
    "dense": bidirectional(SCENE),
    "packed": bidirectional(Layout([*SCENE.scenes, *SCENE.scenes])),
    "overlapping": context_causal(SCENE),
    "gathered": selected_history(SCENE, [[], [], [0]]),
}


def order(monkeypatch, hardware, form):
    """The kernels that are tried, in order, if this were the hardware."""
    monkeypatch.setattr(hooks, "_hardware", lambda device: hardware)
    request = KernelRequest(PLANS[form], torch.device("cuda"), torch.bfloat16, 2, 2, 64, False)
    return [name for name, rank in registry().ranks(request).items() if rank is not None]


def test_the_plans_are_of_all_forms():
    assert {name: plan.form for name, plan in PLANS.items()} == {form: form for form in get_args(Form)}


@pytest.mark.parametrize("form", PLANS)
def test_the_order_is_the_tables(monkeypatch, form):
    one_launch = form != "dense"
    assert order(monkeypatch, "sm_90", form) == ["flash3", "sdpa"]
    assert order(monkeypatch, "sm_80", form) == (["flash2", "flash-torch"] if one_launch else []) + ["sdpa"]
    for other in ("cpu", "sm_100", "sm_75", "cuda", "mps"):
        assert order(monkeypatch, other, form) == ["sdpa"]


def test_every_kernel_of_the_table_has_a_rank_of_its_own():
    for row in auto.TABLE:
        assert set(row.order) <= set(registry().kernels)
        assert len(set(row.order)) == len(row.order)
        assert set(row.forms) <= set(get_args(Form))
    places = [(hardware, form) for row in auto.TABLE for hardware in row.hardware for form in row.forms]
    assert len(set(places)) == len(places)


def test_auto_takes_sdpa_on_a_cpu():
    request = KernelRequest(PLANS["overlapping"], torch.device("cpu"), torch.bfloat16, 2, 2, 64, True)
    assert registry().kernel("auto", request) is registry().kernel("sdpa", request)


def test_the_documentation_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    assert f"<!-- auto -->\n{auto.markdown()}\n<!-- /auto -->" in page
