"""HunyuanVideo as diffusers ships it: text to video, and image to video in its three ways.

Dual-stream blocks, then single-stream blocks; both attend to ``[video, text]`` jointly, and text has no positions. Text
goes through a refiner, which sees the timestep and the mean of the tokens, so it needs at least one. Beside the
timestep, blocks are modulated by a pooled CLIP embedding, ``pooled_projections``, and where the model is distilled by
the scale of its guidance times 1000, ``guidance``; a global prompt needs both too. RoPE: axes of 16, 56 and 56
channels, theta 256, float32 angles. Rectified flow, timesteps 0 to 1000. A first image comes in one of these ways:

- HunyuanVideo-I2V, the first one (``latent_concat``), joins 16 channels of latents, then 1 of mask, to the noise, and
  SkyReels-V1 joins 16 of latents: ``condition``, zero behind the first frame.
- HunyuanVideo-I2V, the later one (``token_replace``), always has the image as the latents' first frame; its tokens are
  modulated for timestep 0, whatever the noise level of the shot. Its pipeline drops what is predicted there.
- Both of HunyuanVideo-I2V also have tokens of the image in front of those of the prompt: a part of ``text``.

The model runs with a mask whether there is padding or not; here padding is cut off, which is the same but for the last
bits. Not served: Framepack, which packs a history of its own.

Sources: HunyuanVideo, arXiv 2412.03603; ``diffusers.models.transformers.transformer_hunyuan_video`` and
``pipelines.hunyuan_video``.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lct_backbones._diffusers import DiffusersBackbone, adaptive, finished, project, project_out
from lct_core import QKV, Extra, ShotInput, Site, State, Traits, axis_frequencies


class HunyuanVideoBackbone(DiffusersBackbone):
    """The adapter of ``HunyuanVideoTransformer3DModel``."""

    processors = ("HunyuanVideoAttnProcessor2_0",)
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")

    def describe(self, config: Any) -> Traits:
        """RoPE; text behind the video, and a mask for its padding."""
        self.frequencies = axis_frequencies(config.rope_axes_dim, theta=config.rope_theta, dtype=torch.float32)
        return self.common(
            config,
            text="joint",
            text_first=False,
            text_tokens=(1, None),
            text_mask="encoder_attention_mask",
            extras=self.extras(config),
        )

    def extras(self, config: Any) -> dict[str, Extra]:
        """Channels for a condition; a pooled prompt, and guidance where the model is distilled."""
        return {**self.condition(config), **self.beside_time(config)}

    def noisy(self, inputs: ShotInput) -> Tensor | None:
        """All but the first frame, where that is always the image."""
        if self.model.config.get("image_condition_type") != "token_replace":
            return None
        noisy = torch.ones_like(inputs.latents[:, :1, :, :1, :1], dtype=torch.bool)
        noisy[:, :, : self.traits.patch[0]] = False
        return noisy

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Patches; refined text; the time, and time 0 for every token of a clean first frame, each with the prompt."""
        given, (_, height, width) = self.arguments(inputs, timestep), self.shot(inputs).grid
        time, clean = self.model.time_text_embed(timestep, given["pooled_projections"], given.get("guidance"))
        video = self.model.x_embedder(given["hidden_states"])
        text = self.model.context_embedder(inputs.text, timestep, given["encoder_attention_mask"])
        first = {} if clean is None else {"clean": clean[:, None].expand(-1, height * width, -1)}
        return State({"video": video, "text": text}, {"time": time, **first})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of the video, then of the text; a single-stream block needs its input again."""
        text, video = state.streams["text"], state.streams["video"]
        if hasattr(block, "proj_mlp"):
            both, gate = _normed(block.norm, self.joined(text, video), **state.conditioning)
            return QKV(*project(block.attn, both), (both, gate))
        video, *of_video = _normed(block.norm1, video, **state.conditioning)
        text, *of_text = adaptive(block.norm1_context, text, state.conditioning["time"])
        return QKV(*self.project_both(block.attn, text, video), (of_text, of_video))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """Gates and MLPs: one for both streams, or one for each."""
        text, video, out = state.streams["text"], state.streams["video"], attended.flatten(2)
        if hasattr(block, "proj_mlp"):
            both, gate = aux
            out = torch.cat([out, block.act_mlp(block.proj_mlp(both))], dim=2)
            text, video = self.apart(self.joined(text, video) + gate * block.proj_out(out), text, video)
            return {"text": text, "video": video}
        of_text, of_video = aux
        text_seen, seen = self.apart(out, text, video)
        text = finished(text, block.attn.to_add_out(text_seen), block.norm2_context, block.ff_context, *of_text)
        video = finished(video, project_out(block.attn, seen), block.norm2, block.ff, *of_video)
        return {"text": text, "video": video}


def _normed(norm: nn.Module, x: Tensor, time: Tensor, clean: Tensor | None = None) -> tuple[Tensor, ...]:
    """The modulated norm, and the rest of the modulation, ``[batch, 1 or tokens, width]``."""
    if clean is None:
        return adaptive(norm, x, time)
    first = torch.arange(x.shape[1], device=x.device)[:, None] < clean.shape[1]
    x, *parts = norm(x, time, clean[:, 0], clean.shape[1])
    half = len(parts) // 2  # those of the shot's own time, then those of time 0
    return x, *(torch.where(first, b[:, None], a[:, None]) for a, b in zip(parts[:half], parts[half:], strict=True))
