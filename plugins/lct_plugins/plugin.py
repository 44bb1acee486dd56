"""What this distribution announces: every attention kernel that comes with the library beyond torch's own."""

from lct_core import KernelSpec, hookimpl
from lct_plugins import flex


@hookimpl
def lct_kernels() -> list[KernelSpec]:
    """The kernels."""
    return [flex.SPEC]
