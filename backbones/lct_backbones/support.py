"""The support table: what the models of every backbone family are like, and what was tested, in words."""

from lct_core import Support

_VELOCITY = "rectified flow, velocity"


def _family(
    text: str, positions: str, *rows: tuple[str, str, str], path: str = _VELOCITY, time: str = "0 to 1000"
) -> tuple[Support, ...]:
    """Rows that differ in no more than their models, the images that they take, and what was tested."""
    return tuple(Support(models, text, positions, path, time, images, tested) for models, images, tested in rows)


_LTX2 = _family(
    "cross",
    "3D RoPE in seconds and pixels, over the width of all heads, fp32",
    ("LTX-2", "the latents' first frame, timesteps of tokens; no audio", "T2V, I2V at tiny sizes"),
)

_COGVIDEOX = Support(
    models="CogVideoX 2B",
    text="joint",
    positions="absolute sine-cosine, text of 226 tokens",
    path="variance preserving (SNR shift 3), v",
    time="-1 (clamped to 0) to 999",
    images="none",
    tested="T2V at tiny sizes",
)

_COGVIDEOX_5B = _COGVIDEOX._replace(
    models="CogVideoX 5B",
    positions="3D RoPE, 16/24/24, fp32, laid in the trained grid",
    path="variance preserving (SNR shift 1), v",
)

_COSMOS = _family(
    "cross",
    "3D RoPE, 44/42/42, NTK, fp32",
    ("Cosmos Predict 2 Text2Image 2B, 14B", "none", "text to image at tiny sizes"),
    (
        "Cosmos Predict 2 Video2World 2B, 14B; Predict 2.5 2B, 14B",
        "clean first frames: mask (1 channel), timesteps of frames",
        "image and video to world at tiny sizes",
    ),
    (
        "Cosmos Transfer 2.5 2B, without its control branch",
        "clean first frames: mask (1 channel), timesteps of frames; image tokens",
        "image tokens at a tiny size",
    ),
    time="0 to 1",
)

#: The rows of every family, by its name.
SUPPORT: dict[str, tuple[Support, ...]] = {
    "mmdit": _family("joint", "3D RoPE, fp64", ("MMDiT of any size", "given shots", "conformance, demo")),
    "wan": _family(
        "cross",
        "3D RoPE, 44/42/42, fp64",
        ("Wan 2.1 T2V 1.3B, 14B; Wan 2.2 T2V A14B", "none", "T2V at tiny sizes"),
        (
            "Wan 2.1 I2V 14B, FLF2V 14B",
            "condition (20 channels), CLIP tokens of one image or two",
            "I2V, FLF2V at tiny sizes",
        ),
        ("Wan 2.2 I2V A14B", "condition (20 channels)", "I2V at tiny sizes"),
        ("Wan 2.2 TI2V 5B", "the latents' first frame, timesteps of tokens", "TI2V at tiny sizes"),
    ),
    "skyreels_v2": _family(
        "cross",
        "3D RoPE, 44/42/42, fp64",
        ("SkyReels-V2 T2V 14B", "none", "T2V at tiny sizes"),
        ("SkyReels-V2 I2V 1.3B, 14B", "condition (20 channels), CLIP tokens", "I2V at tiny sizes"),
        (
            "SkyReels-V2 DF 1.3B, 14B",
            "clean frames among the latents, timesteps of frames",
            "DF with and without frames per second, at tiny sizes",
        ),
    ),
    "hunyuan_video": _family(
        "joint",
        "3D RoPE, 16/56/56, theta 256, fp32",
        (
            "HunyuanVideo (distilled), SkyReels-V1 T2V, I2V",
            "SkyReels-V1 I2V: condition (16 channels)",
            "T2V with guidance, I2V at tiny sizes",
        ),
        (
            "HunyuanVideo-I2V",
            "condition (17 channels), or the latents' first frame; tokens in the text",
            "latent_concat and token_replace at tiny sizes",
        ),
    ),
    "hunyuan_video15": _family(
        "joint",
        "3D RoPE, 16/56/56, theta 256, fp32",
        (
            "HunyuanVideo-1.5 T2V, I2V, not step-distilled",
            "condition (33 channels), SigLIP tokens in the text",
            "T2V, I2V at tiny sizes",
        ),
    ),
    "ltx": _family(
        "cross",
        "3D RoPE in seconds and pixels, over the width of all heads, fp32",
        (
            "LTX-Video 2B, 13B (0.9 to 0.9.8)",
            "the latents' first frame, timesteps of tokens",
            "T2V, I2V, frame rates, causal positions at tiny sizes",
        ),
    ),
    "ltx2": (*_LTX2, _LTX2[0]._replace(models="LTX-2.3, 2.5 without keyframe tokens")),
    "cogvideox": (
        _COGVIDEOX,
        _COGVIDEOX_5B,
        _COGVIDEOX_5B._replace(
            models="CogVideoX 5B I2V",
            positions="the same, and learned ones for one size and text of 226 tokens",
            images="condition (16 channels)",
            tested="I2V at a tiny size",
        ),
        _COGVIDEOX_5B._replace(
            models="CogVideoX 1.5 5B, 5B I2V",
            positions="3D RoPE, 16/24/24, fp32",
            images="I2V: condition (16 channels), ofs",
            tested="I2V at tiny sizes",
        ),
    ),
    "sd3": _family(
        "joint",
        "no RoPE: cropped sine-cosine grid",
        (
            "Stable Diffusion 3, 3.5 Large, Medium",
            "condition (channels of an editing model)",
            "3, 3.5 Medium with a condition, at tiny sizes",
        ),
    ),
    "flux": _family(
        "joint",
        "3D RoPE, 16/56/56, fp64",
        ("FLUX.1 dev, schnell", "none", "schnell; guidance with a condition, at tiny sizes"),
        ("FLUX.1 Fill, Canny, Depth", "condition (80 or 16 channels)", "guidance and a condition at tiny sizes"),
        time="0 to 1",
    ),
    "flux2": _family(
        "joint",
        "4D RoPE, 32/32/32/32, theta 2000, fp64; text on its own axis",
        ("FLUX.2 dev, klein", "none; no reference images", "dev, klein at tiny sizes"),
        time="0 to 1",
    ),
    "qwen_image": _family(
        "joint",
        "3D RoPE, 16/56/56, fp32, centred; text on the diagonal",
        ("Qwen-Image", "none", "text to image at a tiny size"),
        (
            "Qwen-Image-Edit, Edit-Plus",
            "image_latents of the shot's size, as tokens of the shot",
            "five images, modulated as the shot or as clean, at a tiny size",
        ),
        time="0 to 1",
    ),
    "minimax_h3": _family(
        "joint",
        "3D RoPE, 32/32/32 of 128, fp32; text on the time axis, frames 5/3 or 20/3 apart",
        ("MiniMax-H3, text to video without sound", "none", "text to video at a tiny size"),
        path=f"{_VELOCITY} toward the data",
        time="1 to 0",
    ),
    "mochi": _family(
        "joint",
        "learned RoPE per head, centred and normalised by area, fp32; text at the origin",
        ("Mochi 1 preview", "none", "text to video at a tiny size"),
        path=f"{_VELOCITY} toward the data",
        time="1000 to 0",
    ),
    "cosmos": (
        _COSMOS[0],
        _COSMOS[1]._replace(positions="3D RoPE, 44/42/42, NTK, fp32; by fps (Predict 2)"),
        _COSMOS[2],
    ),
    "easyanimate": _family(
        "joint",
        "3D RoPE, 16/24/24, fp32, laid in one grid; text at the origin",
        ("EasyAnimate 5.1 12B", "none", "T2V, also with blocks of one stream and a second text, at tiny sizes"),
        ("EasyAnimate 5.1 12B InP, Control", "condition (17 or 32 channels)", "inpainting, control at tiny sizes"),
    ),
}
