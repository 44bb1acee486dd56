"""How the demo trains: one optimiser loop, and the loss of a step in each of its three stages."""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lct_core.backbone import ShotInput
from lct_core.layout import Layout, Shot
from lct_core.losses import scene_loss, tuning_loss
from lct_core.noise import RectifiedFlow, sample_levels, sample_shot_run
from lct_core.scene_model import SceneModel

StepLoss = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Clips:
    """A data set in memory: every scene has as many shots as the others.

    Args:
        videos: ``[scenes, shots, channels, frames, height, width]``, RGB in [-1, 1].
        texts: ``[scenes, shots, tokens, width]``, encoded prompts.
    """

    videos: Float[Tensor, "scenes shots channels frames height width"]
    texts: Float[Tensor, "scenes shots tokens width"]


def optimise(
    model: nn.Module,
    loss: StepLoss,
    *,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    on_step: Callable[[float], None],
) -> None:
    """AdamW with betas (0.9, 0.95), weight decay 0.1 and cosine decay (paper, A.1); warm-up and clipping to 1 are ours.

    The paper's moving average of the weights is left out: its memory, 250 steps, is long beside runs this short.

    Args:
        model: What is trained, in place.
        loss: The loss of a step, given its number and the generator.
        steps: Number of steps.
        learning_rate: Its peak.
        generator: Source of all randomness.
        on_step: Called with every step's loss.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warm_up = max(1, steps // 20)
    for step in range(steps):
        decay = 0.5 * (1 + cos(pi * step / steps))
        optimiser.param_groups[0]["lr"] = learning_rate * min((step + 1) / warm_up, decay)
        optimiser.zero_grad()
        value = loss(step, generator)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        on_step(value.item())


def single_shot_loss(dit: nn.Module, clips: Clips, *, batch: int) -> StepLoss:
    """Eq. 1 on random shots, by the model's own forward: (latents, timestep 0 to 1000, text) to velocity.

    Args:
        dit: The single-shot model.
        clips: The data.
        batch: Shots in a step.
    """
    path = RectifiedFlow()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        scenes = torch.randint(len(clips.videos), (batch,), generator=generator)
        shots = torch.randint(clips.videos.shape[1], (batch,), generator=generator)
        z, text = clips.videos[scenes, shots], clips.texts[scenes, shots]
        noise = torch.randn(z.shape, generator=generator)
        t = sample_levels(Layout([[Shot(text=0, grid=(1, 1, 1))]]), generator=generator, batch=batch)[:, 0]
        return scene_loss([dit(path.add_noise(z, noise, t), 1000 * t, text)], [path.target(z, noise, t)]).mean

    return loss


def long_context_loss(model: SceneModel, clips: Clips, single: StepLoss, *, batch: int, pattern: str) -> StepLoss:
    """Single shots and scenes in turn, 1:1 (paper, A.1): in a scene every shot has its own noise level.

    Args:
        model: The retrofitted model.
        clips: The data.
        single: The loss of a single-shot step.
        batch: Scenes in a scene step; they share a layout, so as many shots of each.
        pattern: ``"bidirectional"``, or ``"context_causal"`` for the causal stage.
    """

    def loss(step: int, generator: torch.Generator) -> Tensor:
        if step % 2:
            return single(step, generator)
        scenes = torch.randint(len(clips.videos), (batch,), generator=generator)
        run = sample_shot_run(clips.videos.shape[1], generator=generator)
        shots = [ShotInput(latents=clips.videos[scenes, i], text=clips.texts[scenes, i]) for i in run]
        noise = [torch.randn(clips.videos[scenes, i].shape, generator=generator) for i in run]
        layout = Layout([[model.adapter.shot(shot) for shot in shots]])
        t = sample_levels(layout, generator=generator, batch=batch)
        return tuning_loss(model, shots, t, noise, pattern=pattern).mean

    return loss
