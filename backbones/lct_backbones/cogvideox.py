"""CogVideoX 2B, 5B and 1.5 as diffusers ships them: text to video, image to video, a control video.

Text and video are one sequence, text first, with one set of weights; only the modulation tells them apart. Positions:

- 2B has absolute sine-cosine positions, added once to the video: frames 1 apart, rows and columns 1 / 1.875, at any
  size. The class adds them behind 226 tokens of text, no more and no fewer. There is no RoPE.
- 5B (1.0) has RoPE, text without: a quarter of a head's channels for frames, three eighths each for rows and columns,
  float32 angles. The largest grid of the shot's shape that fits the one the model was trained on (30 x 45) is laid in
  its middle, and the shot's rows and columns are spread over it; frames are 1 apart.
- 5B I2V (1.0) has learned positions beside, for the size alone that it was trained at: others are refused.
- 1.5 has RoPE at (frame, row, column) of its tokens, which are two latent frames deep. Its pipeline stops at the grid
  that the model was trained on; here a larger shot counts on.

The attention has no mask, so padding counts as text: pad prompts to 226 tokens, as the pipelines do. An image (its
latents in the first frame, zeros behind) or a control video is concatenated to the latents: ``condition``. I2V 1.5 also
takes ``ofs``, 2.0 unless given (upstream). Its pipeline brings an odd number of latent frames to an even one, in front.

Variance preserving path, v-prediction, a schedule of 1000 timesteps with zero terminal SNR; its shift is 3 for 2B, 1
for the others (for another schedule, replace ``traits.path``). Level 0 would be timestep -1, which no model has seen:
below level 0.001 it gets timestep 0.

Not served: fused projections, ``timestep_cond``.

Sources: CogVideoX, arXiv 2408.06072; ``diffusers.models.transformers.cogvideox_transformer_3d``,
``pipelines.cogvideo``, ``CogVideoXDDIMScheduler``; the shifts: diffusers' ``convert_cogvideox_to_diffusers.py``.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor

from lct_backbones._diffusers import DiffusersBackbone, project, project_out
from lct_core import QKV, Extra, Shot, ShotInput, Site, State, Traits, VariancePreserving, axis_frequencies, rotation


class CogVideoXBackbone(DiffusersBackbone):
    """The adapter of ``CogVideoXTransformer3DModel``."""

    processors = ("CogVideoXAttnProcessor2_0",)
    patches = "(c t h w)"

    def describe(self, config: Any) -> Traits:
        """RoPE, absolute positions or both; v-prediction."""
        rotary, learned = config.use_rotary_positional_embeddings, config.use_learned_positional_embeddings
        patch = config.patch_size_t or 1, config.patch_size, config.patch_size
        if patch[0] > 1 and (learned or not rotary):
            raise ValueError(
                f"model: got patch_size_t={patch[0]} beside absolute positions, of which this class has one for every "
                "latent frame; expected patch_size_t=None, or use_rotary_positional_embeddings=True alone"
            )
        self.text_length = config.max_text_seq_length if learned or not rotary else None
        frames = 1 + (config.sample_frames - 1) // config.temporal_compression_ratio
        self.only_size = (frames, config.sample_height, config.sample_width) if learned else None
        if rotary:
            side = config.attention_head_dim // 8 * 3
            self.frequencies = axis_frequencies((config.attention_head_dim // 4, side, side), dtype=torch.float32)
        schedule: Any = CogVideoXDDIMScheduler(snr_shift_scale=1.0 if rotary else 3.0, rescale_betas_zero_snr=True)
        extras = {"ofs": Extra(())} if config.ofs_embed_dim else {}
        if condition := config.in_channels - config.out_channels:
            extras["condition"] = Extra((condition, "frames", "height", "width"), required=True, image=True)
        return self.common(
            config,
            patch=patch,
            text_width=config.text_embed_dim,
            text="joint",
            pairing="interleaved" if rotary else None,
            timesteps=(-1.0, 999.0),
            path=VariancePreserving(schedule.alphas_cumprod.tolist()),
            extras=extras,
        )

    def shot(self, inputs: ShotInput) -> Shot:
        """As for any model; beside absolute positions text has one length, beside learned ones the video one size."""
        shot = super().shot(inputs)
        if self.text_length not in (None, shot.text):
            raise ValueError(
                f"text: got {shot.text} tokens, expected {self.text_length}: this model adds its absolute positions "
                "behind that many; pad or cut the encoded prompt, as its pipeline does"
            )
        size, own = tuple(inputs.latents.shape[2:]), self.only_size
        dummy = inputs.role == "global"  # whose one frame nobody looks at: the class gives it fixed positions
        if own is not None and size[dummy:] != own[dummy:]:
            raise ValueError(
                f"latents: got frames, height, width {size}, expected {own}: this model learned positions for that "
                "size alone; resize the video, or take a model without use_learned_positional_embeddings"
            )
        return shot

    def example(self, shot: Shot, **options: Any) -> ShotInput:
        """Of the text length and the size that the model takes."""
        (t, h, w), (frames, height, width) = self.traits.patch, self.only_size or (0, 0, 0)
        grid = (frames // t, height // h, width // w) if self.only_size else shot.grid
        return super().example(replace(shot, text=self.text_length or shot.text, grid=grid), **options)

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """As its pipelines do: 1.0 spreads rows and columns over a crop of the trained grid; float32 there."""
        coords, config = super().coordinates(inputs, shot), self.model.config
        if self.traits.pairing is None or config.patch_size_t is not None:
            return coords
        (frames, rows, columns), p = shot.grid, config.patch_size
        height, width = config.sample_height // p, config.sample_width // p
        tall = rows / columns > height / width
        fit = (height, round(height / rows * columns)) if tall else (round(width / columns * rows), width)
        top, left = (round((base - side) / 2) for base, side in zip((height, width), fit, strict=True))
        spans = (0, frames, frames), (top, top + fit[0], rows), (left, left + fit[1], columns)
        axes = (torch.linspace(start, end * (n - 1) / n, n, dtype=torch.float32) for start, end, n in spans)
        coords[shot.text :] = torch.cartesian_prod(*axes)
        return coords

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """Frames before channels, the condition joined to the latents; rotations of the video; timesteps from 0 on."""
        extras, latents = dict(inputs.extras), inputs.latents
        if "condition" in extras:
            latents = torch.cat([latents, extras.pop("condition")], dim=1)
        if "ofs" in self.traits.extras:
            extras.setdefault("ofs", latents.new_full((len(latents),), 2.0))
        if self.traits.pairing is not None:
            shot = self.shot(inputs)
            by = rotation(self.rope(self.coordinates(inputs, shot).to(latents.device)), pairing=self.traits.pairing)
            extras["image_rotary_emb"] = tuple(x[shot.text :, 0].repeat_interleave(2, dim=1) for x in (by.cos, by.sin))
        return super().arguments(replace(inputs, latents=latents.transpose(1, 2), extras=extras), timestep.clamp(min=0))

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward, channels before frames again."""
        return super().single_shot(inputs, timestep).transpose(1, 2)

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Text and patches, with absolute positions where the model has them; time, with ``ofs``."""
        given, model = self.arguments(inputs, timestep), self.model
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        time = model.time_embedding(model.time_proj(given["timestep"]).to(latents.dtype))
        if model.ofs_embedding is not None:
            time = time + model.ofs_embedding(model.ofs_proj(given["ofs"]).to(latents.dtype))
        tokens = model.embedding_dropout(model.patch_embed(text, latents))
        return State({"text": tokens[:, : text.shape[1]], "video": tokens[:, text.shape[1] :]}, {"time": time})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of both streams by the same weights, text first."""
        text, video = state.streams["text"], state.streams["video"]
        video, text, *gates = block.norm1(video, text, state.conditioning["time"])
        return QKV(*project(block.attn1, torch.cat([text, video], dim=1)), tuple(gates))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """Gates and the MLP of both streams."""
        text, video = state.streams["text"], state.streams["video"]
        text, video = _added(text, video, project_out(block.attn1, attended.flatten(2)), *aux)
        x, y, *gates = block.norm2(video, text, state.conditioning["time"])
        text, video = _added(text, video, block.ff(torch.cat([y, x], dim=1)), *gates)
        return {"text": text, "video": video}

    def head(self, state: State) -> Tensor:
        """The final layer."""
        video = self.model.norm_out(self.model.norm_final(state.streams["video"]), temb=state.conditioning["time"])
        return self.model.proj_out(video)


def _added(text: Tensor, video: Tensor, update: Tensor, gate: Tensor, text_gate: Tensor) -> tuple[Tensor, Tensor]:
    """Both streams and their shares of an update, text first, each through its gate."""
    n = text.shape[1]
    return text + text_gate * update[:, :n], video + gate * update[:, n:]
