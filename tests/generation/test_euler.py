"""The sampling loop: Euler steps, levels, callbacks."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given as drawn, strategies as st

from lct_core.generation import (
    Step,
    euler,
    schedule,
)
from lct_core.testing.tolerances import error
from tests.generation.definitions import (
    MODES,
    SHOT_AFTER_SHOT,
    case,
    every_mode,
    generated,
    guide,
    guided_or_not,
    negatives,
    random,
    run,
    same,
    scene_model,
    with_and_without_global,
    worst,
)


@drawn(steps=st.integers(1, 64), rate=st.floats(-4, 4))
def test_euler_is_exact_for_a_constant_velocity(steps, rate):
    noise = [random(1, 2, 1, 2, 3, seed=0).double(), random(1, 2, 2, 1, 1, seed=1).double()]
    got = euler(lambda latents, t: [torch.full_like(z, rate) for z in latents], noise, steps=steps)
    for z, start in zip(got, noise, strict=True):
        assert (z - (start - rate)).abs().max() <= 1e-13 * steps  # roundings, one each step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_euler_does_not_lose_small_steps(dtype):
    """Half precision would round each of them away."""
    seen = []
    (got,) = euler(
        lambda latents, t: (seen.append(latents[0].dtype), [torch.full_like(latents[0], 0.01)])[1],
        [torch.ones(1, 1, 1, 1, 1, dtype=dtype)],
        steps=64,
    )
    assert {got.dtype, *seen} == {torch.promote_types(dtype, torch.float32)}
    assert got.item() == pytest.approx(0.99, abs=1e-5)


@pytest.mark.parametrize("rate", [1.0, -1.5, 0.5])
def test_euler_is_of_first_order(rate):
    """For dz/dt = rate z, from t = 1 to 0: z shrinks by e^-rate; each step multiplies by 1 - rate / steps."""
    noise = random(1, 2, 1, 2, 3, seed=0).double()
    errors = []
    for steps in (32, 64, 128, 256):
        (z,) = euler(lambda latents, t: [rate * z for z in latents], [noise], steps=steps)
        assert torch.allclose(z, noise * (1 - rate / steps) ** steps, rtol=1e-12, atol=0)
        errors.append(error(z, noise * torch.tensor(-rate, dtype=torch.float64).exp()))
    assert all(1.9 < a / b < 2.1 for a, b in pairwise(errors))


@drawn(steps=st.integers(1, 50))
def test_the_levels_of_a_loop(steps):
    visited, reached = [], []
    euler(
        lambda latents, t: (visited.append(t), latents)[1],
        [torch.ones(1, 1, 1, 1, 1)],
        steps=steps,
        callback=lambda step: reached.append(step.t),
    )
    assert visited == [1 - i / steps for i in range(steps)]
    assert reached == [*visited[1:], 0.0]
    assert visited[0] == 1
    assert visited[-1] == pytest.approx(1 / steps)


@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0, 12.0])
def test_a_schedule_is_the_schedulers(shift):
    """Of diffusers' pipelines, which give it levels that are equal steps apart and let it shift them."""
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 32 for i in range(32)])
    assert schedule(32, shift=shift) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert schedule(32, shift=1) == [1 - i / 32 for i in range(33)]


def test_a_loop_follows_any_levels():
    visited, levels = [], [1.0, 0.9, 0.2, 0.0]
    noise = random(1, 2, 1, 2, 3, seed=0).double()
    (z,) = euler(lambda latents, t: (visited.append(t), latents)[1], [noise], steps=tuple(levels))
    assert visited == levels[:-1]
    assert torch.allclose(z, noise * (1 - 0.1) * (1 - 0.7) * (1 - 0.2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_follows_levels(mode):
    scene, given = case(mode)
    equal, shifted = (generated(mode, scene, given, steps=schedule(4, shift=shift)) for shift in (1, 3))
    assert same(equal, generated(mode, scene, given, steps=4))
    left = [i for i, z in enumerate(equal) if z is not None and i not in (given or {})]
    assert not any(torch.equal(equal[i], shifted[i]) for i in left)


@pytest.mark.parametrize(
    "levels",
    [[], [1.0], [0.0, 1.0], [1.0, 0.5], [0.9, 0.0], [1.0, 0.5, 0.5, 0.0], [1.0, float("nan"), 0.0], [1, "0.5", 0]],
)
def test_refuses_levels_that_do_not_go_down_from_one_to_zero(levels):
    with pytest.raises(ValueError, match=r"^steps: got the levels \[.*expected numbers that go down from 1 to 0"):
        euler(lambda latents, t: latents, [torch.ones(1, 1, 1, 1, 1)], steps=levels)


@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf"), None, "3", torch.tensor(3.0)])
def test_refuses_a_shift_that_is_not_positive(shift):
    with pytest.raises(ValueError, match=r"^shift: got .*expected a positive number"):
        schedule(4, shift=shift)


def test_what_a_callback_of_a_loop_is_told():
    noise, told = [torch.ones(1, 1, 1, 1, 2), torch.ones(1, 1, 2, 1, 1)], []
    got = euler(
        lambda latents, t: [torch.full_like(z, t) for z in latents],
        noise,
        steps=2,
        callback=told.append,
    )
    assert [(step.shots, step.step, step.steps, step.t) for step in told] == [((0, 1), 1, 2, 0.5), ((0, 1), 2, 2, 0.0)]
    for step, left in zip(told, (0.5, 0.25), strict=True):
        assert isinstance(step, Step)
        assert same(step.latents, [torch.full_like(z, left) for z in noise])
    assert same(got, told[-1].latents)
    assert all(torch.equal(z, torch.ones_like(z)) for z in noise)  # untouched


def test_a_velocity_for_every_shot():
    with pytest.raises(ValueError, match="shorter"):
        euler(lambda latents, t: latents[:1], [torch.ones(1, 1, 1, 1, 1)] * 2, steps=1)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "32", None])
def test_refuses_what_is_no_number_of_steps(steps):
    message = rf"^steps: got {steps!r}, expected an int of at least 1"
    with pytest.raises(ValueError, match=message):
        euler(lambda latents, t: latents, [torch.ones(1, 1, 1, 1, 1)], steps=steps)
    for mode in MODES:
        scene, given = case(mode)
        with pytest.raises(ValueError, match=message):
            generated(mode, scene, given, steps=steps)


@every_mode
@with_and_without_global
@guided_or_not
def test_what_a_callback_is_told(mode, with_global, guided):
    scene, given = case(mode, with_global)
    told, steps = [], 3
    guidance = guide(*negatives()) if guided else None
    got = run(mode, scene_model(), scene, given, steps=steps, guidance=guidance, callback=told.append)
    made = [i for i, shot in enumerate(scene) if shot.role == "shot" and i not in given]
    loops = [(i,) for i in made] if mode in SHOT_AFTER_SHOT else [tuple(made)]
    assert [(step.shots, step.step, step.steps, step.t) for step in told] == [
        (loop, n, steps, 1 - n / steps) for loop in loops for n in (1, 2, 3)
    ]
    assert all(isinstance(step, Step) for step in told)
    assert all(same(step.latents, [got[i] for i in step.shots]) for step in told[steps - 1 :: steps])
    assert all([z.shape for z in step.latents] == [scene[i].latents.shape for i in step.shots] for step in told)
    assert worst(told[0].latents, told[-1].latents if len(loops) == 1 else told[steps - 1].latents) > 1e-3
    assert same(got, run(mode, scene_model(), scene, given, steps=steps, guidance=guidance))  # it changes nothing
