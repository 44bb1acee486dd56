"""What a history offers, be it one model's or two experts': each verb is done to every part of it, or to none."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, Protocol, Self

import torch

from lct_core.cache import changes
from lct_core.cache.budget import Budget, Storage, divided
from lct_core.cache.holdings import Holdings
from lct_core.cache.saved import read_index, restored, save
from lct_core.cache.shots import CachedShot, StagedShots, Tier
from lct_core.fingerprint import check_fingerprint
from lct_core.layout import Range, consecutive
from lct_core.lineage import dependents

P = ParamSpec("P")


class Fingerprinted(Protocol):
    """A model, as far as a cache knows it."""

    def fingerprint(self) -> Mapping[str, Any]:
        """What tells the model from others that would read its cache wrongly, as JSON can say it."""
        ...


class ShotCache:
    """The verbs and properties of :class:`KVCache` and :class:`ExpertCache`, whose docstrings explain the arguments."""

    _names: ClassVar[tuple[str, ...]]  # of its parts, in a saved cache

    def __init__(
        self, *, capacity: int = 0, storage: Storage = "native", budget: Budget | None = None, branch: str = ""
    ) -> None:
        share = self._share(budget)
        self._holdings = tuple(Holdings(capacity, storage, share, branch) for _ in self._names)

    @classmethod
    def _share(cls, budget: Budget | None) -> Budget:
        """What each part has of a budget."""
        if not isinstance(budget, Budget | None):
            raise ValueError(f"budget: got {budget!r}, expected Budget(device=..., host=..., folder=...) or None")
        return divided(budget or Budget(), len(cls._names))

    @classmethod
    def _of(cls, holdings: Iterable[Holdings]) -> Self:
        """The cache that has these holdings."""
        cache = cls.__new__(cls)
        cache._holdings = tuple(holdings)
        return cache

    @classmethod
    def _fingerprints(cls, model: Fingerprinted) -> dict[str, Mapping[str, Any]]:
        """The fingerprint of each part's model, by the part's name."""
        whole = model.fingerprint()
        parts = whole if "high" in whole else {"history": whole}
        if not set(cls._names) <= set(parts):
            raise ValueError(
                f"model: got {type(model).__name__}, which has no {cls.__name__}, expected the kind of model that "
                "wrote it: Experts have an ExpertCache, a SceneModel has a KVCache"
            )
        return {name: parts[name] for name in cls._names}

    # What it knows. All parts hold the same shots; they differ in bytes and in values.

    @property
    def shots(self) -> tuple[CachedShot, ...]:
        """The selected history, in the order in which it is seen."""
        return self._holdings[0].shots

    @property
    def held(self) -> tuple[CachedShot, ...]:
        """Every shot that the cache holds: the selected history, then the others as they were appended."""
        return self._holdings[0].held

    @property
    def ids(self) -> tuple[Hashable, ...]:
        """The ids of every shot that the cache holds, the selected history first."""
        return self._holdings[0].ids

    @property
    def branch(self) -> str:
        """The guidance branch that it is the history of."""
        return self._holdings[0].branch

    @property
    def end(self) -> int:
        """Where on the diagonal the next shot starts."""
        return max((entry.origin + entry.extent for entry in self.shots), default=0)

    @property
    def staged(self) -> StagedShots | None:
        """The shots that :meth:`append` would keep: those of :meth:`hold`, else of the last call."""
        return self._holdings[0].staged if all(part.staged for part in self._holdings) else None

    @property
    def errors(self) -> dict[Hashable, tuple[float, float]]:
        """The error of storage in 8 bits, of each shot's keys and of its values: the largest at any site, relative to
        the largest magnitude there."""
        found: dict[Hashable, tuple[float, float]] = {}
        for part in self._holdings:
            for i, kept in part.kept.items():
                if kept.errors:
                    k, v = found.get(i, kept.errors)
                    found[i] = max(k, kept.errors[0]), max(v, kept.errors[1])
        return found

    @property
    def bytes_by_tier(self) -> dict[Tier, int]:
        """Bytes on the device, spare room, working rows and staged shots included; in host memory; in files."""
        first, *others = (part.bytes_by_tier for part in self._holdings)
        return {tier: nbytes + sum(other[tier] for other in others) for tier, nbytes in first.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, spare room included, and what forks share counted in each."""
        tiers = self.bytes_by_tier
        return tiers["device"] + tiers["host"]

    @property
    def peak_nbytes(self) -> int:
        """Most bytes that it has held on the device at once, temporary copies included; of two experts, both peaks.

        Leaves out what arithmetic needs for a moment: a rotation, or the conversion to 8 bits, of some thousand tokens
        at a time. With b bytes for a token at all n equal sites, and no shot moved:

        - while rows only grow: ``b * capacity``, or where that is too little, ``b * (history + longest call)``, and the
          row of one site more;
        - where another history is selected: what was, and what is then, whichever is more, and again one site's row;
        - where the history is brought: one working row, or two on a GPU, of ``b / n * (history + longest call)``; ``b``
          for every token of the longest call; and the shots that are kept on the device.

        Tensors on ``meta`` give the numbers of a run without its memory.
        """
        return sum(max(part.peak, part.device_bytes) for part in self._holdings)

    def spans(self) -> dict[Hashable, Range]:
        """Where the tokens of the selected history lie in the row that a call sees."""
        spans = consecutive(entry.shot.tokens for entry in self.shots)
        return {entry.id: span for entry, span in zip(self.shots, spans, strict=True)}

    def dependents(self, *ids: Hashable) -> tuple[Hashable, ...]:
        """The shots of the cache whose keys and values hold something of any of these, directly or through others.

        Args:
            ids: Shots that the cache holds, or that one of its shots saw.

        Raises:
            ValueError: for an id that it knows nothing of.
        """
        saw = {i: kept.entry.saw for i, kept in self._holdings[0].kept.items()}
        known = {*saw, *(i for seen in saw.values() for i in seen)}
        if unknown := [i for i in ids if i not in known]:
            raise ValueError(f"ids: {unknown} are not in the cache; it holds {list(self.ids)}")
        found = dependents(saw, ids)
        return tuple(i for i in saw if i in found)

    # What it does.

    def append(self, *ids: Hashable, prompts: Sequence[str] = ()) -> None:
        """Keep the shots of the last call as history, or those of :meth:`hold`, under these ids, in the call's order.

        Args:
            ids: A name for every shot.
            prompts: What every shot was prompted with (default: not recorded).

        Raises:
            ValueError: where no call has written since, the number of ids or prompts differs, an id is taken, or the
                budget has no room.
        """
        self._change(changes.appending, ids, prompts)

    def hold(self) -> None:
        """Keep a copy of what the last call wrote: :meth:`append` then takes it, whatever later calls write.

        Raises:
            ValueError: where no call has written since the last append, select or reposition, or the budget has no
                room.
        """
        self._change(changes.holding)

    def select(self, ids: Iterable[Hashable], *, reposition: bool = True) -> None:
        """Choose the shots that later calls see, in this order: by relevance rather than recency (paper, 3.4).

        The others stay in the cache, unseen, and can be selected again. Rows whose shots change are made anew once,
        here, one site after another.

        Args:
            ids: Shots of this cache.
            reposition: Let the chosen shots follow one another on the diagonal from 0 (default: ours), see
                :meth:`reposition`; False leaves every shot where it stands.

        Raises:
            ValueError: for an unknown or repeated id, or a budget that has no room.
        """
        self._change(changes.selecting, list(ids), reposition)

    def reorder(self, ids: Iterable[Hashable], *, reposition: bool = True) -> None:
        """Put the selected history in another order.

        Args:
            ids: The selected shots, all of them.
            reposition: As for :meth:`select`.

        Raises:
            ValueError: for other shots than the selected ones, or a budget that has no room.
        """
        self._change(changes.reordering, list(ids), reposition)

    def reposition(self, origins: Sequence[int] | None = None) -> None:
        """Move the history's shots along the diagonal, each as one body, by the constant rotation R(steps).

        Equals having rotated the same keys at the new places from the start, to 1e-6 of the largest key in float32; in
        bfloat16 a moved key is rounded once more. A shot is always moved by one rotation from where it was written: the
        keys as they were written are kept until it is back there.

        Args:
            origins: For every selected shot, where on the diagonal it is to start (default: end to end from 0).

        Raises:
            ValueError: for the wrong number of origins, others than whole numbers, or a budget that has no room.
        """
        self._change(changes.repositioning, origins)

    def drop(self, *ids: Hashable) -> None:
        """Forget shots and free their memory. The others stay where they stand on the diagonal.

        Raises:
            ValueError: for an unknown or repeated id.
        """
        self._change(changes.dropping, ids)

    def pin(self, *ids: Hashable) -> None:
        """Have shots kept near the model before others, see :func:`lct_core.cache.recency`.

        Raises:
            ValueError: for an unknown or repeated id, or a policy that does not rank the shots.
        """
        self._change(changes.pinning, ids, True)

    def unpin(self, *ids: Hashable) -> None:
        """Have shots kept near the model no longer than others.

        Raises:
            ValueError: for an unknown or repeated id, or a policy that does not rank the shots.
        """
        self._change(changes.pinning, ids, False)

    def move(self, *ids: Hashable, tier: Tier) -> None:
        """Say where shots are to be from now on. A budget moves the others first; one that is too small moves these.

        Args:
            ids: Shots of this cache.
            tier: ``"device"``, ``"host"`` or ``"disk"``.

        Raises:
            ValueError: for an unknown tier, unknown or repeated ids, no folder for files, or a budget without room.
        """
        self._change(changes.moving, ids, tier)

    def fork(self) -> Self:
        """A cache of the same shots that goes its own way: for trying several continuations.

        Nothing is copied now. The first that writes behind the shared history goes on in its rows; the other copies
        them when it writes. What is staged but not appended stays behind.
        """
        return self._of(part.fork() for part in self._holdings)

    def save(self, folder: str | Path, model: Fingerprinted) -> None:
        """Write the cache to a folder, one file for each shot; shots that it has already are not written again.

        What was saved there before stays whole until all of this is. What is staged but not appended is not saved.

        Args:
            folder: Of this cache alone; made if need be.
            model: The model that wrote the cache.

        Raises:
            ValueError: for ids that are neither strings, whole numbers nor tuples of them.
            OSError: where a file can't be written, such as a full disk.
        """
        save(dict(zip(self._names, self._holdings, strict=True)), Path(folder), self._fingerprints(model))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: Fingerprinted,
        *,
        device: str | torch.device = "cpu",
        budget: Budget | None = None,
    ) -> Self:
        """The cache that was saved to a folder, to the last bit; memory-mapped until a call needs it.

        Args:
            folder: As it was given to :meth:`save`.
            model: The same model.
            device: Where the model runs.
            budget: As for a new cache.

        Raises:
            FileNotFoundError: where something is missing.
            ValueError: where a file is truncated or edited, of another layout version, or another model wrote it.
        """
        share, fingerprints = cls._share(budget), cls._fingerprints(model)
        told = read_index(Path(folder), cls._names)
        for name, here in fingerprints.items():
            check_fingerprint(told[name]["model"], here)
        return cls._of(restored(told[name], Path(folder), torch.device(device), share) for name in cls._names)

    def _change(
        self,
        change: Callable[Concatenate[Holdings, P], AbstractContextManager[None]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Make a change to every part, or to none."""
        changes.together(*(change(part, *args, **kwargs) for part in self._holdings))
