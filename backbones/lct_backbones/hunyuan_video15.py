"""HunyuanVideo-1.5 as diffusers ships it: text to video, image to video, and its step-distilled (MeanFlow) models.

HunyuanVideo's dual-stream blocks alone, over ``[video, text]``, text without positions, RoPE as there. Text is made of
up to three parts, one after the other, each marked by an embedding of its kind:

- SigLIP tokens of a first image, ``image_embeds``. All zeros, as the text-to-video pipeline gives, mean no image, and
  the model then masks them; here they are cut off. It decides so for a batch as a whole, so that an entry without an
  image would have one beside others: refused.
- ByT5 tokens of what is to be written in the picture, ``encoder_hidden_states_2``, mostly none. Their mask
  ``encoder_attention_mask_2`` may pick any of them, the same number in every entry.
- MLLM tokens of the prompt, the shot's ``text``, through a refiner that sees the timestep and their mean: at least one.

``condition``, 32 channels of the image's latents and 1 of mask, is always joined to the noise: zeros where there is no
image, which it is here if left out. A model for image to video (``task_type``) must be given both, zeros if need be.
A MeanFlow model also takes the timestep that a step leads to, ``timestep_r``, which changes with every step. Rectified
flow, timesteps 0 to 1000, which the model takes, and so rounds, in its own dtype.

Sources: HunyuanVideo 1.5, arXiv 2511.18870; ``diffusers.models.transformers.transformer_hunyuan_video15`` and
``pipelines.hunyuan_video1_5``.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lct_backbones.hunyuan_video import HunyuanVideoBackbone
from lct_core import Extra, Shot, ShotInput, State, Traits

_TEXT_2, _MASK_2, _IMAGE = "encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds"


class HunyuanVideo15Backbone(HunyuanVideoBackbone):
    """The adapter of ``HunyuanVideo15Transformer3DModel``."""

    processors = ("HunyuanVideo15AttnProcessor2_0",)
    stacks = ("transformer_blocks",)

    def describe(self, config: Any) -> Traits:
        """A second text and an image; MeanFlow's second timestep."""
        image = config.task_type == "i2v"
        extras = {
            _TEXT_2: Extra(("tokens_2", config.text_embed_2_dim)),
            _MASK_2: Extra(("tokens_2",)),
            _IMAGE: Extra(("image_tokens", config.image_embed_dim), required=image, image=True),
        }
        if config.use_meanflow:
            extras["timestep_r"] = Extra((), required=True)
        return self.joint(config, extras, image=image)

    def shot(self, inputs: ShotInput) -> Shot:
        """As for HunyuanVideo; text counts all three parts."""
        shot, extras = super().shot(inputs), inputs.extras
        images = extras[_IMAGE].ne(0).flatten(1).any(1).tolist() if _IMAGE in extras else []
        if len(set(images)) > 1:
            raise ValueError(
                f"extras: {_IMAGE} has an image (is not all zeros) in entries {images} of the batch, expected in all "
                "or in none: the model decides it for all at once; call once for each"
            )
        parts = [extras[name].shape[1] for name in (_IMAGE, _TEXT_2) if name in extras]
        return replace(shot, text=shot.text + sum(parts))

    def prepare(self, inputs: ShotInput) -> ShotInput:
        """As for any model; padding cut off the second text too, and an image that is none cut off whole."""
        inputs = super().prepare(inputs)
        extras = dict(inputs.extras)
        if _MASK_2 in extras:
            extras[_TEXT_2] = _kept(extras.get(_TEXT_2), extras.pop(_MASK_2))
        if _IMAGE in extras and not extras[_IMAGE].any():
            extras[_IMAGE] = extras[_IMAGE][:, :0]
        return replace(inputs, extras=extras)

    def example(self, shot: Shot, **options: Any) -> ShotInput:
        """Without the mask of the second text."""
        inputs = super().example(shot, **options)
        return replace(inputs, extras={name: x for name, x in inputs.extras.items() if name != _MASK_2})

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """All parts of the text, their masks and a condition, which the model must have; no tokens where not given."""
        latents, text, config = inputs.latents, inputs.text, self.model.config
        extras = {
            _TEXT_2: text.new_zeros(len(text), 0, config.text_embed_2_dim),
            _IMAGE: text.new_zeros(len(text), 0, config.image_embed_dim),
            "condition": latents.new_zeros(len(latents), config.in_channels - latents.shape[1], *latents.shape[2:]),
            **inputs.extras,
        }
        extras = {_MASK_2: text.new_ones(extras[_TEXT_2].shape[:2]), **extras}
        return super().arguments(replace(inputs, extras=extras), timestep.to(latents.dtype))

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Patches; the parts of the text, each with its kind; the embedding of the time."""
        model, given = self.model, self.arguments(inputs, timestep)
        time = model.time_embed(given["timestep"], timestep_r=given.get("timestep_r"))
        video = model.x_embedder(given["hidden_states"])
        text = model.context_embedder(inputs.text, given["timestep"], given["encoder_attention_mask"])
        parts = [text, model.context_embedder_2(given[_TEXT_2]), model.image_embedder(given[_IMAGE])]
        kinds = [model.cond_type_embed(x.new_full(x.shape[:2], kind, dtype=torch.long)) for kind, x in enumerate(parts)]
        text = torch.cat([x + kind for x, kind in zip(parts, kinds, strict=True)][::-1], dim=1)
        return State({"video": video, "text": text}, {"time": time})


def _kept(tokens: Tensor | None, mask: Tensor) -> Tensor:
    """The tokens of the second text that its mask keeps, as many in every entry of the batch."""
    counts = mask.bool().sum(1).tolist()
    if tokens is None or tokens.shape[:2] != mask.shape or len(set(counts)) != 1:
        came = None if tokens is None else list(tokens.shape)
        raise ValueError(
            f"extras: {_MASK_2} is {list(mask.shape)} and keeps {counts} tokens, {_TEXT_2} is {came}, expected a mask "
            "for every token, which keeps the same number in every entry of the batch; call once for each"
        )
    return tokens[mask.bool()].view(len(mask), -1, tokens.shape[2])
