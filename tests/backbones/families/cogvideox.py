"""CogVideoX at tiny sizes: 2B, 5B and 1.5, text and image to video.

Sizes are of a model trained on 4 x 6 tokens of 2 x 2 latents, 2 latent frames.
"""

import torch
from diffusers import CogVideoXTransformer3DModel

from tests.backbones.families.case import Case, random_model, series

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 12,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 6,
}


def cogvideox(**config):
    """Learned positions are a buffer, which is the fixed positions until a checkpoint is loaded."""
    model = random_model(CogVideoXTransformer3DModel, **{**TINY, **config})
    if model.config.use_learned_positional_embeddings:
        learned = model.patch_embed.pos_embedding
        learned += torch.randn(learned.shape, generator=torch.Generator().manual_seed(0)) / 2
    return model


def joined(model):
    return [block.attn1 for block in model.transformer_blocks]


def steps_of_5b(inputs, shot):
    """Worked out by hand: one more than the last row or column, in the grid of 4 x 6 that the shot is laid in.

    3 x 4 tokens are laid in 4 x 5 from the corner on: columns up to 3.75. 1 x 2 tokens are laid in 3 x 6: columns 0 and
    3. 4 x 2 tokens are laid in the middle, at columns 2 and 3, rows 0 to 3.
    """
    return {(2, 3, 4): 5, (1, 3, 4): 5, (1, 1, 2): 4, (1, 4, 2): 4}[shot.grid]


CASES = [
    Case(
        name="cogvideox, 2B: absolute positions",
        model=cogvideox,
        joined=joined,
    ),
    Case(
        name="cogvideox, 5B: RoPE",
        model=lambda: cogvideox(use_rotary_positional_embeddings=True),
        joined=joined,
        diagonal=series(4, 6, 6),
        steps=steps_of_5b,
    ),
    Case(
        name="cogvideox, 5B I2V: condition, learned positions beside RoPE",
        model=lambda: cogvideox(
            in_channels=8, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True
        ),
        joined=joined,
        diagonal=series(4, 6, 6),
    ),
    Case(
        name="cogvideox, 1.5 I2V: patches of two frames, condition, ofs",
        model=lambda: cogvideox(in_channels=8, patch_size_t=2, ofs_embed_dim=16, use_rotary_positional_embeddings=True),
        joined=joined,
        diagonal=series(4, 6, 6),
    ),
    Case(
        name="cogvideox, 1.5 I2V, ofs left out",
        model=lambda: cogvideox(in_channels=8, patch_size_t=2, ofs_embed_dim=16, use_rotary_positional_embeddings=True),
        joined=joined,
        diagonal=series(4, 6, 6),
        without=("ofs",),
    ),
]
