"""What the adapters of image models share: a shot is one frame, and a scene is a storyboard."""

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
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


class PackedImageBackbone(ImageBackbone):
    """The adapter of one that takes and gives tokens, which its pipelines pack from latents and unpack to them."""

    def pack(self, image: Tensor) -> Tensor:
        """The tokens of ``[batch, channels, height, width]``."""
        _, h, w = self.traits.patch
        return rearrange(image, "b c (y h) (x w) -> b (y x) (c h w)", h=h, w=w)

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """Tokens, those of the condition beside those of the latents."""
        given = super().arguments(inputs, timestep)
        return {**given, "hidden_states": self.pack(given["hidden_states"])}

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward, its tokens as a frame."""
        return self.unpatchify(super().single_shot(inputs, timestep), self.shot(inputs))


def within_half(x: Tensor) -> Tensor:
    """Kept finite in float16, as FLUX does between its blocks."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
