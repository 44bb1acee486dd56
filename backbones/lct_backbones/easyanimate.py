"""EasyAnimate 5.1 as diffusers ships it: text to video, inpainting (image to video), control.

Text and video are two streams, text first, that share the norms of a block. In its first blocks (``mmdit_layers``) each
stream has projections and an MLP of its own; in the others, if there are any, one set serves both, and what the text
attended to is not projected back. The text of a second encoder, ``encoder_hidden_states_t5``, stands behind the first
one's where the model has a projection for it; the pipelines use none. There is no mask, so padding counts as text: pad
prompts to 256 tokens, as the pipelines do.

RoPE: a quarter of a head's channels for frames, three eighths each for rows and columns, float32 angles; text has none
and stands at the origin. As in CogVideoX 1.0, rows and columns are spread over a crop of one grid, 60 x 90 latents,
whatever the shot's own size; frames are 1 apart. One step along the diagonal is one frame, row and column of that grid.

Rectified flow, velocity, timesteps 0 to 1000. An inpainting model joins a mask (1 channel, or 16) and the latents of
what is given, such as a first frame, to the noise; a control model, the latents of a control video and of a reference
image. Both are ``condition``: the class has two arguments for them, which do the same.

Not served: ``timestep_cond``, which no checkpoint has.

Sources: EasyAnimate, arXiv 2405.18991; ``diffusers.models.transformers.transformer_easyanimate`` and
``pipelines.easyanimate``.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lct_backbones._diffusers import DiffusersBackbone, project, project_out, spread
from lct_core import QKV, Extra, Shot, ShotInput, Site, State, Traits, axis_frequencies

_GRID = (60, 90)  # rows and columns of latents, fixed in the class
_T5 = "encoder_hidden_states_t5"


class EasyAnimateBackbone(DiffusersBackbone):
    """The adapter of ``EasyAnimateTransformer3DModel``."""

    processors = ("EasyAnimateAttnProcessor2_0",)
    texts = (_T5,)

    def describe(self, config: Any) -> Traits:
        """Channels that the model takes beyond those that it predicts are a condition."""
        side = config.attention_head_dim // 8 * 3
        self.frequencies = axis_frequencies((config.attention_head_dim // 4, side, side), dtype=torch.float32)
        width = config.text_embed_dim_t5
        extras = {} if width is None else {_T5: Extra(("t5_tokens", width), prompt=True)}
        return self.common(config, text="joint", extras={**extras, **self.condition(config)})

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """As the model lays them: spread over a crop of its grid; float32 there."""
        coords, patch, (height, width) = super().coordinates(inputs, shot), self.model.config.patch_size, _GRID
        coords[shot.text :] = spread(shot.grid, (height // patch, width // patch))
        return coords

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """The condition under one of its two names."""
        extras = dict(inputs.extras)
        condition = extras.pop("condition", None)
        return {**super().arguments(replace(inputs, extras=extras), timestep), "inpaint_latents": condition}

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Patches, frame by frame; text of both encoders; time."""
        model, latents = self.model, super().arguments(inputs, timestep)["hidden_states"]
        time = model.time_embedding(model.time_proj(timestep).to(latents.dtype))
        frames = model.proj(latents.permute(0, 2, 1, 3, 4).flatten(0, 1)).unflatten(0, (len(latents), -1))
        video = frames.permute(0, 2, 1, 3, 4).flatten(2).transpose(1, 2)
        text = model.text_proj(inputs.text)
        if _T5 in inputs.extras:
            text = torch.cat([text, model.text_proj_t5(inputs.extras[_T5])], dim=1)
        return State({"text": text, "video": video}, {"time": time})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of both streams, text first, by weights of their own or by the same."""
        video, text, *gates = block.norm1(state.streams["video"], state.streams["text"], state.conditioning["time"])
        if block.attn1.add_q_proj is None:
            return QKV(*project(block.attn1, self.joined(text, video)), tuple(gates))
        return QKV(*self.project_both(block.attn1, text, video), tuple(gates))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """Gates and the MLP of both streams."""
        text, video, (gate, text_gate) = state.streams["text"], state.streams["video"], aux
        text_seen, seen = self.apart(attended.flatten(2), text, video)
        if block.attn1.to_add_out is not None:
            text_seen = block.attn1.to_add_out(text_seen)
        video = video + gate.unsqueeze(1) * project_out(block.attn1, seen)
        text = text + text_gate.unsqueeze(1) * text_seen
        x, y, gate, text_gate = block.norm2(video, text, state.conditioning["time"])
        x, y = block.ff(x), (block.txt_ff or block.ff)(y)
        if block.norm3 is not None:
            x, y = block.norm3(x), block.norm3(y)
        return {"text": text + text_gate.unsqueeze(1) * y, "video": video + gate.unsqueeze(1) * x}

    def head(self, state: State) -> Tensor:
        """The final layer."""
        video = self.model.norm_out(self.model.norm_final(state.streams["video"]), temb=state.conditioning["time"])
        return self.model.proj_out(video)
