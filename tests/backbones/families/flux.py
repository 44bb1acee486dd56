"""FLUX.1 at tiny sizes: plain, as schnell; and distilled for guidance, with an image condition, as Fill and Control."""

from diffusers import FluxTransformer2DModel

from tests.backbones.families.case import Case, random_model, series

TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 6,
    "axes_dims_rope": (4, 6, 6),
}


def flux(**config):
    return random_model(FluxTransformer2DModel, **{**TINY, **config})


def guided():
    return flux(guidance_embeds=True, in_channels=28, out_channels=16)


def joined(model):
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


CASES = [
    Case(name="flux", model=flux, joined=joined, diagonal=series(4, 6, 6)),
    Case(name="flux: guidance, an image condition", model=guided, joined=joined, diagonal=series(4, 6, 6)),
]
