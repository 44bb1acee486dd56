"""Stable Diffusion 3 and 3.5 at tiny sizes: plain, and with normed keys, a second attention and an image condition."""

from diffusers import SD3Transformer2DModel

from tests.backbones.families.case import Case, random_model

TINY = {
    "sample_size": 8,
    "pos_embed_max_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 6,
}


def sd3(**config):
    return random_model(SD3Transformer2DModel, **{**TINY, **config})


def sd35():
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1), in_channels=9)


CASES = [
    Case(
        name="sd3",
        model=sd3,
        joined=lambda model: [block.attn for block in model.transformer_blocks],
    ),
    Case(
        name="sd3.5: a second attention, normed keys, an image condition",
        model=sd35,
        joined=lambda model: [
            attention
            for block in model.transformer_blocks
            for attention in (block.attn, block.attn2)
            if attention is not None
        ],
    ),
]
