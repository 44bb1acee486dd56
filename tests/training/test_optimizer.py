"""AdamW, the cosine schedule and the moving average."""

from copy import deepcopy
from math import cos, isclose, pi

import pytest
import torch
from hypothesis import given, strategies as st

from lct_core.testing.tolerances import BOUNDS, error
from lct_core.training import (
    EMA,
    adamw,
    cosine,
)
from tests.training.scenes import same

FLOAT32 = BOUNDS[torch.float32]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_adamw_is_the_papers_for_what_is_trained():
    """Against the definition (Loshchilov and Hutter, Algorithm 2, decoupled) with betas 0.9 and 0.95, decay 0.1."""
    trained = torch.nn.Parameter(torch.randn(5, generator=generator(), dtype=torch.float64))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = adamw(iter([frozen, trained]), learning_rate=0.03)
    assert [p is trained for group in optimizer.param_groups for p in group["params"]] == [True]
    expected, m, v = trained.detach().clone(), torch.zeros(5).double(), torch.zeros(5).double()
    for step in range(1, 6):
        trained.grad = torch.randn(5, generator=generator(step), dtype=torch.float64)
        m = 0.9 * m + 0.1 * trained.grad
        v = 0.95 * v + 0.05 * trained.grad**2
        expected -= 0.03 * 0.1 * expected
        expected -= 0.03 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()
        assert error(trained, expected) <= 1e-14
    assert adamw([trained]).defaults["lr"] == 1e-4


@given(steps=st.integers(1, 1000), share=st.floats(0, 1), data=st.data())
def test_cosine_is_half_a_cosine_after_a_linear_rise(steps, share, data):
    step = data.draw(st.integers(0, steps - 1))
    half = (1 + cos(pi * step / steps)) / 2
    assert isclose(cosine(step, steps), half)
    rising = max(1, int(share * steps))
    assert isclose(cosine(step, steps, warm_up=share), min((step + 1) / rising, half))


def test_cosine_begins_and_ends():
    assert (cosine(0, 100), cosine(50, 100), cosine(100, 100)) == (1, 0.5, 0)
    assert [cosine(step, 1000, warm_up=0.01) for step in range(3)] == [0.1, 0.2, 0.3]
    assert cosine(0, 1, warm_up=0.5) == 1


def little(dtype=torch.float32, seed=0):
    """Two parameters, one of them frozen, and a buffer."""
    module = torch.nn.Linear(3, 2, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed)))
    module.bias.requires_grad_(False)
    return module


def walk(module, ema, steps, *, seed=1):
    """Random steps, each taken into the average; what the weights were."""
    draws, seen = generator(seed), []
    for _ in range(steps):
        with torch.no_grad():
            module.weight.add_(torch.randn(module.weight.shape, generator=draws).to(module.weight.dtype))
        seen.append(module.weight.detach().double().clone())
        ema.update()
    return seen


def averaged(first, seen, decay):
    """The plain definition in float64, with the warm-up."""
    average = first.double()
    for n, weight in enumerate(seen, 1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight
    return average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 5, 60])
def test_the_average_is_the_definition(dtype, decay, steps):
    module = little(dtype)
    first = module.weight.detach().clone()
    ema = EMA(module, decay=decay)
    expected = averaged(first, walk(module, ema, steps), decay)
    (average,) = ema.state_dict()["average"]  # of what is trained alone
    assert average.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(average, expected) <= FLOAT32["definition"].absolute
    ema.copy_to_model()
    assert torch.equal(module.weight, average.to(dtype))


def test_the_average_of_low_precision_weights_keeps_small_steps():
    """In bfloat16 the average could not move: a step of it is less than half a step of the format."""
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(module.weight)
    ema = EMA(module, decay=0.999)
    ema.updates = 10**6
    torch.nn.init.constant_(module.weight, 1.0078125)
    for _ in range(1000):
        ema.update()
    ema.copy_to_model()
    assert module.weight.item() == 1.0078125


def test_the_average_is_lent_and_taken_back():
    module = little()
    ema = EMA(module)
    walk(module, ema, 5)
    own, bias = module.weight.detach().clone(), module.bias.clone()
    with ema.applied():
        assert torch.equal(module.weight, ema.state_dict()["average"][0])
        assert not torch.equal(module.weight, own)
    assert torch.equal(module.weight, own)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert torch.equal(module.weight, own)
    assert torch.equal(module.bias, bias)
    assert module.weight.requires_grad


def test_the_average_goes_on_from_its_state():
    module = little()
    ema = EMA(module)
    walk(module, ema, 5)
    state, start = deepcopy(ema.state_dict()), deepcopy(module)
    walk(module, ema, 5, seed=2)
    other = EMA(start)
    other.load_state_dict(state)
    walk(start, other, 5, seed=2)
    assert same(other.state_dict(), ema.state_dict())
    assert other.updates == 10
    assert not same(state, ema.state_dict())


def test_another_models_average_is_refused():
    for module in (torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)):  # other shapes; one parameter more
        with pytest.raises(ValueError, match=r"^state: its average has other shapes than this model's parameters"):
            EMA(little()).load_state_dict(EMA(module).state_dict())
