"""LTX-2 at tiny sizes, its video alone: as 2.0, 2.3 and 2.5 are configured."""

import math

from diffusers import LTX2VideoTransformer3DModel

from tests.backbones.families.case import Case, fractional, random_model

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 14,
    "in_channels": 8,
    "out_channels": 8,
    "cross_attention_dim": 28,
    "caption_channels": 16,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 10,
    "audio_cross_attention_dim": 20,
    "num_layers": 2,
}
LTX23 = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "rope_type": "split",
    "perturbed_attn": True,
}


def ltx2(**config):
    return random_model(LTX2VideoTransformer3DModel, **{**TINY, **config})


def steps(inputs, shot):
    """One more than the middle of the last token is from 0, in latent frames at 24 per second or in rows or columns."""
    patch, rate = inputs.latents.shape[2] // shot.grid[0], inputs.extras.get("fps", 24)
    first, last = (8 * patch * (shot.grid[0] - 1) - 7, 8 * patch * shot.grid[0] - 7)
    frames = (max(first, 0) + last) / 2 / rate * 24 / (8 * patch)
    return 1 + math.ceil(max(frames - 1e-3, shot.grid[1] - 0.5, shot.grid[2] - 0.5))


def case(name, *, without=(), patch=1, **config):
    step = (8 * patch / 24 / 20, 32 * patch / 2048, 32 * patch / 2048)
    channels = 8 * patch**3
    return Case(
        name=name,
        model=lambda: ltx2(patch_size=patch, patch_size_t=patch, in_channels=channels, out_channels=channels, **config),
        joined=lambda model: [block.attn1 for block in model.transformer_blocks],
        text=lambda model: [block.attn2 for block in model.transformer_blocks],
        diagonal=fractional(2, 14, step=step),
        pairing="half" if config.get("rope_type") == "split" else "interleaved",
        steps=steps,
        without=without,
    )


CASES = [
    case("ltx2, text to video", without=("timestep_mask",)),
    case("ltx2, image to video, patches", patch=2, rope_double_precision=False, norm_elementwise_affine=True),
    case("ltx2, 2.3: gates, prompt modulation, split RoPE", without=("timestep_mask",), **LTX23),
    case("ltx2, 2.3, image to video", **LTX23),
    case("ltx2, 2.5: constant prompt modulation", **LTX23, use_prompt_adaln_single=False, ff_bias=False),
]
