"""Checkpoints: files to resume a run from, tuned models to share, and what these say of themselves."""

from lct_core.checkpoints.file import load_checkpoint, save_checkpoint
from lct_core.checkpoints.model_card import ModelCard
from lct_core.checkpoints.tuned import Tuned

__all__ = ["ModelCard", "Tuned", "load_checkpoint", "save_checkpoint"]
