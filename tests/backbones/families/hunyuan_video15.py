"""HunyuanVideo-1.5 at tiny sizes: text to video with and without a second text, image to video."""

from diffusers import HunyuanVideo15Transformer3DModel

from tests.backbones.families.case import Case, random_model, series

TINY = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "text_embed_2_dim": 10,
    "image_embed_dim": 14,
    "rope_axes_dim": (4, 4, 4),
}


def hunyuan_video15(**config):
    return random_model(HunyuanVideo15Transformer3DModel, **{**TINY, **config})


def case(variant, without=(), **config):
    return Case(
        name=f"hunyuan_video15, {variant}",
        model=lambda: hunyuan_video15(**config),
        joined=lambda model: [block.attn for block in model.transformer_blocks],
        diagonal=series(*config.get("rope_axes_dim", (4, 4, 4)), theta=256.0),
        without=without,
        masks_padding=True,
    )


TEXT_2 = ("encoder_hidden_states_2", "encoder_attention_mask_2")

CASES = [
    case("text to video", (*TEXT_2, "image_embeds", "condition"), task_type="t2v"),
    case("image to video", attention_head_dim=16, rope_axes_dim=(4, 6, 6)),
]
