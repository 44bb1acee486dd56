"""What a finished stage of tuning left: weights, and what to do with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lct_core.checkpoints.file import load_checkpoint
from lct_core.checkpoints.model_card import ModelCard
from lct_core.codec import Codec
from lct_core.scene_model import SceneModel

_WINDOW = 9  # shots, the paper's, where a checkpoint does not say its own


@dataclass(frozen=True, eq=False, kw_only=True)
class Tuned:
    """What a finished stage of tuning left.

    Args:
        file: The checkpoint.
        card: What it says of its model.
        weights: Of the model.
        pattern: The attention that it was tuned with.
        window: Most shots that it was tuned on.
    """

    file: Path
    card: ModelCard
    weights: Mapping[str, Tensor]
    pattern: str
    window: int

    @classmethod
    def load(cls, file: Path) -> "Tuned":
        """Read a checkpoint.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not of a finished stage, or does not say how to make its model.
        """
        saved = load_checkpoint(file)
        if "model" not in saved:
            raise ValueError(f"{file}: a stage that is not finished, expected one of the files named like a stage")
        card = ModelCard.from_state(saved.get("about", {}), file)
        windows = {stage["name"]: stage["max_shots"] for stage in saved.get("stages", [])}
        window = windows.get(saved.get("stage"), _WINDOW)
        return cls(file=file, card=card, weights=saved["model"], pattern=saved["pattern"], window=window)

    def build(self, device: torch.device) -> tuple[SceneModel, Codec]:
        """The tuned model on its device, and its codec.

        Raises:
            ValueError: for weights of another model, and as :meth:`ModelCard.build` does.
        """
        model, codec = self.card.build()
        try:
            model.backbone.load_state_dict(self.weights)
        except RuntimeError as error:
            raise ValueError(f"{self.file}: its weights are not of {self.card.name}: {error}") from error
        model.backbone.to(device).eval()
        return model, codec
