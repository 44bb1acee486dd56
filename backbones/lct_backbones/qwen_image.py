"""Qwen-Image as diffusers ships it: text to image, Edit and Edit-Plus. The shots are storyboard frames.

Text and image have weights of their own in every block and meet in one self-attention, text first. RoPE turns both:
the axes get 16, 56 and 56 of 128 channels, float32 angles. Rows and columns are counted from the image's middle, and
text token ``i`` stands at ``(p+i, p+i, p+i)``, where ``p`` is half the larger side: that diagonal is the model's own.
The model turns by products of complex numbers, which round otherwise: one shot is its own forward to 2e-6 in float32.
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
from einops import rearrange
from torch import Tensor

from lct_backbones._diffusers import gated_mlp, joined, project, project_added, project_out
from lct_backbones._images import ImageBackbone, within_half
from lct_core import QKV, Extra, Shot, ShotInput, Site, State, Traits, axis_frequencies


class QwenImageBackbone(ImageBackbone):
    """The adapter of ``QwenImageTransformer2DModel``."""

    processors = ("QwenDoubleStreamAttnProcessor2_0",)
    patches = "(c t h w)"

    def describe(self, config: Any) -> Traits:
        """Any model may have images to go by; other inputs and outputs than the pipelines' are refused."""
        channels, patch = self.model.out_channels, config.patch_size
        layered = {"use_layer3d_rope": False, "use_additional_t_cond": False}
        expected = {"in_channels": channels * patch**2, "guidance_embeds": False, **layered}
        if wrong := {name: config[name] for name in expected if config[name] != expected[name]}:
            raise ValueError(
                f"model: got {wrong}, expected {expected}: latents go in as they come out, diffusers has no weights "
                f"for guidance, and {[*layered]} are Qwen-Image-Layered's, whose frames are layers; load another model"
            )
        self.frequencies = axis_frequencies(config.axes_dims_rope, dtype=torch.float32)
        return self.common(
            config,
            latent_channels=channels,
            patch=(1, patch, patch),
            text_width=config.joint_attention_dim,
            text="joint",
            timesteps=(0.0, 1.0),
            extras={
                "encoder_hidden_states_mask": Extra(("tokens",)),
                "image_latents": Extra((channels, "images", "height", "width"), image=True),
            },
            text_mask="encoder_hidden_states_mask",
        )

    def shot(self, inputs: ShotInput) -> Shot:
        """One frame, and behind it the images as further frames."""
        shot, images = super().shot(inputs), inputs.extras.get("image_latents", inputs.latents[:, :, :0])
        return replace(shot, grid=(1 + images.shape[2], *shot.grid[1:]))

    def prepare(self, inputs: ShotInput) -> ShotInput:
        """A global prompt gets no images that it did not come with."""
        prepared, none = super().prepare(inputs), {"image_latents"} - set(inputs.extras)
        return replace(prepared, extras={name: x for name, x in prepared.extras.items() if name not in none})

    def example(self, shot: Shot, **options: Any) -> ShotInput:
        """Of one frame, and with text: the model's own forward needs some."""
        return super().example(replace(shot, text=max(shot.text, 1)), **options)

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """Rows and columns from the middle, text behind the larger side."""
        coords, sides = super().coordinates(inputs, shot), shot.grid[1:]
        coords[: shot.text] = max(sides) // 2 + torch.arange(shot.text)[:, None]
        coords[shot.text :, 1:] -= torch.tensor([side - side // 2 for side in sides])
        return coords

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """The tokens of the shot and of its images, each of which is one of ``img_shapes``."""
        given, (_, h, w) = super().arguments(inputs, timestep), self.traits.patch
        pictures = torch.cat([inputs.latents, given.pop("image_latents", inputs.latents[:, :, :0])], dim=2)
        batch, _, count, height, width = pictures.shape
        given["img_shapes"] = [[(1, height // h, width // w)] * count] * batch
        given["hidden_states"] = rearrange(pictures, "b c f (y h) (x w) -> b (f y x) (c h w)", h=h, w=w)
        return given

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward, without what it makes of the images."""
        return self.unpatchify(super().single_shot(inputs, timestep), self.shot(inputs))

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Tokens of text, shot and images; time, and where images are modulated as clean, which tokens those are."""
        given, model = self.arguments(inputs, timestep), self.model
        image, text = model.img_in(given["hidden_states"]), model.txt_in(model.txt_norm(given["encoder_hidden_states"]))
        time, own = timestep.to(image.dtype), prod(given["img_shapes"][0][0])
        times = torch.cat([time, time * 0]) if model.zero_cond_t else time
        conditioning = dict(zip(("time", "clean"), model.time_text_embed(times, image).split(len(time)), strict=False))
        if model.zero_cond_t:
            conditioning["is_clean"] = (torch.arange(image.shape[1], device=image.device) >= own).expand(len(time), -1)
        return State({"text": text, "image": image}, conditioning)

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of both streams, text first."""
        time, is_clean = state.conditioning["time"], state.conditioning.get("is_clean")
        text_shift, text_scale, *of_text = block.txt_mod(time)[:, None].chunk(6, dim=-1)
        if is_clean is None:
            modulation = block.img_mod(time)[:, None]
        else:
            both = block.img_mod(torch.cat([time, state.conditioning["clean"]]))[:, None].chunk(2)
            modulation = torch.where(is_clean[..., None], both[1], both[0])
        shift, scale, *of_image = modulation.chunk(6, dim=-1)
        text = block.txt_norm1(state.streams["text"]) * (1 + text_scale) + text_shift
        image = block.img_norm1(state.streams["image"]) * (1 + scale) + shift
        return QKV(*joined(project_added(block.attn, text), project(block.attn, image)), (*of_text, *of_image))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """Both streams."""
        text, image = state.streams["text"], state.streams["image"]
        (text_gate, *of_text), (gate, *of_image) = aux[:4], aux[4:]
        words, picture = (x.contiguous() for x in attended.flatten(2).split([text.shape[1], image.shape[1]], dim=1))
        text = gated_mlp(text + text_gate * block.attn.to_add_out(words), block.txt_norm2, block.txt_mlp, *of_text)
        image = gated_mlp(image + gate * project_out(block.attn, picture), block.img_norm2, block.img_mlp, *of_image)
        return {"text": within_half(text), "image": within_half(image)}

    def head(self, state: State) -> Tensor:
        """The final layer, of the shot's tokens and those of its images."""
        return self.model.proj_out(self.model.norm_out(state.streams["image"], state.conditioning["time"]))

    def unpatchify(self, tokens: Tensor, shot: Shot) -> Tensor:
        """The first tokens are the shot's own."""
        own = replace(shot, grid=(1, *shot.grid[1:]))
        return super().unpatchify(tokens[:, : own.video], own)
