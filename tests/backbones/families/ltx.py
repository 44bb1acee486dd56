"""LTX-Video at tiny sizes: text to video and image to video, with and without patches, another frame rate."""

import math

from diffusers import LTXVideoTransformer3DModel

from tests.backbones.families.case import Case, fractional, random_model

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 14,
    "in_channels": 8,
    "out_channels": 8,
    "cross_attention_dim": 28,
    "caption_channels": 16,
    "num_layers": 2,
}


def ltx(**config):
    width = TINY["num_attention_heads"] * config.get("attention_head_dim", 14)
    return random_model(LTXVideoTransformer3DModel, **{**TINY, "cross_attention_dim": width, **config})


def steps(inputs, shot):
    """One more than the last token is from the first, in latent frames at 25 per second or in rows or columns."""
    patch = inputs.latents.shape[2] // shot.grid[0]
    frame = 8 * patch * (shot.grid[0] - 1)
    if inputs.extras.get("causal_temporal_positioning"):
        frame = max(0, frame - 7)
    seconds = frame / inputs.extras.get("frame_rate", 25)
    return 1 + math.ceil(max(seconds / (8 * patch / 25) - 1e-3, shot.grid[1] - 1, shot.grid[2] - 1))


def case(name, diagonal, *, without=(), **config):
    return Case(
        name=name,
        model=lambda: ltx(**config),
        joined=lambda model: [block.attn1 for block in model.transformer_blocks],
        text=lambda model: [block.attn2 for block in model.transformer_blocks],
        diagonal=diagonal,
        steps=steps,
        without=without,
    )


STEP = (8 / 25 / 20, 32 / 2048, 32 / 2048)
CASES = [
    case("ltx, text to video", fractional(2, 14, step=STEP), without=("timestep_mask",)),
    case("ltx, image to video: timesteps of tokens", fractional(2, 14, step=STEP)),
    case(
        "ltx, patches, affine norms, no bias",
        fractional(2, 12, step=tuple(2 * share for share in STEP)),
        attention_head_dim=12,
        patch_size=2,
        patch_size_t=2,
        in_channels=16,
        out_channels=16,
        norm_elementwise_affine=True,
        attention_bias=False,
        attention_out_bias=False,
    ),
]
