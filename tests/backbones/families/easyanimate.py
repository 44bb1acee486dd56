"""EasyAnimate at tiny sizes: text to video, inpainting, blocks of both kinds, norms after the MLP, two texts."""

from diffusers import EasyAnimateTransformer3DModel

from tests.backbones.families.case import Case, random_model, series

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 2,
    "mmdit_layers": 2,
    "time_embed_dim": 16,
    "text_embed_dim": 12,
}


def easyanimate(**config):
    return random_model(EasyAnimateTransformer3DModel, **{**TINY, **config})


def steps(inputs, shot):
    """Worked out by hand: one more than the last row or column, in the grid of 30 x 45 that the shot is laid in.

    3 x 4 tokens are laid in 30 x 40, columns from 2 to 42 * 3/4. 1 x 2 tokens are laid in 22 x 45: columns 0 and 22.5.
    4 x 2 tokens are laid in 30 x 15: rows up to 22.5.
    """
    return {(2, 3, 4): 33, (1, 3, 4): 33, (1, 1, 2): 24, (1, 4, 2): 24}[shot.grid]


def case(variant, without=(), **config):
    return Case(
        name=f"easyanimate, {variant}",
        model=lambda: easyanimate(**config),
        joined=lambda model: [block.attn1 for block in model.transformer_blocks],
        diagonal=series(4, 6, 6),
        steps=steps,
        without=without,
    )


TWO = {"text_embed_dim_t5": 12, "add_norm_text_encoder": True}

CASES = [
    case("text to video"),
    case("inpainting: mask and latents", in_channels=9),
    case("both kinds of blocks, norms after the MLP", num_layers=4, after_norm=True, norm_elementwise_affine=False),
    case("two texts, normed", **TWO),
    case("two texts, of which one is given", ("encoder_hidden_states_t5",), **TWO),
    case("two texts of unequal widths", text_embed_dim_t5=10),
]
