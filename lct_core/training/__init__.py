"""The tuning recipe (paper, 3.4 and A.1): as pieces, and as one loop."""

from lct_core.checkpoints import load_checkpoint, save_checkpoint
from lct_core.training.examples import Example, TrainingRow, sample_row, scene_examples, single_shots, to_row
from lct_core.training.loop import Report, Training, train
from lct_core.training.optimizer import EMA, adamw, cosine
from lct_core.training.run import CHECKPOINT, METRICS, tune
from lct_core.training.stage import Stage, paper_stages

__all__ = [
    "CHECKPOINT",
    "EMA",
    "METRICS",
    "Example",
    "Report",
    "Stage",
    "Training",
    "TrainingRow",
    "adamw",
    "cosine",
    "load_checkpoint",
    "paper_stages",
    "sample_row",
    "save_checkpoint",
    "scene_examples",
    "single_shots",
    "to_row",
    "train",
    "tune",
]
