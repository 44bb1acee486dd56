"""The video of LTX-2, 2.3 and 2.5 as diffusers ships them, with or without the audio of each shot.

Like LTX-Video: flat video tokens, cross-attended text, fractional positions, timesteps of tokens (``timestep_mask``).

- **Positions** are the middles of tokens, in seconds (``fps``, default: 24) and pixels; the first latent frame is a
  single frame of the video. RoPE turns pairs of neighbours, or of a head's halves, by ``rope_type``; its series is
  computed in float64 where the model is so configured, its angles in float32. One diagonal step is one token along each
  axis: with patches of 1, a latent frame at 24 frames per second (1/3 s) and 32 pixels.
- **Audio** is a second stream with self-attention and a text of its own; it and the video attend to one another. All of
  that stays inside the shot, so that shots hear one another only through the video. ``audio_hidden_states`` are packed
  audio latents, noised by the caller; ``audio_encoder_hidden_states`` their text, without padding; ``audio_timestep``
  their own timestep, 0 to 1000, ``[batch]`` (default: the shot's; 0 for clean audio). A shot without audio runs as the
  model does with ``isolate_modalities``: its video neither hears nor is heard.
- **Text** is modulated by the shot's timestep (the model's ``sigma``) in 2.3, by constants in 2.5. From 2.3 on, what a
  head attends to is gated by the token that asks. ``use_cross_timestep`` says whether the attention between the
  streams is modulated by the other stream's timestep (default: True, as in the pipelines; False for 2.0).

Not served: the prediction of the audio, which the engine has no output for; keyframe tokens and their embedding; the
model's own self-attention mask; perturbed attention for guidance.

Sources: LTX-2, arXiv 2601.03233; ``diffusers.models.transformers.transformer_ltx2`` and ``pipelines.ltx2``.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb
from torch import Tensor

from lct_backbones._diffusers import project, project_out
from lct_backbones.ltx import LTXBackbone, modulations
from lct_core import QKV, Extra, Rotation, Shot, ShotInput, Site, State, Traits

Tensors = dict[str, Tensor]

_RATE = 24  # frames of the video to a second


class LTX2Backbone(LTXBackbone):
    """The adapter of ``LTX2VideoTransformer3DModel``."""

    processors = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")

    def describe(self, config: Any) -> Traits:
        """Positions are the VAE's frames and pixels; the texts of both streams have widths of their own from 2.3 on."""
        t, p, (frames, height, width) = config.patch_size_t, config.patch_size, config.vae_scale_factors
        texts = config.cross_attention_dim, config.audio_cross_attention_dim
        text, self.audio_text = (config.caption_channels,) * 2 if config.use_prompt_embeddings else texts
        extras = {
            "fps": Extra(None),
            "audio_hidden_states": Extra(("audio tokens", config.audio_in_channels)),
            "audio_encoder_hidden_states": Extra(("tokens", self.audio_text)),
            "audio_timestep": Extra(()),
            "use_cross_timestep": Extra(None),
        }
        pairing = "interleaved" if config.rope_type == "interleaved" else "half"
        unit = (frames * t / _RATE, height * p, width * p)
        return self.packed(config, text_width=text, pairing=pairing, unit=unit, extras=extras)

    def shot(self, inputs: ShotInput) -> Shot:
        """As for any model; audio needs its text."""
        given = sorted(name for name in inputs.extras if name.startswith("audio_"))
        if given and not {"audio_hidden_states", "audio_encoder_hidden_states"}.issubset(given):
            raise ValueError(
                f"extras: got {given}, expected audio_hidden_states together with audio_encoder_hidden_states, or no "
                "audio at all"
            )
        return super().shot(inputs)

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """The middles of tokens, in seconds and pixels."""
        size = (count * patch for count, patch in zip(shot.grid, self.traits.patch, strict=True))
        bounds = self.model.rope.prepare_video_coords(1, *size, device="cpu", fps=inputs.extras.get("fps", _RATE))
        start, end = bounds[0].unbind(-1)
        return ((start + end) / 2.0).T.double()

    def rotate(self, x: Tensor, by: Rotation) -> Tensor:
        """Split RoPE adds products in one operation, which rounds once."""
        if by.pairing == "interleaved":
            return super().rotate(x, by)
        tables = by.cos.transpose(0, 1), by.sin.transpose(0, 1)
        return apply_split_rotary_emb(x.transpose(1, 2), tables).transpose(1, 2).contiguous()

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """Without audio, some that nobody hears."""
        given = {"audio_timestep": timestep, "use_cross_timestep": True, **super().arguments(inputs, timestep)}
        given |= {"sigma": timestep, "audio_sigma": given["audio_timestep"]}
        video, names = given["hidden_states"], ("audio_hidden_states", "audio_encoder_hidden_states")
        if inputs.role == "global" or names[0] not in given:
            widths = self.model.config.audio_in_channels, self.audio_text
            silence = (video.new_zeros(len(video), 1, width) for width in widths)
            given |= {"isolate_modalities": True, **dict(zip(names, silence, strict=True))}
        frames = given[names[0]].shape[1] * self.model.config.audio_patch_size_t
        return {**given, "audio_coords": self.model.audio_rope.prepare_audio_coords(len(video), frames, video.device)}

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Tokens of the video, and of the audio if it is heard; their texts and modulations."""
        given, model = self.arguments(inputs, timestep), self.model
        video = model.proj_in(given["hidden_states"])
        conditioning = self._conditioning("", given, video)
        if given.get("isolate_modalities"):
            return State({"video": video}, conditioning)
        audio = model.audio_proj_in(given["audio_hidden_states"])
        times = ("audio_sigma", "sigma") if given["use_cross_timestep"] else ("timestep", "audio_timestep")
        seconds, heard = given["video_coords"][:, :1], given["audio_coords"][:, :1]
        crossing = {
            "crossing": self._crossing("video", "a2v", given[times[0]], video),
            "audio_crossing": self._crossing("audio", "v2a", given[times[1]], audio),
            "rope": torch.stack(model.cross_attn_rope(seconds), dim=1),
            "audio_rope": torch.stack(model.cross_attn_audio_rope(heard), dim=1),
            "audio_self_rope": torch.stack(model.audio_rope(heard), dim=1),
        }
        conditioning |= {**self._conditioning("audio_", given, audio), **crossing}
        return State({"video": video, "audio": audio}, conditioning)

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of the video; or queries of the video, keys and values of the text; and what its heads are gated by."""
        attn, conditioning = getattr(block, site.name), state.conditioning
        x, text = _sources(block, site.name, "", state.streams["video"], conditioning)
        gates = None if attn.to_gate_logits is None else attn.to_gate_logits(x)
        return QKV(*project(attn, x, text, across_heads=True), gates)

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """The gate of the self-attention; or the text's output, the audio, and the MLP."""
        conditioning, streams = state.conditioning, dict(state.streams)
        out = attended if aux is None else attended * (2.0 * torch.sigmoid(aux)).unsqueeze(-1)
        out = project_out(getattr(block, site.name), out.flatten(2))
        streams["video"] = _added(block, site.name, "", streams["video"], out, conditioning)
        if site.name == "attn1":
            return {"video": streams["video"]}
        if "audio" in streams:
            streams["video"], audio = _heard(block, streams["video"], streams["audio"], conditioning)
            streams["audio"] = _mlp(block, "audio_", audio, conditioning)
        return {**streams, "video": _mlp(block, "", streams["video"], conditioning)}

    def _conditioning(self, of: str, given: dict[str, Any], x: Tensor) -> Tensors:
        """Of one stream: its text and what modulates it. The audio's parts are called as the video's, with a prefix."""
        modulation, time = _timed(getattr(self.model, f"{of}time_embed"), given[f"{of}timestep"], x)
        text = given[f"{of}encoder_hidden_states"]
        if self.model.config.use_prompt_embeddings:
            text = getattr(self.model, f"{of}caption_projection")(text)
        conditioning = {f"{of}modulation": modulation, f"{of}time": time.unsqueeze(2), f"{of}text": text}
        if self.model.prompt_modulation:
            adaln = getattr(self.model, f"{of}prompt_adaln", None)
            constant = x.new_zeros(len(x), 1, 2, x.shape[2])
            conditioning[f"{of}prompt"] = constant if adaln is None else _timed(adaln, given[f"{of}sigma"], x)[0]
        return conditioning

    def _crossing(self, of: str, gate: str, timestep: Tensor, x: Tensor) -> Tensor:
        """What modulates the attention of one stream to the other: twice scale and shift, and a gate."""
        config, name = self.model.config, f"av_cross_attn_{of}"
        faster = config.cross_attn_timestep_scale_multiplier / config.timestep_scale_multiplier
        scale_shift, _ = _timed(getattr(self.model, f"{name}_scale_shift"), timestep, x)
        gates, _ = _timed(getattr(self.model, f"{name}_{gate}_gate"), timestep * faster, x)
        return torch.cat([scale_shift, gates], dim=2)


def _timed(embed: Any, timestep: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Modulations ``[batch, 1 or tokens, rows, width]`` and the embedding of timesteps."""
    out, embedded = embed(timestep.flatten(), batch_size=len(x), hidden_dtype=x.dtype)
    return out.view(len(x), -1, embed.num_mod_params, x.shape[2]), embedded.view(len(x), -1, x.shape[2])


def _parts(block: Any, of: str, conditioning: Tensors) -> tuple[Tensor, ...]:
    """Shift, scale and gate: of self-attention, of the MLP, and, in 2.3, of the attention to text."""
    return modulations(getattr(block, f"{of}scale_shift_table"), conditioning[f"{of}modulation"])


def _sources(block: Any, name: str, of: str, x: Tensor, conditioning: Tensors) -> tuple[Tensor, Tensor | None]:
    """What one stream's queries are made of, and its keys and values where they are text."""
    parts = _parts(block, of, conditioning)
    if name == "attn1":
        return getattr(block, f"{of}norm1")(x) * (1 + parts[1]) + parts[0], None
    x, text = getattr(block, f"{of}norm2")(x), conditioning[f"{of}text"]
    if len(parts) > 6:
        x = x * (1 + parts[7]) + parts[6]
    if f"{of}prompt" in conditioning:
        shift, scale = modulations(getattr(block, f"{of}prompt_scale_shift_table"), conditioning[f"{of}prompt"])
        text = text * (1 + scale) + shift
    return x, text


def _added(block: Any, name: str, of: str, x: Tensor, out: Tensor, conditioning: Tensors) -> Tensor:
    """One stream and what it attended to, gated."""
    parts = _parts(block, of, conditioning)
    if name == "attn1":
        return x + out * parts[2]
    return x + (out * parts[8] if len(parts) > 6 else out)


def _mlp(block: Any, of: str, x: Tensor, conditioning: Tensors) -> Tensor:
    """One stream and its MLP."""
    shift, scale, gate = _parts(block, of, conditioning)[3:6]
    return x + getattr(block, f"{of}ff")(getattr(block, f"{of}norm3")(x) * (1 + scale) + shift) * gate


def _heard(block: Any, video: Tensor, audio: Tensor, conditioning: Tensors) -> tuple[Tensor, Tensor]:
    """The audio's attention to itself and to its text; then that of both streams to one another."""
    x, _ = _sources(block, "attn1", "audio_", audio, conditioning)
    out = block.audio_attn1(x, query_rotary_emb=conditioning["audio_self_rope"].unbind(1))
    audio = _added(block, "attn1", "audio_", audio, out, conditioning)
    x, text = _sources(block, "attn2", "audio_", audio, conditioning)
    audio = _added(block, "attn2", "audio_", audio, block.audio_attn2(x, encoder_hidden_states=text), conditioning)
    seen, heard = block.audio_to_video_norm(video), block.video_to_audio_norm(audio)
    a, b, c, d, gate = modulations(block.video_a2v_cross_attn_scale_shift_table, conditioning["crossing"])
    e, f, g, h, audio_gate = modulations(block.audio_a2v_cross_attn_scale_shift_table, conditioning["audio_crossing"])
    rope, audio_rope = conditioning["rope"].unbind(1), conditioning["audio_rope"].unbind(1)
    to_video = block.audio_to_video_attn(
        seen * (1 + a) + b, heard * (1 + e) + f, query_rotary_emb=rope, key_rotary_emb=audio_rope
    )
    to_audio = block.video_to_audio_attn(
        heard * (1 + g) + h, seen * (1 + c) + d, query_rotary_emb=audio_rope, key_rotary_emb=rope
    )
    return video + gate * to_video, audio + audio_gate * to_audio
