"""What this distribution announces: every attention kernel that comes with the library beyond torch's own."""

from dataclasses import replace

from lct_core import KernelSpec, hookimpl
from lct_plugins import auto, cudnn_flex, flash, flash4, flex, magi, triton_attention, xformers


@hookimpl
def lct_kernels() -> list[KernelSpec]:
    """The kernels, with their places in the table that ``kernel="auto"`` follows."""
    specs = (
        flash.FLASH3,
        flash.FLASH2,
        flash.FLASH_TORCH,
        triton_attention.SPEC,
        xformers.SPEC,
        flex.SPEC,
        flex.FLASH,
        cudnn_flex.SPEC,
        flash4.SPEC,
        magi.SPEC,
    )
    return [replace(spec, rank=auto.rank(spec.name)) for spec in specs]
