"""What this distribution announces: every backbone family that comes with the library."""

from collections.abc import Mapping

from lct_backbones.support import SUPPORT
from lct_core import BackboneSpec, hookimpl

_DIFFUSERS = "diffusers.models.transformers"


def _of_diffusers(
    name: str,
    model: str,
    summary: str,
    *,
    module: str = "",
    adapter: str = "",
    refuses: Mapping[str, str] | None = None,
) -> BackboneSpec:
    """A family whose model is one of diffusers'.

    Args:
        name: The family's.
        model: The class in diffusers.
        summary: What the family is.
        module: Where the class lies, below diffusers' transformers (default: by the family's name).
        adapter: The adapter's class (default: by the model's name).
        refuses: Classes of diffusers, below its transformers too, that are near and not served, and why.
    """
    return BackboneSpec(
        name=name,
        summary=summary,
        handles=(f"{_DIFFUSERS}.{module or f'transformer_{name}'}.{model}",),
        adapter=f"lct_backbones.{name}:{adapter or model.split('Transformer')[0] + 'Backbone'}",
        tested_with="diffusers 0.42",
        refuses={f"{_DIFFUSERS}.{other}": why for other, why in (refuses or {}).items()},
        support=SUPPORT[name],
    )


@hookimpl
def lct_backbones() -> list[BackboneSpec]:
    """The backbone families."""
    return [
        BackboneSpec(
            name="mmdit",
            summary="the paper's own architecture: dual-stream MMDiT with joint attention and 3D RoPE, of any size",
            handles=("lct_backbones.mmdit.MMDiT",),
            adapter="lct_backbones.mmdit:MMDiTBackbone",
            build="lct_backbones.mmdit:MMDiT",
            config={"channels": 16, "text_width": 4096, "width": 2048, "depth": 20, "heads": 16},  # the paper's: 3B
            support=SUPPORT["mmdit"],
        ),
        _of_diffusers(
            "wan",
            "WanTransformer3DModel",
            "Wan 2.1 and 2.2: text to video, image to video, TI2V",
            refuses={
                "transformer_wan_vace.WanVACETransformer3DModel": (
                    "a second stack of blocks attends over control video and adds to the first, and the adapter runs "
                    "the first alone; use WanTransformer3DModel"
                ),
                "transformer_wan_animate.WanAnimateTransformer3DModel": (
                    "between its blocks, video attends to the motion of a face, and the adapter runs the blocks alone; "
                    "use WanTransformer3DModel"
                ),
                "transformer_wan_animate_2.WanAnimate2Transformer3DModel": (
                    "its frames attend to those of a reference video through a cache and a mask of its own, and the "
                    "adapter has neither; use WanTransformer3DModel"
                ),
                "transformer_chronoedit.ChronoEditTransformer3DModel": (
                    "it edits an image: two latent frames are the picture before and after, several frames apart, and "
                    "no shot; use WanTransformer3DModel"
                ),
                "transformer_helios.HeliosTransformer3DModel": (
                    "it packs a history of its own beside the frames that it makes, the older the smaller, in place of "
                    "shots; use WanTransformer3DModel"
                ),
                "transformer_anyflow_far.AnyFlowFARTransformer3DModel": (
                    "it goes from one timestep to another, chunk by chunk, with a causal mask and a cache of its own "
                    "and earlier chunks compressed, in place of shots; use WanTransformer3DModel"
                ),
            },
        ),
        _of_diffusers(
            "skyreels_v2", "SkyReelsV2Transformer3DModel", "SkyReels-V2: text and image to video, diffusion forcing"
        ),
        _of_diffusers(
            "hunyuan_video",
            "HunyuanVideoTransformer3DModel",
            "HunyuanVideo: dual- and single-stream blocks, text and image to video",
            refuses={
                "transformer_hunyuan_video_framepack.HunyuanVideoFramepackTransformer3DModel": (
                    "it packs a history of its own beside the frames that it makes, the older the smaller, in place of "
                    "shots; use HunyuanVideoTransformer3DModel"
                )
            },
        ),
        _of_diffusers(
            "hunyuan_video15",
            "HunyuanVideo15Transformer3DModel",
            "HunyuanVideo-1.5: dual-stream blocks, two text encoders and an image",
        ),
        _of_diffusers(
            "ltx",
            "LTXVideoTransformer3DModel",
            "LTX-Video: fractional coordinates, timesteps of tokens",
            adapter="LTXBackbone",
        ),
        _of_diffusers(
            "ltx2",
            "LTX2VideoTransformer3DModel",
            "LTX-2, 2.3 and 2.5: their video, without audio",
            adapter="LTX2Backbone",
        ),
        _of_diffusers(
            "cogvideox",
            "CogVideoXTransformer3DModel",
            "CogVideoX 2B, 5B and 1.5: joint text, v-prediction",
            module="cogvideox_transformer_3d",
            refuses={
                "consisid_transformer_3d.ConsisIDTransformer3DModel": (
                    "between the blocks it cross-attends to the features of a face, which the adapter does not run; "
                    "use CogVideoXTransformer3DModel"
                ),
                "latte_transformer_3d.LatteTransformer3DModel": (
                    "its attention is factorised: a block sees one frame, or one place in all frames, and none sees a "
                    "whole shot, so there is no sequence to join"
                ),
            },
        ),
        _of_diffusers("sd3", "SD3Transformer2DModel", "Stable Diffusion 3 and 3.5: storyboard frames"),
        _of_diffusers("flux", "FluxTransformer2DModel", "FLUX.1: storyboard frames"),
        _of_diffusers("flux2", "Flux2Transformer2DModel", "FLUX.2: storyboard frames"),
        _of_diffusers(
            "qwen_image",
            "QwenImageTransformer2DModel",
            "Qwen-Image and its Edit: storyboard frames",
            module="transformer_qwenimage",
            refuses={
                "transformer_qwenimage21.QwenImage21Transformer2DModel": (
                    "its text is causal: inside a shot, a token of text sees only what comes before it, while here all "
                    "tokens of a shot see one another"
                )
            },
        ),
        _of_diffusers("minimax_h3", "MiniMaxH3Transformer3DModel", "MiniMax-H3: its video path, without sound"),
        _of_diffusers(
            "mochi",
            "MochiTransformer3DModel",
            "Mochi 1: joint text, learned frequencies",
            refuses={
                "transformer_allegro.AllegroTransformer3DModel": (
                    "Allegro predicts the noise, on a schedule that ends short of pure noise; scenes start from pure "
                    "noise, where a predicted noise says nothing of the data"
                )
            },
        ),
        _of_diffusers(
            "cosmos",
            "CosmosTransformer3DModel",
            "Cosmos Predict 2 and 2.5, Transfer 2.5 without control: text, image and video to world",
        ),
        _of_diffusers(
            "easyanimate",
            "EasyAnimateTransformer3DModel",
            "EasyAnimate 5.1: joint text, text to video, inpainting, control",
            refuses={
                "transformer_kandinsky.Kandinsky5Transformer3DModel": (
                    "it rounds turned queries and keys to bfloat16 in every dtype, so that a shot moved along the "
                    "diagonal differs from what it was, which it must not in float32"
                ),
                "transformer_motif_video.MotifVideoTransformer3DModel": (
                    "in its decoder blocks a shot attends to the tokens of a video twice, with positions and without, "
                    "while here every token is there once"
                ),
            },
        ),
    ]
