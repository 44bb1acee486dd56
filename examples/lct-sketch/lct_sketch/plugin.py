"""What this distribution announces to lct-core."""

from lct_core import BackboneSpec, hookimpl


@hookimpl
def lct_backbones() -> list[BackboneSpec]:
    """One family."""
    return [
        BackboneSpec(
            name="sketch",
            summary="a made-up DiT: cross-attended text, channels paired half by half",
            handles=("lct_sketch.model.Sketch",),
            adapter="lct_sketch.adapter:SketchBackbone",
            build="lct_sketch.model:Sketch",
        )
    ]
