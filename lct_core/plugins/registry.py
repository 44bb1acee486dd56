"""The registry: backbones and kernels, announced by plugins through pluggy and looked up by model or by name.

A plugin is a module (or any object) with functions marked ``@lct_core.hookimpl``, named in a distribution's entry-point
group ``lct``. Hooks announce; they never choose.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import Any

import pluggy
import torch
from torch import nn

from lct_core.backbone import Backbone
from lct_core.plugins import torch_kernels
from lct_core.plugins.hooks import BackboneSpec, Hooks, Kernel, KernelRequest, KernelSpec, PluginError

_MOST_RESOLVED, _MOST_SEGMENTS = 1024, 2**15  # plans whose kernels are remembered, and segments of theirs: some 20 MB


class Registry:
    """Every backbone and kernel that there is. :func:`registry` has the installed ones.

    Args:
        plugins: Entry points to load, besides the kernels that need nothing but torch.

    Raises:
        PluginError: for a plugin that cannot be loaded, announces under a misspelt name, or takes a name twice.
    """

    def __init__(self, plugins: Iterable[EntryPoint] = ()) -> None:
        self._manager = pluggy.PluginManager("lct")
        self._manager.add_hookspecs(Hooks)
        self._resolved: dict[tuple[str, KernelRequest, bool], Kernel] = {}
        self._segments = 0
        self.register(torch_kernels, name="lct_core")
        for entry in plugins:
            try:
                plugin = entry.load()
            except Exception as error:
                raise PluginError(
                    f"plugin {entry.name!r} ({entry.value}{_origin(entry)}) cannot be loaded: "
                    f"{type(error).__name__}: {error}; mend or uninstall it. Loaded: {self._names()}"
                ) from error
            self.register(plugin, name=entry.name, origin=_origin(entry))

    def register(self, plugin: Any, *, name: str, origin: str = "") -> None:
        """Add a plugin: a module or object with hook implementations.

        Raises:
            PluginError: as for the class; the registry is then unchanged.
        """
        if self._manager.has_plugin(name):
            raise PluginError(f"plugin {name!r}{origin} is registered twice; loaded: {self._names()}")
        try:
            self._manager.register(plugin, name=name)
            self._manager.check_pending()
            self._collect()
        except PluginError:
            self._manager.unregister(name=name)
            raise
        except Exception as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            hooks = [hook for hook in vars(Hooks) if hook.startswith("lct_")]
            raise PluginError(
                f"plugin {name!r}{origin}: {type(error).__name__}: {error}; the hooks there are: {hooks}"
            ) from error

    @property
    def backbones(self) -> dict[str, BackboneSpec]:
        """The backbones by name."""
        return dict(sorted(self._backbones.items()))

    @property
    def kernels(self) -> dict[str, KernelSpec]:
        """The kernels by name."""
        return dict(sorted(self._kernels.items()))

    def ranks(self, request: KernelRequest) -> dict[str, int | None]:
        """Every kernel's rank for a request, in the order that ``kernel="auto"`` follows.

        Those that must be asked for by name, of rank None, come last.

        Raises:
            PluginError: where a kernel's own answer crashes.
        """
        ranks = {
            name: _of("kernel", name, partial(spec.place, request), self.kernels) for name, spec in self.kernels.items()
        }
        return dict(sorted(ranks.items(), key=lambda item: (item[1] is None, item[1] or 0)))

    def kernel(self, name: str, request: KernelRequest) -> Kernel:
        """The kernel to run for a request; looked up once for each kind of request.

        Raises:
            ValueError: for an unknown name, or where the kernel refuses; ``"auto"`` lists every candidate's reasons.
            PluginError: where the kernel's own code crashes.
        """
        key = name, request, torch.are_deterministic_algorithms_enabled()  # which some kernels refuse
        try:
            return self._resolved[key]
        except KeyError:
            spec = self._choose(name, request)
            kernel = _of("kernel", spec.name, spec.load, self.kernels)
            self._segments += len(request.plan.segments)
            if len(self._resolved) >= _MOST_RESOLVED or self._segments > _MOST_SEGMENTS:
                # routed plans, and those of a run with other scenes in every row, have no end
                self._resolved.clear()
                self._segments = len(request.plan.segments)
            self._resolved[key] = kernel
            return kernel

    def check_kernel(self, name: str) -> str:
        """The name, where it is "auto" or a kernel's; else ``ValueError``."""
        if name != "auto" and name not in self._kernels:
            raise ValueError(f'kernel: got {name!r}, expected "auto" or one of {list(self.kernels)}')
        return name

    def refusals(self, name: str, request: KernelRequest) -> list[str]:
        """Every reason why a kernel cannot serve a request; empty where it can.

        Raises:
            PluginError: where the kernel's own answer crashes.
        """
        return _of("kernel", name, partial(self._kernels[name].refusals, request), self.kernels)

    def _choose(self, name: str, request: KernelRequest) -> KernelSpec:
        self.check_kernel(name)
        candidates, reasons = [name], []
        if name == "auto":
            candidates = [kernel for kernel, rank in self.ranks(request).items() if rank is not None]
        for candidate in candidates:
            refusals = self.refusals(candidate, request)
            if not refusals:
                return self._kernels[candidate]
            reasons += [f"  {candidate}: {'; '.join(refusals)}"]
        raise ValueError(
            f"kernel: no kernel for {request.dtype} on {request.device}, {request.heads}:{request.kv_heads} heads of "
            f"{request.head_dim}{', with gradients' if request.grad else ''}; {name!r} was asked for, and refuses:\n"
            + "\n".join(reasons)
        )

    def adapter(self, model: nn.Module, name: str | None = None) -> Backbone:
        """The adapter for a model, found by its class, or by the backbone's name.

        Raises:
            ValueError: where no backbone, or more than one, handles the model, or the name is unknown.
            PluginError: where the adapter cannot be imported.
        """
        if name is not None:
            return self._resolve(name, self._backbone(name).adapter)(model)
        for cls in type(model).__mro__:  # the most derived class that somebody handles decides
            full_name = f"{cls.__module__}.{cls.__qualname__}"
            found = [spec for spec in self._backbones.values() if full_name in spec.handles]
            if len(found) > 1:
                raise ValueError(
                    f"model: {full_name} is handled by {[s.name for s in found]}; "
                    "choose one with retrofit(model, backbone=NAME)"
                )
            if found:
                return self._resolve(found[0].name, found[0].adapter)(model)
            for spec in self._backbones.values():
                if full_name in spec.refuses:
                    raise ValueError(f"model: {full_name} cannot be served: {spec.refuses[full_name]}")
        handled = "\n".join(f"  {spec.name}: {', '.join(spec.handles)}" for spec in self.backbones.values())
        raise ValueError(
            f"model: no backbone handles {type(model).__module__}.{type(model).__qualname__}; there are:\n{handled}\n"
            "write an adapter (a lct_core.Backbone) and pass it: retrofit(model, backbone=MyAdapter(model))"
        )

    def build(self, name: str, **config: Any) -> nn.Module:
        """Make a model of a backbone family from its configuration.

        Raises:
            ValueError: for an unknown name, or a family whose models come from elsewhere.
        """
        spec = self._backbone(name)
        if spec.build is None:
            raise ValueError(
                f"name: backbone {name!r} adapts models but cannot make one; load one with its own library"
            )
        return self._resolve(name, spec.build)(**config)

    def _resolve(self, name: str, where: str) -> Callable[..., Any]:
        return _of("backbone", name, partial(resolve_name, where), self.backbones)

    def _backbone(self, name: str) -> BackboneSpec:
        if name not in self._backbones:
            raise ValueError(f"backbone: got {name!r}, expected one of {list(self.backbones)}")
        return self._backbones[name]

    def _collect(self) -> None:
        """Read what all plugins announce; nothing changes where two of them clash."""
        backbones = self._by_name("backbone", self._manager.hook.lct_backbones.get_hookimpls(), BackboneSpec)
        kernels = self._by_name("kernel", self._manager.hook.lct_kernels.get_hookimpls(), KernelSpec)
        self._backbones, self._kernels = backbones, kernels
        self._resolved.clear()
        self._segments = 0

    def _by_name(self, kind: str, implementations: list[Any], spec_type: type) -> dict[str, Any]:
        announced = [(spec, impl.plugin_name) for impl in implementations for spec in impl.function()]
        for spec, plugin in announced:
            if not isinstance(spec, spec_type):
                raise PluginError(f"plugin {plugin!r} announces {spec!r} as a {kind}, expected a {spec_type.__name__}")
        for name, times in Counter(spec.name for spec, _ in announced).items():
            if times > 1 or name == "auto":
                owners = sorted(plugin for spec, plugin in announced if spec.name == name)
                raise PluginError(
                    f"{kind} {name!r} is announced by plugins {owners}, but a name must be unique "
                    f'and not "auto"; there are: {sorted({spec.name for spec, _ in announced})}'
                )
        return {spec.name: spec for spec, _ in announced}

    def _names(self) -> list[str]:
        return sorted(name for name, _ in self._manager.list_name_plugin())


@cache
def registry() -> Registry:
    """The registry of the installed plugins, loaded on first use."""
    return Registry(entry_points(group="lct"))


def _of(kind: str, name: str, call: Callable[[], Any], known: Iterable[str]) -> Any:
    """What a plugin's own code returns; where it crashes, whose it is."""
    try:
        return call()
    except Exception as error:
        raise PluginError(
            f"{kind} {name!r} is broken: {type(error).__name__}: {error}; mend or uninstall its plugin. "
            f"There are: {sorted(known)}"
        ) from error


def _origin(entry: EntryPoint) -> str:
    return f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
