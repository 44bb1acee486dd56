"""What generation, sessions and commands ask of a model, be it one scene model or experts that share out its levels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lct_core.backbone import Backbone
from lct_core.cache import Budget, ExpertCache, KVCache, Storage
from lct_core.coordinates import Scheme
from lct_core.engine.scene import Scene
from lct_core.engine.visibility import TextScope
from lct_core.patterns import Pattern

Cache = TypeVar("Cache", KVCache, ExpertCache)


class Denoiser(ABC, Generic[Cache]):
    """A :class:`lct_core.SceneModel`, or :class:`lct_core.Experts`.

    Attributes:
        adapter: What the model takes; of two experts, the adapter of the high one.
        scheme: Coordinates that the model was retrofitted with.
        text: Which prompts a shot cross-attends to.
        several: Whether several experts share out the noise levels: one runs in a step, all must write a shot's keys.
    """

    adapter: Backbone
    scheme: Scheme
    text: TextScope
    several: ClassVar[bool] = False
    _cache: type[Cache]

    @abstractmethod
    def __call__(
        self,
        shots: Scene | Sequence[Scene],
        t: Tensor,
        *,
        pattern: str | Pattern = "bidirectional",
        cache: Cache | None = None,
        denoised: Sequence[int] | None = None,
        text_free: bool = False,
    ) -> list[Any]:
        """Predict for all shots; ``denoised``: places of those being denoised, ``()`` in a pass that writes history."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What tells the model from others that would read its cache wrongly, as JSON can say it."""

    def new_cache(
        self, *, capacity: int = 0, storage: Storage = "native", budget: Budget | None = None, branch: str = ""
    ) -> Cache:
        """An empty history for this model; the arguments are those of :class:`lct_core.KVCache`."""
        return self._cache(capacity=capacity, storage=storage, budget=budget, branch=branch)

    def load_cache(
        self, folder: str | Path, *, device: str | torch.device = "cpu", budget: Budget | None = None
    ) -> Cache:
        """A history that this model wrote and that was saved, see :meth:`lct_core.KVCache.load`."""
        return self._cache.load(folder, self, device=device, budget=budget)
