"""Wan 2.1 and 2.2 as diffusers ships them: text to video, image to video, and one model for both (TI2V).

A single stream of video tokens; text is cross-attended and has no positions. The axes of its RoPE get 44, 42 and 42 of
128 channels, float64 angles. The pipelines pad text to 512 tokens with zeros, and the model attends to all of them: pad
prompts in the same way. A first image comes in three ways:

- Wan 2.1 and 2.2 A14B (I2V) concatenate 20 channels, 4 of mask and 16 of latents, to the noise: ``condition``.
- Wan 2.1 (I2V) also cross-attends CLIP tokens of the image, ``encoder_hidden_states_image``; with a first and a last
  image (FLF2V), those of both, one after the other.
- Wan 2.2 5B (TI2V) has the image's latents in the first frame, and timestep 0 at its tokens: ``timestep_mask``, of the
  size of the latents without channels, is 0 at the clean frame and 1 elsewhere.

Wan 2.2 A14B is two models, each for its half of the noise levels: retrofit both, then :class:`lct_core.Experts`.

Sources: Wan, arXiv 2503.20314; ``diffusers.models.transformers.transformer_wan`` and ``pipelines.wan``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lct_backbones._diffusers import DiffusersBackbone, attend_image, modulations, project, project_out
from lct_core import QKV, Extra, ShotInput, Site, State, Traits, axis_frequencies

_IMAGE = "encoder_hidden_states_image"
_TEXT = 512  # text tokens that an I2V model expects behind those of the image: it splits there


class WanBackbone(DiffusersBackbone):
    """The adapter of ``WanTransformer3DModel``."""

    processors = ("WanAttnProcessor",)
    stacks = ("blocks",)
    patches = "(t h w c)"

    def describe(self, config: Any) -> Traits:
        """Frames get the channels that do not divide by three; beside CLIP tokens, the model expects 512 of text."""
        rope, traits = self.model.rope, {"text": "cross", "text_width": config.text_dim}
        self.frequencies = axis_frequencies((rope.t_dim, rope.h_dim, rope.w_dim))
        extras = {**self.condition(config), "timestep_mask": Extra(("frames", "height", "width"), image=True)}
        if config.image_dim is not None:
            extras[_IMAGE] = Extra((config.pos_embed_seq_len or "tokens", config.image_dim), required=True, image=True)
            traits["text_tokens"] = (_TEXT, _TEXT)
        return self.common(config, extras=extras, noisy_mask="timestep_mask", **traits)

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """Two images of a shot as entries of the batch."""
        given = super().arguments(inputs, timestep)
        if _IMAGE in given and self.model.config.pos_embed_seq_len is not None:
            given[_IMAGE] = given[_IMAGE].unflatten(1, (2, -1)).flatten(0, 1)
        return given

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Patches; text; the six modulations of a block, for the shot or for every token."""
        given = self.arguments(inputs, timestep)
        video, times = self.model.patch_embedding(given["hidden_states"]), given["timestep"]
        embedded = self.model.condition_embedder(times.flatten(), inputs.text, given.get(_IMAGE), *times.shape[1:])
        return self.state(video.flatten(2).transpose(1, 2).contiguous(), *embedded)

    def state(self, video: Tensor, time: Tensor, modulation: Tensor, text: Tensor, image: Tensor | None) -> State:
        """Time and its modulations get an axis of tokens, of 1 where the shot has one timestep."""
        time, modulation = (x.view(len(video), -1, n, video.shape[-1]) for x, n in ((time, 1), (modulation, 6)))
        conditioning = {"time": time, "modulation": modulation, "text": text}
        if image is not None:
            both = torch.cat([image, text], dim=1)  # then parts of it, as in the model: strides decide the last bits
            conditioning |= {"image": both[:, :-_TEXT], "text": both[:, -_TEXT:]}
        return State({"video": video}, conditioning)

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of the video; or queries of the video, keys and values of the text."""
        video, attn, of = state.streams["video"], getattr(block, site.name), state.conditioning
        if site.name == "attn1":
            shift, scale, *_ = modulations(block.scale_shift_table, of["modulation"].float())
            return QKV(*project(attn, _modulated(block.norm1, video, shift, scale), across_heads=True))
        x = block.norm2(video.float()).type_as(video)
        q, k, v = project(attn, x, of["text"], across_heads=True)
        return QKV(q, k, v, _attend_image(attn, q, of["image"]) if "image" in of else None)

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """The gate of the self-attention; or the text's output, and the MLP."""
        video, attn, of = state.streams["video"], getattr(block, site.name), state.conditioning
        _, _, gate, shift, scale, mlp_gate = modulations(block.scale_shift_table, of["modulation"].float())
        if site.name == "attn1":
            return {"video": (video.float() + project_out(attn, attended.flatten(2)) * gate).type_as(video)}
        video = video + project_out(attn, (attended if aux is None else attended + aux).flatten(2))
        mlp = block.ffn(_modulated(block.norm3, video, shift, scale))
        return {"video": (video.float() + mlp.float() * mlp_gate).type_as(video)}

    def head(self, state: State) -> Tensor:
        """The final layer."""
        shift, scale = modulations(self.model.scale_shift_table, state.conditioning["time"])
        return self.model.proj_out(_modulated(self.model.norm_out, state.streams["video"], shift, scale))


def _modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (norm(x.float()) * (1 + scale) + shift).type_as(x)


def _attend_image(attn: Any, q: Tensor, image: Tensor) -> Tensor:
    """To the image's tokens, by projections beside those for the text."""
    k, v = attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image)
    return attend_image(q, *(x.unflatten(2, (attn.heads, -1)) for x in (k, v)))
