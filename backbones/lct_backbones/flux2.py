"""FLUX.2 as diffusers ships it: text to image; here, storyboards, a frame for every shot.

As FLUX.1, dual-stream blocks and then single-stream ones, text first, but all blocks of a kind share their modulation,
and a single-stream block projects its queries, keys, values and MLP at once. There is no pooled prompt.

- Coordinates have four axes: an image's tokens stand at ``(0, row, column, 0)``, those of its text at ``(0, 0, 0, i)``;
  32 of 128 channels for each, theta 2000, float64 angles. A shot moves along the first three, where reference images
  would stand too, and not along the fourth: every text is read from 0, and its length moves nothing. In the ``"paper"``
  scheme, text stands on the diagonal instead, and at 0 on the fourth axis.
- Latents are the VAE's 32 channels of 2 x 2 latents, patchified and normalized: 128 channels, one token each.
- ``guidance``, in a model that is distilled for it, is one number for every entry of the batch, 4 by default in the
  pipeline.
- ``text`` are the encoder's tokens, padding included: the model takes no mask.
- Time goes from 0, clean, to 1, noise.

Not served: reference images, which are further tokens of a shot, and with them the key-value cache of Klein.

Sources: ``diffusers.models.transformers.transformer_flux2`` and ``pipelines.flux2``.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock
from torch import Tensor
from torch.nn import functional as F

from lct_backbones._diffusers import modulated
from lct_backbones.flux import FluxBackbone
from lct_core import QKV, Shot, ShotInput, Site, State, Traits, axis_frequencies


class Flux2Backbone(FluxBackbone):
    """The adapter of ``Flux2Transformer2DModel``."""

    processors = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")
    single = Flux2SingleTransformerBlock
    contiguous = False

    def describe(self, config: Any) -> Traits:
        """Four axes, of which shots move along three."""
        self.frequencies = axis_frequencies(config.axes_dims_rope, theta=config.rope_theta)
        return self.common(
            config,
            patch=(1, 1, 1),
            text="joint",
            unit=(1.0, 1.0, 1.0, 0.0),
            timesteps=(0.0, 1.0),
            extras={**self.beside_time(config), **self.condition(config)},
        )

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """Text one after the other on an axis of its own."""
        places = F.pad(super().coordinates(inputs, shot), (0, 1))
        places[: shot.text, 3] = torch.arange(shot.text)
        return places

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Tokens of both streams; the time with guidance, and the modulations that it gives all blocks."""
        model, given = self.model, self.arguments(inputs, timestep)
        tokens, names = given["hidden_states"], {"timestep", "guidance"} & set(given)
        scaled = {name: given[name].to(tokens.dtype) * 1000 for name in names}
        time = model.time_guidance_embed(scaled["timestep"], scaled.get("guidance"))
        by = {
            "of_text": model.double_stream_modulation_txt(time)[:, None],
            "of_video": model.double_stream_modulation_img(time)[:, None],
            "of_both": model.single_stream_modulation(time)[:, None],
        }
        streams = {"text": model.context_embedder(inputs.text), "video": model.x_embedder(tokens)}
        return State(streams, {"time": time, **by})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of both streams, text first; in a single-stream block, of both as one, and its MLP."""
        text, video, by = state.streams["text"], state.streams["video"], state.conditioning
        if isinstance(block, self.single):
            both, attn = self.joined(text, video), block.attn
            x, gate = modulated(block.norm, both, *by["of_both"].chunk(3, dim=-1))
            *heads, mlp = attn.to_qkv_mlp_proj(x).split([attn.inner_dim] * 3 + [2 * attn.mlp_hidden_dim], dim=-1)
            q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in heads)
            return QKV(attn.norm_q(q), attn.norm_k(k), v, (gate, attn.mlp_act_fn(mlp)))
        text, *of_text = modulated(block.norm1_context, text, *by["of_text"].chunk(6, dim=-1))
        video, *of_video = modulated(block.norm1, video, *by["of_video"].chunk(6, dim=-1))
        return QKV(*self.project_both(block.attn, text, video), (of_text, of_video))

    def merge(self, block: Any, x: Tensor) -> Tensor:
        """A single-stream block's last projection, of attention and MLP side by side."""
        return block.attn.to_out(x)
