"""Cosmos at tiny sizes: Predict 2 for images, Predict 2 and 2.5 for video, Transfer 2.5 with image tokens."""

import torch
from diffusers import CosmosTransformer3DModel

from tests.backbones.families.case import Case, random_model, series

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 14,  # not all axes alike: 6, 4, 4
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 16,
    "adaln_lora_dim": 8,
    "mlp_ratio": 2.0,
    "num_layers": 2,
    "max_size": (32, 32, 32),
    "rope_scale": (1.0, 3.0, 3.0),
    "extra_pos_embed_type": None,
}
VIDEO = {"in_channels": 5, "rope_scale": (2.0, 3.0, 4.0)}
PROJECTED = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 24, "encoder_hidden_states_channels": 16}
IMAGE = {
    "img_context_dim_in": 12,
    "img_context_num_tokens": 3,
    "img_context_dim_out": 28,
}  # the last: the model's width


def cosmos(**config):
    return random_model(CosmosTransformer3DModel, **{**TINY, **config})


def diagonal(*scales):
    """NTK: every axis of d channels stretches its theta by scale^(d / (d - 2))."""
    channels = (6, 4, 4)
    thetas = [10_000.0 * scale ** (d / (d - 2)) for d, scale in zip(channels, scales, strict=True)]
    return torch.cat([series(d, theta=theta) for d, theta in zip(channels, thetas, strict=True)], dim=1)


def case(name, config, *, scales, **options):
    return Case(
        name=f"cosmos, {name}",
        model=lambda: cosmos(**config),
        joined=lambda model: [block.attn1 for block in model.transformer_blocks],
        text=lambda model: [block.attn2 for block in model.transformer_blocks],
        diagonal=diagonal(*scales),
        pairing="half",
        **options,
    )


CASES = [
    case("Predict 2, text to image", {}, scales=(1, 3, 3), without=("timestep_mask",)),
    case("no channel of padding", {"concat_padding_mask": False}, scales=(1, 3, 3), without=("timestep_mask",)),
    case("Predict 2, video to world: timesteps of frames", VIDEO, scales=(2, 3, 4)),
    case("Predict 2.5: projected text", {**VIDEO, **PROJECTED}, scales=(2, 3, 4)),
    case(
        "Transfer 2.5: tokens of an image",
        {**VIDEO, **PROJECTED, **IMAGE, "controlnet_block_every_n": 2},
        scales=(2, 3, 4),
        sources=("text", "image"),
    ),
]
