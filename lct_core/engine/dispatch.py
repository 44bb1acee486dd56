"""The forward of a retrofitted module: its own, or the engine's share of the work."""

from abc import ABC, abstractmethod
from inspect import Signature, signature, unwrap
from types import MethodType
from typing import Any

from torch import nn


class Work(ABC):
    """What the engine does inside a module's forward, on that module. Opaque to hooks on purpose."""

    @abstractmethod
    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Do it."""


class Dispatch:
    """The forward of a retrofitted module: its own, unless it is handed a part of the engine's work.

    Every module is still entered through its ``__call__``, so that hooks (sharding, offload) fire, and runs its own
    weights, also after a deep copy or a pickle round trip.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __signature__(self) -> Signature:
        """The module's own, for libraries that look up what a model takes."""
        return signature(MethodType(type(self.module).forward, self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine's work on the module, or the module's own forward."""
        if args and isinstance(args[0], Work):
            return args[0](self.module, *args[1:])
        return type(self.module).forward(self.module, *args, **kwargs)


def install(module: nn.Module) -> None:
    """Let a module's forward take the engine's work too.

    Raises:
        ValueError: where its forward was replaced on the instance.
    """
    own = module.__dict__.get("forward")
    if own is None:
        module.forward = Dispatch(module)
    elif not isinstance(unwrap(own), Dispatch):
        raise ValueError(
            f"model: this {type(module).__name__}'s forward was replaced on the instance, by an offloading "
            "hook for example, and would be lost; retrofit first, add such hooks afterwards"
        )
