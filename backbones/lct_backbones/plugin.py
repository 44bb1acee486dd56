"""What this distribution announces: every backbone family that comes with the library."""

from lct_core import BackboneSpec, hookimpl


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
        ),
    ]
