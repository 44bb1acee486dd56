"""HunyuanVideo at tiny sizes: text to video, distilled or not, and image to video in its three ways."""

from diffusers import HunyuanVideoTransformer3DModel

from tests.backbones.families.case import Case, random_model, series

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": False,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 4, 4),
}


def hunyuan_video(**config):
    return random_model(HunyuanVideoTransformer3DModel, **{**TINY, **config})


def case(variant, **config):
    return Case(
        name=f"hunyuan_video, {variant}",
        model=lambda: hunyuan_video(**config),
        joined=lambda model: [block.attn for block in [*model.transformer_blocks, *model.single_transformer_blocks]],
        diagonal=series(*config.get("rope_axes_dim", (4, 4, 4)), theta=256.0),
        masks_padding=True,
    )


CASES = [
    case("distilled", guidance_embeds=True, attention_head_dim=16, rope_axes_dim=(4, 6, 6), patch_size_t=2),
    case("latent_concat", image_condition_type="latent_concat", in_channels=9),
    case("token_replace", image_condition_type="token_replace", guidance_embeds=True),
    case("SkyReels-V1", in_channels=8),
]
