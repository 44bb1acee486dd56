"""How the demo generates: each shot by itself, all at once, or one after the other through the KV cache."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lct_core.backbone import ShotInput
from lct_core.cache import KVCache
from lct_core.scene_model import SceneModel

Latents = Float[Tensor, "batch channels frames height width"]
Text = Float[Tensor, "batch tokens width"]
Velocity = Callable[[list[Latents], float], list[Latents]]


def euler(velocity: Velocity, noise: Sequence[Latents], *, steps: int) -> list[Latents]:
    """Follow the flow from noise, t = 1, to data, t = 0, in equal Euler steps (paper, A.2).

    Args:
        velocity: What the model says of some shots that share one noise level.
        noise: Where to start, shot by shot.
        steps: Number of steps.
    """
    shots = list(noise)
    for i in range(steps):
        change = velocity(shots, 1 - i / steps)
        shots = [z - v / steps for z, v in zip(shots, change, strict=True)]
    return shots


@torch.no_grad()
def independent(dit: nn.Module, texts: Sequence[Text], noise: Sequence[Latents], *, steps: int) -> list[Latents]:
    """Every shot by the single-shot model's own forward, as if there were no others: the baseline."""

    def velocity(shots: list[Latents], t: float) -> list[Latents]:
        return [dit(z, torch.full((len(z),), 1000 * t), text) for z, text in zip(shots, texts, strict=True)]

    return euler(velocity, noise, steps=steps)


@torch.no_grad()
def joint(model: SceneModel, texts: Sequence[Text], noise: Sequence[Latents], *, steps: int) -> list[Latents]:
    """All shots of the scene at once, bidirectionally, at one noise level (paper, Fig. 4 a.1)."""

    def velocity(shots: list[Latents], t: float) -> list[Latents]:
        return _velocity(model, shots, texts, t)

    return euler(velocity, noise, steps=steps)


@torch.no_grad()
def causal(
    model: SceneModel, texts: Sequence[Text], noise: Sequence[Latents], *, steps: int, t_c: float
) -> list[Latents]:
    """Shot after shot, context-causally, each seeing the keys and values of those before it (paper, Fig. 4 b).

    Args:
        model: A scene model tuned with context-causal attention.
        texts: Every shot's encoded prompt.
        noise: Where each shot starts.
        steps: Euler steps for each shot.
        t_c: Noise level of the history, on the paper's 0-1000 scale: a finished shot is noised to it (with the noise it
            started from: ours), and its keys and values are cached in a pass of its own (paper, 4.2).
    """
    cache, done = KVCache(), []
    for number, (text, start) in enumerate(zip(texts, noise, strict=True)):

        def velocity(shots: list[Latents], t: float, text: Text = text) -> list[Latents]:
            return _velocity(model, shots, [text], t, pattern="context_causal", cache=cache)

        (shot,) = euler(velocity, [start], steps=steps)
        level = torch.full((len(shot),), t_c / 1000)
        velocity([model.adapter.traits.path.add_noise(shot, start, level)], t_c / 1000)
        cache.append(number)
        done.append(shot)
    return done


def _velocity(
    model: SceneModel, shots: Sequence[Latents], texts: Sequence[Text], t: float, **how: Any
) -> list[Latents]:
    """The velocity of shots that share a noise level."""
    inputs = [ShotInput(latents=z, text=text) for z, text in zip(shots, texts, strict=True)]
    outputs = model(inputs, torch.full((len(inputs),), t), **how)
    levels = torch.full((len(shots[0]),), t)
    return [model.adapter.traits.path.to_velocity(out, z, levels) for out, z in zip(outputs, shots, strict=True)]
