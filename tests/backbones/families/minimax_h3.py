"""MiniMax-H3 at a tiny size: text to video."""

from math import ceil

import torch
from diffusers import MiniMaxH3Transformer3DModel

from tests.backbones.families.case import Case, random_model, series

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,  # of which 12 are turned
    "hidden_size": 24,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "ffn_dim": 32,
    "in_channels": 4,
    "audio_in_channels": 6,
    "text_dim": 20,
    "freq_dim": 32,
    "time_embed_hidden_dim": 24,
    "time_embed_dim": 16,
    "rope_freq_dim": 2,
}
FRAME = 20 / 3  # a latent frame of four frames


def minimax_h3(**config):
    return random_model(MiniMaxH3Transformer3DModel, **{**TINY, **config})


def last(size, other):
    """The last of some rows, each other's distance 32 over the root of the area, the middle of all at 16."""
    return 16 + 32 * (size / 2 - 1) / (size * other) ** 0.5


def steps(inputs, shot):
    """One more than the largest coordinate: of the last frame, whose first is of one frame; the last row or column."""
    frames, height, width = shot.grid
    clock = shot.text + sum(FRAME / 4 if i % 5 == 0 else FRAME for i in range(frames - 1))
    return 1 + ceil(max(clock / FRAME, last(height, width), last(width, height)) - 1e-3)


axis = series(4)

CASES = [
    Case(
        name="minimax_h3, text to video",
        model=minimax_h3,
        joined=lambda model: [block.attn for block in model.transformer_blocks],
        diagonal=torch.cat([FRAME * axis, axis, axis], dim=1),
        pairing="half",
        steps=steps,
    ),
]
