"""Checkpoints: files to go on from and to hand out, and what they say of their model."""

from lct_core.checkpoints.file import load_checkpoint, save_checkpoint
from lct_core.checkpoints.model_card import ModelCard
from lct_core.checkpoints.tuned import Tuned

__all__ = ["ModelCard", "Tuned", "load_checkpoint", "save_checkpoint"]
