"""The oracle itself: against attention written out by hand, and that it stops where forwards part ways."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lct_core.testing.oracle import Join, lockstep
from lct_core.testing.tolerances import error

EXACT = 1e-12  # float64 in another order


class Layer(nn.Module):
    """Attention over its input, ``[batch, tokens, 4]``, with one head."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = [torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(3)]

    def qkv(self, x):
        return [x @ w for w in self.weights]

    def forward(self, x):
        q, k, v = (y[:, None] for y in self.qkv(x))
        return x + F.scaled_dot_product_attention(q, k, v)[:, 0]


@pytest.fixture
def layers():
    return [Layer(0), Layer(1)]


@pytest.fixture
def shots():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, n, 4, generator=generator, dtype=torch.float64) for n in (3, 1, 5)]


def forwards(layers, shots):
    return [lambda x=x: layers[1](layers[0](x)) for x in shots]


def turned(x, angle):
    """Channels 0 and 1 by the angle, 2 and 3 by half of it, as complex numbers."""
    z = torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous())
    turn = torch.polar(torch.ones(2, dtype=torch.float64), angle * torch.tensor([1.0, 0.5], dtype=torch.float64))
    return torch.view_as_real(z * turn).flatten(-2)


def by_hand(layer, shots, sees, angles):
    out = []
    for i, x in enumerate(shots):
        q = turned(layer.qkv(x)[0], angles[i])
        keys = torch.cat([turned(layer.qkv(y)[1], angles[j]) for j, y in enumerate(shots) if sees[i, j]], dim=1)
        values = torch.cat([layer.qkv(y)[2] for j, y in enumerate(shots) if sees[i, j]], dim=1)
        out.append(x + (q @ keys.mT / math.sqrt(4)).softmax(-1) @ values)
    return out


@pytest.mark.parametrize("sees", [torch.ones(3, 3).bool(), torch.ones(3, 3).tril().bool(), torch.eye(3).bool()])
@pytest.mark.parametrize("offsets", [(0, 0, 0), (0, 7, 19)])
def test_equals_attention_by_hand(layers, shots, sees, offsets):
    diagonal = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    joins = {layer: Join(sees) for layer in layers}
    got = lockstep(forwards(layers, shots), joins, offsets=offsets, diagonal=diagonal)
    expected = shots
    for layer in layers:
        expected = by_hand(layer, expected, sees, offsets)
    assert max(error(g, x) for g, x in zip(got, expected, strict=True)) <= EXACT


def test_modules_that_do_not_join_stay_inside_their_shot(layers, shots):
    everyone = Join(torch.ones(3, 3).bool())
    got = lockstep(forwards(layers, shots), {layers[1]: everyone}, offsets=(0, 0, 0), diagonal=None)
    own = [layers[0](x) for x in shots]
    expected = by_hand(layers[1], own, everyone.sees, (0, 0, 0))
    assert max(error(g, x) for g, x in zip(got, expected, strict=True)) <= EXACT


def test_keys_that_do_not_move_are_not_turned(layers, shots):
    diagonal = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    still = {layer: Join(torch.ones(3, 3).bool(), turned=False) for layer in layers}
    got = lockstep(forwards(layers, shots), still, offsets=(0, 7, 19), diagonal=diagonal)
    unmoved = lockstep(forwards(layers, shots), still, offsets=(0, 0, 0), diagonal=None)
    assert all(torch.equal(g, x) for g, x in zip(got, unmoved, strict=True))


class Twice(Layer):
    """The same attention two times, as a cross-attention to two things has it."""

    def forward(self, x):
        return super().forward(super().forward(x))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_attentions_of_one_module_may_join_differently(shots, order):
    layer, diagonal = Twice(0), torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    everyone, alone = Join(torch.ones(3, 3).bool()), Join(torch.eye(3).bool(), turned=False)
    joins = [(everyone, alone)[i] for i in order]
    got = lockstep([lambda x=x: layer(x) for x in shots], {layer: joins}, offsets=(0, 7, 19), diagonal=diagonal)
    expected = shots
    for join in joins:
        expected = by_hand(layer, expected, join.sees, (0, 7, 19) if join.turned else (0, 0, 0))
    assert max(error(g, x) for g, x in zip(got, expected, strict=True)) <= EXACT


def test_one_join_is_for_all_attentions_of_a_module(shots):
    layer, join = Twice(0), Join(torch.ones(3, 3).tril().bool())
    got, expected = (
        lockstep([lambda x=x: layer(layer(x)) for x in shots], {layer: joins}, offsets=(0, 0, 0), diagonal=None)
        for joins in (join, [join, join])  # for every forward of it anew
    )
    assert all(torch.equal(g, x) for g, x in zip(got, expected, strict=True))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_join_needs_one_attention(shots, count):
    layer, joins = Twice(0), [Join(torch.ones(3, 3).bool())] * count
    message = f"joins: got {count} Joins for a Twice whose forward calls scaled_dot_product_attention 2 times"
    with pytest.raises(RuntimeError, match=message):
        lockstep([lambda x=x: layer(x) for x in shots], {layer: joins}, offsets=(0, 0, 0), diagonal=None)


def test_gradients_flow_between_the_shots(layers, shots):
    leaves = [shot.clone().requires_grad_() for shot in shots]
    joins = {layer: Join(torch.ones(3, 3).tril().bool()) for layer in layers}
    *_, last = lockstep(forwards(layers, leaves), joins, offsets=(0, 0, 0), diagonal=None)
    gradients = torch.autograd.grad(last.square().sum(), leaves)
    assert all(bool(gradient.any()) for gradient in gradients)


def test_forwards_that_part_ways_are_an_error(layers, shots):
    joins = {layer: Join(torch.ones(3, 3).bool()) for layer in layers}
    astray = [*forwards(layers, shots[:2]), lambda: layers[0](layers[1](shots[2]))]
    with pytest.raises(RuntimeError, match="different attentions"):
        lockstep(astray, joins, offsets=(0, 0, 0), diagonal=None)
    short = [*forwards(layers, shots[:2]), lambda: layers[0](shots[2])]
    with pytest.raises(RuntimeError, match="different attentions"):
        lockstep(short, joins, offsets=(0, 0, 0), diagonal=None)
    failing = [*forwards(layers, shots[:2]), lambda: 1 / 0]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        lockstep(failing, joins, offsets=(0, 0, 0), diagonal=None)
    with pytest.raises(RuntimeError, match=r"^joins: 1 modules \(Layer\) never called"):
        lockstep(
            forwards(layers, shots), {**joins, Layer(2): Join(torch.ones(3, 3).bool())}, offsets=(0,) * 3, diagonal=None
        )
    assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"  # all is put back
    assert not layers[0]._forward_pre_hooks


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.tensor([True, False, True])}])
def test_attention_that_hides_keys_is_refused(shots, options):
    class Masked(Layer):
        def forward(self, x):
            q, k, v = (y[:, None] for y in self.qkv(x))
            return F.scaled_dot_product_attention(q, k, v, **options)[:, 0]

    layer = Masked(0)
    with pytest.raises(RuntimeError, match="hides some of its own keys"):
        lockstep([lambda: layer(shots[0])], {layer: Join(torch.ones(1, 1).bool())}, offsets=(0,), diagonal=None)
