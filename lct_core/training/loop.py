"""The one training loop, for every stage (paper, 3.4 and A.1)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from lct_core.codec import Codec
from lct_core.data import VideoScene
from lct_core.losses import tuning_loss
from lct_core.noise import keyed_generator
from lct_core.scene_model import SceneModel
from lct_core.training.examples import TrainingRow, sample_row
from lct_core.training.optimizer import EMA, adamw, check_settings, cosine
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

    Raises:
        ValueError: for trained weights in half precision.
    """

    def __init__(self, model: SceneModel, stage: Stage) -> None:
        coarse = {p.dtype for p in model.backbone.parameters() if p.requires_grad and p.dtype.itemsize < 4}
        if coarse:
            raise ValueError(
                f"model: got trained weights in {', '.join(map(str, coarse))}, expected float32: in half precision "
                "most steps round to nothing; call .float() on the model; precision 'bf16' runs it under autocast"
            )
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
            ValueError: for a state of another model, or of an optimiser with other betas, eps or weight decay.
        """
        check_settings(state["optimizer"], self.optimizer)
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
        seed: Of the run. A step's data, noise, levels and whatever the model and the codec draw from torch's global
            generators depend on it, on the stage's name and on the step alone.
        steps: Most steps to take in this call (default: all that are left).
        single_shot_data: Where single shots come from (default: the scenes' own shots).
        on_step: Called after every step, when ``training`` can be saved.

    Raises:
        ValueError: for a loss or a gradient that is not finite, before any weight has changed, and as
            :class:`SceneModel` and the codec do.
    """
    backbone, stage = training.model.backbone, training.stage
    stop = stage.steps if steps is None else min(stage.steps, training.step + steps)
    device = next(backbone.parameters()).device
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.train()
    try:
        while training.step < stop:
            with _randomness(seed, stage, training.step, device):
                row = sample_row(stage, training.step, data, codec, seed=seed, single_shot_data=single_shot_data)
                report = _step(training, row.to(device), device)
            if training.step == stage.steps:
                training.ema.copy_to_model()
            if on_step is not None:
                on_step(report)
    finally:
        for module, mode in modes:
            module.training = mode


def _step(training: Training, row: TrainingRow, device: torch.device) -> Report:
    """One optimiser step; ``training`` is one step further, unless it raises."""
    stage, model, step = training.stage, training.model, training.step
    rate = stage.learning_rate * cosine(step, stage.steps, warm_up=stage.warm_up)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.optimizer.zero_grad()
    with torch.autocast(device.type, torch.bfloat16) if stage.precision == "bf16" else nullcontext():
        loss = tuning_loss(model, row.scenes, row.levels, row.noise, pattern=stage.pattern)
    loss.mean.backward()
    norm = nn.utils.clip_grad_norm_(model.backbone.parameters(), stage.clip)
    if not (torch.isfinite(loss.mean) and torch.isfinite(norm)):
        raise ValueError(
            f"{stage.name}, step {step + 1}: the loss is {loss.mean.item()}, the norm of its gradient {norm.item()}; "
            f"lower learning_rate={rate:g}, or look for pictures or weights that are not finite"
        )
    training.optimizer.step()
    training.ema.update()
    training.step += 1
    return Report(
        stage=stage.name,
        step=training.step,
        kind="scene" if stage.is_scene_step(step) else "single_shot",
        shots=len(row.levels) * len(loss.shots),
        loss=loss.mean.item(),
        learning_rate=rate,
        gradient_norm=norm.item(),
    )


@contextmanager
def _randomness(seed: int, stage: Stage, step: int, device: torch.device) -> Iterator[None]:
    """What draws from torch's global generators, a model's dropout or a codec's sampling, depends on the step alone."""
    drawn = keyed_generator("global", seed, stage.name, step).initial_seed()
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []), torch.cuda.device(device) if cuda else nullcontext():
        torch.default_generator.manual_seed(drawn)
        if cuda:
            torch.cuda.manual_seed(drawn)
        yield
