"""The one training loop, for every stage (paper, 3.4 and A.1)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from lct_core.codec import Codec
from lct_core.data import VideoScene
from lct_core.losses import tuning_loss
from lct_core.scene_model import SceneModel
from lct_core.training.examples import sample_row
from lct_core.training.optimizer import EMA, adamw, cosine
from lct_core.training.stage import Stage


class Report(NamedTuple):
    """What a step says of itself.

    Args:
        stage: The stage's name.
        step: The step, counting from 1.
        kind: ``"scene"`` or ``"single_shot"``.
        shots: Shots with a loss.
        loss: Their average.
        learning_rate: At this step.
        gradient_norm: Before clipping.
    """

    stage: str
    step: int
    kind: str
    shots: int
    loss: float
    learning_rate: float
    gradient_norm: float


class Training:
    """What a stage changes as it goes: the weights of the model, their moving average, the optimiser, the step.

    Args:
        model: A retrofitted model; its backbone's parameters that take gradients are trained, in place.
        stage: The stage.
    """

    def __init__(self, model: SceneModel, stage: Stage) -> None:
        self.model, self.stage, self.step = model, stage, 0
        self.optimizer = adamw(model.backbone.parameters(), learning_rate=stage.learning_rate)
        self.ema = EMA(model.backbone, decay=stage.ema)

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on needs: :func:`train` after :meth:`load_state_dict` equals never having stopped."""
        return {
            "step": self.step,
            "model": self.model.backbone.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved stage was.

        Raises:
            ValueError: for a state of another model.
        """
        try:
            self.model.backbone.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"state: it is not this model's: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.step = state["step"]


def train(
    training: Training,
    data: Sequence[VideoScene],
    codec: Codec,
    *,
    seed: int,
    steps: int | None = None,
    single_shot_data: Sequence[VideoScene] | None = None,
    on_step: Callable[[Report], None] | None = None,
) -> None:
    """Run a stage from where it is to its end, or for some steps; at its end the model has the averaged weights.

    Args:
        training: A new stage, or one that goes on.
        data: Scenes.
        codec: Encodes pictures and prompts.
        seed: Of the run. A step's data, noise and levels depend on it, on the stage's name and on the step alone.
        steps: Most steps to take in this call (default: all that are left).
        single_shot_data: Where single shots come from (default: the scenes' own shots).
        on_step: Called after every step, when ``training`` can be saved.

    Raises:
        ValueError: for a loss that is not finite, and as :class:`SceneModel` and the codec do.
    """
    stage, model = training.stage, training.model
    weights = model.backbone.parameters()
    device = next(weights).device
    stop = stage.steps if steps is None else min(stage.steps, training.step + steps)
    while training.step < stop:
        step = training.step
        row = sample_row(stage, step, data, codec, seed=seed, single_shot_data=single_shot_data)
        row = row.to(device)
        rate = stage.learning_rate * cosine(step, stage.steps, warm_up=stage.warm_up)
        for group in training.optimizer.param_groups:
            group["lr"] = rate
        training.optimizer.zero_grad()
        with _autocast(stage, device):
            loss = tuning_loss(model, row.scenes, row.levels, row.noise, pattern=stage.pattern)
        if not torch.isfinite(loss.mean):
            raise ValueError(
                f"{stage.name}, step {step + 1}: the loss is {loss.mean.item()}; lower learning_rate={rate:g}, or look "
                "for pictures or weights that are not finite"
            )
        loss.mean.backward()
        norm = nn.utils.clip_grad_norm_(model.backbone.parameters(), stage.clip)
        training.optimizer.step()
        training.ema.update()
        training.step += 1
        if training.step == stage.steps:
            training.ema.copy_to_model()
        if on_step is not None:
            kind = "scene" if stage.is_scene_step(step) else "single_shot"
            shots = len(row.levels) * len(loss.shots)
            on_step(Report(stage.name, step + 1, kind, shots, loss.mean.item(), rate, norm.item()))


def _autocast(stage: Stage, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if stage.precision == "bf16" else nullcontext()
