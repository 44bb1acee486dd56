"""Two experts that share out the noise levels, each a scene model with a cache of its own (Wan 2.2, A14B)."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lct_core.backbone import Backbone
from lct_core.cache import Budget, CachedShot, KVCache, Stage, Storage, Tier
from lct_core.cache.kv_cache import together
from lct_core.layout import Range
from lct_core.masks import Pattern
from lct_core.scene_model import Scene, SceneModel, as_scenes, noise_levels


class ExpertCache:
    """The history of a scene, once for each expert: their keys and values are never mixed.

    What :class:`KVCache` offers for a whole history is done to both; an error leaves both as they were. The bytes of a
    budget are halved between them.
    """

    def __init__(
        self, *, capacity: int = 0, storage: Storage = "native", budget: Budget | None = None, branch: str = ""
    ) -> None:
        half = _halved(budget)
        self.high = KVCache(capacity=capacity, storage=storage, budget=half, branch=branch)
        self.low = KVCache(capacity=capacity, storage=storage, budget=half, branch=branch)
        self.written_by_both = False

    @property
    def shots(self) -> tuple[CachedShot, ...]:
        """The selected history, in the order in which it is seen."""
        return self.high.shots

    @property
    def held(self) -> tuple[CachedShot, ...]:
        """Every shot that the cache holds, the selected history first."""
        return self.high.held

    @property
    def ids(self) -> tuple[Hashable, ...]:
        """The ids of every shot that the cache holds."""
        return self.high.ids

    @property
    def branch(self) -> str:
        """The guidance branch that it is the history of."""
        return self.high.branch

    @property
    def end(self) -> int:
        """Where on the diagonal the next shot starts."""
        return self.high.end

    @property
    def staged(self) -> Stage | None:
        """What :meth:`append` would take: what both experts wrote in the last call, or :meth:`hold` keeps."""
        return self.high.staged if self.low.staged else None

    @property
    def nbytes(self) -> int:
        """Bytes of memory held for both experts."""
        return self.high.nbytes + self.low.nbytes

    @property
    def peak_nbytes(self) -> int:
        """Most bytes that both have held on the device, each counted at its own time."""
        return self.high.peak_nbytes + self.low.peak_nbytes

    @property
    def bytes_by_tier(self) -> dict[Tier, int]:
        """Bytes on the device, in host memory and in files, for both experts."""
        low = self.low.bytes_by_tier
        return {tier: nbytes + low[tier] for tier, nbytes in self.high.bytes_by_tier.items()}

    @property
    def errors(self) -> dict[Hashable, tuple[float, float]]:
        """What storage in 8 bits costs each shot's keys and its values, the larger of both experts' errors."""
        low = self.low.errors
        return {i: (max(k, low[i][0]), max(v, low[i][1])) for i, (k, v) in self.high.errors.items()}

    def spans(self) -> dict[Hashable, Range]:
        """Where the selected history's tokens lie, see :meth:`KVCache.spans`."""
        return self.high.spans()

    def dependents(self, *ids: Hashable) -> tuple[Hashable, ...]:
        """The shots that hold something of any of these, see :meth:`KVCache.dependents`."""
        return self.high.dependents(*ids)

    def append(self, *ids: Hashable, prompts: Sequence[str] = ()) -> None:
        """Keep the shots of the last call as history, under these ids.

        Raises:
            ValueError: where only one expert has written them since, and as :meth:`KVCache.append` does.
        """
        if self.high._own.hold is None:
            self._check_written("append")
        together(*(cache._appending(ids, prompts) for cache in (self.high, self.low)))
        self.written_by_both = False

    def hold(self) -> None:
        """Keep a copy of what both experts wrote in the last call, see :meth:`KVCache.hold`.

        Raises:
            ValueError: where only one expert has written, and as :meth:`KVCache.hold` does.
        """
        self._check_written("hold")
        together(*(cache._holding() for cache in (self.high, self.low)))

    def select(self, ids: Iterable[Hashable], *, reposition: bool = True) -> None:
        """Choose the shots that later calls see, see :meth:`KVCache.select`."""
        chosen = list(ids)
        together(*(cache._selecting(chosen, reposition) for cache in (self.high, self.low)))

    def reorder(self, ids: Iterable[Hashable], *, reposition: bool = True) -> None:
        """Put the selected history in another order, see :meth:`KVCache.reorder`."""
        chosen = list(ids)
        together(*(cache._reordering(chosen, reposition) for cache in (self.high, self.low)))

    def reposition(self, origins: Sequence[int] | None = None) -> None:
        """Move the history's shots along the diagonal, see :meth:`KVCache.reposition`."""
        together(*(cache._repositioning(origins) for cache in (self.high, self.low)))

    def drop(self, *ids: Hashable) -> None:
        """Forget shots, see :meth:`KVCache.drop`."""
        together(*(cache._dropping(ids) for cache in (self.high, self.low)))

    def pin(self, *ids: Hashable) -> None:
        """Have shots kept near the model before others, see :meth:`KVCache.pin`."""
        together(*(cache._pinning(ids, True) for cache in (self.high, self.low)))

    def unpin(self, *ids: Hashable) -> None:
        """Have shots kept near the model no longer than others, see :meth:`KVCache.unpin`."""
        together(*(cache._pinning(ids, False) for cache in (self.high, self.low)))

    def move(self, *ids: Hashable, tier: Tier) -> None:
        """Say where shots are to be, see :meth:`KVCache.move`."""
        together(*(cache._moving(ids, tier) for cache in (self.high, self.low)))

    def fork(self) -> "ExpertCache":
        """A cache of the same shots that goes its own way, see :meth:`KVCache.fork`."""
        twin = ExpertCache()
        twin.high, twin.low = self.high.fork(), self.low.fork()
        return twin

    def save(self, folder: str | Path, model: "Experts") -> None:
        """Write both histories to a folder, see :meth:`KVCache.save`."""
        from lct_core.cache.saved import save

        save({"high": self.high, "low": self.low}, Path(folder), {"high": model.high, "low": model.low})

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: "Experts",
        *,
        device: str | torch.device = "cpu",
        budget: Budget | None = None,
    ) -> "ExpertCache":
        """The cache that was saved to a folder, see :meth:`KVCache.load`."""
        from lct_core.cache.saved import load

        models = {"high": model.high, "low": model.low}
        found = load(Path(folder), models, device=torch.device(device), budget=_halved(budget))
        cache = cls()
        cache.high, cache.low = found["high"], found["low"]
        return cache

    def _check_written(self, what: str) -> None:
        if not self.written_by_both and (self.high.staged or self.low.staged):
            raise ValueError(
                f"{what}: one expert alone has written these shots last; both need them: pass them once more, at their "
                "level as history, with denoised=()"
            )


def _halved(budget: Budget | None) -> Budget | None:
    """A budget for each expert."""
    if budget is None:
        return None
    device, host = (nbytes if nbytes is None else nbytes // 2 for nbytes in (budget.device, budget.host))
    return replace(budget, device=device, host=host)


class Experts:
    """Two scene models, one for high noise levels and one for low ones; used like a :class:`SceneModel`.

    The shots that are being denoised decide which of them runs, not conditions or a history at a low level beside them.

    Args:
        high: The expert of levels from ``boundary`` up (diffusers: ``pipeline.transformer``).
        low: The expert of levels below it (diffusers: ``pipeline.transformer_2``).
        boundary: The level where they meet (diffusers: ``boundary_ratio``; upstream, Wan 2.2: 0.875 for text to video,
            0.9 for image to video).

    Raises:
        ValueError: for experts that do not take the same inputs, and a boundary outside (0, 1).
    """

    def __init__(self, high: SceneModel, low: SceneModel, *, boundary: float) -> None:
        if not 0 < boundary < 1:
            raise ValueError(f"boundary: got {boundary!r}, expected a noise level between 0 and 1, such as 0.875")
        if high.adapter.traits != low.adapter.traits or (high.scheme, high.text) != (low.scheme, low.text):
            raise ValueError(
                "high, low: their traits, scheme or text differ, expected two experts of one model, retrofitted alike"
            )
        self.high, self.low, self.boundary = high, low, boundary

    @property
    def adapter(self) -> Backbone:
        """An adapter that says what both take."""
        return self.high.adapter

    def __call__(
        self,
        shots: Scene | Sequence[Scene],
        t: Float[Tensor, "*batch num_shots"],
        *,
        pattern: str | Pattern = "bidirectional",
        cache: ExpertCache | None = None,
        denoised: Sequence[int] | None = None,
        text_free: bool = False,
    ) -> list[Any]:
        """Predict for all shots at once, as :class:`SceneModel` does, by the expert of the denoised shots' level.

        Args:
            shots: As :class:`SceneModel` takes them.
            t: Noise level of every shot.
            pattern: As :class:`SceneModel` takes it.
            cache: The history; the expert that runs sees and writes its own.
            denoised: The shots that are being denoised, counted from 0 in row order (default: the noisiest). None of
                them, ``()``, is for a pass that writes history: both experts run, each for its own cache.
            text_free: As :class:`SceneModel` takes it.

        Raises:
            ValueError: where the denoised shots lie on both sides of the boundary, and as :class:`SceneModel` does.
        """
        if cache is not None and not isinstance(cache, ExpertCache):
            raise ValueError(f"cache: got a {type(cache).__name__}, expected an ExpertCache: one history per expert")
        high, low = (self.high, None if cache is None else cache.high), (self.low, None if cache is None else cache.low)
        if denoised is not None and not len(denoised):
            chosen = [high, low]
        else:
            chosen = [high if self._is_high(shots, t, denoised) else low]
        if cache is not None:
            cache.written_by_both = False
        *_, outputs = [expert(shots, t, pattern=pattern, cache=own, text_free=text_free) for expert, own in chosen]
        if cache is not None:
            cache.written_by_both = len(chosen) == 2
        return outputs

    def _is_high(self, shots: Scene | Sequence[Scene], t: Tensor, denoised: Sequence[int] | None) -> bool:
        scenes, _ = as_scenes(shots)
        inputs = [shot for scene in scenes for shot in scene]
        batch = len(inputs[0].text) if isinstance(inputs[0].text, Tensor) else 1  # else the expert says what is wrong
        levels = noise_levels(t, [shot.role for shot in inputs], batch)
        shots_alone = [i for i, shot in enumerate(inputs) if shot.role == "shot"]
        if denoised is None:
            deciding = levels.amax(dim=1)
        elif set(denoised) <= set(shots_alone):
            deciding = levels[:, list(denoised)]
        else:
            raise ValueError(f"denoised: got {list(denoised)}, expected some of {shots_alone}: shots, counted from 0")
        high = deciding >= self.boundary
        if bool(high.any()) != bool(high.all()):
            raise ValueError(
                f"t: the denoised shots are at {deciding.flatten().tolist()}, on both sides of the boundary "
                f"{self.boundary}, expected one side: one expert runs at a time; call once for each side"
            )
        return bool(high.any())


def new_cache(
    model: SceneModel | Experts,
    *,
    capacity: int = 0,
    storage: Storage = "native",
    budget: Budget | None = None,
    branch: str = "",
) -> Any:
    """An empty history for a model: a :class:`KVCache`, or one for each expert. The arguments are those of KVCache."""
    kind = ExpertCache if isinstance(model, Experts) else KVCache
    return kind(capacity=capacity, storage=storage, budget=budget, branch=branch)
