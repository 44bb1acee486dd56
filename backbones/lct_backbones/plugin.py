"""What this distribution announces: every backbone family that comes with the library."""

from lct_core import BackboneSpec, Support, hookimpl

_DIFFUSERS = "diffusers.models.transformers"


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
            support=(
                Support(
                    models="MMDiT of any size",
                    text="joint",
                    positions="3D RoPE, fp64",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="given shots",
                    tested="conformance, demo",
                ),
            ),
        ),
        BackboneSpec(
            name="wan",
            summary="Wan 2.1 and 2.2: text to video, image to video, TI2V",
            handles=(f"{_DIFFUSERS}.transformer_wan.WanTransformer3DModel",),
            adapter="lct_backbones.wan:WanBackbone",
            tested_with="diffusers 0.42",
            refuses={
                f"{_DIFFUSERS}.transformer_wan_vace.WanVACETransformer3DModel": (
                    "a second stack of blocks attends over control video and adds to the first, and the adapter runs "
                    "the first alone; use WanTransformer3DModel"
                ),
                f"{_DIFFUSERS}.transformer_wan_animate.WanAnimateTransformer3DModel": (
                    "between its blocks, video attends to the motion of a face, and the adapter runs the blocks alone; "
                    "use WanTransformer3DModel"
                ),
                f"{_DIFFUSERS}.transformer_wan_animate_2.WanAnimate2Transformer3DModel": (
                    "its frames attend to those of a reference video through a cache and a mask of its own, and the "
                    "adapter has neither; use WanTransformer3DModel"
                ),
                f"{_DIFFUSERS}.transformer_chronoedit.ChronoEditTransformer3DModel": (
                    "it edits an image: two latent frames are the picture before and after, several frames apart, and "
                    "no shot; use WanTransformer3DModel"
                ),
                f"{_DIFFUSERS}.transformer_helios.HeliosTransformer3DModel": (
                    "it packs a history of its own beside the frames that it makes, the older the smaller, in place of "
                    "shots; use WanTransformer3DModel"
                ),
                f"{_DIFFUSERS}.transformer_anyflow_far.AnyFlowFARTransformer3DModel": (
                    "it goes from one timestep to another, chunk by chunk, with a causal mask and a cache of its own "
                    "and earlier chunks compressed, in place of shots; use WanTransformer3DModel"
                ),
            },
            support=(
                Support(
                    models="Wan 2.1 T2V 1.3B, 14B; Wan 2.2 T2V A14B",
                    text="cross",
                    positions="3D RoPE, 44/42/42, fp64",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="none",
                    tested="T2V at tiny sizes",
                ),
                Support(
                    models="Wan 2.1 I2V 14B, FLF2V 14B",
                    text="cross",
                    positions="3D RoPE, 44/42/42, fp64",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="condition (20 channels), CLIP tokens of one image or two",
                    tested="I2V, FLF2V at tiny sizes",
                ),
                Support(
                    models="Wan 2.2 I2V A14B",
                    text="cross",
                    positions="3D RoPE, 44/42/42, fp64",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="condition (20 channels)",
                    tested="I2V at tiny sizes",
                ),
                Support(
                    models="Wan 2.2 TI2V 5B",
                    text="cross",
                    positions="3D RoPE, 44/42/42, fp64",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="the latents' first frame, timesteps of tokens",
                    tested="TI2V at tiny sizes",
                ),
            ),
        ),
        BackboneSpec(
            name="skyreels_v2",
            summary="SkyReels-V2: text and image to video, diffusion forcing",
            handles=(f"{_DIFFUSERS}.transformer_skyreels_v2.SkyReelsV2Transformer3DModel",),
            adapter="lct_backbones.skyreels_v2:SkyReelsV2Backbone",
            tested_with="diffusers 0.42",
            support=(
                Support(
                    models="SkyReels-V2 T2V 14B",
                    text="cross",
                    positions="3D RoPE, 44/42/42, fp64",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="none",
                    tested="T2V at tiny sizes",
                ),
                Support(
                    models="SkyReels-V2 I2V 1.3B, 14B",
                    text="cross",
                    positions="3D RoPE, 44/42/42, fp64",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="condition (20 channels), CLIP tokens",
                    tested="I2V at tiny sizes",
                ),
                Support(
                    models="SkyReels-V2 DF 1.3B, 14B",
                    text="cross",
                    positions="3D RoPE, 44/42/42, fp64",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="clean frames among the latents, timesteps of frames",
                    tested="DF with and without frames per second, at tiny sizes",
                ),
            ),
        ),
        BackboneSpec(
            name="hunyuan_video",
            summary="HunyuanVideo: dual- and single-stream blocks, text and image to video",
            handles=(f"{_DIFFUSERS}.transformer_hunyuan_video.HunyuanVideoTransformer3DModel",),
            adapter="lct_backbones.hunyuan_video:HunyuanVideoBackbone",
            tested_with="diffusers 0.42",
            refuses={
                f"{_DIFFUSERS}.transformer_hunyuan_video_framepack.HunyuanVideoFramepackTransformer3DModel": (
                    "it packs a history of its own beside the frames that it makes, the older the smaller, in place of "
                    "shots; use HunyuanVideoTransformer3DModel"
                )
            },
            support=(
                Support(
                    models="HunyuanVideo (distilled), SkyReels-V1 T2V, I2V",
                    text="joint",
                    positions="3D RoPE, 16/56/56, theta 256, fp32",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="SkyReels-V1 I2V: condition (16 channels)",
                    tested="T2V with guidance, I2V at tiny sizes",
                ),
                Support(
                    models="HunyuanVideo-I2V",
                    text="joint",
                    positions="3D RoPE, 16/56/56, theta 256, fp32",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="condition (17 channels), or the latents' first frame; tokens in the text",
                    tested="latent_concat and token_replace at tiny sizes",
                ),
            ),
        ),
        BackboneSpec(
            name="hunyuan_video15",
            summary="HunyuanVideo-1.5: dual-stream blocks, two text encoders and an image",
            handles=(f"{_DIFFUSERS}.transformer_hunyuan_video15.HunyuanVideo15Transformer3DModel",),
            adapter="lct_backbones.hunyuan_video15:HunyuanVideo15Backbone",
            tested_with="diffusers 0.42",
            support=(
                Support(
                    models="HunyuanVideo-1.5 T2V, I2V, not step-distilled",
                    text="joint",
                    positions="3D RoPE, 16/56/56, theta 256, fp32",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="condition (33 channels), SigLIP tokens in the text",
                    tested="T2V, I2V at tiny sizes",
                ),
            ),
        ),
        BackboneSpec(
            name="ltx",
            summary="LTX-Video: fractional coordinates, timesteps of tokens",
            handles=(f"{_DIFFUSERS}.transformer_ltx.LTXVideoTransformer3DModel",),
            adapter="lct_backbones.ltx:LTXBackbone",
            tested_with="diffusers 0.42",
            support=(
                Support(
                    models="LTX-Video 2B, 13B (0.9 to 0.9.8)",
                    text="cross",
                    positions="3D RoPE in seconds and pixels, over the width of all heads, fp32",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="the latents' first frame, timesteps of tokens",
                    tested="T2V, I2V, frame rates, causal positions at tiny sizes",
                ),
            ),
        ),
        BackboneSpec(
            name="ltx2",
            summary="LTX-2, 2.3 and 2.5: their video, without audio",
            handles=(f"{_DIFFUSERS}.transformer_ltx2.LTX2VideoTransformer3DModel",),
            adapter="lct_backbones.ltx2:LTX2Backbone",
            tested_with="diffusers 0.42",
            support=(
                Support(
                    models="LTX-2",
                    text="cross",
                    positions="3D RoPE in seconds and pixels, over the width of all heads, fp32",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="the latents' first frame, timesteps of tokens; no audio",
                    tested="T2V, I2V at tiny sizes",
                ),
                Support(
                    models="LTX-2.3, 2.5 without keyframe tokens",
                    text="cross",
                    positions="3D RoPE in seconds and pixels, over the width of all heads, fp32",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="the latents' first frame, timesteps of tokens; no audio",
                    tested="T2V, I2V at tiny sizes",
                ),
            ),
        ),
        BackboneSpec(
            name="cogvideox",
            summary="CogVideoX 2B, 5B and 1.5: joint text, v-prediction",
            handles=(f"{_DIFFUSERS}.cogvideox_transformer_3d.CogVideoXTransformer3DModel",),
            adapter="lct_backbones.cogvideox:CogVideoXBackbone",
            tested_with="diffusers 0.42",
            refuses={
                f"{_DIFFUSERS}.consisid_transformer_3d.ConsisIDTransformer3DModel": (
                    "between the blocks it cross-attends to the features of a face, which the adapter does not run; "
                    "use CogVideoXTransformer3DModel"
                ),
                f"{_DIFFUSERS}.latte_transformer_3d.LatteTransformer3DModel": (
                    "its attention is factorised: a block sees one frame, or one place in all frames, and none sees a "
                    "whole shot, so there is no sequence to join"
                ),
            },
            support=(
                Support(
                    models="CogVideoX 2B",
                    text="joint",
                    positions="absolute sine-cosine, text of 226 tokens",
                    path="variance preserving (SNR shift 3), v",
                    time="-1 (clamped to 0) to 999",
                    images="none",
                    tested="T2V at tiny sizes",
                ),
                Support(
                    models="CogVideoX 5B",
                    text="joint",
                    positions="3D RoPE, 16/24/24, fp32, laid in the trained grid",
                    path="variance preserving (SNR shift 1), v",
                    time="-1 (clamped to 0) to 999",
                    images="none",
                    tested="T2V at tiny sizes",
                ),
                Support(
                    models="CogVideoX 5B I2V",
                    text="joint",
                    positions="the same, and learned ones for one size and text of 226 tokens",
                    path="variance preserving (SNR shift 1), v",
                    time="-1 (clamped to 0) to 999",
                    images="condition (16 channels)",
                    tested="I2V at a tiny size",
                ),
                Support(
                    models="CogVideoX 1.5 5B, 5B I2V",
                    text="joint",
                    positions="3D RoPE, 16/24/24, fp32",
                    path="variance preserving (SNR shift 1), v",
                    time="-1 (clamped to 0) to 999",
                    images="I2V: condition (16 channels), ofs",
                    tested="I2V at tiny sizes",
                ),
            ),
        ),
        BackboneSpec(
            name="sd3",
            summary="Stable Diffusion 3 and 3.5: storyboard frames",
            handles=(f"{_DIFFUSERS}.transformer_sd3.SD3Transformer2DModel",),
            adapter="lct_backbones.sd3:SD3Backbone",
            tested_with="diffusers 0.42",
            support=(
                Support(
                    models="Stable Diffusion 3, 3.5 Large, Medium",
                    text="joint",
                    positions="no RoPE: cropped sine-cosine grid",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="condition (channels of an editing model)",
                    tested="3, 3.5 Medium with a condition, at tiny sizes",
                ),
            ),
        ),
        BackboneSpec(
            name="flux",
            summary="FLUX.1: storyboard frames",
            handles=(f"{_DIFFUSERS}.transformer_flux.FluxTransformer2DModel",),
            adapter="lct_backbones.flux:FluxBackbone",
            tested_with="diffusers 0.42",
            support=(
                Support(
                    models="FLUX.1 dev, schnell",
                    text="joint",
                    positions="3D RoPE, 16/56/56, fp64",
                    path="rectified flow, velocity",
                    time="0 to 1",
                    images="none",
                    tested="schnell; guidance with a condition, at tiny sizes",
                ),
                Support(
                    models="FLUX.1 Fill, Canny, Depth",
                    text="joint",
                    positions="3D RoPE, 16/56/56, fp64",
                    path="rectified flow, velocity",
                    time="0 to 1",
                    images="condition (80 or 16 channels)",
                    tested="guidance and a condition at tiny sizes",
                ),
            ),
        ),
        BackboneSpec(
            name="flux2",
            summary="FLUX.2: storyboard frames",
            handles=(f"{_DIFFUSERS}.transformer_flux2.Flux2Transformer2DModel",),
            adapter="lct_backbones.flux2:Flux2Backbone",
            tested_with="diffusers 0.42",
            support=(
                Support(
                    models="FLUX.2 dev, klein",
                    text="joint",
                    positions="4D RoPE, 32/32/32/32, theta 2000, fp64; text on its own axis",
                    path="rectified flow, velocity",
                    time="0 to 1",
                    images="none; no reference images",
                    tested="dev, klein at tiny sizes",
                ),
            ),
        ),
        BackboneSpec(
            name="qwen_image",
            summary="Qwen-Image and its Edit: storyboard frames",
            handles=(f"{_DIFFUSERS}.transformer_qwenimage.QwenImageTransformer2DModel",),
            adapter="lct_backbones.qwen_image:QwenImageBackbone",
            tested_with="diffusers 0.42",
            refuses={
                f"{_DIFFUSERS}.transformer_qwenimage21.QwenImage21Transformer2DModel": (
                    "its text is causal: inside a shot, a token of text sees only what comes before it, while here all "
                    "tokens of a shot see one another"
                ),
            },
            support=(
                Support(
                    models="Qwen-Image",
                    text="joint",
                    positions="3D RoPE, 16/56/56, fp32, centred; text on the diagonal",
                    path="rectified flow, velocity",
                    time="0 to 1",
                    images="none",
                    tested="text to image at a tiny size",
                ),
                Support(
                    models="Qwen-Image-Edit, Edit-Plus",
                    text="joint",
                    positions="3D RoPE, 16/56/56, fp32, centred; text on the diagonal",
                    path="rectified flow, velocity",
                    time="0 to 1",
                    images="image_latents of the shot's size, as tokens of the shot",
                    tested="five images, modulated as the shot or as clean, at a tiny size",
                ),
            ),
        ),
        BackboneSpec(
            name="minimax_h3",
            summary="MiniMax-H3: its video path, without sound",
            handles=(f"{_DIFFUSERS}.transformer_minimax_h3.MiniMaxH3Transformer3DModel",),
            adapter="lct_backbones.minimax_h3:MiniMaxH3Backbone",
            tested_with="diffusers 0.42",
            support=(
                Support(
                    models="MiniMax-H3, text to video without sound",
                    text="joint",
                    positions="3D RoPE, 32/32/32 of 128, fp32; text on the time axis, frames 5/3 or 20/3 apart",
                    path="rectified flow, velocity toward the data",
                    time="1 to 0",
                    images="none",
                    tested="text to video at a tiny size",
                ),
            ),
        ),
        BackboneSpec(
            name="mochi",
            summary="Mochi 1: joint text, learned frequencies",
            handles=(f"{_DIFFUSERS}.transformer_mochi.MochiTransformer3DModel",),
            adapter="lct_backbones.mochi:MochiBackbone",
            tested_with="diffusers 0.42",
            refuses={
                f"{_DIFFUSERS}.transformer_allegro.AllegroTransformer3DModel": (
                    "Allegro predicts the noise, on a schedule that ends short of pure noise; scenes start from pure "
                    "noise, where a predicted noise says nothing of the data"
                ),
            },
            support=(
                Support(
                    models="Mochi 1 preview",
                    text="joint",
                    positions="learned RoPE per head, centred and normalised by area, fp32; text at the origin",
                    path="rectified flow, velocity toward the data",
                    time="1000 to 0",
                    images="none",
                    tested="text to video at a tiny size",
                ),
            ),
        ),
        BackboneSpec(
            name="cosmos",
            summary="Cosmos Predict 2 and 2.5, Transfer 2.5 without control: text, image and video to world",
            handles=(f"{_DIFFUSERS}.transformer_cosmos.CosmosTransformer3DModel",),
            adapter="lct_backbones.cosmos:CosmosBackbone",
            tested_with="diffusers 0.42",
            support=(
                Support(
                    models="Cosmos Predict 2 Text2Image 2B, 14B",
                    text="cross",
                    positions="3D RoPE, 44/42/42, NTK, fp32",
                    path="rectified flow, velocity",
                    time="0 to 1",
                    images="none",
                    tested="text to image at tiny sizes",
                ),
                Support(
                    models="Cosmos Predict 2 Video2World 2B, 14B; Predict 2.5 2B, 14B",
                    text="cross",
                    positions="3D RoPE, 44/42/42, NTK, fp32; by fps (Predict 2)",
                    path="rectified flow, velocity",
                    time="0 to 1",
                    images="clean first frames: mask (1 channel), timesteps of frames",
                    tested="image and video to world at tiny sizes",
                ),
                Support(
                    models="Cosmos Transfer 2.5 2B, without its control branch",
                    text="cross",
                    positions="3D RoPE, 44/42/42, NTK, fp32",
                    path="rectified flow, velocity",
                    time="0 to 1",
                    images="clean first frames: mask (1 channel), timesteps of frames; image tokens",
                    tested="image tokens at a tiny size",
                ),
            ),
        ),
        BackboneSpec(
            name="easyanimate",
            summary="EasyAnimate 5.1: joint text, text to video, inpainting, control",
            handles=(f"{_DIFFUSERS}.transformer_easyanimate.EasyAnimateTransformer3DModel",),
            adapter="lct_backbones.easyanimate:EasyAnimateBackbone",
            tested_with="diffusers 0.42",
            refuses={
                f"{_DIFFUSERS}.transformer_kandinsky.Kandinsky5Transformer3DModel": (
                    "it rounds turned queries and keys to bfloat16 in every dtype, so that a shot moved along the "
                    "diagonal differs from what it was, which it must not in float32"
                ),
                f"{_DIFFUSERS}.transformer_motif_video.MotifVideoTransformer3DModel": (
                    "in its decoder blocks a shot attends to the tokens of a video twice, with positions and without, "
                    "while here every token is there once"
                ),
            },
            support=(
                Support(
                    models="EasyAnimate 5.1 12B",
                    text="joint",
                    positions="3D RoPE, 16/24/24, fp32, laid in one grid; text at the origin",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="none",
                    tested="T2V, also with blocks of one stream and a second text, at tiny sizes",
                ),
                Support(
                    models="EasyAnimate 5.1 12B InP, Control",
                    text="joint",
                    positions="3D RoPE, 16/24/24, fp32, laid in one grid; text at the origin",
                    path="rectified flow, velocity",
                    time="0 to 1000",
                    images="condition (17 or 32 channels)",
                    tested="inpainting, control at tiny sizes",
                ),
            ),
        ),
    ]
