"""The one loop that every mode runs: plain Euler steps from noise to data (paper, A.2)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lct_core.noise import Path, RectifiedFlow

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


def euler(
    velocity: Velocity,
    noise: Sequence[Latents],
    *,
    path: Path | None = None,
    noisy: Sequence[Tensor | None] | None = None,
    steps: int = 32,
    shots: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> list[Latents]:
    """Follow the flow from noise, t = 1, to data, t = 0, in equal steps of the path, in float32 at least.

    Args:
        velocity: dz/dt of some shots that share the noise level t: ``velocity(latents, t)``.
        noise: Where each shot starts.
        path: Whose steps they are (default: of the straight one, z <- z - v / steps).
        noisy: Where each shot is to be denoised; the rest stays as it is (default: everywhere).
        steps: Number of steps (paper, A.2: 32).
        shots: What a callback shall call these shots (default: 0, 1, 2, ...).
        callback: Called after every step.

    Returns:
        Every shot at t = 0.

    Raises:
        ValueError: for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    path = path or RectifiedFlow()
    names = tuple(range(len(noise)) if shots is None else shots)
    latents = [wide(z) for z in noise]
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        change = velocity(latents, t)
        stepped = [path.step(z, v, t, s) for z, v in zip(latents, change, strict=True)]
        latents = [
            new if part is None else torch.where(part, new, old)
            for new, old, part in zip(stepped, latents, noisy or [None] * len(latents), strict=True)
        ]
        if callback is not None:
            callback(Step(names, i + 1, steps, s, latents))
    return latents


def wide(x: Tensor) -> Tensor:
    """In float32, or in its own dtype where that is finer: half precision would lose small steps."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
