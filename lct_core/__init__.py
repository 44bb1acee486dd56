"""Long Context Tuning: the pieces that make a scene model of a single-shot video diffusion transformer.

``retrofit`` a model, or use the pieces one by one: a ``Layout`` says which token belongs to which shot; coordinates,
attention plans (``bidirectional``, ``context_causal``, ...) and packing all derive from it.

A name is imported when it is first used, so that importing the package takes no time. ``__init__.pyi`` lists them all.
"""

import importlib.util
import pathlib
import re
import sys
import types

_STUB = pathlib.Path(__file__).with_suffix(".pyi").read_text()
_MODULES = {
    name: module
    for module, names in re.findall(r"from (\S+) import (\([^)]*\)|.*)", _STUB)
    for name in re.findall(r"as (\w+)", names)
}
__all__ = sorted(_MODULES)


class _Package(types.ModuleType):
    """Importing a module of the package makes it an attribute; not where a public name is spelt alike."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
