"""Qwen-Image as diffusers ships it: text to image, Edit and Edit-Plus. The shots are storyboard frames.

Text and image have weights of their own in every block and meet in one self-attention, text first. RoPE turns both:
the axes get 16, 56 and 56 of 128 channels, float32 angles. Rows and columns are counted from the image's middle, and
text token ``i`` stands at ``(p+i, p+i, p+i)``, where ``p`` is half the larger side: that diagonal is the model's own.
The model turns by products of complex numbers, and so does the adapter, to the last bit.
Timesteps go from 0, clean, to 1; rectified flow, velocity.

Latents are ``[batch, 16, 1, height, width]``; the adapter packs them into the model's tokens. The images that Edit and
Edit-Plus go by are tokens behind the shot's own and stand at 1, 2, ... along the frame axis. They come as
``image_latents``, ``[batch, 16, images, height, width]``: of the shot's size, as the pipelines make them too where all
have one aspect ratio. With ``zero_cond_t`` they are modulated as clean.

Not served: residuals of a ControlNet; guidance embeddings, which the class announces and does not have; Layered, whose
frames are the layers of one picture.

Sources: Qwen-Image, arXiv 2508.02324; ``diffusers.models.transformers.transformer_qwenimage``, ``pipelines.qwenimage``.
"""

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lct_backbones._diffusers import finished, modulated, project_out
from lct_backbones._images import PackedImageBackbone, within_half
from lct_core import QKV, Extra, Rotation, Shot, ShotInput, Site, State, Traits, axis_frequencies

_MASK, _IMAGES = "encoder_hidden_states_mask", "image_latents"


class QwenImageBackbone(PackedImageBackbone):
    """The adapter of ``QwenImageTransformer2DModel``."""

    processors = ("QwenDoubleStreamAttnProcessor2_0",)

    def describe(self, config: Any) -> Traits:
        """Any model may have images to go by; layers are refused."""
        if config.use_layer3d_rope or config.use_additional_t_cond:
            raise ValueError("model: got Qwen-Image-Layered, whose frames are layers; load another Qwen-Image")
        if config.in_channels != (config.out_channels or config.in_channels) * config.patch_size**2:
            raise ValueError(
                f"model: got in_channels={config.in_channels} and out_channels={config.out_channels}, expected the "
                f"former to be {config.patch_size} x {config.patch_size} times the latter: it predicts what it is given"
            )
        self.frequencies = axis_frequencies(config.axes_dims_rope, dtype=torch.float32)
        images = Extra((config.out_channels, "images", "height", "width"), image=True)
        return self.common(
            config,
            text_tokens=(1, None),
            text="joint",
            timesteps=(0.0, 1.0),
            extras={_IMAGES: images},
            text_mask=_MASK,
        )

    def shot(self, inputs: ShotInput) -> Shot:
        """One frame, and behind it the images as further frames."""
        shot, images = super().shot(inputs), inputs.extras.get(_IMAGES, inputs.latents[:, :, :0])
        return replace(shot, grid=(1 + images.shape[2], *shot.grid[1:]))

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """Rows and columns from the middle, text behind the larger side."""
        coords, sides = super().coordinates(inputs, shot), shot.grid[1:]
        coords[: shot.text] = max(sides) // 2 + torch.arange(shot.text)[:, None]
        coords[shot.text :, 1:] -= torch.tensor([side - side // 2 for side in sides])
        return coords

    def rotation(self, coords: Tensor, shot: Shot, *, dtype: torch.dtype) -> Rotation:
        """From complex numbers that are made on the CPU, as the model's table of them is."""
        angles = self.rope(coords.cpu())
        turns = torch.polar(torch.ones_like(angles), angles).to(coords.device)
        return Rotation(turns.real.to(dtype), turns.imag.to(dtype), "interleaved")

    def rotate(self, x: Tensor, by: Rotation) -> Tensor:
        """By a product of complex numbers."""
        pairs = torch.view_as_complex(x.to(by.cos.dtype).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(by.cos, by.sin)).flatten(-2).type_as(x)

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """The tokens of the shot and of its images, each of which is one of ``img_shapes``; a mask changes nothing."""
        given = super().arguments(inputs, timestep)
        del given[_MASK]
        images = [self.pack(image) for image in given.pop(_IMAGES, inputs.latents[:, :, :0]).unbind(2)]
        given["hidden_states"] = torch.cat([given["hidden_states"], *images], dim=1)
        count, *sides = self.shot(inputs).grid
        return {**given, "img_shapes": [[(1, *sides)] * count] * len(inputs.latents)}

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Tokens of text, shot and images; the shot's time and, where images are modulated as clean, theirs."""
        given, model = self.arguments(inputs, timestep), self.model
        video, text = model.img_in(given["hidden_states"]), model.txt_in(model.txt_norm(given["encoder_hidden_states"]))
        time, own = timestep.to(video.dtype), prod(given["img_shapes"][0][0])
        both = model.time_text_embed(torch.cat([time, time * 0]) if model.zero_cond_t else time, video)
        times = both.unflatten(0, (-1, len(time))).transpose(0, 1)
        is_image = (torch.arange(video.shape[1], device=video.device) >= own)[:, None].expand(len(time), -1, -1)
        return State({"text": text, "video": video}, {"time": times[:, 0], "times": times, "is_image": is_image})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of both streams, text first."""
        by = state.conditioning
        own, *clean = block.img_mod(by["times"].transpose(0, 1)).unsqueeze(2)
        modulation = torch.where(by["is_image"], clean[0], own) if clean else own
        video, *of_video = modulated(block.img_norm1, state.streams["video"], *modulation.chunk(6, dim=-1))
        modulation = block.txt_mod(by["time"])[:, None]
        text, *of_text = modulated(block.txt_norm1, state.streams["text"], *modulation.chunk(6, dim=-1))
        return QKV(*self.project_both(block.attn, text, video), (of_text, of_video))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """Both streams."""
        text, video, (of_text, of_video) = state.streams["text"], state.streams["video"], aux
        text_seen, seen = (x.contiguous() for x in self.apart(attended.flatten(2), text, video))
        text = finished(text, block.attn.to_add_out(text_seen), block.txt_norm2, block.txt_mlp, *of_text)
        video = finished(video, project_out(block.attn, seen), block.img_norm2, block.img_mlp, *of_video)
        return {"text": within_half(text), "video": within_half(video)}

    def unpatchify(self, tokens: Tensor, shot: Shot) -> Tensor:
        """The first frame is the shot's own."""
        return super().unpatchify(tokens, shot)[:, :, :1]
