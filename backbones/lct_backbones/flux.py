"""FLUX.1 as diffusers ships it: text to image; here, storyboards, a frame for every shot.

Dual-stream blocks, then single-stream ones whose MLP runs beside their attention; text is joined to self-attention,
text first. RoPE turns all tokens, text at the origin and images at ``(0, row, column)``: 16, 56 and 56 of 128 channels,
float64 angles. So shots that move along the diagonal also move along the first axis, where FLUX.1 Kontext has its
reference images.

- Latents are 16 channels, shifted and scaled as the pipelines have them; four of them, 2 x 2, make a token, which the
  pipelines call packing.
- ``pooled_projections``, CLIP's pooled prompt, is added to the time; in a model distilled for guidance (FLUX.1 dev and
  its kin), so is ``guidance``, one number for every entry of the batch, 3.5 by default in the pipeline.
- ``text`` are T5's tokens, padding included: the model takes no mask.
- FLUX.1 Fill and the Control models take more channels, the ``condition``: 16 of a control image; or 16 of a masked
  image and 64 of its mask, 8 x 8 pixels.
- Time goes from 0, clean, to 1, noise.

Not served: Kontext's reference images, which are further tokens of a shot, ControlNets, and an IP-Adapter. Redux is a
text of its own.

Sources: Black Forest Labs, FLUX.1 Kontext, arXiv 2506.15742;
``diffusers.models.transformers.transformer_flux`` and ``pipelines.flux``.
"""

from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor

from lct_backbones._diffusers import adaptive, finished, project, project_out
from lct_backbones._images import PackedImageBackbone, within_half
from lct_core import QKV, ShotInput, Site, State, Traits, axis_frequencies


class FluxBackbone(PackedImageBackbone):
    """The adapter of ``FluxTransformer2DModel``."""

    processors: ClassVar[tuple[str, ...]] = ("FluxAttnProcessor",)
    stacks = ("transformer_blocks", "single_transformer_blocks")
    #: Its single-stream blocks.
    single: ClassVar[Any] = FluxSingleTransformerBlock
    #: Whether output projections get contiguous tokens: where weights are frozen, a matmul's bits depend on it.
    contiguous: ClassVar[bool] = True

    def describe(self, config: Any) -> Traits:
        """Four latents make a token, which is what the model counts as channels."""
        self.frequencies = axis_frequencies(config.axes_dims_rope, theta=self.model.pos_embed.theta)
        return self.common(
            config,
            latent_channels=self.model.out_channels // 4,
            patch=(1, 2, 2),
            text="joint",
            timesteps=(0.0, 1.0),
            extras={**self.beside_time(config), **self.condition(config, packed=4)},
        )

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """Tokens, and where they are."""
        places = self.coordinates(inputs, self.shot(inputs)).to(inputs.latents.device)
        text, image = places.tensor_split([inputs.text.shape[1]])
        return {**super().arguments(inputs, timestep), "txt_ids": text, "img_ids": image}

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Tokens of both streams; the time with guidance and the pooled prompt."""
        given = self.arguments(inputs, timestep)
        video = self.model.x_embedder(given["hidden_states"])
        scales = [given[name].to(video.dtype) * 1000 for name in ("timestep", "guidance") if name in given]
        time = self.model.time_text_embed(*scales, given["pooled_projections"])
        return State({"text": self.model.context_embedder(inputs.text), "video": video}, {"time": time})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of both streams, text first; in a single-stream block, of both as one, and its MLP."""
        text, video, time = state.streams["text"], state.streams["video"], state.conditioning["time"]
        if isinstance(block, self.single):
            x, gate = adaptive(block.norm, self.joined(text, video), time)
            return QKV(*project(block.attn, x), (gate, block.act_mlp(block.proj_mlp(x))))
        text, *of_text = adaptive(block.norm1_context, text, time)
        video, *of_video = adaptive(block.norm1, video, time)
        return QKV(*self.project_both(block.attn, text, video), (of_text, of_video))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """Both streams."""
        text, video, out = state.streams["text"], state.streams["video"], attended.flatten(2)
        if isinstance(block, self.single):
            gate, mlp = aux
            both = self.joined(text, video) + gate * self.merge(block, torch.cat([out, mlp], dim=2))
            text, video = self.apart(within_half(both), text, video)
            return {"text": text, "video": video}
        of_text, of_video = aux
        text_seen, seen = (x.contiguous() if self.contiguous else x for x in self.apart(out, text, video))
        text = finished(text, block.attn.to_add_out(text_seen), block.norm2_context, block.ff_context, *of_text)
        video = finished(video, project_out(block.attn, seen), block.norm2, block.ff, *of_video)
        return {"text": within_half(text), "video": video}

    def merge(self, block: Any, x: Tensor) -> Tensor:
        """A single-stream block's last projection, of attention and MLP side by side."""
        return block.proj_out(x)
