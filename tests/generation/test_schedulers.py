"""Flow-matching schedulers in the place of plain Euler steps."""

from copy import deepcopy

import pytest
import torch

from lct_backbones.mmdit import tiny
from lct_core import Shot, retrofit
from lct_core.generation import Director, Take, euler, joint, schedule
from lct_core.generation.schedulers import _arrives, call_levels, denoise
from lct_core.paths import RectifiedFlow, VariancePreserving
from lct_core.testing.tolerances import error
from tests.generation.definitions import (
    MODES,
    SHOT_AFTER_SHOT,
    Watched,
    case,
    draw,
    guide,
    negatives,
    random,
    run,
    same,
    worst,
)

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # its own use of numpy
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SHOT = Shot(2, (2, 2, 3))


def euler_scheduler(steps=4, **config):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    return scheduler


def ready(name, *, steps=4, **config):
    scheduler = getattr(diffusers, name)(**config)
    options = {"mu": 0.7} if config.get("use_dynamic_shifting") and name.startswith("FlowMatch") else {}
    scheduler.set_timesteps(steps, **options)
    return scheduler


SCHEDULERS = {
    "Euler": lambda: ready("FlowMatchEulerDiscreteScheduler"),
    "Euler, shifted": lambda: ready("FlowMatchEulerDiscreteScheduler", shift=3.0),
    "Euler, shifted by mu": lambda: ready("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True),
    "Euler, stochastic": lambda: ready("FlowMatchEulerDiscreteScheduler", stochastic_sampling=True),
    "Heun": lambda: ready("FlowMatchHeunDiscreteScheduler", steps=3),
    "UniPC": lambda: ready("UniPCMultistepScheduler", flow_shift=3.0, **FLOW),
    "DPM++": lambda: ready("DPMSolverMultistepScheduler", flow_shift=3.0, **FLOW),
    "DPM++, SDE": lambda: ready("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", **FLOW),
    "DPM++, single step": lambda: ready("DPMSolverSinglestepScheduler", **FLOW),
    "LCM": lambda: ready("FlowMatchLCMScheduler"),
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS)


def own_loop(dit, scheduler, shot, *, seed=None):
    """A pipeline's: the model gets the scheduler's timesteps, which are the model's own."""
    latents, scheduler = shot.latents, deepcopy(scheduler)
    options = {} if seed is None else {"generator": seed}
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            velocity = dit(latents, timestep.expand(len(latents)), shot.text)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False, **options)[0]
    return latents


@pytest.mark.parametrize("scheduler", [*[*SCHEDULERS][:3], "Heun", "UniPC", "DPM++"])
@pytest.mark.parametrize("mode", ["joint", *SHOT_AFTER_SHOT])
def test_one_shot_is_the_schedulers_own_loop(mode, scheduler):
    """Bit for bit."""
    dit, (shot,), scheduler = tiny(), draw(SHOT, with_global=False), SCHEDULERS[scheduler]()
    expected = own_loop(dit, scheduler, shot)
    (got,) = run(mode, retrofit(dit), [shot], {}, steps=scheduler)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_an_euler_scheduler_is_our_euler(shift):
    model, scene = retrofit(tiny()), draw(SHOT, Shot(1, (1, 3, 2)), with_global=True)
    scheduler = euler_scheduler(shift=shift)
    got = joint(model, scene, steps=scheduler)
    assert worst(got, joint(model, scene, steps=schedule(4, shift=shift))) <= 1e-6
    assert worst(got, joint(model, scene, steps=schedule(4, shift=2.0))) > 1e-4


@every_scheduler
def test_schedulers_lead_along_a_straight_line(scheduler):
    """From noise to data, when told the way, in several shots at once; a clean part stays as it is."""
    noise, data = ([random(2, 3, 2, 2, 2, seed=s), random(2, 3, 1, 4, 2, seed=s + 1)] for s in (0, 2))
    clean = torch.tensor([True, False]).reshape(1, 1, 2, 1, 1)
    noise[0] = torch.where(clean, data[0], noise[0])
    got = denoise(
        lambda latents, t: [(z - x) / t for z, x in zip(latents, data, strict=True)],
        noise,
        steps=SCHEDULERS[scheduler](),
        path=RectifiedFlow(),
        noisy=[~clean, None],
        shots=(4, 7),
    )
    assert worst(got, data) < 0.01
    assert torch.equal(got[0][:, :, :1], data[0][:, :, :1])


@pytest.mark.parametrize("scheduler", ["Heun", "UniPC", "DPM++, SDE"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_follows_a_scheduler(mode, scheduler):
    """The same each time, with a state for every shot and take of its own; it is left as it was set up."""
    (scene, given), scheduler, told = case(mode), SCHEDULERS[scheduler](), []
    watched = Watched(retrofit(tiny()))
    got = run(mode, watched, scene, given, steps=scheduler, callback=told.append)
    assert scheduler.step_index is None
    assert same(got, run(mode, retrofit(tiny()), scene, given, steps=scheduler))
    levels = call_levels(scheduler, RectifiedFlow())
    loops = 4 - bool(given) if mode in SHOT_AFTER_SHOT else 1
    assert [(step.step, step.steps, step.t) for step in told] == [
        (n, len(levels), t) for _ in range(loops) for n, t in enumerate([*levels[1:], 0.0], 1)
    ]
    assert worst(got, run(mode, retrofit(tiny()), scene, given, steps=2)) > 1e-3


def test_scheduler_noise_depends_on_seed_and_shot():
    scene = [replaced for shot in draw(SHOT, with_global=False) for replaced in (shot, shot)]
    scheduler = SCHEDULERS["Euler, stochastic"]()

    def shoot(seed):
        torch.manual_seed(len(told))
        told.append(seed)
        return Director(retrofit(tiny()), scene, steps=scheduler, seed=seed).shoot(Take((0, 1), cached=False))

    told = []
    first, again, other = shoot(0), shoot(0), shoot(1)
    assert all(torch.equal(first[i], again[i]) for i in (0, 1))
    assert error(other[0], first[0]) > 1e-3
    independent = Director(retrofit(tiny()), scene, steps=scheduler)
    alone = [independent.shoot(Take((i,), ()))[i] for i in (0, 1)]
    assert error(*alone) > 1e-3  # of one noise and one prompt


@pytest.mark.parametrize("guided", [False, True])
def test_keys_of_the_nearest_call_of_a_scheduler(guided):
    """Of two calls at one level the last, as Heun's steps have them."""
    scene, scheduler = draw(SHOT, SHOT, with_global=False), SCHEDULERS["Heun"]()
    level = call_levels(scheduler, RectifiedFlow())[1]
    assert call_levels(scheduler, RectifiedFlow())[1:3] == [level, level]
    guidance = guide(*negatives()) if guided else None
    watched = Watched(retrofit(tiny()))
    director = Director(watched, scene, steps=scheduler, t_c=1000 * level, write="nearest", guidance=guidance)
    results = director.shoot(Take((0,)))
    at_level = watched.calls[2 * (1 + guided)]
    director.keep(results, Take((0,)))
    got = director.shoot(Take((1,)))[1]
    plain = Director(retrofit(tiny()), scene, steps=scheduler, t_c=1000 * level, guidance=guidance)
    plain.give(0, at_level[0][0].latents, t_c=0)
    for branch, cache in enumerate(plain.caches):
        shot = at_level[0][0] if branch == 0 else guidance.negative(at_level[0], plain.model.adapter.traits)[0]
        with torch.no_grad():
            plain.model([shot], torch.tensor([level]), pattern="context_causal", cache=cache)
        cache.append(0)
    assert torch.equal(plain.shoot(Take((1,)))[1], got)


def test_a_fine_scene_and_a_half_precision_model():
    (shot,) = draw(SHOT, with_global=False)
    half = type(shot)(latents=shot.latents.bfloat16(), text=shot.text.bfloat16())
    (got,) = joint(retrofit(tiny().bfloat16()), [half], steps=SCHEDULERS["UniPC"]())
    assert got.dtype == torch.float32
    assert not torch.equal(got, got.bfloat16().float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_that_was_set_up_on_a_gpu(scheduler):
    made = getattr(diffusers, scheduler)(**(FLOW if scheduler.startswith("Uni") else {}))
    made.set_timesteps(4, device="cuda")
    (shot,) = draw(SHOT, with_global=False)
    on_gpu = type(shot)(latents=shot.latents.cuda(), text=shot.text.cuda())
    (got,) = joint(retrofit(tiny().cuda()), [on_gpu], steps=made)
    (expected,) = joint(retrofit(tiny()), [shot], steps=ready(scheduler, **made.config))
    assert error(got.cpu(), expected) < 1e-3


class Flow:
    """A scheduler that is not of diffusers."""

    config = {"num_train_timesteps": 10}  # noqa: RUF012
    timesteps, num_inference_steps = torch.tensor([10.0, 5.0]), 2

    def step(self, model_output, timestep, sample, *, return_dict):
        return (sample - 0.5 * model_output,)


def test_a_scheduler_is_asked_where_its_own_numbers_are():
    """Before it is used: torch mixes no numbers of two devices."""

    class Elsewhere(Flow):
        timesteps = Flow.timesteps.to("meta")

        def step(self, model_output, timestep, sample, *, return_dict):
            assert sample.device == model_output.device == timestep.device
            raise InterruptedError

    with pytest.raises(InterruptedError):
        _arrives(Elsewhere(), [1.0, 0.5])


def test_anything_that_steps_like_one():
    model, scene = retrofit(tiny()), draw(SHOT, with_global=False)
    assert same(joint(model, scene, steps=Flow()), joint(model, scene, steps=2))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
            r"^steps: this FlowMatchEuler.* has no steps yet; call",
        ),
        (
            lambda: diffusers.UniPCMultistepScheduler(**FLOW),
            r"^steps: this UniPC.* has no steps yet; call",
        ),
        (
            lambda: ready("DDIMScheduler"),
            r"^steps: this DDIMScheduler has prediction_type='epsilon'",
        ),
        (
            lambda: ready("UniPCMultistepScheduler"),
            r"^steps: this UniPCMulti.* has prediction_type='epsilon'",
        ),
        (
            lambda: ready("UniPCMultistepScheduler", prediction_type="flow_prediction"),
            r"^steps: this UniPCMultistepScheduler has prediction_type='flow_prediction' and use_flow_sigmas=False",
        ),
        (
            lambda: ready("DPMSolverMultistepScheduler", prediction_type="v_prediction", use_flow_sigmas=True),
            r"^steps: this DPMSolverMultistepScheduler has prediction_type='v_prediction'",
        ),
        (
            lambda: ready("IPNDMScheduler"),
            r"^steps: this IPNDMScheduler does not lead from noise, 1, to data, 0",
        ),
        (lambda: ready("DEISMultistepScheduler", **FLOW), r"^steps: this DEISM.* \(some leave noise in the end\)"),
        (lambda: type("Bare", (Flow,), {"config": {}})(), r"^steps: this Bare has no num_train_timesteps, which turn"),
        (
            lambda: ready("FlowMatchEulerDiscreteScheduler", invert_sigmas=True),
            r"^steps: this FlowMatchEulerDiscreteScheduler does not lead from noise, 1, to data, 0",
        ),
    ],
)
def test_refuses_schedulers_of_another_kind(scheduler, message):
    watched, scene = Watched(retrofit(tiny())), draw(SHOT, with_global=False)
    with pytest.raises(ValueError, match=message):
        joint(watched, scene, steps=scheduler())
    assert not watched.calls


def test_refuses_a_scheduler_that_was_used():
    scheduler, z = SCHEDULERS["UniPC"](), torch.ones(1, 1, 1, 1, 1)
    scheduler.step(z, scheduler.timesteps[0], z)
    with pytest.raises(ValueError, match=r"^steps: this UniPCMultistepScheduler has made steps since it was set up"):
        joint(retrofit(tiny()), draw(SHOT, with_global=False), steps=scheduler)


def test_refuses_a_scheduler_off_its_path():
    path = VariancePreserving(torch.linspace(0.99, 0.0, 1000, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^steps: got a Flow, which steps along a straight path, but .* VarianceP"):
        denoise(lambda z, t: z, [torch.ones(1, 1, 1, 1, 1)], steps=Flow(), path=path, noisy=[None], shots=(0,))


@pytest.mark.parametrize("steps", [3, [1.0, 0.4, 0.0]])
def test_without_a_scheduler_it_is_euler(steps):
    noise = [random(1, 2, 1, 2, 2, seed=0)]
    got = denoise(lambda z, t: [x * t for x in z], noise, steps=steps, path=RectifiedFlow(), noisy=[None], shots=(0,))
    assert same(got, euler(lambda z, t: [x * t for x in z], noise, steps=steps))
    assert call_levels(steps, RectifiedFlow()) == (schedule(3)[:-1] if steps == 3 else [1.0, 0.4])
