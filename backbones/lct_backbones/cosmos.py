"""Cosmos Predict 2 and 2.5, and the transformer of Transfer 2.5, as diffusers ships them.

A single stream of video tokens; text is cross-attended and has no positions. 2.5 projects it down first: its text width
is that of all layers of the encoder together. The pipelines pad to 512 tokens and mask nothing: padding counts as text.

RoPE: channels pair across the halves of a head; float32 angles; the axes get 44, 42 and 42 of 128 channels, each with a
theta of its own (NTK: 10000 times ``rope_scale`` to the power of d / (d - 2)). With the extra ``fps``, frames are 24 /
fps apart, as in Predict 2's pipeline for video; without, 1 apart, as for images and in 2.5.

An image, or the end of a video, stands clean in the first latent frames, marked by the channel ``condition_mask`` and
by ``timestep_mask``, ``[batch, frames]``: 0 at the clean frames, whose timestep is then 0 (ours; the pipelines have
0.0001, that of Transfer 2.5 has 0.1), and 1 elsewhere. The pipelines' guidance scale is one less than that of
:class:`lct_core.generation.Guidance`. Transfer 2.5 also cross-attends tokens of an image,
``img_context``; its pipeline gives zeros. The channel that marks padding is 0, as in every pipeline.

The models see z = (1 - t) z_0 + t eps at timestep t in [0, 1] and predict its velocity: 2.5 plainly, Predict 2 inside
the preconditioning of its pipelines, whose latents are z / (1 - t), where sigma is t / (1 - t).

Not served: Predict 1, of the same class but with learned positions, which was trained with EDM: its time is not linear
in the noise level. Nor the residuals of Transfer 2.5's control branch, which sees one shot alone.

Sources: Cosmos, arXiv 2501.03575; Predict and Transfer 2.5, arXiv 2511.00062;
``diffusers.models.transformers.transformer_cosmos`` and ``pipelines.cosmos``.
"""

from typing import Any

import torch
from torch import Tensor

from lct_backbones._diffusers import DiffusersBackbone, attend_image, project, project_out
from lct_core import QKV, Extra, Shot, ShotInput, Site, State, Traits, axis_frequencies


class CosmosBackbone(DiffusersBackbone):
    """The adapter of ``CosmosTransformer3DModel``."""

    processors = ("CosmosAttnProcessor2_0", "CosmosAttnProcessor2_5")
    patches = "(h w t c)"

    def describe(self, config: Any) -> Traits:
        """Every axis has a theta of its own; Predict 1 is refused."""
        if config.extra_pos_embed_type is not None:
            raise ValueError(
                f"model: got extra_pos_embed_type={config.extra_pos_embed_type!r}, expected None: Predict 1, with "
                "learned positions, was trained with EDM, whose time is not linear in the noise level; use 2 or 2.5"
            )
        rope = self.model.rope
        axes = ((rope.dim_t, rope.t_ntk_factor), (rope.dim_h, rope.h_ntk_factor), (rope.dim_w, rope.w_ntk_factor))
        series = [axis_frequencies((dim,), theta=10000.0 * factor, dtype=torch.float32) for dim, factor in axes]
        self.frequencies = torch.block_diag(*series)
        extras = {"timestep_mask": Extra(("frames",), image=True), "fps": Extra(None, positive=True)}
        if channels := config.in_channels - config.out_channels:
            extras["condition_mask"] = Extra((channels, "frames", "height", "width"), required=True, image=True)
        if width := config.img_context_dim_in:
            extras["img_context"] = Extra((config.img_context_num_tokens, width), required=True, image=True)
        return self.common(
            config,
            text_width=config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim,
            text="cross",
            text_mask="attention_mask",
            noisy_mask="timestep_mask",
            pairing="half",
            timesteps=(0.0, 1.0),
            extras=extras,
        )

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Tensor:
        """Frames are 24 / fps apart, computed in float32 as the model does."""
        coords = super().coordinates(inputs, shot)
        if (fps := inputs.extras.get("fps")) is not None:
            coords[:, 0] = coords[:, 0].float() / fps * self.model.rope.base_fps
        return coords

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """No padding; timesteps of frames; the image beside the text, where the model takes no mask."""
        given = super().arguments(inputs, timestep)
        if given["timestep"].ndim == 2:
            given["timestep"] = given["timestep"][:, None, :, None, None]
        if "img_context" in self.traits.extras:
            given["encoder_hidden_states"] = (inputs.text, given.pop("img_context", None))
            del given["attention_mask"]
        return {**given, "padding_mask": inputs.latents.new_zeros(1, 1, *inputs.latents.shape[-2:])}

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Patches of the latents and their masks; time of the shot or of every token; text and image."""
        given, model = self.arguments(inputs, timestep), self.model
        video, conditioning = inputs.latents, {"text": inputs.text}
        if "condition_mask" in given:
            video = torch.cat([video, given["condition_mask"]], dim=1)
        if model.config.concat_padding_mask:
            video = torch.cat([video, torch.zeros_like(video[:, :1])], dim=1)
        video = model.patch_embed(video)
        times = model.time_embed(video, given["timestep"].flatten())
        if "timestep_mask" in inputs.extras:
            batch, _, *area, _ = video.shape
            times = [x.view(batch, -1, 1, 1, x.shape[1]).expand(-1, -1, *area, -1).flatten(1, 3) for x in times]
        if model.config.use_crossattn_projection:
            conditioning["text"] = model.crossattn_proj(inputs.text)
        if "img_context" in inputs.extras:
            conditioning["image"] = model.img_context_proj(inputs.extras["img_context"])
        return State({"video": video.flatten(1, 3)}, {**conditioning, "modulation": times[0], "time": times[1]})

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """Of the video; or queries of the video, keys and values of the text."""
        to_text, of = site.name == "attn2", state.conditioning
        x, gate = _modulated(block.norm2 if to_text else block.norm1, state.streams["video"], of)
        image = _attend_image(block.attn2, x, of["image"]) if to_text and "image" in of else None
        return QKV(*project(getattr(block, site.name), x, of["text"] if to_text else None), (gate, image))

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """The attention behind its gate; after the text, the MLP."""
        gate, image = aux
        out = project_out(getattr(block, site.name), (attended if image is None else attended + image).flatten(2))
        video = state.streams["video"] + gate * out
        if site.name == "attn2":
            x, gate = _modulated(block.norm3, video, state.conditioning)
            video = video + gate * block.ff(x)
        return {"video": video}

    def head(self, state: State) -> Tensor:
        """The final layer."""
        return self.model.proj_out(_modulated(self.model.norm_out, state.streams["video"], state.conditioning))


def _modulated(norm: Any, video: Tensor, conditioning: dict[str, Tensor]) -> Any:
    """The video, modulated by the time; and the gate, except of the final layer."""
    return norm(video, conditioning["time"], conditioning["modulation"])


def _attend_image(attn: Any, x: Tensor, image: Tensor) -> Tensor:
    """To the image's tokens, by projections beside those for the text."""
    q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (attn.q_img(x), attn.k_img(image), attn.v_img(image)))
    return attend_image(attn.q_img_norm(q), attn.k_img_norm(k), v)
