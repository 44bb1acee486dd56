"""Kandinsky 6 at tiny sizes: text to video, image to video, without channels for a condition."""

import torch
from diffusers import Kandinsky6Transformer3DModel
from families.case import Case, random_model, series

TINY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 10,
    "time_dim": 16,
    "model_dim": 28,
    "ff_dim": 32,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 4),
    "in_audio_dim": 6,
    "out_audio_dim": 6,
}
IMAGE = {"visual_token_type_num_embeddings": 2}


def kandinsky6(**config):
    return random_model(Kandinsky6Transformer3DModel, **{**TINY, **config})


def diagonal(rows=2.0, columns=2.0):
    """One frame; one row and one column, their angles divided."""
    return torch.cat([series(4), series(6) / rows, series(4) / columns], dim=1)


RELEASED = diagonal()


def case(variant, *, diagonal=RELEASED, without=(), **config):
    """What is heard of other prompts is tested apart: a global prompt needs a pooled text of its own."""
    return Case(
        name=f"kandinsky6, {variant}",
        model=lambda: kandinsky6(**config),
        joined=lambda model: [block.video_dec_block.self_attention for block in model.visual_transformer_blocks],
        diagonal=diagonal,
        without=("encoder_attention_mask", *without),
    )


CASES = [
    case("text to video"),
    case("image to video", **IMAGE),
    case("text to video with a model of image to video", without=("image",), **IMAGE),
    case(
        "no channels for a condition, another scale",
        diagonal=diagonal(1.0, 3.16),
        visual_cond=False,
        scale_factor=(1.0, 1.0, 3.16),
    ),
]
