"""FLUX.2 at tiny sizes: distilled for guidance, as dev, and without, as Klein."""

import torch
from diffusers import Flux2Transformer2DModel

from tests.backbones.families.case import Case, random_model, series

TINY = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}


def flux2(**config):
    return random_model(Flux2Transformer2DModel, **{**TINY, **config})


def klein():
    return flux2(guidance_embeds=False)


def joined(model):
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


#: Shots move along frames, rows and columns, and not along the places in a text.
DIAGONAL = torch.cat([series(4, 4, 4, theta=2000.0), torch.zeros(1, 2, dtype=torch.float64)], dim=1)

CASES = [
    Case(name="flux2: guidance", model=flux2, joined=joined, diagonal=DIAGONAL),
    Case(name="flux2 klein", model=klein, joined=joined, diagonal=DIAGONAL),
]
