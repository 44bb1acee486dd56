"""The video of LTX-2, 2.3 and 2.5 as diffusers ships them.

Like LTX-Video: flat video tokens, cross-attended text, fractional positions, timesteps of tokens (``timestep_mask``).

- **Positions** are the middles of tokens, in seconds (``fps``, default: 24) and pixels; the first latent frame is a
  single frame of the video. RoPE turns pairs of neighbours, or of a head's halves, by ``rope_type``; its series is
  computed in float64 where the model is so configured, its angles in float32. One diagonal step is one token along each
  axis: with patches of 1, a latent frame at 24 frames per second (1/3 s) and 32 pixels.
- **Text** is what the pipeline's connectors make of the encoder's. It is modulated by the shot's timestep (the model's
  ``sigma``) in 2.3, by constants in 2.5. From 2.3 on, what a head attends to is gated by the token that asks.

Not served: audio. The model runs as it does with ``isolate_modalities=True``, the mode that its pipelines use for
guidance between video and audio: its video neither hears an audio stream nor is heard. Nor are keyframe tokens and
their embedding, the model's own self-attention mask, and perturbed attention for guidance.

Sources: LTX-2, arXiv 2601.03233; ``diffusers.models.transformers.transformer_ltx2`` and ``pipelines.ltx2``.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb
from torch import Tensor

from lct_backbones._diffusers import gated_mlp, modulations, project, project_out
from lct_backbones.ltx import LTXBackbone
from lct_core import QKV, Rotation, Shot, ShotInput, Site, State, Traits


class LTX2Backbone(LTXBackbone):
    """The adapter of ``LTX2VideoTransformer3DModel``."""

    processors = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")
    rate = 24
    numbers = ("fps",)

    def describe(self, config: Any) -> Traits:
        """As LTX-Video; from 2.3 on, the text has the width of the cross-attention."""
        text_width = config.caption_channels if config.use_prompt_embeddings else config.cross_attention_dim
        traits = replace(super().describe(config), text_width=text_width)
        return traits if config.rope_type == "interleaved" else replace(traits, pairing="half")

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """The middles of tokens, in seconds and pixels."""
        size = (count * patch for count, patch in zip(shot.grid, self.traits.patch, strict=True))
        bounds = self.model.rope.prepare_video_coords(1, *size, device="cpu", fps=inputs.extras.get("fps", self.rate))
        start, end = bounds[0].unbind(-1)
        return ((start + end) / 2.0).T.double()

    def rotate(self, x: Tensor, by: Rotation) -> Tensor:
        """Split RoPE adds products in one operation, which rounds once."""
        if by.pairing == "interleaved":
            return super().rotate(x, by)
        tables = by.cos.transpose(0, 1), by.sin.transpose(0, 1)
        return apply_split_rotary_emb(x.transpose(1, 2), tables).transpose(1, 2).contiguous()

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """With some audio, which nobody hears."""
        config, batch = self.model.config, len(timestep)
        text_width = config.caption_channels if config.use_prompt_embeddings else config.audio_cross_attention_dim
        return {
            **super().arguments(inputs, timestep),
            "sigma": timestep,
            "isolate_modalities": True,
            "audio_hidden_states": inputs.latents.new_zeros(batch, 1, config.audio_in_channels),
            "audio_encoder_hidden_states": inputs.text.new_zeros(batch, 1, text_width),
            "audio_timestep": timestep,
            "audio_num_frames": 1,
        }

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """As LTX-Video; in 2.3, what modulates the text."""
        state = super().encode(inputs, timestep)
        if not hasattr(self.model, "prompt_adaln"):
            return state
        prompt, _ = self.timed(self.model.prompt_adaln, timestep, state.streams["video"])
        return replace(state, conditioning={**state.conditioning, "prompt": prompt})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of the video; or queries of the video, keys and values of the text; and what its heads are gated by."""
        attn, video, of, text = getattr(block, site.name), state.streams["video"], state.conditioning, None
        shift, scale, _, _, _, _, *of_text = modulations(block.scale_shift_table, of["modulation"])
        if site.name == "attn1":
            x = block.norm1(video) * (1 + scale) + shift
        else:
            x, text = block.norm2(video), of["text"]
            if of_text:
                x = x * (1 + of_text[1]) + of_text[0]
            if block.cross_attn_adaln:
                shift, scale = modulations(block.prompt_scale_shift_table, of.get("prompt", 0))
                text = text * (1 + scale) + shift
        gates = None if attn.to_gate_logits is None else attn.to_gate_logits(x)
        return QKV(*project(attn, x, text, across_heads=True), gates)

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """The gate of the self-attention; or the text's output, gated from 2.3 on, and the MLP."""
        video, attn = state.streams["video"], getattr(block, site.name)
        parts = modulations(block.scale_shift_table, state.conditioning["modulation"])
        out = attended if aux is None else attended * (2.0 * torch.sigmoid(aux)).unsqueeze(-1)
        out = project_out(attn, out.flatten(2))
        if site.name == "attn1":
            return {"video": video + out * parts[2]}
        video = video + (out * parts[8] if len(parts) > 6 else out)
        return {"video": gated_mlp(video, block.norm3, block.ff, *parts[3:6])}
