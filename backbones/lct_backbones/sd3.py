"""Stable Diffusion 3 and 3.5 as diffusers ships them: text to image; here, storyboards, a frame for every shot.

Dual-stream blocks with joint self-attention, image first; the last one leaves its text as it is. There is no RoPE: a
fixed grid of sine-cosine embeddings is cropped at its middle to the size of the image, and what is larger than the grid
is refused. So a shot's place in the scene turns nothing, and every frame has a crop of its own, whatever its size: only
tuning can teach the model which shot is which.

- SD3.5 Medium has a second attention over the image's tokens alone in some blocks: ``attn2``. It joins shots too.
- Queries and keys are normed in SD3.5.
- ``pooled_projections``, the two CLIP encoders' pooled prompts, are added to the time. ``text`` is theirs and T5's
  tokens, one after the other, padding included: the model takes no mask.
- Channels that a model takes beside its latents (image editing) are its ``condition``.

Not served: ControlNets, skipped layers, and an IP-Adapter.

Sources: Esser et al., arXiv 2403.03206; ``diffusers.models.transformers.transformer_sd3``,
``models.attention.JointTransformerBlock`` and ``pipelines.stable_diffusion_3``.
"""

from typing import Any

import torch
from torch import Tensor

from lct_backbones._diffusers import adaptive, finished, gated_mlp, project, project_out
from lct_backbones._images import ImageBackbone
from lct_core import QKV, Shot, ShotInput, Site, State, Traits


class SD3Backbone(ImageBackbone):
    """The adapter of ``SD3Transformer2DModel``."""

    processors = ("JointAttnProcessor2_0",)
    patches = "(t h w c)"

    def describe(self, config: Any) -> Traits:
        """No RoPE; text behind the image."""
        return self.common(
            config,
            text="joint",
            text_first=False,
            pairing=None,
            extras={**self.beside_time(config), **self.condition(config)},
        )

    def shot(self, inputs: ShotInput) -> Shot:
        """As for any image; no larger than the grid."""
        shot, most = super().shot(inputs), self.model.config.pos_embed_max_size
        if max(shot.grid) > most:
            raise ValueError(
                f"latents: got {shot.grid} patches, expected at most {most} rows and columns: the model's grid"
            )
        return shot

    def sites(self, block: Any) -> tuple[Site, ...]:
        """The second attention first: both see what the block was given, and the joint one's finish ends the block."""
        second = (Site("attn2", tokens="video"),) if block.use_dual_attention else ()
        return (*second, Site("attn"))

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward, its image as a frame."""
        return super().single_shot(inputs, timestep).unsqueeze(2)

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Patches with their crop of the grid; text; the time with the pooled prompt."""
        video = self.model.pos_embed(self.arguments(inputs, timestep)["hidden_states"]).contiguous()
        time = self.model.time_text_embed(timestep, inputs.extras["pooled_projections"])
        return State({"video": video, "text": self.model.context_embedder(inputs.text)}, {"time": time})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of the image alone; or of image and text."""
        video, text, time = state.streams["video"], state.streams["text"], state.conditioning["time"]
        if site.name == "attn2":
            *_, x, gate = block.norm1(video, emb=time)
            return QKV(*project(block.attn2, x), gate[:, None])
        video, *of_video = adaptive(block.norm1, video, time)
        if block.context_pre_only:
            text, of_text = block.norm1_context(text, time), []
        else:
            text, *of_text = adaptive(block.norm1_context, text, time)
        return QKV(*self.project_both(block.attn, text, video), (of_text, of_video[:4]))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """What the second attention adds, for later; or both streams."""
        video, text, out = state.streams["video"], state.streams["text"], attended.flatten(2)
        if site.name == "attn2":
            return {"second": aux * project_out(block.attn2, out)}
        of_text, (gate, *of_video) = aux
        text_seen, seen = self.apart(out, text, video)
        changed: dict[str, Tensor] = {}
        video = video + gate * project_out(block.attn, seen)
        if block.use_dual_attention:
            video = video + state.streams["second"]
            changed["second"] = torch.zeros_like(video[:, :0])  # it is used up: no memory for it between blocks
        changed["video"] = gated_mlp(video, block.norm2, block.ff, *of_video)
        if of_text:
            out = block.attn.to_add_out(text_seen)
            changed["text"] = finished(text, out, block.norm2_context, block.ff_context, *of_text)
        return changed
