"""Wan at tiny sizes: text to video, image to video with CLIP tokens, first and last frame, per-token timesteps."""

from diffusers import WanTransformer3DModel
from families.case import Case, random_model, series

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan(**config):
    return random_model(WanTransformer3DModel, **{**TINY, **config})


CASES = [
    Case(
        name="wan, text to video",
        model=wan,
        joined=lambda model: [block.attn1 for block in model.blocks],
        text=lambda model: [block.attn2 for block in model.blocks],
        diagonal=series(4, 4, 4),
        without=("timestep_mask",),
    ),
    Case(
        name="wan, TI2V: timesteps of tokens",
        model=wan,
        joined=lambda model: [block.attn1 for block in model.blocks],
        text=lambda model: [block.attn2 for block in model.blocks],
        diagonal=series(4, 4, 4),
    ),
]
