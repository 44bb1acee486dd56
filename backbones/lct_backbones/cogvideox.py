"""CogVideoX 2B, 5B and 1.5 as diffusers ships them: text to video and image to video.

Text and video are one sequence, text first, with one set of weights; only the modulation tells them apart. Positions:

- 2B has absolute sine-cosine positions, added once to the video: frames 1 apart, rows and columns 1 / 1.875, at any
  size. The class adds them behind 226 tokens of text, no more and no fewer. There is no RoPE.
- 5B (1.0) has RoPE, text without: a quarter of a head's channels for frames, three eighths each for rows and columns,
  float32 angles. The largest grid of the shot's shape that fits the one the model was trained on (30 x 45) is laid in
  its middle, and the shot's rows and columns are spread over it; frames are 1 apart.
- 5B I2V (1.0) has learned positions beside, for the size alone that it was trained at: others are refused. The dummy
  frame of a global prompt has what the class gives to other frame counts, sine-cosine ones.
- 1.5 has RoPE at (frame, row, column) of its tokens, which are two latent frames deep. Its pipeline stops at the grid
  that the model was trained on; here a larger shot counts on.

The attention has no mask, so padding counts as text: pad prompts to 226 tokens, as the pipelines do. An image (its
latents in the first frame, zeros behind) is concatenated to the latents: ``condition``. Where the VAE's configuration
has ``invert_scale_latents``, the pipeline divides it by the scaling factor with which it multiplies latents. I2V 1.5
also takes ``ofs``, 2.0 unless given (upstream). Its pipeline brings an odd number of latent frames to an even one, in
front.

Variance preserving path, v-prediction, a schedule of 1000 timesteps with zero terminal SNR; its shift is 3 for 2B, 1
for the others. Another schedule is another path: on a retrofitted model, set
``model.adapter.traits = dataclasses.replace(model.adapter.traits, path=VariancePreserving(alphas_cumprod))``. Level 0
would be timestep -1, which no model has seen: below level 0.001 it gets timestep 0.

Not served: fused projections, ``timestep_cond``.

Sources: CogVideoX, arXiv 2408.06072; ``diffusers.models.transformers.cogvideox_transformer_3d``,
``pipelines.cogvideo``, ``CogVideoXDDIMScheduler``; the shifts: diffusers' ``convert_cogvideox_to_diffusers.py``.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor

from lct_backbones._diffusers import DiffusersBackbone, project, project_out, spread
from lct_core import QKV, Extra, Shot, ShotInput, Site, State, Traits, VariancePreserving, axis_frequencies


class CogVideoXBackbone(DiffusersBackbone):
    """The adapter of ``CogVideoXTransformer3DModel``."""

    processors = ("CogVideoXAttnProcessor2_0",)

    def describe(self, config: Any) -> Traits:
        """RoPE, absolute positions or both; v-prediction."""
        rotary, learned = config.use_rotary_positional_embeddings, config.use_learned_positional_embeddings
        frames = 1 + (config.sample_frames - 1) // config.temporal_compression_ratio
        self.trained = frames, config.sample_height // config.patch_size, config.sample_width // config.patch_size
        self.only_grid = self.trained if learned else None
        frame, side = config.attention_head_dim // 4, config.attention_head_dim // 8 * 3
        self.frequencies = axis_frequencies((frame, side, side), dtype=torch.float32)
        schedule: Any = CogVideoXDDIMScheduler(snr_shift_scale=1.0 if rotary else 3.0, rescale_betas_zero_snr=True)
        ofs = {"ofs": Extra(())} if config.ofs_embed_dim else {}
        return self.common(
            config,
            text="joint",
            text_tokens=(config.max_text_seq_length,) * 2 if learned or not rotary else (0, None),
            pairing="interleaved" if rotary else None,
            timesteps=(-1.0, 999.0),
            path=VariancePreserving(schedule.alphas_cumprod.tolist()),
            extras={**self.condition(config), **ofs},
        )

    def shot(self, inputs: ShotInput) -> Shot:
        """As for any model; of one size beside learned positions, but for the dummy frame of a global prompt."""
        shot = super().shot(inputs)
        if shot.role == "shot" and self.only_grid not in (None, shot.grid):
            raise ValueError(
                f"latents: got {shot.grid} patches, expected {self.only_grid}: this model learned positions for that "
                "size alone; resize the video, or take a model without use_learned_positional_embeddings"
            )
        return shot

    def example(self, shot: Shot, **options: Any) -> ShotInput:
        """Of the size that the model takes."""
        return super().example(replace(shot, grid=self.only_grid or shot.grid), **options)

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """As its pipelines do: 1.0 spreads rows and columns over a crop of the trained grid; float32 there."""
        coords = super().coordinates(inputs, shot)
        if self.traits.pairing is not None and self.model.config.patch_size_t is None:
            coords[shot.text :] = spread(shot.grid, self.trained[1:])
        return coords

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """Frames before channels; rotations of the video; timesteps from 0 on."""
        given, shot = super().arguments(inputs, timestep.clamp(min=0)), self.shot(inputs)
        given["hidden_states"] = given["hidden_states"].transpose(1, 2)
        if "ofs" in self.traits.extras:
            given.setdefault("ofs", inputs.latents.new_full((len(timestep),), 2.0))
        if self.traits.pairing is not None:
            coords = self.coordinates(inputs, shot).to(inputs.latents.device)
            by = self.rotation(coords, shot, dtype=torch.float32)
            given["image_rotary_emb"] = tuple(x[shot.text :, 0].repeat_interleave(2, dim=1) for x in (by.cos, by.sin))
        return given

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward, channels before frames again."""
        return super().single_shot(inputs, timestep).transpose(1, 2)

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Text and patches, with absolute positions where the model has them; time, with ``ofs``."""
        given, model, text = self.arguments(inputs, timestep), self.model, inputs.text
        latents = given["hidden_states"]
        time = model.time_embedding(model.time_proj(given["timestep"]).to(latents.dtype))
        if "ofs" in given:
            time = time + model.ofs_embedding(model.ofs_proj(given["ofs"]).to(latents.dtype))
        tokens = model.embedding_dropout(model.patch_embed(text, latents))
        return State({"text": tokens[:, : text.shape[1]], "video": tokens[:, text.shape[1] :]}, {"time": time})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of both streams by the same weights, text first."""
        text, video = state.streams["text"], state.streams["video"]
        video, text, *gates = block.norm1(video, text, state.conditioning["time"])
        return QKV(*project(block.attn1, self.joined(text, video)), tuple(gates))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """Gates and the MLP of both streams."""
        text, video, (gate, text_gate) = state.streams["text"], state.streams["video"], aux
        text_seen, seen = self.apart(project_out(block.attn1, attended.flatten(2)), text, video)
        text, video = text + text_gate * text_seen, video + gate * seen
        x, y, gate, text_gate = block.norm2(video, text, state.conditioning["time"])
        y, x = self.apart(block.ff(self.joined(y, x)), text, video)
        return {"text": text + text_gate * y, "video": video + gate * x}

    def head(self, state: State) -> Tensor:
        """Two norms, of which the time modulates the second."""
        video = self.model.norm_final(state.streams["video"])
        return self.model.proj_out(self.model.norm_out(video, temb=state.conditioning["time"]))
