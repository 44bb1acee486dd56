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
from torch import Tensor
from torch.nn import functional as F

from lct_backbones._diffusers import DiffusersBackbone, gated_mlp, modulations, project, project_out
from lct_core import QKV, Extra, Shot, ShotInput, Site, State, Traits

_FRAMES, _PIXELS = 8, 32  # of the video to a latent


class LTXBackbone(DiffusersBackbone):
    """The adapter of ``LTXVideoTransformer3DModel``."""

    processors: ClassVar[tuple[str, ...]] = ("LTXVideoAttnProcessor",)
    #: Frames of the video to a second, where a shot says nothing else; numbers that say where tokens lie, these first.
    rate: ClassVar[int] = 25
    numbers: ClassVar[tuple[str, ...]] = ("frame_rate", "causal_temporal_positioning")

    def describe(self, config: Any) -> Traits:
        """Positions are the VAE's frames and pixels; the model counts the channels of a patch."""
        t, p = config.patch_size_t, config.patch_size
        frames, height, width = config.get("vae_scale_factors", (_FRAMES, _PIXELS, _PIXELS))
        extras = {"timestep_mask": Extra(("frames", "height", "width"), image=True)}
        return self.common(
            config,
            latent_channels=config.in_channels // (t * p * p),
            text_width=config.caption_channels,
            text="cross",
            text_mask="encoder_attention_mask",
            noisy_mask="timestep_mask",
            unit=(frames * t / self.rate, height * p, width * p),
            extras=extras | {name: Extra(None, positive=name == self.numbers[0]) for name in self.numbers},
        )

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """Seconds and pixels, as the pipelines compute them."""
        t, p, _ = self.traits.patch
        coords = super().coordinates(inputs, shot).float() * torch.tensor([_FRAMES * t, _PIXELS * p, _PIXELS * p])
        if inputs.extras.get("causal_temporal_positioning", False):
            coords[:, 0] = (coords[:, 0] + 1 - _FRAMES).clamp(min=0)
        coords[:, 0] *= 1.0 / inputs.extras.get("frame_rate", self.rate)
        return coords.double()

    def rope(self, coords: Tensor) -> Tensor:
        """The model's own float32 angles of a shot's tokens, all of them, and float64 ones for its diagonal steps.

        Its own angles have too few digits for a long scene. The first token lies less than 3/4 of a step from where
        the shot starts, so its row says how many steps that is.
        """
        unit, double = coords.new_tensor(self.traits.unit), getattr(self.model.rope, "double_precision", False)
        steps = (coords[:1, 1:2] / unit[1] + 0.25).floor()
        own = (coords - steps * unit).float()
        turned = self._turned(own, start=1, series=torch.float64 if double else torch.float32)
        return turned.double() + self._turned(steps * unit, start=0, series=torch.float64) if steps.any() else turned

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """Packed latents and their coordinates."""
        given, latents, (t, p, _) = super().arguments(inputs, timestep), inputs.latents, self.traits.patch
        coords = self.coordinates(inputs, replace(self.shot(inputs), text=0)).to(latents.device, torch.float32)
        pattern = f"b c (f t) (y h) (x w) -> b (f y x) {self.patches}"
        given["hidden_states"] = rearrange(latents, pattern, t=t, h=p, w=p)
        given["video_coords"] = coords.T.expand(len(latents), -1, -1)
        return {name: x for name, x in given.items() if name not in self.numbers}

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward, between packing and unpacking."""
        return self.unpatchify(super().single_shot(inputs, timestep), self.shot(inputs))

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Tokens; text; the modulations of a block, for the shot or for every token."""
        given = self.arguments(inputs, timestep)
        video, text = self.model.proj_in(given["hidden_states"]), given["encoder_hidden_states"]
        if hasattr(self.model, "caption_projection"):
            text = self.model.caption_projection(text)
        modulation, time = self.timed(self.model.time_embed, given["timestep"], video)
        return State({"video": video}, {"modulation": modulation, "time": time, "text": text})

    def timed(self, embed: Any, timestep: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Modulations and the embedding of timesteps, ``[batch, 1 or tokens, rows, width]``."""
        modulation, time = embed(timestep.flatten(), batch_size=len(video), hidden_dtype=video.dtype)
        tokens = timestep.numel() // len(video)
        return modulation.view(len(video), tokens, -1, video.shape[2]), time.view(len(video), tokens, 1, video.shape[2])

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
        _, _, gate, *of_mlp = modulations(block.scale_shift_table, state.conditioning["modulation"])
        if site.name == "attn1":
            return {"video": video + out * gate}
        return {"video": gated_mlp(video + out, block.norm2, block.ff, *of_mlp)}

    def head(self, state: State) -> Tensor:
        """The final layer."""
        shift, scale = modulations(self.model.scale_shift_table, state.conditioning["time"])
        return self.model.proj_out(self.model.norm_out(state.streams["video"]) * (1 + scale) + shift)

    def _turned(self, coords: Tensor, *, start: int, series: torch.dtype) -> Tensor:
        """Angles ``[tokens, heads, pairs]``: a series times (2 x - ``start``), with x in units of the base sizes."""
        rope, heads, pairs = self.model.rope, self.traits.heads, self.traits.heads * self.traits.head_dim // 2
        sizes = rope.base_num_frames, rope.base_height, rope.base_width
        shares = torch.stack([axis / size for axis, size in zip(coords.unbind(1), sizes, strict=True)], dim=1)
        powers = rope.theta ** torch.linspace(0.0, 1.0, pairs // 3, dtype=series, device=coords.device)
        turned = (shares.unsqueeze(-1) * 2 - start) * (powers * math.pi / 2.0).to(coords.dtype)
        return F.pad(turned.transpose(1, 2).flatten(1), (pairs % 3, 0)).unflatten(1, (heads, -1))
