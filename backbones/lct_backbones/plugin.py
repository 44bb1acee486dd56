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
        ),
        BackboneSpec(
            name="skyreels_v2",
            summary="SkyReels-V2: text and image to video, diffusion forcing",
            handles=(f"{_DIFFUSERS}.transformer_skyreels_v2.SkyReelsV2Transformer3DModel",),
            adapter="lct_backbones.skyreels_v2:SkyReelsV2Backbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="hunyuan_video",
            summary="HunyuanVideo: dual- and single-stream blocks, text and image to video",
            handles=(f"{_DIFFUSERS}.transformer_hunyuan_video.HunyuanVideoTransformer3DModel",),
            adapter="lct_backbones.hunyuan_video:HunyuanVideoBackbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="hunyuan_video15",
            summary="HunyuanVideo-1.5: dual-stream blocks, two text encoders and an image",
            handles=(f"{_DIFFUSERS}.transformer_hunyuan_video15.HunyuanVideo15Transformer3DModel",),
            adapter="lct_backbones.hunyuan_video15:HunyuanVideo15Backbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="ltx",
            summary="LTX-Video: fractional coordinates, timesteps of tokens",
            handles=(f"{_DIFFUSERS}.transformer_ltx.LTXVideoTransformer3DModel",),
            adapter="lct_backbones.ltx:LTXBackbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="ltx2",
            summary="LTX-2: its video stream",
            handles=(f"{_DIFFUSERS}.transformer_ltx2.LTX2VideoTransformer3DModel",),
            adapter="lct_backbones.ltx2:LTX2Backbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="cogvideox",
            summary="CogVideoX 2B, 5B and 1.5: joint text, v-prediction",
            handles=(f"{_DIFFUSERS}.cogvideox_transformer_3d.CogVideoXTransformer3DModel",),
            adapter="lct_backbones.cogvideox:CogVideoXBackbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="sd3",
            summary="Stable Diffusion 3 and 3.5: storyboard frames",
            handles=(f"{_DIFFUSERS}.transformer_sd3.SD3Transformer2DModel",),
            adapter="lct_backbones.sd3:SD3Backbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="flux",
            summary="FLUX.1: storyboard frames",
            handles=(f"{_DIFFUSERS}.transformer_flux.FluxTransformer2DModel",),
            adapter="lct_backbones.flux:FluxBackbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="flux2",
            summary="FLUX.2: storyboard frames",
            handles=(f"{_DIFFUSERS}.transformer_flux2.Flux2Transformer2DModel",),
            adapter="lct_backbones.flux2:Flux2Backbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="qwen_image",
            summary="Qwen-Image: storyboard frames",
            handles=(f"{_DIFFUSERS}.transformer_qwenimage.QwenImageTransformer2DModel",),
            adapter="lct_backbones.qwen_image:QwenImageBackbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="minimax_h3",
            summary="MiniMax-H3: its video stream",
            handles=(f"{_DIFFUSERS}.transformer_minimax_h3.MiniMaxH3Transformer3DModel",),
            adapter="lct_backbones.minimax_h3:MiniMaxH3Backbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="mochi",
            summary="Mochi: learned frequencies",
            handles=(f"{_DIFFUSERS}.transformer_mochi.MochiTransformer3DModel",),
            adapter="lct_backbones.mochi:MochiBackbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="cosmos",
            summary="Cosmos Predict 2 and 2.5",
            handles=(f"{_DIFFUSERS}.transformer_cosmos.CosmosTransformer3DModel",),
            adapter="lct_backbones.cosmos:CosmosBackbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="kandinsky5",
            summary="Kandinsky 5",
            handles=(f"{_DIFFUSERS}.transformer_kandinsky.Kandinsky5Transformer3DModel",),
            adapter="lct_backbones.kandinsky5:Kandinsky5Backbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="easyanimate",
            summary="EasyAnimate",
            handles=(f"{_DIFFUSERS}.transformer_easyanimate.EasyAnimateTransformer3DModel",),
            adapter="lct_backbones.easyanimate:EasyAnimateBackbone",
            tested_with="diffusers 0.42",
        ),
        BackboneSpec(
            name="allegro",
            summary="Allegro",
            handles=(f"{_DIFFUSERS}.transformer_allegro.AllegroTransformer3DModel",),
            adapter="lct_backbones.allegro:AllegroBackbone",
            tested_with="diffusers 0.42",
        ),
    ]
