"""A flow-matching scheduler in the place of plain Euler steps: one of diffusers, or any that is used like them."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lct_core.generation.euler import Callback, Latents, Velocity, euler, levels_of, loop
from lct_core.noise import keyed_generator
from lct_core.paths import Path, RectifiedFlow


@runtime_checkable
class Scheduler(Protocol):
    """What is used of a scheduler: ``FlowMatchEulerDiscreteScheduler`` and its kin, after their ``set_timesteps``."""

    config: Mapping[str, Any]
    timesteps: Tensor

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *, return_dict: bool) -> tuple[Tensor, ...]:
        """The sample at the next timestep, from dz/dt at this one."""
        ...


Steps = int | Sequence[float] | Scheduler
"""How a loop goes from noise to data: a number of equal Euler steps, their noise levels, or a scheduler."""


def denoise(
    velocity: Velocity,
    noise: Sequence[Latents],
    *,
    steps: Steps,
    path: Path,
    noisy: Sequence[Tensor | None],
    shots: Sequence[int],
    seed: int = 0,
    callback: Callback | None = None,
) -> list[Latents]:
    """From noise to data as ``steps`` say: :func:`euler`, or a scheduler's own steps.

    A scheduler's timesteps become levels by its ``config["num_train_timesteps"]``. It keeps the state of one sample, so
    every shot gets a copy of it as it was set up. Where it draws noise, that depends on the seed and the shot.

    Args:
        velocity: As :func:`euler` takes it, like the other arguments.
        noise: Where each shot starts.
        steps: How to go.
        path: The model's; schedulers step along the straight one alone.
        noisy: Where each shot is to be denoised.
        shots: What to call these shots.
        seed: Of the noise that a scheduler draws.
        callback: Called after every step, which for a scheduler is a call of the model.

    Raises:
        ValueError: as :func:`euler` and :func:`call_levels` do.
    """
    if not isinstance(steps, Scheduler):
        return euler(velocity, noise, path=path, noisy=noisy, steps=steps, shots=shots, callback=callback)
    levels = call_levels(steps, path)
    seeded = [_seeded(steps, seed, i) for i in shots]
    schedulers = [deepcopy(steps) for _ in noise]
    timesteps = iter(steps.timesteps)

    def step(latents: list[Latents], change: Sequence[Latents], t: float, s: float) -> list[Latents]:
        timestep = next(timesteps)
        return [
            scheduler.step(v, timestep, z, **options, return_dict=False)[0].to(z.dtype)
            for scheduler, v, z, options in zip(schedulers, change, latents, seeded, strict=True)
        ]

    return loop(velocity, step, noise, levels=[*levels, 0.0], noisy=noisy, shots=shots, callback=callback)


def call_levels(steps: Steps, path: Path) -> list[float]:
    """The noise level of every call of the model in a loop, in order.

    Raises:
        ValueError: for a scheduler that is not set up, was used since, or does not follow a flow, and where the model's
            path is not straight.
    """
    if not isinstance(steps, Scheduler):
        return [*levels_of(steps)][:-1]
    name, config = type(steps).__name__, steps.config
    if not isinstance(path, RectifiedFlow):
        raise ValueError(
            f"steps: got a {name}, which steps along a straight path, but this model's is a {type(path).__name__}; "
            "expected a number of steps, or their noise levels"
        )
    if getattr(steps, "num_inference_steps", None) is None:
        raise ValueError(f"steps: this {name} has no steps yet; call its set_timesteps(...) first")
    if getattr(steps, "step_index", None) is not None:
        raise ValueError(f"steps: this {name} has made steps since it was set up; call its set_timesteps(...) again")
    predicts = config.get("prediction_type", "flow_prediction")
    if predicts != "flow_prediction" or not config.get("use_flow_sigmas", True):
        raise ValueError(
            f"steps: this {name} has prediction_type={predicts!r} and use_flow_sigmas="
            f"{config.get('use_flow_sigmas', False)}, expected a flow-matching scheduler: a "
            'FlowMatchEulerDiscreteScheduler, or prediction_type="flow_prediction" with use_flow_sigmas=True'
        )
    if "num_train_timesteps" not in config:
        raise ValueError(f"steps: this {name} has no num_train_timesteps, which turn its timesteps into noise levels")
    levels = [t / config["num_train_timesteps"] for t in steps.timesteps.tolist()]
    if not _arrives(steps, levels):
        raise ValueError(
            f"steps: this {name} does not lead from noise, 1, to data, 0, along a straight line (some leave noise in "
            "the end); expected a flow-matching scheduler, such as a FlowMatchEulerDiscreteScheduler"
        )
    return levels


def _arrives(scheduler: Scheduler, levels: Sequence[float]) -> bool:
    """Whether a scheduler takes noise of -1 to data of 1, when told the way there."""
    copy, options = deepcopy(scheduler), _seeded(scheduler, 0)
    z = torch.full((1, 1, 1, 1, 1), -1.0, device=scheduler.timesteps.device)  # where its own numbers are
    for timestep, t in zip(scheduler.timesteps, levels, strict=True):
        if not 0 < t <= 1:
            return False
        z = copy.step((z - 1) / t, timestep, z, **options, return_dict=False)[0]
    return abs(z.item() - 1) < 0.01  # some round their timesteps to whole numbers


def _seeded(scheduler: Scheduler, *key: int) -> dict[str, torch.Generator]:
    """A generator for the noise that a scheduler may draw in its steps."""
    draws = "generator" in signature(scheduler.step).parameters
    return {"generator": keyed_generator("steps", *key)} if draws else {}
