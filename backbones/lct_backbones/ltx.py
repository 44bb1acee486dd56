"""LTX-Video as diffusers ships it: text and image to video, in few and large steps of space and time.

A single stream of video tokens, flat: the adapter packs latents as the pipelines do. Text is cross-attended, has no
positions, and comes with a mask. Timesteps go from 0 to 1000; the model predicts a rectified flow's velocity.

- **Positions** are seconds and pixels: a token's first latent frame, row and column times the VAE's compression, 8
  frames and 32 x 32 pixels. ``frame_rate`` (default: 25, that of the pipelines) turns frames into seconds. The first
  latent frame holds a single frame of the video. ``LTXPipeline`` and ``LTXImageToVideoPipeline`` pass over that;
  ``LTXConditionPipeline``, made for 0.9.5 and later, does not, and nor does the adapter with
  ``causal_temporal_positioning=True`` (the name is that of the original configuration): frames 0, 1, 9, 17 ...
- **RoPE** turns the width of all heads before it is split, so that every head has angles of its own. They are affine in
  positions as fractions of 20 s and 2048 x 2048 pixels, the axes take turns, and channels that do not divide by six are
  left alone, in front. They go up to 5000 pi in float32, which rounds them by 5e-4.
- **One diagonal step** is one token along each axis: with patches of 1, a latent frame at 25 frames per second (0.32 s)
  and 32 pixels. At another frame rate frames lie further apart or closer, and shots take as many steps as they need.
- A **first image** has its latents in the first frame and timestep 0 at its tokens: ``timestep_mask``, of the size of
  the latents without channels, is 0 at the clean frame and 1 elsewhere.

Not served: tokens of condition frames beside those of the video (``LTXConditionPipeline`` with conditions that do not
start at frame 0), and conditions of a strength between 0 and 1, whose timesteps that pipeline clamps.

Sources: LTX-Video, arXiv 2501.00103; ``diffusers.models.transformers.transformer_ltx`` and ``pipelines.ltx``.
"""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lct_backbones._diffusers import DiffusersBackbone, project, project_out, token_timesteps
from lct_core import QKV, Extra, ShotInput, Site, State, Traits

_FRAMES, _PIXELS, _RATE = 8, 32, 25  # of the video to a latent, and to a second


class LTXBackbone(DiffusersBackbone):
    """The adapter of ``LTXVideoTransformer3DModel``."""

    processors: ClassVar[tuple[str, ...]] = ("LTXVideoAttnProcessor",)
    patches = "(c t h w)"

    def describe(self, config: Any) -> Traits:
        """Positions are the VAE's frames and pixels."""
        t, p = config.patch_size_t, config.patch_size
        return self.packed(
            config,
            text_width=config.caption_channels,
            unit=(_FRAMES * t / _RATE, _PIXELS * p, _PIXELS * p),
            extras={"frame_rate": Extra(None), "causal_temporal_positioning": Extra(None)},
        )

    def packed(self, config: Any, *, extras: dict[str, Extra], **traits: Any) -> Traits:
        """The model counts the channels of a patch; its text has a mask."""
        t, p, mask = config.patch_size_t, config.patch_size, "encoder_attention_mask"
        channels, size = config.in_channels // (t * p * p), ("frames", "height", "width")
        extras = {mask: Extra(("tokens",)), "timestep_mask": Extra(size, image=True), **extras}
        shared = {"latent_channels": channels, "patch": (t, p, p), "text": "cross", "text_mask": mask}
        return self.common(config, extras=extras, **shared, **traits)

    def sites(self, block: nn.Module) -> tuple[Site, ...]:
        """Self-attention, then text."""
        return (Site("attn1"), Site("attn2", "text"))

    def coordinates(self, inputs: ShotInput, shot: Any) -> Tensor:
        """Seconds and pixels, as the pipelines compute them."""
        frame, row, column = super().coordinates(inputs, shot).float().unbind(1)
        t, p, _ = self.traits.patch
        rate = inputs.extras.get("frame_rate", _RATE)
        if inputs.extras.get("causal_temporal_positioning", False):
            seconds = (frame * t * _FRAMES + 1 - _FRAMES).clamp(min=0) * (1.0 / rate)
        else:
            seconds = frame * (_FRAMES / rate) * t
        return torch.stack([seconds, row * _PIXELS * p, column * _PIXELS * p], dim=1).double()

    def rope(self, coords: Tensor) -> Tensor:
        """The model's own float32 angles of a shot's tokens, all of them, and float64 ones for its diagonal steps.

        Its own angles have too few digits for a long scene. The first token lies less than 3/4 of a step from where
        the shot starts, so its row says how many steps that is.
        """
        rope, unit = self.model.rope, coords.new_tensor(self.traits.unit)
        sizes = (rope.base_num_frames, rope.base_height, rope.base_width)
        steps = (coords[:1, 1:2] / unit[1] + 0.25).floor()
        axes = (coords - steps * unit).float().unbind(1)
        own = torch.stack([axis / size for axis, size in zip(axes, sizes, strict=True)], dim=1)
        turned = self._turned(own * 2 - 1, torch.float64 if getattr(rope, "double_precision", False) else torch.float32)
        if not bool(steps.any()):
            return turned
        return turned.double() + self._turned(2 * steps * unit / unit.new_tensor(sizes), torch.float64)

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """Packed latents and their coordinates; timesteps of tokens."""
        given, (t, p, _) = super().arguments(inputs, timestep), self.traits.patch
        coords = self.coordinates(inputs, replace(self.shot(inputs), text=0)).float().to(inputs.latents.device)
        given["hidden_states"] = rearrange(
            inputs.latents, "b c (f t) (y h) (x w) -> b (f y x) (c t h w)", t=t, h=p, w=p
        )
        if "timestep_mask" in given:
            given["timestep"] = token_timesteps(timestep, given.pop("timestep_mask"), self.traits.patch)
        given = {name: x for name, x in given.items() if name not in ("frame_rate", "causal_temporal_positioning")}
        coords = coords.T.expand(len(inputs.latents), -1, -1)
        return {"encoder_attention_mask": None, **given, "video_coords": coords}

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward, between packing and unpacking."""
        return self.unpatchify(super().single_shot(inputs, timestep), self.shot(inputs))

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Tokens; text; the six modulations of a block, for the shot or for every token."""
        given = self.arguments(inputs, timestep)
        video = self.model.proj_in(given["hidden_states"])
        batch, _, width = video.shape
        modulation, time = self.model.time_embed(
            given["timestep"].flatten(), batch_size=batch, hidden_dtype=video.dtype
        )
        conditioning = {
            "modulation": modulation.view(batch, -1, 6, width),
            "time": time.view(batch, -1, 1, width),
            "text": self.model.caption_projection(given["encoder_hidden_states"]),
        }
        return State({"video": video}, conditioning)

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of the video; or queries of the video, keys and values of the text."""
        video = state.streams["video"]
        if site.name == "attn2":
            return QKV(*project(block.attn2, video, state.conditioning["text"], across_heads=True))
        shift, scale, *_ = modulations(block.scale_shift_table, state.conditioning["modulation"])
        return QKV(*project(block.attn1, block.norm1(video) * (1 + scale) + shift, across_heads=True))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """The gate of the self-attention; or the text's output, and the MLP."""
        video, out = state.streams["video"], project_out(getattr(block, site.name), attended.flatten(2))
        parts = modulations(block.scale_shift_table, state.conditioning["modulation"])
        _, _, gate, shift, scale, mlp_gate = parts
        if site.name == "attn1":
            return {"video": video + out * gate}
        video = video + out
        return {"video": video + block.ff(block.norm2(video) * (1 + scale) + shift) * mlp_gate}

    def head(self, state: State) -> Tensor:
        """The final layer."""
        shift, scale = modulations(self.model.scale_shift_table, state.conditioning["time"])
        return self.model.proj_out(self.model.norm_out(state.streams["video"]) * (1 + scale) + shift)

    def _turned(self, fractions: Tensor, dtype: torch.dtype) -> Tensor:
        """Angles at fractions of the base sizes, ``[tokens, heads, pairs]``; ``dtype`` is that of the series."""
        width = self.traits.heads * self.traits.head_dim
        powers = self.model.rope.theta ** torch.linspace(0.0, 1.0, width // 6, dtype=dtype, device=fractions.device)
        frequencies = (powers * math.pi / 2.0).to(fractions.dtype)
        turned = (frequencies * fractions.unsqueeze(-1)).transpose(1, 2).flatten(1)
        return F.pad(turned, (width // 2 - turned.shape[1], 0)).unflatten(1, (self.traits.heads, -1))


def modulations(table: Tensor, of_time: Tensor) -> tuple[Tensor, ...]:
    """The rows of a block's table, each with its part of the time's ``[batch, 1 or tokens, rows, width]``."""
    return (table[None, None] + of_time).unbind(2)
