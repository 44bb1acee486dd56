"""MiniMax-H3 as diffusers ships it: its video path, text to video.

One sequence of rows, text, then sound, then video, with weights in common; each kind has its own modulation in every
block. The adapter gives the model no rows of sound, which its forward allows and its pipelines never do: what real
weights make of that is not known. Blocks of a refiner, in which a prompt's tokens see one another, run for every shot.

RoPE turns 96 of 128 channels, 32 for each axis, half-split, float32 angles. Coordinates are those of the pipeline:

- text token ``i`` at ``(i, 0, 0)``, the first frame behind the text; a latent frame that holds one frame of the video
  takes 5/3, one that holds four 20/3, in groups of 1, 4, 4, 4, 4;
- rows and columns in the unit interval times 32, centred, by the size of the picture: 1.008 apart at 768 x 1344 pixels.

One step along the diagonal is a latent frame of four, and one row and one column (ours): ``(20/3, 1, 1)``.

Rectified flow, upside down: the model predicts the velocity toward the data, and its timesteps go from 0 at noise to
1 at clean latents; text has that of its shot. The model's own forward has a row of the sequence at one timestep in
the whole batch: it runs once for every entry.

Not served: sound, keyframes and references, which come as further rows and mark a part of the text as video.

Sources: ``diffusers.models.transformers.transformer_minimax_h3``, ``modular_pipelines.minimax_h3`` and
``schedulers.scheduling_minimax_h3``.
"""

from typing import Any

import torch
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep, patchify_video_latents
from torch import Tensor, nn

from lct_backbones._diffusers import DiffusersBackbone, finished, modulated, project, project_out
from lct_core import QKV, RectifiedFlow, Shot, ShotInput, Site, State, Traits, axis_frequencies

_VIDEO, _TEXT, _SOUND = range(3)  # kinds of rows, in the order of their modulations
_LAYOUT = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")


class MiniMaxH3Backbone(DiffusersBackbone):
    """The adapter of ``MiniMaxH3Transformer3DModel``."""

    processors = ("MiniMaxH3AttnProcessor",)

    def describe(self, config: Any) -> Traits:
        """A part of the channels is turned; everything upside down: time and prediction."""
        axes = (2 * config.rope_freq_dim,) * 3
        self.frequencies = axis_frequencies(axes, theta=config.rope_theta, dtype=torch.float32)
        return self.common(
            config,
            text_width=config.text_dim,
            text="joint",
            pairing="half",
            unit=(20 / 3, 1.0, 1.0),
            timesteps=(1.0, 0.0),
            path=RectifiedFlow(toward_data=True),
        )

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """The pipeline's."""
        return self._layout(shot)["position_ids"]

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """Rows, and what the pipeline says of them; no sound."""
        given, layout = super().arguments(inputs, timestep), self._layout(self.shot(inputs))
        rows = patchify_video_latents(inputs.latents, self.traits.patch).unflatten(0, (len(timestep), -1))
        sound = rows.new_zeros(len(rows), 0, self.model.config.audio_in_channels)
        layout = {name: x.to(rows.device) for name, x in layout.items()}
        return {**given, **layout, "hidden_states": rows, "audio_hidden_states": sound}

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward at every entry's timestep, of which that entry counts."""
        given = self.arguments(inputs, timestep)
        first, entries = torch.zeros_like(given["token_tags"]), range(len(timestep))
        rows = [self.model(**given, timestep_indices=first + i, return_dict=False)[0][i] for i in entries]
        return self.unpatchify(torch.stack(rows), self.shot(inputs))

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Rows of refined text and of video; the time; which row is of which kind."""
        given, model = self.arguments(inputs, timestep), self.model
        text = model.token_refiner(_entered(model.context_embedder, given["encoder_hidden_states"]))
        video = _entered(model.proj_in, given["hidden_states"]).to(text.dtype)
        time = model.time_embedder(model.time_proj(timestep).to(get_parameter_dtype(model.time_embedder)))
        kinds = given["token_tags"].expand(len(timestep), -1)
        return State({"rows": torch.cat([text, video], dim=1)}, {"time": time, "kinds": kinds})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of all rows, modulated by their kinds."""
        kinds, table = state.conditioning["kinds"], block.adaln_proj(state.conditioning["time"])
        entries = torch.arange(len(kinds), device=kinds.device)[:, None]
        x, *others = modulated(block.norm1, state.streams["rows"], *(part[3 * entries + kinds] for part in table))
        return QKV(*project(block.attn, x), others)

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """Output projection and MLP."""
        out = project_out(block.attn, attended.flatten(2))
        return {"rows": finished(state.streams["rows"], out, block.norm2, block.ff, *aux)}

    def head(self, state: State) -> Tensor:
        """The final layer of all rows, by a table of times with a row for every entry of the batch."""
        rows, time = state.streams["rows"], state.conditioning["time"]
        entries = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
        rows = self.model.norm_out(rows.flatten(0, 1), time, entries).unflatten(0, rows.shape[:2])
        return _entered(self.model.proj_out, rows)

    def unpatchify(self, tokens: Tensor, shot: Shot) -> Tensor:
        """The last rows are the video's."""
        return super().unpatchify(tokens[:, -shot.video :], shot)

    def _layout(self, shot: Shot) -> dict[str, Tensor]:
        """What the model's forward takes to know its rows."""
        (frames, height, width), (_, h, w) = shot.grid, self.traits.patch
        text = torch.full((shot.text,), _TEXT)
        rows = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
            text, frames, height * h, width * w, 0, self.traits.patch, 2, _SOUND, _VIDEO
        )
        return dict(zip(_LAYOUT, rows[:5], strict=True))


def _entered(linear: nn.Linear, x: Tensor) -> Tensor:
    """A projection in the precision of its weights: those of text are not those of latents."""
    return linear(x.to(get_parameter_dtype(linear)))
