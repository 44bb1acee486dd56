"""SkyReels-V2 as diffusers ships it: text to video, image to video, and diffusion forcing (a noise level per frame).

Blocks, RoPE and padding of the text are Wan's, and an image comes in as in Wan 2.1 (``condition``, CLIP tokens). What
it has of its own:

- Models for diffusion forcing (DF) take a timestep for every latent frame. ``timestep_mask``, ``[batch, frames]``, is 0
  at clean frames, an image's or those of an earlier clip, and 1 elsewhere; left out, it is 1 everywhere.
- DF 1.3B also takes the kind of frame rate: ``fps`` is 0 for 16 frames per second and 1 for any other (default 1:
  upstream, 24 frames per second).

Not served is the mask between blocks of frames of its asynchronous pipelines (``causal_block_size`` above 1).

Sources: SkyReels-V2, arXiv 2504.13074; ``diffusers.models.transformers.transformer_skyreels_v2`` and
``pipelines.skyreels_v2``.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lct_backbones.wan import WanBackbone
from lct_core import Extra, Shot, ShotInput, State, Traits


class SkyReelsV2Backbone(WanBackbone):
    """The adapter of ``SkyReelsV2Transformer3DModel``."""

    processors = ("SkyReelsV2AttnProcessor",)

    def describe(self, config: Any) -> Traits:
        """As Wan, but a timestep for every frame, and frames per second."""
        traits = super().describe(config)
        extras = {**traits.extras, "timestep_mask": Extra(("frames",), image=True)}
        if config.inject_sample_info:
            extras["fps"] = Extra(None)
        return replace(traits, extras=extras)

    def refusals(self) -> list[str]:
        """Also a mask between frames, which pipelines may set at any time."""
        reasons, size = super().refusals(), self.model.config.num_frame_per_block
        if size > 1:
            reasons.append(
                f"its frames see only blocks of {size} frames and those before, and scenes join whole shots; call "
                "model._set_ar_attention(1), or its pipeline with causal_block_size=1"
            )
        return reasons

    def shot(self, inputs: ShotInput) -> Shot:
        """As for Wan; of frames per second, the model knows two."""
        shot = super().shot(inputs)
        if (fps := inputs.extras.get("fps", 1)) not in (0, 1):
            raise ValueError(f"extras: fps is {fps}, expected 0 for 16 frames per second or 1 for any other number")
        return shot

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """Diffusion forcing where frames have timesteps; frames per second once for the whole batch."""
        given = super().arguments(inputs, timestep)
        if "fps" in self.traits.extras:
            given["fps"] = [given.get("fps", 1)]
        return {**given, "enable_diffusion_forcing": given["timestep"].ndim == 2}

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Patches; text; the six modulations of a block, for the shot or for every frame, then for its tokens."""
        given, model = self.arguments(inputs, timestep), self.model
        video, image = model.patch_embedding(given["hidden_states"]), given.get("encoder_hidden_states_image")
        time, modulation, text, image = model.condition_embedder(given["timestep"], inputs.text, image)
        if "fps" in given:
            fps = torch.tensor(given["fps"], dtype=torch.long, device=video.device)
            modulation = modulation + model.fps_projection(model.fps_embedding(fps))
        if given["enable_diffusion_forcing"]:
            area = video.shape[3] * video.shape[4]
            time, modulation = (x.repeat_interleave(area, dim=1) for x in (time, modulation))
        return self.state(video.flatten(2).transpose(1, 2), time, modulation, text, image)
