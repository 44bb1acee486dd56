"""Qwen-Image at tiny sizes: text to image, and Edit, whose images are modulated as the shot or as clean."""

from diffusers import QwenImageTransformer2DModel

from lct_core import Shot
from tests.backbones.families.case import Case, random_model, series

TINY = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 14,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 4, 8),
}


def qwen_image(**config):
    return random_model(QwenImageTransformer2DModel, **{**TINY, **config})


def steps(inputs, shot):
    """One more than the largest coordinate: the last image's number, or the last text token behind half a side."""
    images, height, width = shot.grid
    return max(images, max(height // 2, width // 2) + shot.text)


def case(name, *, without=(), **config):
    return Case(
        name=f"qwen_image, {name}",
        model=lambda: qwen_image(**config),
        joined=lambda model: [block.attn for block in model.transformer_blocks],
        diagonal=series(2, 4, 8),
        steps=steps,
        without=without,
        shots=(Shot(3, (1, 3, 4)), Shot(2, (1, 1, 2)), Shot(5, (1, 4, 2))),
    )


CASES = [
    case("text to image", without=("image_latents",)),
    case("Edit Plus: five images", without=()),
    case("Edit: images modulated as clean", zero_cond_t=True),
]
