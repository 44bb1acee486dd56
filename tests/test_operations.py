"""The tests' own count of operations, against torch's wherever torch counts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lct_backbones.mmdit import tiny
from tests import operations
from tests.operations import Operations

pytestmark = pytest.mark.internals

aten = torch.ops.aten


def leaf(*shape, device="cpu"):
    return torch.randn(*shape, device=device, requires_grad=True)


def sdpa(backend):
    def run():
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(leaf(2, 3, 5, 8), leaf(2, 3, 7, 8), leaf(2, 3, 7, 8)).sum().backward()

    return run


def on_meta(op):
    def run():
        q, k, v = leaf(2, 3, 5, 8, device="meta"), *(leaf(2, 3, 7, 8, device="meta") for _ in range(2))
        bias = (None, True) if "efficient" in str(op) or "cudnn" in str(op) else ()
        op(q, k, v, *bias)[0].sum().backward()

    return run


@torch.inference_mode()
def without_autograd():
    F.linear(torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4))
    F.scaled_dot_product_attention(*torch.randn(3, 2, 3, 5, 8))


def model():
    mmdit = tiny()
    mmdit(torch.randn(1, mmdit.channels, 2, 4, 6), torch.rand(1), torch.randn(1, 3, mmdit.text_width)).sum().backward()


RUNS = {
    "linear": lambda: nn.Linear(5, 4)(leaf(2, 3, 5)).sum().backward(),
    "linear without a bias": lambda: nn.Linear(5, 4, bias=False)(leaf(2, 3, 5)).sum().backward(),
    "batched": lambda: (leaf(2, 3, 5) @ leaf(2, 5, 4)).sum().backward(),
    "batched with a sum": lambda: torch.baddbmm(leaf(2, 3, 4), leaf(2, 3, 5), leaf(2, 5, 4)).sum().backward(),
    "convolution": lambda: nn.Conv3d(4, 6, 2, stride=2, groups=2)(torch.randn(2, 4, 4, 6, 8)),
    "transposed convolution": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2)(torch.randn(2, 4, 5, 7)),
    "attention as products": sdpa(SDPBackend.MATH),
    "attention": sdpa(SDPBackend.FLASH_ATTENTION),
    **{str(op): on_meta(op) for op in operations.ATTENTION[1:]},
    "inference mode": without_autograd,
    "a model": model,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_count_is_what_torch_counts(run):
    with Operations() as ours:
        run()
    with FlopCounterMode(display=False) as theirs:
        run()
    counted = {op: count for op, count in ours.counts.items() if op in flop_registry}
    assert counted == theirs.get_flop_counts().get("Global", {})
    assert ours.counts


def test_flash_attention_takes_what_its_products_do():
    """Also where torch takes it for nothing; its backward computes the scores once more."""
    totals = []
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with Operations() as forward, sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(leaf(2, 3, 5, 8), leaf(2, 3, 7, 8), leaf(2, 3, 7, 8))
        with Operations() as backward:
            out.sum().backward()
        totals.append((forward.total, backward.total))
    (products, products_backward), flash = totals
    assert flash == (products, products_backward + products / 2)


def test_attention_without_a_formula_is_an_error(monkeypatch):
    monkeypatch.delitem(operations.COUNTED, aten._scaled_dot_product_flash_attention_for_cpu)
    with (
        Operations(),
        pytest.raises(AssertionError, match="attention_for_cpu has no formula"),
    ):
        sdpa(SDPBackend.FLASH_ATTENTION)()
