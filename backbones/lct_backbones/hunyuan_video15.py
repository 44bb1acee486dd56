"""HunyuanVideo-1.5 as diffusers ships it: text to video, and image to video.

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
Rectified flow, timesteps 0 to 1000, which the model takes, and so rounds, in its own dtype.

Not served: the step-distilled (MeanFlow) models, which also take the timestep that a step leads to.

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
    texts = (_IMAGE, _TEXT_2)

    def describe(self, config: Any) -> Traits:
        """As HunyuanVideo, but not MeanFlow."""
        if config.use_meanflow:
            raise ValueError(
                "model: got use_meanflow=True, expected False: a step-distilled model also takes the timestep that "
                "each step leads to, which samplers here do not give; take a model that is not step-distilled"
            )
        return super().describe(config)

    def extras(self, config: Any) -> dict[str, Extra]:
        """A second text; an image and its tokens, needed for image to video alone."""
        image = config.task_type == "i2v"
        return {
            **self.condition(config, required=image),
            _TEXT_2: Extra(("tokens_2", config.text_embed_2_dim), prompt=True),
            _MASK_2: Extra(("tokens_2",), prompt=True),
            _IMAGE: Extra(("image_tokens", config.image_embed_dim), required=image, image=True),
        }

    def prepare(self, inputs: ShotInput) -> ShotInput:
        """As for any model; padding cut off the second text too, and an image that is none cut off whole."""
        inputs = super().prepare(inputs)
        extras = dict(inputs.extras)
        if (mask := extras.pop(_MASK_2, None)) is not None:
            if not bool((mask == mask.bool()).all()):
                raise ValueError(f"extras: {_MASK_2} has other values than 0 and 1, expected 1 where a token is kept")
            extras[_TEXT_2] = _kept(_TEXT_2, extras.get(_TEXT_2), mask)
        if (image := extras.get(_IMAGE)) is not None:
            extras[_IMAGE] = _kept(_IMAGE, image, image.flatten(1).any(1, keepdim=True).expand(image.shape[:2]))
        return replace(inputs, extras=extras)

    def example(self, shot: Shot, **options: Any) -> ShotInput:
        """With all of its second text."""
        given = super().example(shot, **options)
        return replace(given, extras={**given.extras, _MASK_2: torch.ones_like(given.extras[_MASK_2])})

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """All parts of the text, a mask of the second and a condition, which the model must have: empty ones."""
        latents, text, config = inputs.latents, inputs.text, self.model.config
        given = {
            _TEXT_2: text.new_zeros(len(text), 0, config.text_embed_2_dim),
            _IMAGE: text.new_zeros(len(text), 0, config.image_embed_dim),
            "condition": latents.new_zeros(len(latents), config.in_channels - latents.shape[1], *latents.shape[2:]),
            **inputs.extras,
        }
        given.setdefault(_MASK_2, text.new_ones(given[_TEXT_2].shape[:2]))
        return super().arguments(replace(inputs, extras=given), timestep.to(latents.dtype))

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Patches; the parts of the text, each with its kind; the time."""
        model, given = self.model, self.arguments(inputs, timestep)
        text = model.context_embedder(inputs.text, given["timestep"], given["encoder_attention_mask"])
        parts = model.image_embedder(given[_IMAGE]), model.context_embedder_2(given[_TEXT_2]), text
        kinds = model.cond_type_embed(torch.tensor([2, 1, 0], device=text.device))
        text = torch.cat([part + kind for part, kind in zip(parts, kinds, strict=True)], dim=1)
        video, time = model.x_embedder(given["hidden_states"]), model.time_embed(given["timestep"])
        return State({"video": video, "text": text}, {"time": time})


def _kept(name: str, tokens: Tensor | None, mask: Tensor) -> Tensor:
    """The tokens that a mask keeps, as many in every entry of the batch."""
    counts = mask.bool().sum(1).tolist()
    if tokens is None or tokens.shape[:2] != mask.shape or len(set(counts)) != 1:
        raise ValueError(
            f"extras: {name} is {None if tokens is None else list(tokens.shape)}, of which its mask {list(mask.shape)} "
            f"keeps {counts} tokens (an image of zeros has none), expected a mask for every token, and as many in "
            "every entry of the batch; call once for each"
        )
    return tokens[mask.bool()].view(len(mask), -1, tokens.shape[2])
