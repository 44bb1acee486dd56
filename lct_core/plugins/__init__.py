"""What plugs in: backbones and attention kernels, announced through pluggy and looked up by model or by name."""

from lct_core.plugins.hooks import PluginError, hookimpl
from lct_core.plugins.registry import Registry, registry

__all__ = ["PluginError", "Registry", "hookimpl", "registry"]
