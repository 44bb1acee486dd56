"""Kandinsky 6 as diffusers ships it: its video stream, text and image to video.

Text goes through blocks of its own, modulated by the timestep and a pooled CLIP embedding, ``pooled_projections``; then
it is cross-attended, and has no positions there. A global prompt needs its pooled embedding too. RoPE: axes of 32, 48
and 48 channels, theta 10000, angles of rows and columns halved (``scale_factor``), float32. Its class has tables of 128
positions; a scene goes on behind them.

A first image, ``image``, is one more frame of the shot, behind the others and in the place of the first, with a token
type of its own; what is predicted there is dropped. The channels for a condition (``visual_cond``) hold nothing but its
mask. Rectified flow, velocity, timesteps 0 to 1000.

Not served: audio; models distilled for ``PiflowScheduler``, which predict several velocities at once.

Source: ``diffusers.models.transformers.transformer_kandinsky6`` and ``pipelines.kandinsky6``.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_kandinsky6 import apply_gate_sum, apply_scale_shift, get_freqs
from torch import Tensor, nn

from lct_backbones._diffusers import DiffusersBackbone, Heads
from lct_core import QKV, Extra, Shot, ShotInput, Site, State, Traits, angles

_POOLED, _MASK = "pooled_projections", "encoder_attention_mask"


class Kandinsky6Backbone(DiffusersBackbone):
    """The adapter of ``Kandinsky6Transformer3DModel``."""

    processors = ("Kandinsky6AttnProcessor",)
    stacks = ("visual_transformer_blocks",)
    patches = "(c t h w)"

    def describe(self, config: Any) -> Traits:
        """Axes and their scale; an image where the model has a token type for it."""
        channels, axes = config.in_visual_dim, config.axes_dims
        if config.out_visual_dim != channels:
            raise ValueError(
                f"model: got out_visual_dim={config.out_visual_dim} beside in_visual_dim={channels}, expected the "
                "same: a model distilled for PiflowScheduler predicts several velocities; load one that is not"
            )
        self.frequencies = torch.block_diag(*(get_freqs(n // 2)[None] for n in axes))
        self.scale = torch.tensor(self.model.scale_factor).repeat_interleave(torch.tensor(axes) // 2)
        extras = {_POOLED: Extra((config.in_text_dim2,), required=True)}
        if config.visual_cond and config.visual_token_type_num_embeddings > 1 and config.patch_size[0] == 1:
            extras["image"] = Extra((channels, "height", "width"), image=True)
        heads = config.model_dim // sum(axes)
        return Traits(
            latent_channels=channels,
            patch=tuple(config.patch_size),
            text_width=config.in_text_dim,
            heads=heads,
            kv_heads=heads,
            head_dim=sum(axes),
            text="cross",
            extras={**extras, _MASK: Extra(("tokens",))},
            text_mask=_MASK,
        )

    def shot(self, inputs: ShotInput) -> Shot:
        """As for any model, with the image as a further frame."""
        shot = super().shot(inputs)
        frames, height, width = shot.grid
        return replace(shot, grid=(frames + 1, height, width)) if shot.video and "image" in inputs.extras else shot

    def cast(self, dtype: torch.dtype) -> None:
        """Tables of angles stay in float32, as ``from_pretrained`` leaves them."""
        tables = [(table, table.data) for table in self.model.buffers()]
        super().cast(dtype)
        for table, exact in tables:
            table.data = exact

    def attentions(self) -> Iterable[nn.Module]:
        """Those of the video."""
        videos: list[Any] = [block.video_dec_block for block in self.blocks]
        return [attention for video in videos for attention in (video.self_attention, video.cross_attention)]

    def sites(self, block: nn.Module) -> tuple[Site, ...]:
        """Self-attention, then text."""
        return (Site("self_attention"), Site("cross_attention", "text"))

    def rope(self, coords: Tensor) -> Tensor:
        """Scaled along each axis."""
        return angles(coords, self.frequencies) / self.scale.to(coords.device)

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """The image stands where the first frame does."""
        coords = super().coordinates(inputs, shot)
        if shot.video and "image" in inputs.extras:
            coords.view(*shot.grid, 3)[-1, ..., 0] = 0
        return coords

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """Channels last, the image behind the frames, the channels of a condition; no mask where none is given."""
        extras, latents = dict(inputs.extras), inputs.latents
        if (image := extras.pop("image", None)) is not None:
            latents = torch.cat([latents, image.unsqueeze(2)], dim=2)
        is_image = torch.arange(latents.shape[2], device=latents.device) >= inputs.latents.shape[2]
        if image is not None:
            rows, columns = (torch.arange(n // p) for n, p in zip(image.shape[2:], self.traits.patch[1:], strict=True))
            extras["visual_token_type_ids"] = is_image.long().expand(len(latents), -1)
            extras["visual_rope_pos"] = (torch.arange(len(is_image)) * ~is_image.cpu(), rows, columns)
        if self.model.config.visual_cond:
            mask = is_image.to(latents.dtype).view(1, 1, -1, 1, 1).expand_as(latents[:, :1])
            latents = torch.cat([latents, torch.zeros_like(latents), mask], dim=1)
        given = super().arguments(replace(inputs, latents=latents.permute(0, 2, 3, 4, 1), extras=extras), timestep)
        return {name: x for name, x in given.items() if name != _MASK or name in extras}

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward, channels first again, without what it makes of the image."""
        out = super().single_shot(inputs, timestep).permute(0, 4, 1, 2, 3)
        return out[:, :, : inputs.latents.shape[2]]

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Patches, with their token types beside an image; time with pooled text; text through its own blocks."""
        given, model = self.arguments(inputs, timestep), self.model
        time = model.video_time_embeddings(timestep) + model.video_pooled_text_embeddings(given[_POOLED])
        text = model.video_text_embeddings(inputs.text)
        turns = model.video_text_rope_embeddings(torch.arange(text.shape[1], device=text.device))
        for block in model.video_text_transformer_blocks:
            text = block(text, time, turns)
        video = model.visual_embeddings(given["hidden_states"])
        own = video[:, : inputs.latents.shape[2] // self.traits.patch[0]].flatten(1, 3)
        if (types := given.get("visual_token_type_ids")) is not None:
            video = video + model.visual_token_type_embeddings(types)[:, :, None, None, :]
        return State({"video": video.flatten(1, 3)}, {"time": time, "text": text, "own": own[..., :0]})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of the video; or queries of the video, keys and values of the text."""
        part, name, text = block.video_dec_block, site.name, state.conditioning["text"]
        shift, scale, _ = _modulation(part, name, state)
        x = _modulated(getattr(part, f"{name}_norm"), state.streams["video"], scale, shift)
        return QKV(*_project(getattr(part, name), x, x if name == "self_attention" else text))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """The gate of the attention; behind that to the text, the MLP too."""
        part, video = block.video_dec_block, state.streams["video"]
        *_, gate = _modulation(part, site.name, state)
        video = apply_gate_sum(video, getattr(part, site.name).out_layer(attended.flatten(2)), gate)
        if site.name == "cross_attention":
            shift, scale, gate = _modulation(part, "feed_forward", state)
            mlp = part.feed_forward(_modulated(part.feed_forward_norm, video, scale, shift))
            video = apply_gate_sum(video, mlp, gate)
        return {"video": video}

    def head(self, state: State) -> Tensor:
        """The final layer, without the image."""
        layer, own = self.model.out_layer, state.conditioning["own"]
        shift, scale = layer.modulation(state.conditioning["time"]).chunk(2, dim=-1)
        return layer.out_layer(_modulated(layer.norm, state.streams["video"], scale, shift))[:, : own.shape[1]]

    def unpatchify(self, tokens: Tensor, shot: Shot) -> Tensor:
        """As many frames as there are tokens for: none for the image."""
        _, height, width = shot.grid
        return super().unpatchify(tokens, replace(shot, grid=(tokens.shape[1] // (height * width), height, width)))


def _modulation(part: Any, name: str, state: State) -> tuple[Tensor, ...]:
    """Shift, scale and gate of a part of a block."""
    place = ("self_attention", "cross_attention", "feed_forward").index(name)
    return part.visual_modulation(state.conditioning["time"]).chunk(3, dim=-1)[place].chunk(3, dim=-1)


def _modulated(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return apply_scale_shift(norm(x.float()), x, scale, shift)


def _project(attn: Any, x: Tensor, source: Tensor) -> Heads:
    projected = attn.to_query(x), attn.to_key(source), attn.to_value(source)
    q, k, v = (part.unflatten(2, (attn.num_heads, -1)) for part in projected)
    return attn.query_norm(q), attn.key_norm(k), v
