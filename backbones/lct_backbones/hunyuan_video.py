"""HunyuanVideo as diffusers ships it: text to video, and image to video in its three ways.

Dual-stream blocks, then single-stream blocks; both attend to ``[video, text]`` jointly, and text has no positions. Text
goes through a refiner, which sees the timestep and the mean of the tokens, so it needs at least one. Beside the
timestep, blocks are modulated by a pooled CLIP embedding, ``pooled_projections``, and where the model is distilled by
the scale of its guidance times 1000, ``guidance``; a global prompt needs both too. RoPE: axes of 16, 56 and 56
channels, theta 256, float32 angles. Rectified flow, timesteps 0 to 1000. A first image comes in one of these ways:

- HunyuanVideo-I2V, the first one (``latent_concat``), joins 16 channels of latents and 1 of mask to the noise, and
  SkyReels-V1 joins 16 of latents: ``condition``.
- HunyuanVideo-I2V, the later one (``token_replace``), always has the image as the latents' first frame; its tokens are
  modulated for timestep 0, whatever the noise level of the shot. Its pipeline drops what is predicted there.
- Both of HunyuanVideo-I2V also have tokens of the image in front of those of the prompt: a part of ``text``.

The model runs with a mask whether there is padding or not; here padding is cut off, which is the same but for the last
bits. Not served: Framepack, which packs a history of its own.

Sources: HunyuanVideo, arXiv 2412.03603; ``diffusers.models.transformers.transformer_hunyuan_video`` and
``pipelines.hunyuan_video``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lct_backbones._diffusers import DiffusersBackbone, joined, project, project_added, project_out
from lct_core import QKV, Extra, Shot, ShotInput, Site, State, Traits, axis_frequencies


class HunyuanVideoBackbone(DiffusersBackbone):
    """The adapter of ``HunyuanVideoTransformer3DModel``."""

    processors = ("HunyuanVideoAttnProcessor2_0",)
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    patches = "(c t h w)"

    def describe(self, config: Any) -> Traits:
        """A pooled prompt, and guidance where the model is distilled."""
        extras = {"pooled_projections": Extra((config.pooled_projection_dim,), required=True)}
        if config.guidance_embeds:
            extras["guidance"] = Extra((), required=True)
        return self.joint(config, extras, image=True)

    def joint(self, config: Any, extras: dict[str, Extra], *, image: bool) -> Traits:
        """What the versions have in common; ``image``: whether the condition's channels must be given."""
        self.frequencies = axis_frequencies(config.rope_axes_dim, theta=config.rope_theta, dtype=torch.float32)
        extras["encoder_attention_mask"] = Extra(("tokens",))
        if condition := config.in_channels - (config.out_channels or config.in_channels):
            extras["condition"] = Extra((condition, "frames", "height", "width"), required=image, image=True)
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        joint = {"text": "joint", "text_first": False, "text_mask": "encoder_attention_mask", "extras": extras}
        return self.common(config, patch=patch, text_width=config.text_embed_dim, **joint)

    def shot(self, inputs: ShotInput) -> Shot:
        """As for any model, with some text; a global prompt too needs what is embedded beside the timestep."""
        shot, takes = super().shot(inputs), self.traits.extras
        if not shot.text:
            raise ValueError(
                "text: got no token, expected at least 1, padding not counted: the model takes the mean of the prompt; "
                "encode an empty prompt in the text encoder's template, as its pipeline does"
            )
        needed = {name for name, extra in takes.items() if extra.required and not extra.image}
        if missing := sorted(needed - set(inputs.extras)):
            raise ValueError(
                f"extras: got {sorted(inputs.extras) or 'none'} for a {inputs.role} shot, but this "
                f"{type(self.model).__name__} also needs {missing}; pass them as ShotInput(extras={{...}})"
            )
        return shot

    def example(self, shot: Shot, **options: Any) -> ShotInput:
        """With at least one token of text."""
        return super().example(replace(shot, text=max(shot.text, 1)), **options)

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """The condition joined to the latents; a mask, which the model must have."""
        latents, text = inputs.latents, inputs.text
        extras = {"encoder_attention_mask": text.new_ones(text.shape[:2]), **inputs.extras}
        if "condition" in extras:
            latents = torch.cat([latents, extras.pop("condition")], dim=1)
        return super().arguments(replace(inputs, latents=latents, extras=extras), timestep)

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Patches; refined text; the embedding of the time, and that of time 0 for every token of a clean first frame.

        Both embeddings hold the pooled prompt too.
        """
        given, (_, height, width) = self.arguments(inputs, timestep), self.shot(inputs).grid
        time, clean = self.model.time_text_embed(timestep, given["pooled_projections"], given.get("guidance"))
        video = self.model.x_embedder(given["hidden_states"])
        text = self.model.context_embedder(inputs.text, timestep, given["encoder_attention_mask"])
        streams, conditioning = {"video": video, "text": text}, {"time": time}
        if clean is not None:
            conditioning["clean"] = clean.unsqueeze(1).expand(-1, height * width, -1)
        return State(streams, conditioning)

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of the video, then of the text; a single-stream block needs its input again."""
        video, text, time = state.streams["video"], state.streams["text"], state.conditioning["time"]
        if hasattr(block, "proj_mlp"):
            both, parts = _normed(block.norm, torch.cat([video, text], dim=1), state)
            return QKV(*project(block.attn, both), (both, *parts))
        video, of_video = _normed(block.norm1, video, state)
        text, *of_text = block.norm1_context(text, emb=time)
        return QKV(*joined(project(block.attn, video), project_added(block.attn, text)), (*of_text, *of_video))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """Gates and MLPs: one for both streams, or one for each."""
        video, text, out = state.streams["video"], state.streams["text"], attended.flatten(2)
        lengths, clean = [video.shape[1], text.shape[1]], state.conditioning.get("clean")
        if hasattr(block, "proj_mlp"):
            both, *parts = aux
            (gate,) = _of_tokens(parts, sum(lengths), clean)
            out = torch.cat([out, block.act_mlp(block.proj_mlp(both))], dim=2)
            both = gate * block.proj_out(out) + torch.cat([video, text], dim=1)
            video, text = both.split(lengths, dim=1)
            return {"video": video, "text": text}
        of_video, of_text = out.split(lengths, dim=1)
        of_video, of_text = project_out(block.attn, of_video), block.attn.to_add_out(of_text)
        video_parts, text_parts = _of_tokens(aux[4:], lengths[0], clean), _of_tokens(aux[:4], lengths[1], None)
        return {
            "video": _gated(block.norm2, block.ff, video, of_video, video_parts),
            "text": _gated(block.norm2_context, block.ff_context, text, of_text, text_parts),
        }

    def head(self, state: State) -> Tensor:
        """The final layer."""
        return self.model.proj_out(self.model.norm_out(state.streams["video"], state.conditioning["time"]))


def _normed(norm: nn.Module, x: Tensor, state: State) -> tuple[Tensor, list[Tensor]]:
    """The modulated norm, and the rest of the modulation: the shot's, then that of a clean first frame."""
    time, clean = state.conditioning["time"], state.conditioning.get("clean")
    x, *parts = norm(x, emb=time) if clean is None else norm(x, time, clean[:, 0], clean.shape[1])
    return x, parts


def _of_tokens(parts: Sequence[Tensor], tokens: int, clean: Tensor | None) -> list[Tensor]:
    """Parts of a modulation, ``[batch, width]``, as ``[batch, 1 or tokens, width]``."""
    each = [part.unsqueeze(1) for part in parts]
    if clean is None:
        return each
    first, half = clean.shape[1], len(each) // 2
    pairs = zip(each[half:], each[:half], strict=True)
    return [torch.cat([a.expand(-1, first, -1), b.expand(-1, tokens - first, -1)], dim=1) for a, b in pairs]


def _gated(norm: nn.Module, mlp: nn.Module, x: Tensor, attended: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """One stream of a dual-stream block after its attention."""
    gate, shift, scale, mlp_gate = parts
    x = x + attended * gate
    return x + mlp_gate * mlp(norm(x) * (1 + scale) + shift)
