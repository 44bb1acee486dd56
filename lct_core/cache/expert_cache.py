"""The history of a scene for two experts, a cache for each."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lct_core.cache import Budget, CachedShot, KVCache, Stage, Storage, Tier
from lct_core.cache.kv_cache import together

if TYPE_CHECKING:
    from lct_core.experts import Experts
from lct_core.layout import Range


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
