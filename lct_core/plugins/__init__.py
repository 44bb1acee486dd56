"""What plugs in: backbones and attention kernels, announced through pluggy and looked up by model or by name."""

from lct_core.plugins.hooks import BackboneSpec, Kernel, KernelRequest, KernelSpec, PluginError, Support, hookimpl
from lct_core.plugins.registry import Registry, registry

__all__ = [
    "BackboneSpec",
    "Kernel",
    "KernelRequest",
    "KernelSpec",
    "PluginError",
    "Registry",
    "Support",
    "hookimpl",
    "registry",
]
