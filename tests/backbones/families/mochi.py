"""Mochi at a tiny size."""

from math import ceil, sqrt

from diffusers import MochiTransformer3DModel

from tests.backbones.families.case import Case, random_model

ROW = 192 / sqrt(30 * 53)  # of one row of a shot of 480 x 848 pixels, in native coordinates


def mochi(**config):
    tiny = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "pooled_projection_dim": 12,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 16,
    }
    return random_model(MochiTransformer3DModel, **{**tiny, **config})


def diagonal():
    """Learned: of one frame, one row and one column, for every head."""
    frames, rows, columns = mochi().pos_frequencies.detach().double()
    return frames + ROW * (rows + columns)


def steps(inputs, shot):
    """One more than the last frame, or the outermost row or column from the middle, whichever is further."""
    frames, height, width = shot.grid
    apart = 192 / sqrt(height * width)
    return 1 + ceil(max(frames - 1, apart * (max(height, width) - 1) / 2 / ROW) - 1e-3)


CASES = [
    Case(
        name="mochi",
        model=mochi,
        joined=lambda model: [block.attn1 for block in model.transformer_blocks],
        diagonal=diagonal(),
        steps=steps,
        masks_padding=True,  # it drops padding, and so attends one entry of a batch after the other
    ),
]
