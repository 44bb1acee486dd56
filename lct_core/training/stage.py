"""What one stage of tuning does, as numbers; the defaults are the paper's."""

import re
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from lct_core.coordinates import Scheme, check_scheme
from lct_core.patterns import PATTERNS

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of tuning.

    Args:
        name: What logs and checkpoints call it: letters, digits, ``-`` and ``_``.
        steps: Optimiser steps.
        pattern: Attention between shots: ``"bidirectional"``, ``"context_causal"``, or ``"own_shot"`` where only single
            shots are trained on.
        scene_share: Share of the steps that take scenes; the others take single shots (paper, A.1: 1:1).
        single_shot_batch: Single shots in a single-shot step (ours: 4).
        scene_batch: Scenes in a scene step (paper, A.1: 3.5 sequences per GPU; ours: 1).
        max_shots: Most shots of a scene in a step (paper, 4: nine); fewer are drawn too, see
            :func:`lct_core.sample_shot_run`.
        learning_rate: Its peak (paper, A.1: 1e-4).
        warm_up: Share of the steps in which the learning rate rises to its peak (ours: 0.05; the paper names none).
        clip: Norm that the gradient is clipped to (ours: 1; the paper names none).
        ema: Decay of the moving average of the weights (paper, A.1: 0.996), reached after a warm-up (ours).
        single_frame: Probability that a shot of a scene becomes one frame of itself (paper, A.1: 0.1).
        text_dropout: Probability that the global prompt is left empty, and, drawn apart from it, that all prompts of
            shots are (ours: 0.1; without it the unconditional branch of guidance is never trained).
        storyline_dropout: Probability that the global prompt goes without its story overview (paper, A.1: "randomly";
            ours: 0.1).
        level_mean: Mean of the logit of a shot's noise level (upstream, SD3: 0).
        level_std: Its standard deviation (upstream, SD3: 1).
        precision: ``"fp32"``, or ``"bf16"``: weights in float32, the model under bfloat16 autocast.

    Raises:
        ValueError: naming the field, for a value that makes no sense.
    """

    name: str
    steps: int
    pattern: str = "bidirectional"
    scene_share: float = 0.5
    single_shot_batch: int = 4
    scene_batch: int = 1
    max_shots: int = 9
    learning_rate: float = 1e-4
    warm_up: float = 0.05
    clip: float = 1.0
    ema: float = 0.996
    single_frame: float = 0.1
    text_dropout: float = 0.1
    storyline_dropout: float = 0.1
    level_mean: float = 0.0
    level_std: float = 1.0
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"name: got {self.name!r}, expected letters, digits, - and _: files are named like it")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern: got {self.pattern!r}, expected one of {list(PATTERNS)}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: got {self.precision!r}, expected 'fp32' or 'bf16'")
        for name in ("steps", "single_shot_batch", "scene_batch", "max_shots"):
            value, least = getattr(self, name), 0 if name == "steps" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: got {value!r}, expected an int of at least {least}")
        for name in ("scene_share", "warm_up", "single_frame", "text_dropout", "storyline_dropout", "ema"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name}: got {value!r}, expected a number from 0 to 1")
        for name in ("learning_rate", "clip", "level_std"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not (isfinite(value) and value > 0):
                raise ValueError(f"{name}: got {value!r}, expected a positive number")
        if not isinstance(self.level_mean, int | float) or not isfinite(self.level_mean):
            raise ValueError(f"level_mean: got {self.level_mean!r}, expected a finite number")

    def is_scene_step(self, step: int) -> bool:
        """Whether a step takes scenes: evenly spread, in exactly the share asked for."""
        return int((step + 1) * self.scene_share) > int(step * self.scene_share)


def paper_stages(scheme: Scheme) -> tuple[Stage, ...]:
    """The paper's stages, in order (paper, 3.2.2, 3.3 and 4).

    With ``"paper"`` coordinates text moves, which the single-shot model has to learn first, on single shots alone
    ("done via efficient single-shot model fine-tuning"; the paper gives no number of steps, 10,000 are ours).
    ``"anchored"`` coordinates change nothing inside a shot and need no such stage.

    Args:
        scheme: Coordinates of the model.
    """
    stages = (
        Stage(name="single_shot", steps=10_000, scene_share=0.0, pattern="own_shot"),
        Stage(name="bidirectional", steps=135_000),
        Stage(name="causal", steps=9_000, pattern="context_causal"),
    )
    return stages if check_scheme(scheme) == "paper" else stages[1:]
