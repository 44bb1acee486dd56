"""What the adapters of image models share: a shot is one frame, and a scene is a storyboard."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lct_backbones._diffusers import DiffusersBackbone
from lct_core import Extra, Shot, ShotInput


class ImageBackbone(DiffusersBackbone):
    """The adapter of a text-to-image model."""

    def condition(self, channels: int) -> dict[str, Extra]:
        """The extra for image channels that the model takes beside those of the latents, where there are any."""
        return (
            {"condition": Extra((channels, "frames", "height", "width"), required=True, image=True)} if channels else {}
        )

    def shot(self, inputs: ShotInput) -> Shot:
        """As for any model, but of one frame; a global shot needs what belongs to its prompt, pooled text and guidance.

        Raises:
            ValueError: for more frames, and a global shot without these.
        """
        shot, name = super().shot(inputs), type(self.model).__name__
        if inputs.latents.shape[2] != 1:
            raise ValueError(
                f"latents: got {inputs.latents.shape[2]} frames, expected 1: {name} makes images; give every frame of "
                "a storyboard as a shot of its own"
            )
        takes = self.traits.extras
        missing = [n for n, extra in takes.items() if extra.required and not extra.follows_latents]
        if missing := [n for n in missing if n not in inputs.extras]:
            raise ValueError(
                f"extras: this global shot has no {', '.join(missing)}, expected those of its prompt: {name} needs them"
            )
        return shot

    def example(self, shot: Shot, **options: Any) -> ShotInput:
        """Of one frame."""
        return super().example(replace(shot, grid=(1, *shot.grid[1:])), **options)

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """One frame, ``[batch, channels, height, width]``, with its condition."""
        extras, latents = dict(inputs.extras), inputs.latents
        if "condition" in extras:
            latents = torch.cat([latents, extras.pop("condition")], dim=1)
        return super().arguments(replace(inputs, latents=latents.squeeze(2), extras=extras), timestep)


def check_packed(config: Any) -> None:
    """Refuse a FLUX model that patches its tokens once more.

    Raises:
        ValueError: for a patch size other than 1.
    """
    if config.patch_size != 1:
        raise ValueError(
            f"model: got patch_size {config.patch_size}, expected 1, as in every released model: tokens come packed"
        )


def gated_mlp(x: Tensor, norm: nn.Module, mlp: nn.Module, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """A modulated and gated MLP, added to its input; modulation is ``[batch, 1 or tokens, width]``."""
    return x + gate * mlp(norm(x) * (1 + scale) + shift)


def within_half(x: Tensor) -> Tensor:
    """Kept finite in float16, as FLUX does between its blocks."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
