"""What a plugin can announce: hooks, and the specs of backbones and kernels that they return.

A plugin implements a hook by a function of its name, marked with :data:`hookimpl`. Specs are light: a model's or a
kernel's library is imported when it is used, not when it is announced.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol

import pluggy
import torch
from torch import Tensor

from lct_core.plan import AttentionPlan

hookspec = pluggy.HookspecMarker("lct")
hookimpl = pluggy.HookimplMarker("lct")


class PluginError(Exception):
    """A plugin is broken, misspelt or clashes with another; the message says which and lists what there is."""


class Kernel(Protocol):
    """An attention kernel: shapes as in :func:`lct_core.attend`, which has validated everything before."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, /) -> Tensor:
        """Attend."""
        ...


class KernelRequest(NamedTuple):
    """One kind of attention call: what a kernel must serve."""

    plan: AttentionPlan
    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    grad: bool

    @property
    def hardware(self) -> str:
        """What the kernel is to run on: ``"sm_90"`` and the like on CUDA, else the type of the device."""
        return _hardware(self.device)


@cache
def _hardware(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.cuda is None:
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """What a plugin announces about an attention kernel.

    Args:
        name: Unique among all plugins.
        summary: One line for ``lct kernels``.
        load: Imports and returns the kernel, ``kernel(q, k, v, plan, scale) -> out``, in the shapes of
            :func:`lct_core.attend`.
        refusals: Every reason why the kernel cannot serve a request; empty where it can. Must be cheap.
        rank: Place in the order that ``kernel="auto"`` follows, lowest first; None where it must be asked for by name.
            A function of the request where the place depends on hardware, pattern or shape. Torch's own SDPA, which
            serves everything, has 100.
    """

    name: str
    summary: str
    load: Callable[[], Kernel]
    refusals: Callable[[KernelRequest], list[str]]
    rank: int | Callable[[KernelRequest], int | None] | None = None

    def place(self, request: KernelRequest) -> int | None:
        """The rank for a request."""
        return self.rank(request) if callable(self.rank) else self.rank


class Support(NamedTuple):
    """One row of the support table: some models that are alike in all of it, in words.

    Args:
        models: Their names.
        text: Text path: ``"joint"``, or ``"cross"`` where text is cross-attended.
        positions: How tokens know their place.
        path: Path from data to noise, and what the model predicts.
        time: The model's own timesteps at noise levels 0 and 1.
        images: Image conditions and other extras that matter.
        tested: What runs in the tests.
    """

    models: str
    text: str
    positions: str
    path: str
    time: str
    images: str
    tested: str


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """What a plugin announces about a backbone family: light data, no model library is imported for it.

    Args:
        name: Unique among all plugins.
        summary: One line for ``lct backbones``.
        handles: Full names of the model classes that the adapter takes, ``"package.module.Class"``.
        adapter: Where the :class:`lct_core.Backbone` is, ``"package.module:Class"``.
        build: Where a function is that makes a model from keyword arguments, ``"package.module:function"``.
        config: Arguments that make the family's usual model, where those that the class has by default do not.
        tested_with: Versions of the model's library that the adapter was tested with, for people.
        refuses: Classes that look servable and are not, by full name, with the reason.
        support: What the family's models are like: the rows of the support table.
    """

    name: str
    summary: str
    handles: tuple[str, ...]
    adapter: str
    build: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    tested_with: str = ""
    refuses: Mapping[str, str] = field(default_factory=dict)
    support: tuple[Support, ...] = ()


class Hooks:
    """What a plugin can announce."""

    @hookspec
    def lct_backbones(self) -> list[BackboneSpec]:  # type: ignore[empty-body]
        """Backbone families that the plugin adapts."""

    @hookspec
    def lct_kernels(self) -> list[KernelSpec]:  # type: ignore[empty-body]
        """Attention kernels that the plugin brings."""
