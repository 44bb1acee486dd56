"""What the adapters of image models share: a shot is one frame, and a scene is a storyboard."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lct_backbones._diffusers import DiffusersBackbone
from lct_core import Shot, ShotInput


class ImageBackbone(DiffusersBackbone):
    """The adapter of a text-to-image model."""

    def shot(self, inputs: ShotInput) -> Shot:
        """As for any model, but of one frame.

        Raises:
            ValueError: for more frames.
        """
        shot, name = super().shot(inputs), type(self.model).__name__
        if inputs.latents.shape[2] != 1:
            raise ValueError(
                f"latents: got {inputs.latents.shape[2]} frames, expected 1: {name} makes images; give every frame of "
                "a storyboard as a shot of its own"
            )
        return shot

    def example(self, shot: Shot, **options: Any) -> ShotInput:
        """Of one frame."""
        return super().example(replace(shot, grid=(1, *shot.grid[1:])), **options)

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """One frame, ``[batch, channels, height, width]``, with its condition."""
        given = super().arguments(inputs, timestep)
        return {**given, "hidden_states": given["hidden_states"].squeeze(2)}


def check_packed(config: Any) -> None:
    """Refuse a FLUX model that patches its tokens once more.

    Raises:
        ValueError: for a patch size other than 1.
    """
    if config.patch_size != 1:
        raise ValueError(
            f"model: got patch_size {config.patch_size}, expected 1, as in every released model: tokens come packed"
        )


def within_half(x: Tensor) -> Tensor:
    """Kept finite in float16, as FLUX does between its blocks."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
