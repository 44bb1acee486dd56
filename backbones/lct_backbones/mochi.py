"""Mochi 1 as diffusers ships it.

Two streams, video before text; that of the text is narrower, and after the last block nobody reads it. Padding does not
reach the attention (``encoder_attention_mask``), and pooled text joins the time.

RoPE: the frequencies are learned, for every head, and each mixes all three axes; float32 angles. Text has none: it is
at the origin. Rows and columns are centred, and stretched so that any shot covers an area of 192 x 192: in native
coordinates, frames are 1 apart, rows and columns 192 / sqrt(rows * columns). One step along the diagonal is one latent
frame, and one row and one column of the size that the model was trained at (30 x 53 tokens, 480 x 848 pixels), 4.8 in
native coordinates, whatever the shot's own size (ours).

Rectified flow, upside down: the model predicts the velocity toward the data, and its timesteps go from 0 at noise to
1000 at clean latents.

Sources: Genmo, Mochi 1 (github.com/genmoai/mochi); ``diffusers.models.transformers.transformer_mochi`` and
``pipelines.mochi``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lct_backbones._diffusers import DiffusersBackbone, project_out
from lct_core import QKV, RectifiedFlow, Rotation, Shot, ShotInput, Site, State, Traits

_TRAINED = 30 * 53  # tokens of a latent frame of the size that the model was trained at


class MochiBackbone(DiffusersBackbone):
    """The adapter of ``MochiTransformer3DModel``."""

    processors = ("MochiAttnProcessor2_0",)
    patches = "(t h w c)"

    def describe(self, config: Any) -> Traits:
        """Everything upside down: time and prediction."""
        row = (self.model.rope.target_area / _TRAINED) ** 0.5
        return self.common(
            config,
            text="joint",
            text_first=False,
            unit=(1.0, row, row),
            timesteps=(1000.0, 0.0),
            path=RectifiedFlow(toward_data=True),
            text_mask="encoder_attention_mask",
        )

    def rope(self, coords: Tensor) -> Tensor:
        """By the learned frequencies, as they are now."""
        return torch.einsum("nd,dhf->nhf", coords.float(), self.model.pos_frequencies.float())

    def rotation(self, coords: Tensor, shot: Shot, *, dtype: torch.dtype) -> Rotation:
        """Of the video apart, as the model does: a matrix product's bits depend on the number of rows."""
        turn = super().rotation
        video, text = (turn(part, shot, dtype=dtype) for part in coords.split([shot.video, shot.text]))
        return Rotation(torch.cat([video.cos, text.cos]), torch.cat([video.sin, text.sin]), "interleaved")

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """The model's own for the video; text at the origin."""
        video = self.model.rope._get_positions(*shot.grid, device="cpu", dtype=torch.float32)
        return torch.cat([video, video.new_zeros(shot.text, 3)]).double()

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Patches frame by frame; text; time with pooled text."""
        model, latents, mask = self.model, inputs.latents, self.arguments(inputs, timestep)["encoder_attention_mask"]
        time, text = model.time_embed(timestep, inputs.text, mask, hidden_dtype=latents.dtype)
        frames = model.patch_embed(latents.permute(0, 2, 1, 3, 4).flatten(0, 1))
        video = frames.unflatten(0, (len(latents), -1)).flatten(1, 2)
        return State({"video": video, "text": text}, {"time": time})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of both streams, video first."""
        time = state.conditioning["time"]
        video, *gates = block.norm1(state.streams["video"], time)
        text = block.norm1_context(state.streams["text"], time)
        text, *text_gates = [text] if block.context_pre_only else text
        return QKV(*self.project_both(block.attn1, text, video), (gates, text_gates))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """Both streams; the last block's text stays as it is."""
        video, text, (gates, text_gates) = state.streams["video"], state.streams["text"], aux
        text_seen, seen = self.apart(attended.flatten(2), text, video)
        norms = (block.norm2, block.norm3, block.norm4)
        video = _finished(video, project_out(block.attn1, seen), gates, norms, block.ff)
        if block.context_pre_only:
            return {"video": video}
        norms = (block.norm2_context, block.norm3_context, block.norm4_context)
        text = _finished(text, block.attn1.to_add_out(text_seen), text_gates, norms, block.ff_context)
        return {"video": video, "text": text}


def _finished(
    x: Tensor, attended: Tensor, gates: Sequence[Tensor], norms: Sequence[nn.Module], mlp: nn.Module
) -> Tensor:
    """A stream behind its attention: what is added is normed, and scaled by a gate between -1 and 1."""
    gate, scale, mlp_gate = (part.unsqueeze(1) for part in gates)
    x = x + norms[0](attended, torch.tanh(gate))
    hidden = mlp(norms[1](x, 1 + scale.to(torch.float32)))
    return x + norms[2](hidden, torch.tanh(mlp_gate))
