"""Wan at tiny sizes: text to video, image to video with CLIP tokens, first and last frame, per-token timesteps."""

from diffusers import WanTransformer3DModel

from tests.backbones.families.case import Case, random_model, series

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
CLIP = {"in_channels": 9, "image_dim": 20, "added_kv_proj_dim": 24}  # 1 channel of mask, 4 of latents


def wan(**config):
    return random_model(WanTransformer3DModel, **{**TINY, **config})


def case(name, *, axes=(4, 4, 4), without=("timestep_mask",), **config):
    """Where there are CLIP tokens, a cross-attention sees them, then the text."""
    return Case(
        name=f"wan, {name}",
        model=lambda: wan(**config),
        joined=lambda model: [block.attn1 for block in model.blocks],
        text=lambda model: [block.attn2 for block in model.blocks],
        sources=("image", "text") if "image_dim" in config else ("text",),
        diagonal=series(*axes),
        without=without,
    )


CASES = [
    case("text to video"),
    case("norm of cross-attention off, axes unequal", axes=(6, 4, 4), cross_attn_norm=False, attention_head_dim=14),
    case("TI2V: timesteps of tokens", without=()),
    case("I2V A14B: channels of the image", in_channels=9),
    case("I2V: CLIP tokens", **CLIP),
    case("I2V: CLIP tokens and timesteps of tokens", without=(), **CLIP),
    case("FLF2V: CLIP tokens of two images", pos_embed_seq_len=6, **CLIP),
]
