"""The one loop that every mode runs: plain Euler steps from noise to data (paper, A.2)."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import isfinite
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lct_core._describe import describe
from lct_core.paths import Path, RectifiedFlow

Latents = Float[Tensor, "batch channels frames height width"]
Velocity = Callable[[list[Latents], float], Sequence[Latents]]


class Step(NamedTuple):
    """One step that is done, as a callback is told of it.

    Args:
        shots: Indices, in the scene that the mode was given, of the shots that this loop denoises.
        step: How many steps are done.
        steps: How many there are.
        t: The noise level reached, from 1 to 0.
        latents: The shots at that level.
    """

    shots: tuple[int, ...]
    step: int
    steps: int
    t: float
    latents: list[Latents]


Callback = Callable[[Step], None]


def schedule(steps: int, *, shift: float = 1.0) -> list[float]:
    """Noise levels to step through, from 1 to 0: equal steps, each level t then moved to s t / (1 + (s - 1) t).

    Args:
        steps: Number of steps.
        shift: The s that the base model is sampled with, above 1 for more steps at high noise (paper: none, 1; Wan's
            pipelines: 3 at 480P and 5 at 720P). Where a pipeline speaks of mu, it is exp(mu). In training, the same
            shift is a ``Stage.level_mean`` of log(shift).

    Returns:
        ``steps + 1`` levels.

    Raises:
        ValueError: for fewer than one step, or a shift that is not positive.
    """
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(
            f"steps: got {describe(steps)}, expected an int of at least 1, or a list of noise levels from 1 down to 0"
        )
    if not isinstance(shift, int | float) or not isfinite(shift) or shift <= 0:
        raise ValueError(f"shift: got {describe(shift)}, expected a positive number; 1 is no shift")
    levels = [1 - i / steps for i in range(int(steps) + 1)]
    return [shift * t / (shift * t + (1 - t)) for t in levels]


def levels_of(steps: int | Sequence[float], *, shift: float = 1.0) -> Sequence[float]:
    """The noise levels of a loop, from 1 to 0.

    Args:
        steps: Their number, or the levels themselves.
        shift: Of a number of steps, see :func:`schedule`.

    Raises:
        ValueError: for fewer than one step, a shift that is not positive, and levels that do not go down from 1 to 0.
    """
    levels = steps if isinstance(steps, Sequence) and not isinstance(steps, str) else schedule(steps, shift=shift)
    numbers = all(isinstance(t, int | float) for t in levels)
    if not numbers or [*levels[:1], *levels[-1:]] != [1, 0] or not all(t > s for t, s in pairwise(levels)):
        raise ValueError(
            f"steps: got the levels {describe(levels)}, expected numbers that go down from 1 to 0; "
            "lct_core.generation.schedule makes them"
        )
    return levels


def euler(
    velocity: Velocity,
    noise: Sequence[Latents],
    *,
    path: Path | None = None,
    noisy: Sequence[Tensor | None] | None = None,
    steps: int | Sequence[float] = 32,
    shots: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> list[Latents]:
    """Follow the flow from noise, t = 1, to data, t = 0, in steps of the path, in float32 at least.

    Args:
        velocity: dz/dt of some shots that share the noise level t: ``velocity(latents, t)``.
        noise: Where each shot starts.
        path: Whose steps they are (default: of the straight one, z <- z - (t - s) v from level t to s).
        noisy: Where each shot is to be denoised; the rest stays as it is (default: everywhere).
        steps: Number of equal steps (paper, A.2: 32), or the noise levels themselves, from 1 down to 0: a
            :func:`schedule`, or ``FlowMatchEulerDiscreteScheduler.sigmas.tolist()``.
        shots: What a callback shall call these shots (default: 0, 1, 2, ...).
        callback: Called after every step.

    Returns:
        Every shot at t = 0.

    Raises:
        ValueError: for fewer than one step, and levels that do not go down from 1 to 0.
    """
    path = path or RectifiedFlow()

    def step(latents: list[Latents], change: Sequence[Latents], t: float, s: float) -> list[Latents]:
        return [path.step(z, v, t, s) for z, v in zip(latents, change, strict=True)]

    return loop(
        velocity,
        step,
        noise,
        levels=levels_of(steps),
        noisy=noisy or [None] * len(noise),
        shots=range(len(noise)) if shots is None else shots,
        callback=callback,
    )


def loop(
    velocity: Velocity,
    step: Callable[[list[Latents], Sequence[Latents], float, float], Sequence[Latents]],
    noise: Sequence[Latents],
    *,
    levels: Sequence[float],
    noisy: Sequence[Tensor | None],
    shots: Sequence[int],
    callback: Callback | None,
) -> list[Latents]:
    """From noise to data in some steps, in float32 at least; what is not to be denoised stays as it is.

    Args:
        velocity: dz/dt of some shots that share a noise level.
        step: The shots at the next level, ``step(latents, dz/dt, t, next t)``.
        noise: Where each shot starts.
        levels: All noise levels, the last one included.
        noisy: Where each shot is to be denoised; None for everywhere.
        shots: What a callback shall call these shots.
        callback: Called after every step.
    """
    latents = [wide(z) for z in noise]
    for done, (t, s) in enumerate(pairwise(levels), 1):
        stepped = step(latents, velocity(latents, t), t, s)
        latents = [
            new if part is None else torch.where(part, new, old)
            for new, old, part in zip(stepped, latents, noisy, strict=True)
        ]
        if callback is not None:
            callback(Step(tuple(shots), done, len(levels) - 1, s, latents))
    return latents


def wide(x: Tensor) -> Tensor:
    """In float32, or in its own dtype where that is finer: half precision would lose small steps."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
