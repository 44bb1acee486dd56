"""The cache itself: which shots it holds, which of them are seen, and in what order."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lct_core.cache.budget import STORAGES, Budget, SiteSize, Storage
from lct_core.cache.quantize import relative_error
from lct_core.cache.rows import Row, Segment, Site, empty, fill, turn
from lct_core.cache.shots import CachedShot, Space, Stage, Tier
from lct_core.cache.tiers import (
    KV,
    NOTHING,
    AnyStored,
    Pair,
    ShotFile,
    SiteKey,
    Stored,
    copied,
    copies,
    place,
    quantized,
    write_shot,
)
from lct_core.cache.working import WorkingRows, rows_at_once
from lct_core.coordinates import Scheme
from lct_core.layout import Range, consecutive
from lct_core.rope import Pairing, Rotation, RowParts

if TYPE_CHECKING:  # they import the cache
    from lct_core.scene_model import SceneModel


class KVCache:
    """History for shot-after-shot generation: pass it to a scene model, then keep what the call wrote.

    Every call with the cache sees the selected history and writes its own shots' keys and values in place behind it, so
    that no step copies the history; the next call overwrites them, unless :meth:`append` has kept them. A shot is best
    kept after a pass of its own at the conditioning noise level t_c (paper, 4.2)::

        with torch.no_grad():
            for step in steps:
                velocity = model([shot], t, pattern="context_causal", cache=cache)
                ...
            model([noised_result], t_c, pattern="context_causal", cache=cache)
        cache.append("shot-1")

    While all selected shots are on the device as the model wrote them, they stand in one row for every attention site.
    Else (in 8 bits, in host memory, on disk) each site's history is brought into a working row when its turn comes, one
    site ahead on a GPU; what the model attends to, and hence what comes out, is the same to the last bit.

    An error leaves the cache as it was.

    Args:
        capacity: Tokens of selected history and current shots that rows are made for. Beyond it room is made when a
            longer shot is begun, by one copy, and never during its steps. Without effect where the budget limits the
            device.
        storage: How shots are kept: ``"native"`` (default), as the model wrote them, or in 8 bits, ``"int8"`` or
            ``"fp8"``, with a scale for every head of 64 tokens; see :attr:`errors`.
        budget: How many bytes may be held where (default: all that is selected on the device, the rest where it is).
        branch: The guidance branch that it is the history of, for those who ask later.

    Raises:
        ValueError: for an unknown storage.
    """

    def __init__(
        self, *, capacity: int = 0, storage: Storage = "native", budget: Budget | None = None, branch: str = ""
    ) -> None:
        if storage not in STORAGES:
            raise ValueError(f"storage: got {storage!r}, expected one of {list(STORAGES)}")
        self._capacity, self._storage, self._branch = capacity, storage, branch
        self._budget = budget or Budget()
        self._me = object()  # whose rows are whose, see Row
        self._kept: dict[Hashable, _Kept] = {}  # in the order of their appending
        self._history: list[Hashable] = []
        self._sites: dict[SiteKey, Site] = {}
        self._reserve: dict[Space, int] = {}  # most tokens that a call has written
        self._working = WorkingRows()
        self._stage: Stage | None = None
        self._hold: _Hold | None = None
        self._scheme: Scheme | None = None
        self._diagonal: Tensor | None = None
        self._pairing: Pairing | None = None
        self._peak = 0

    # What it knows.

    @property
    def shots(self) -> tuple[CachedShot, ...]:
        """The selected history, in the order in which it is seen."""
        return tuple(self._kept[i].entry for i in self._history)

    @property
    def held(self) -> tuple[CachedShot, ...]:
        """Every shot that the cache holds: the selected history, then the others as they were appended."""
        return (*self.shots, *(kept.entry for kept in self._kept.values() if not kept.entry.selected))

    @property
    def ids(self) -> tuple[Hashable, ...]:
        """The ids of every shot that the cache holds, the selected history first."""
        return tuple(entry.id for entry in self.held)

    @property
    def branch(self) -> str:
        """The guidance branch that it is the history of."""
        return self._branch

    @property
    def end(self) -> int:
        """Where on the diagonal the next shot starts."""
        return max((entry.origin + entry.extent for entry in self.shots), default=0)

    @property
    def staged(self) -> Stage | None:
        """What the last call wrote, or :meth:`hold` keeps, and :meth:`append` would take."""
        return self._hold.stage if self._hold else self._stage

    @property
    def errors(self) -> dict[Hashable, tuple[float, float]]:
        """What storage in 8 bits costs each shot's keys and its values: the largest error at any site, relative to the
        largest magnitude there."""
        return {i: kept.errors for i, kept in self._kept.items() if kept.errors}

    @property
    def bytes_by_tier(self) -> dict[Tier, int]:
        """Bytes on the device, spare room, working rows and staged shots included; in host memory; in files."""
        tiers: dict[Tier, int] = {"device": self._device_bytes, "host": 0, "disk": 0}
        for kept in self._kept.values():
            if kept.entry.tier != "device":
                tiers[kept.entry.tier] += sum(kv.nbytes for kv in kept.kv.values())
        return tiers

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, spare room included, and what forks share counted in each."""
        tiers = self.bytes_by_tier
        return tiers["device"] + tiers["host"]

    @property
    def peak_nbytes(self) -> int:
        """Most bytes that it has held on the device at once, copies in passing included.

        Not what arithmetic takes in passing: a rotation, or the conversion to 8 bits, of some thousand tokens at a
        time. With b bytes for a token at all n equal sites, and no shot moved:

        - while rows only grow: ``b * capacity``, or where that is too little, ``b * (history + longest call)``, and the
          row of one site more;
        - where another history is selected: what was, and what is then, whichever is more, and again one site's row;
        - where the history is brought: one working row, or two on a GPU, of ``b / n * (history + longest call)``; ``b``
          for every token of the longest call; and the shots that are kept on the device.

        Tensors on ``meta`` give the numbers of a run without its memory.
        """
        return max(self._peak, self._device_bytes)

    def spans(self) -> dict[Hashable, Range]:
        """Where the tokens of the selected history lie in the row that a call sees."""
        return dict(zip(self._history, consecutive(entry.shot.tokens for entry in self.shots), strict=True))

    def dependents(self, *ids: Hashable) -> tuple[Hashable, ...]:
        """The shots of the cache whose keys and values hold something of any of these, directly or through others.

        Args:
            ids: Shots that the cache holds, or whose traces it does.

        Raises:
            ValueError: for an id that it knows nothing of.
        """
        traces = {i for kept in self._kept.values() for i in kept.entry.saw}
        if unknown := [i for i in ids if i not in self._kept and i not in traces]:
            raise ValueError(f"ids: {unknown} are not in the cache; it holds {list(self.ids)}")
        found = set(ids)
        while more := {i for i, kept in self._kept.items() if i not in found and found & set(kept.entry.saw)}:
            found |= more
        return tuple(i for i in self._kept if i in found - set(ids))

    # What it does.

    def append(self, *ids: Hashable, prompts: Sequence[str] = ()) -> None:
        """Keep the shots of the last call as history, or those of :meth:`hold`, under these ids, in the call's order.

        Args:
            ids: A name for every shot.
            prompts: What every shot was prompted with (default: nothing is known).

        Raises:
            ValueError: where no call has written since, the number of ids or prompts differs, an id is taken, or the
                budget has no room.
        """
        stage = self.staged
        if stage is None:
            raise ValueError(
                "append: no call has written to this cache since the last append, select or reposition; "
                "call the scene model with cache=cache first"
            )
        if len(ids) != len(stage.shots):
            raise ValueError(
                f"ids: got {len(ids)}, {list(ids)}, expected {len(stage.shots)}, one for each shot of the last call"
            )
        if len(prompts) not in (0, len(ids)) or isinstance(prompts, str):
            raise ValueError(f"prompts: got {prompts!r}, expected {len(ids)}, one for each id, or none")
        if unhashable := [i for i in ids if not isinstance(i, Hashable)]:
            raise ValueError(f"ids: got {unhashable}, expected hashable names, such as strings or numbers")
        if taken := [i for n, i in enumerate(ids) if i in self._kept or i in ids[:n]]:
            raise ValueError(f"ids: {taken} are taken; the cache holds {list(self.ids)}")
        entries = [
            CachedShot(
                id=i,
                shot=stage.shots[n],
                level=tuple(stage.levels[:, n].tolist()),
                written=stage.origins[n],
                origin=stage.origins[n],
                extent=stage.extents[n],
                saw=(*self._history, *(other for other in ids if other != i)),
                prompt=prompts[n] if prompts else "",
                branch=self._branch,
            )
            for n, i in enumerate(ids)
        ]
        in_rows = self._hold is None and self._in_rows(self.shots)
        if not in_rows and self._budget.device is not None and (self._storage != "native" or len(ids) > 1):
            entries = [replace(entry, tier="host") for entry in entries]  # until there is a place on the device
        new = [_Kept(e, *(({}, None) if in_rows else self._taken(stage, n))) for n, e in enumerate(entries)]
        before = self._kept, [(site, site.standing, site.staged) for site in self._sites.values()]
        self._kept = self._kept | {kept.entry.id: kept for kept in new}
        history = [*self.shots, *entries]
        for site in self._sites.values():
            if in_rows:  # where they stand already
                site.standing = self._segments(history, site.size.space)
            elif self._storage == "native":
                site.staged = None  # it is the shot's own now
        try:
            plan = self._plan(history)
        except BaseException:
            self._kept, sites = before
            for site, standing, staged in sites:
                site.standing, site.staged = standing, staged
            raise
        self._stage = self._hold = None
        for site in self._sites.values():
            site.written = 0
            if in_rows and site.row is not None and site.row.owner is self._me:
                site.row.used = sum(segment.tokens for segment in site.standing)
        self._apply(plan)

    def hold(self) -> None:
        """Keep a copy of what the last call wrote: :meth:`append` then takes it, whatever later calls write.

        Raises:
            ValueError: where no call has written since the last append, select or reposition, or the budget has no
                room.
        """
        if self._stage is None:
            raise ValueError(
                "hold: no call has written to this cache since the last append, select or reposition; "
                "call the scene model with cache=cache first"
            )
        plan = self._plan(self.shots, held=self._stage)
        self._hold = None  # one that is held already is given up
        self._apply(plan)
        kv = {}
        for key, site in self._sites.items():
            written = _written(site)
            kv[key] = written if site.staged else copies(written, site.device)
            site.staged, site.written = None, 0
        self._hold, self._stage = _Hold(self._stage, kv), None

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
        chosen = self._known(ids)
        history = [self._kept[i].entry for i in chosen]
        if any(entry.shot.role == "global" for entry in history[1:]):
            raise ValueError(f"ids: got {chosen}, expected a global shot to come first, as in its scene")
        self._show(_end_to_end(history) if reposition else history)

    def reorder(self, ids: Iterable[Hashable], *, reposition: bool = True) -> None:
        """Put the selected history in another order.

        Args:
            ids: The selected shots, all of them.
            reposition: As for :meth:`select`.

        Raises:
            ValueError: for other shots than the selected ones, or a budget that has no room.
        """
        chosen = list(ids)
        if len(chosen) != len(self._history) or set(chosen) != set(self._history):
            raise ValueError(f"ids: got {chosen}, expected the selected shots, {self._history}, in another order")
        self.select(chosen, reposition=reposition)

    def reposition(self, origins: Sequence[int] | None = None) -> None:
        """Move the history's shots along the diagonal, each as one body, by the constant rotation R(steps).

        Equals having rotated the same keys at the new places from the start, to 1e-6 of the largest key in float32; in
        bfloat16 a moved key has one rounding more. Always one rotation from where a shot was written: its keys as they
        were written are kept until it is back there.

        Args:
            origins: For every selected shot, where on the diagonal it is to start (default: end to end from 0).

        Raises:
            ValueError: for the wrong number of origins, or a budget that has no room.
        """
        history = self.shots
        if origins is None:
            return self._show(_end_to_end(history))
        if len(origins) != len(history):
            raise ValueError(f"origins: got {len(origins)}, expected {len(history)}, one for each selected shot")
        return self._show([replace(e, origin=origin) for e, origin in zip(history, origins, strict=True)])

    def drop(self, *ids: Hashable) -> None:
        """Forget shots and free what they took. The others stay where they stand on the diagonal.

        Raises:
            ValueError: for an unknown or repeated id.
        """
        gone = set(self._known(ids))
        kept = {i: each for i, each in self._kept.items() if i not in gone}
        history = [entry for entry in self.shots if entry.id not in gone]
        plan = self._plan(history, kept)
        self._kept = kept
        self._apply(plan, keep_stage=gone.isdisjoint(self._history))
        if not kept and self.staged is None:
            self._sites, self._reserve = {}, {}
            self._working.resize({})

    def pin(self, *ids: Hashable) -> None:
        """Have shots kept near the model before others, see :func:`lct_core.cache.recency`.

        Raises:
            ValueError: for an unknown or repeated id, or a policy that does not rank the shots.
        """
        self._pin(ids, True)

    def unpin(self, *ids: Hashable) -> None:
        """Have shots kept near the model no longer than others.

        Raises:
            ValueError: for an unknown or repeated id, or a policy that does not rank the shots.
        """
        self._pin(ids, False)

    def move(self, *ids: Hashable, tier: Tier) -> None:
        """Say where shots are to be from now on. A budget moves the others first; one that is too small moves these.

        Args:
            ids: Shots of this cache.
            tier: ``"device"``, ``"host"`` or ``"disk"``.

        Raises:
            ValueError: for an unknown tier, unknown or repeated ids, no folder for files, or a budget without room.
        """
        if tier not in ("device", "host", "disk"):
            raise ValueError(f'tier: got {tier!r}, expected "device", "host" or "disk"')
        chosen = self._known(ids)
        kept = self._kept | {i: replace(self._kept[i], wish=tier) for i in chosen}
        plan = self._plan(self.shots, kept)
        if elsewhere := [i for i in chosen if plan.tiers[i] != tier]:
            raise ValueError(
                f"ids: {elsewhere} do not fit on the {tier}, of which the budget is {getattr(self._budget, tier)} "
                "bytes; give a larger one, drop shots, or select fewer"
            )
        self._kept = kept
        self._apply(plan)

    def fork(self) -> "KVCache":
        """A cache of the same shots that goes its own way: for trying several continuations.

        Nothing is copied now. The first that writes behind the shared history goes on in its rows; the other copies
        them when it writes. What is staged but not appended stays behind.
        """
        twin = KVCache(capacity=self._capacity, storage=self._storage, budget=self._budget, branch=self._branch)
        twin._kept = {i: kept.twin() for i, kept in self._kept.items()}
        twin._history, twin._reserve = list(self._history), dict(self._reserve)
        twin._scheme, twin._diagonal, twin._pairing = self._scheme, self._diagonal, self._pairing
        for key, site in self._sites.items():
            if site.row is not None and site.row.owner is self._me and not site.written:
                site.row.owner = None
            twin._sites[key] = Site(site.size, site.device, site.row, site.standing)
        twin._resize()
        return twin

    def save(self, folder: str | Path, model: "SceneModel") -> None:
        """Write the cache to a folder, one file for each shot; shots that it has already are not written again.

        What was saved there before stays whole until all of this is. What is staged but not appended is not saved.

        Args:
            folder: Of this cache alone; made if need be.
            model: The model that wrote the cache.

        Raises:
            ValueError: for ids that are neither strings, whole numbers nor tuples of them.
            OSError: where a file can't be written, such as a full disk.
        """
        from lct_core.cache.saved import save

        save({"history": self}, Path(folder), {"history": model})

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: "SceneModel",
        *,
        device: str | torch.device = "cpu",
        budget: Budget | None = None,
    ) -> "KVCache":
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
        from lct_core.cache.saved import load

        return load(Path(folder), {"history": model}, device=torch.device(device), budget=budget)["history"]

    # What follows is the engine's side.

    def begin(self, scheme: Scheme, diagonal: Float[Tensor, "heads pairs"] | None, pairing: Pairing | None) -> None:
        """Start a call: the staged shots of the last one are given up.

        Raises:
            ValueError: where the history was written under another coordinate scheme.
        """
        if self._kept and scheme != self._scheme:
            raise ValueError(
                f"cache: its shots were written in scheme {self._scheme!r}, this model's is {scheme!r}; "
                "use another cache"
            )
        self._stage, self._scheme, self._diagonal, self._pairing = None, scheme, diagonal, pairing
        for site in self._sites.values():
            site.written = 0

    def write(
        self, key: SiteKey, space: Space, k: Tensor | RowParts, v: Tensor
    ) -> tuple[Float[Tensor, "batch keys heads head_dim"], Float[Tensor, "batch keys heads head_dim"]]:
        """Write the current shots' rotated keys and values behind the history; return both with it, as views.

        Keys that come as :class:`lct_core.rope.RowParts` are rotated right there, without a copy in between. Where the
        history is brought, the views hold until the next site's turn.

        Raises:
            ValueError: where the batch, heads, dtype or device differ from the history's, or the budget has no room.
        """
        site = self._site(key, space, k, v)
        start = sum(entry.tokens(space) for entry in self.shots)
        stop = start + k.shape[1]
        self._make_room(site, start, stop)
        if self._in_rows(self.shots):
            if site.row is None or not site.row.takes(start, stop, branch=self._me):  # nothing stands in it
                site.row = None
                room = self._room(space, stop)
                self._afford(site.size.nbytes(room))
                site.row = Row(*empty(site.size, room, site.device), self._me, used=0)
            if stop > start:
                site.row.owner = self._me
            keys, values = site.row.k, site.row.v
            fill(keys[:, start:stop], k)
            fill(values[:, start:stop], v)
        else:
            fits = site.staged is not None and site.staged[0].shape[1] == stop - start
            if site.staged is None or not fits:
                site.staged = None
                self._afford(site.size.nbytes(stop - start))
                site.staged = empty(site.size, stop - start, site.device)
            keys, values = self._working.history(key, site, start + self._reserve[space], self._bring)
            if not fits:  # other sites have theirs of the last call still
                self._peak = max(self._peak, self._device_bytes)
            fill(keys[:, start:stop], k)
            fill(values[:, start:stop], v)
            for own, row in zip(site.staged, (keys, values), strict=True):
                own.copy_(row[:, start:stop])
            self._bring_ahead(key)
        site.written = stop - start
        return keys[:, :stop], values[:, :stop]

    def stage(self, stage: Stage) -> None:
        """End a call: what it wrote can be kept with :meth:`append`."""
        self._stage = stage

    # How it does it.

    def _known(self, ids: Iterable[Hashable]) -> list[Hashable]:
        chosen = list(ids)
        if unknown := [i for i in chosen if i not in self._kept]:
            raise ValueError(f"ids: {unknown} are not in the cache; it holds {list(self.ids)}")
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"ids: got {chosen}, expected every shot once")
        return chosen

    def _show(self, history: Sequence[CachedShot]) -> None:
        """Let calls see other shots, or the same elsewhere: what is staged was written behind others."""
        plan = self._plan(history)
        self._apply(plan, keep_stage=False)

    def _pin(self, ids: Iterable[Hashable], pinned: bool) -> None:
        chosen = self._known(ids)
        kept = self._kept | {
            i: replace(self._kept[i], entry=replace(self._kept[i].entry, pinned=pinned)) for i in chosen
        }
        plan = self._plan([kept[i].entry for i in self._history], kept)
        self._kept = kept
        self._apply(plan)

    def _in_rows(self, history: Iterable[CachedShot]) -> bool:
        """Whether the history stands in rows: all of it is on the device as the model attends to it."""
        return self._storage == "native" and all(entry.tier == "device" for entry in history)

    def _steps(self, entry: CachedShot, space: Space) -> int:
        """How far a shot's keys are from where they were written: text that is cross-attended has no place."""
        placed = space != "text" and self._diagonal is not None and self._pairing is not None
        return entry.origin - entry.written if placed else 0

    def _segments(self, history: Iterable[CachedShot], space: Space) -> tuple[Segment, ...]:
        each = (Segment(entry.id, entry.tokens(space), self._steps(entry, space)) for entry in history)
        return tuple(segment for segment in each if segment.tokens)

    def _room(self, space: Space, tokens: int) -> int:
        """How long a row is made that must hold so many tokens."""
        return tokens if space == "text" or self._budget.device is not None else max(tokens, self._capacity)

    @property
    def _device_bytes(self) -> int:
        """Bytes of keys and values on the device, of this cache and of what it shares with forks."""
        found = [x for key, site in self._sites.items() for x in self._on_device(key, site)]
        held = [x for kv in self._hold.kv.values() for x in kv] if self._hold else []
        return sum({id(x): x.nbytes for x in (*found, *held)}.values()) + self._working.nbytes

    def _on_device(self, key: SiteKey, site: Site) -> list[Stored]:
        """What there is on the device for a site."""
        near = [kept.kv[key] for kept in self._kept.values() if kept.entry.tier == "device" and key in kept.kv]
        row = [] if site.row is None else [site.row.k, site.row.v]
        return [*row, *(site.staged or ()), *(x for kv in near for x in kv if x is not None)]

    def _original(self, kept: "_Kept", key: SiteKey) -> Pair:
        """A shot's keys as they were written, and its values, wherever they are."""
        site, own = self._sites[key], kept.kv.get(key, NOTHING)
        if own.k is not None and own.v is not None:
            return own.k, own.v
        tokens = kept.entry.tokens(site.size.space)
        if not tokens or site.row is None:
            return empty(site.size, tokens, site.device)
        spans = consecutive(segment.tokens for segment in site.standing)
        span = spans[[segment.id for segment in site.standing].index(kept.entry.id)].slice
        return site.row.k[:, span] if own.k is None else own.k, site.row.v[:, span]

    def _taken(self, stage: Stage, n: int) -> tuple[dict[SiteKey, KV], tuple[float, float] | None]:
        """What was written of a staged shot, as tensors of its own, and what 8 bits cost it.

        Where the budget limits the device, copies leave it at once, site by site, until there is a place for them.
        """
        kvs: dict[SiteKey, KV] = {}
        errors: list[list[float]] = []
        for key, site in self._sites.items():
            whole = self._hold.kv[key] if self._hold else _written(site)
            span = consecutive(getattr(shot, site.size.space) for shot in stage.shots)[n].slice
            parts: list[Tensor] = [x[:, span] for x in whole]
            if self._storage != "native":
                small = [quantized(x, self._storage) for x in parts]
                errors.append([relative_error(x, q) for x, q in zip(parts, small, strict=True) if not x.is_meta])
                kvs[key] = KV(*(self._aside(x, site) for x in small))
            elif len(stage.shots) == 1:
                kvs[key] = KV(*whole)
            else:
                kvs[key] = KV(*(self._aside(copied(x, site.device), site) for x in parts))
        worst = [max(each) for each in zip(*errors, strict=True)]
        return kvs, (worst[0], worst[1]) if worst else None

    def _aside(self, x: AnyStored, site: Site) -> AnyStored:
        limited = self._budget.device is not None
        return copied(x, "cpu", pinned=site.device.type == "cuda") if limited and site.device.type != "cpu" else x

    def _site(self, key: SiteKey, space: Space, k: Tensor | RowParts, v: Tensor) -> Site:
        """A site that a call writes to, new or of the size and on the device that it had."""
        size = SiteSize(space, k.shape[0], k.shape[2], (k.shape[3], v.shape[3]), k.dtype)
        site = self._sites.get(key)
        if site is None and any(kept.entry.tokens(space) for kept in self._kept.values()):
            raise ValueError(
                f"cache: it holds {len(self._kept)} shots, but nothing for block {key[0]}, site {key[1]!r}; "
                "a cache belongs to the model and branch that filled it"
            )
        if site is not None and self._kept and size != site.size:
            was = site.size
            raise ValueError(
                f"cache: it holds keys of batch {was.entries}, heads and channels {[was.heads, was.channels[0]]}, "
                f"{was.dtype}; this call has {size.entries}, {[size.heads, size.channels[0]]}, {size.dtype}; "
                "use another cache"
            )
        if site is not None and self._kept and v.device != site.device:
            raise ValueError(
                f"cache: its keys belong on {site.device}, this call's are on {v.device}; run the model there, or save "
                f"the cache and load it with device={str(v.device)!r}"
            )
        if site is None or (size, v.device) != (site.size, site.device):
            site = self._sites[key] = Site(size, v.device)
            self._resize()
        return site

    def _make_room(self, site: Site, start: int, stop: int) -> None:
        """Let rows have room behind the history, and shots leave the device where they must, before a call writes."""
        space, before = site.size.space, dict(self._reserve)
        behind = start and self._in_rows(self.shots)
        full = behind and not (site.row and site.row.takes(start, stop, branch=self._me))
        if not full and stop - start <= before.get(space, -1):
            return
        self._reserve[space] = max(stop - start, before.get(space, 0))
        try:
            plan = self._plan(self.shots, writing=(space, stop - start))
        except BaseException:
            self._reserve = before
            raise
        self._apply(plan, writing=(space, stop - start))

    def _afford(self, nbytes: tuple[int, int]) -> None:
        """Refuse what the device has no room for, before it is made."""
        limit, needed = self._budget.device, self._device_bytes + sum(nbytes)
        needed += self._working.wanted - self._working.nbytes
        if limit is not None and needed > limit:
            raise ValueError(_over(f"{needed} bytes on the device, behind {len(self._history)} shots", "device", limit))

    def _resize(self) -> None:
        """Have working rows, where there are to be any."""
        self._working.resize({} if self._in_rows(self.shots) else self._working_sizes(self.shots))

    def _working_sizes(self, history: Sequence[CachedShot]) -> dict[torch.device, tuple[int, int]]:
        """Bytes of keys and of values in a working row of every device: for the longest history and call."""
        sizes: dict[torch.device, tuple[int, int]] = {}
        for site in self._sites.values():
            space = site.size.space
            tokens = sum(entry.tokens(space) for entry in history) + self._reserve.get(space, 0)
            most, here = sizes.get(site.device, (0, 0)), site.size.nbytes(tokens)
            sizes[site.device] = max(most[0], here[0]), max(most[1], here[1])
        return sizes

    def _bring(self, key: SiteKey, keys: Tensor, values: Tensor) -> None:
        """Bring a site's history into a working row."""
        space = self._sites[key].size.space
        for entry, span in zip(self.shots, consecutive(e.tokens(space) for e in self.shots), strict=True):
            if span.size:
                k, v = self._original(self._kept[entry.id], key)
                place(k, keys[:, span.slice], self._turn(self._steps(entry, space), keys[:, span.slice]))
                place(v, values[:, span.slice])

    def _bring_ahead(self, key: SiteKey) -> None:
        """Have the history of the next site brought; behind the last, that of the first, for the next call."""
        if self._history:
            order = list(self._sites)
            following = order[(order.index(key) + 1) % len(order)]
            site = self._sites[following]
            space = site.size.space
            tokens = sum(entry.tokens(space) for entry in self.shots) + self._reserve.get(space, 0)
            self._working.ahead(following, site, tokens, self._bring)

    def _turn(self, steps: int, like: Tensor) -> Rotation | None:
        if not steps or self._diagonal is None or self._pairing is None:
            return None
        return turn(steps, like.shape[1], diagonal=self._diagonal, pairing=self._pairing, like=like)

    def _plan(
        self,
        history: Sequence[CachedShot],
        kept: "dict[Hashable, _Kept] | None" = None,
        *,
        held: Stage | None = None,
        writing: tuple[Space, int] | None = None,
    ) -> "_Plan":
        """Where every shot is to be. What can fail comes here, and changes nothing.

        Args:
            history: The shots that are to be seen.
            kept: What the cache is to hold (default: what it holds).
            held: What is to be held besides.
            writing: How many tokens the present call writes to a space.
        """
        kept = self._kept if kept is None else kept
        entries = {i: replace(each.entry, selected=False) for i, each in kept.items()}
        entries |= {entry.id: replace(entry, selected=True) for entry in history}
        tiers: dict[Hashable, Tier] = {
            i: kept[i].wish or ("device" if entry.selected else entry.tier) for i, entry in entries.items()
        }
        plan = _Plan(entries, [entry.id for entry in history], kept, tiers, {})
        if (self._budget.device, self._budget.host) != (None, None):
            self._fit(plan, held, writing)
        for i, tier in tiers.items():
            if tier != "device" and tier != entries[i].tier:
                plan.moved[i] = self._elsewhere(kept[i], tier)
        return plan

    def _fit(self, plan: "_Plan", held: Stage | None, writing: tuple[Space, int] | None) -> None:
        """Send shots away from the device, then from host memory, until the budget has room: the least worthy first."""
        sizes = [site.size for site in self._sites.values()]
        nbytes = {
            i: sum(sum(size.nbytes(entry.tokens(size.space), self._storage)) for size in sizes)
            for i, entry in plan.entries.items()
        }
        shots = list(plan.entries.values())
        ranking = list(self._budget.policy(shots))
        if len(ranking) != len(shots) or set(ranking) != set(plan.entries):
            raise ValueError(f"policy: it ranks {ranking}, expected each of {list(plan.entries)} once")
        ranking.sort(key=lambda i: plan.kept[i].wish != "device")

        def leave(tier: Tier, further: Tier, limit: int | None, needed: Callable[[], int]) -> None:
            while limit is not None and needed() > limit:
                going = next((i for i in reversed(ranking) if plan.tiers[i] == tier and nbytes[i]), None)
                if going is None or (further == "disk" and self._budget.folder is None):
                    raise ValueError(_over(f"{needed()} bytes {_PLACES[tier]}, for {len(shots)} shots", tier, limit))
                plan.tiers[going] = further

        leave("device", "host", self._budget.device, lambda: self._peak_of(plan, held, writing))
        in_host = lambda: sum(nbytes[i] for i, at in plan.tiers.items() if at == "host")  # noqa: E731
        leave("host", "disk", self._budget.host, in_host)

    def _peak_of(self, plan: "_Plan", held: Stage | None, writing: tuple[Space, int] | None) -> int:
        """Most bytes on the device on the way to a plan, and in the next call: what :meth:`_apply` and it will take."""
        in_rows = plan.in_rows(self._storage)
        stays = {i for i, kept in plan.kept.items() if kept.entry.tier == plan.tiers[i] == "device"}
        running = self._device_bytes - self._working.nbytes
        running -= sum(
            kv.nbytes
            for i, kept in self._kept.items()
            if kept.entry.tier == "device" and i not in stays
            for kv in kept.kv.values()
        )
        peak = running
        for key, site in self._sites.items():
            space, size = site.size.space, site.size
            segments = self._segments([plan.entries[i] for i in plan.history], space)
            start = sum(segment.tokens for segment in segments)
            behind = writing[1] if writing and writing[0] == space else self._reserve.get(space, 0)
            before = sum(x.nbytes for x in site.staged or ()) + (site.row.nbytes if site.row else 0)
            if not in_rows:
                after = fresh = sum(size.nbytes(self._reserve.get(space, 0)))
            elif site.row is not None and self._stays(site, segments, behind):
                after, fresh = site.row.nbytes, 0
            else:
                after = fresh = sum(size.nbytes(start + behind))
            for i, entry in plan.entries.items():
                if plan.tiers[i] != "device" or not entry.tokens(space):
                    continue
                own = plan.kept[i].kv.get(key, NOTHING) if i in stays else NOTHING
                inside = in_rows and entry.selected
                wanted = not inside or self._steps(entry, space) != 0, not inside
                for nbytes, x, is_wanted in zip(
                    size.nbytes(entry.tokens(space), self._storage), own, wanted, strict=True
                ):
                    before += nbytes * (x is not None)
                    after += nbytes * is_wanted
                    fresh += nbytes * (is_wanted and x is None)
            if held is not None:
                after += sum(size.nbytes(held.tokens(space)))
                fresh += sum(size.nbytes(held.tokens(space)))
            peak = max(peak, running + fresh)
            running += after - before
        working = {} if in_rows else self._working_sizes([plan.entries[i] for i in plan.history])
        return max(peak, running + sum(rows_at_once(device) * sum(each) for device, each in working.items()))

    def _stays(self, site: Site, segments: tuple[Segment, ...], behind: int) -> bool:
        """Whether a site's row can go on: what stands in it stands there still, and there is room for the rest."""
        done = len(site.standing)
        if site.row is None or segments[:done] != site.standing:
            return False
        start, stop = (sum(segment.tokens for segment in part) for part in (site.standing, segments))
        if start == stop and not behind:
            return True
        return (start == stop or not site.written) and site.row.takes(start, stop + behind, branch=self._me)

    def _elsewhere(self, kept: "_Kept", tier: Tier) -> dict[SiteKey, KV] | ShotFile:
        """A shot's keys and values in host memory or in a file."""
        if tier == "disk":
            if kept.files:
                return next(iter(kept.files.values()))
            if self._budget.folder is None:
                raise ValueError(
                    f'tier: got "disk" for {kept.entry.id!r}, but the cache has no folder for files, expected '
                    "KVCache(budget=Budget(folder=...))"
                )
            whole = {key: self._original(kept, key) for key in self._sites}
            file = write_shot(self._budget.folder, kept.entry.id, whole)
            kept.files[file.path.parent] = file
            return file
        return {key: self._in_host(kept, key, site) for key, site in self._sites.items()}

    def _in_host(self, kept: "_Kept", key: SiteKey, site: Site) -> KV:
        own = kept.kv.get(key, NOTHING) if kept.entry.tier == "device" and site.device.type == "cpu" else NOTHING
        pinned = site.device.type == "cuda"
        return KV(
            *(
                copied(y, "cpu", pinned=pinned) if x is None else x  # on a CPU, the same memory
                for x, y in zip(own, self._original(kept, key), strict=True)
            )
        )

    def _apply(self, plan: "_Plan", *, keep_stage: bool = True, writing: tuple[Space, int] | None = None) -> None:
        """Bring every shot to its place, one site after another, and free what is in the way."""
        self._peak = max(self._peak, self._device_bytes)
        if not keep_stage:
            self._stage = self._hold = None
        self._working.resize({})
        self._kept, self._history = plan.kept, plan.history
        for i, elsewhere in plan.moved.items():
            plan.kept[i].kv = elsewhere
            plan.kept[i].entry = replace(plan.kept[i].entry, tier=plan.tiers[i])
        for kept in plan.kept.values():
            if kept.entry.tier == "disk" and plan.tiers[kept.entry.id] == "device":
                kept.kv = {**kept.kv}
        running = self._device_bytes
        for key, site in self._sites.items():
            before = {id(x): x.nbytes for x in self._on_device(key, site)}
            row, standing, staged, kv = self._arranged(key, site, plan, keep_stage=keep_stage, writing=writing)
            near = [x for i, each in kv.items() if plan.tiers[i] == "device" for x in each if x is not None]
            after = {id(x): x.nbytes for x in (*((row.k, row.v) if row else ()), *(staged or ()), *near)}
            self._peak = max(self._peak, running + sum(n for x, n in after.items() if x not in before))
            running += sum(after.values()) - sum(before.values())
            site.row, site.standing, site.staged = row, standing, staged
            site.written = site.written if keep_stage else 0
            for i, each in kv.items():
                here = plan.kept[i].kv
                assert isinstance(here, dict)
                here[key] = each
        for i, kept in plan.kept.items():
            kept.entry = replace(plan.entries[i], tier=plan.tiers[i])
        self._resize()

    def _arranged(
        self, key: SiteKey, site: Site, plan: "_Plan", *, keep_stage: bool, writing: tuple[Space, int] | None
    ) -> tuple[Row | None, tuple[Segment, ...], tuple[Tensor, Tensor] | None, dict[Hashable, KV]]:
        """A site as it is to be: its row and what stands there, staged shots, and the shots that are on the device."""
        space, in_rows = site.size.space, plan.in_rows(self._storage)
        segments = self._segments([plan.entries[i] for i in plan.history], space) if in_rows else ()
        behind = writing[1] if writing and writing[0] == space else 0
        written = site.written if keep_stage else 0
        stop = sum(segment.tokens for segment in segments)
        stays = in_rows and self._stays(site, segments, behind)
        row, done = (site.row, len(site.standing)) if stays else (None, 0)
        if in_rows and row is None and (segments or written):
            room = stop + max(behind or self._reserve.get(space, 0), written)
            row = Row(*empty(site.size, self._room(space, room), site.device), self._me, stop)
        spans = consecutive(segment.tokens for segment in segments)
        for segment, span in list(zip(segments, spans, strict=True))[done:]:
            assert row is not None
            self._put(plan.kept[segment.id], key, row.k[:, span.slice], row.v[:, span.slice], segment)
            row.owner, row.used = self._me, stop
        kv = {
            i: self._near(kept, key, inside=in_rows and plan.entries[i].selected, entry=plan.entries[i])
            for i, kept in plan.kept.items()
            if plan.tiers[i] == "device"
        }
        staged = site.staged
        if written and in_rows and (staged is not None or not stays):
            assert row is not None
            for place_, x in zip((row.k, row.v), _written(site), strict=True):
                place_[:, stop : stop + written] = x
        if written and not in_rows and staged is None:
            staged = copies(_written(site), site.device)
        return row, segments, None if in_rows else staged, kv

    def _put(self, kept: "_Kept", key: SiteKey, keys: Tensor, values: Tensor, segment: Segment) -> None:
        """Bring a shot to its place in a new row: as it stands in the old one, or from where it was written."""
        site = self._sites[key]
        if segment in site.standing and site.row is not None:
            spans = consecutive(each.tokens for each in site.standing)
            span = spans[site.standing.index(segment)].slice
            keys.copy_(site.row.k[:, span])
            values.copy_(site.row.v[:, span])
            return
        k, v = self._original(kept, key)
        place(k, keys, self._turn(segment.steps, keys))
        place(v, values)

    def _near(self, kept: "_Kept", key: SiteKey, *, inside: bool, entry: CachedShot) -> KV:
        """What a shot on the device has of its own there: all, or in a row where it was moved, the original keys."""
        site = self._sites[key]
        if not entry.tokens(site.size.space):
            return kept.kv.get(key, NOTHING)
        wanted = not inside or self._steps(entry, site.size.space) != 0, not inside
        reusable = kept.entry.tier == "device" or (kept.entry.tier == "host" and site.device.type == "cpu")
        own = kept.kv.get(key, NOTHING) if reusable else NOTHING
        return KV(
            *(
                (x if x is not None else copied(y, site.device)) if is_wanted else None
                for x, y, is_wanted in zip(own, self._original(kept, key), wanted, strict=True)
            )
        )


@dataclass(eq=False)
class _Kept:
    """A shot: what is known of it, its keys as they were written and its values."""

    entry: CachedShot
    kv: dict[SiteKey, KV] | ShotFile
    errors: tuple[float, float] | None = None
    files: dict[Path, ShotFile] = field(default_factory=dict)  # by folder
    wish: Tier | None = None  # where it is to be, whatever the policy says

    def twin(self) -> "_Kept":
        """The same for a fork: tensors and files are shared, they never change."""
        kv = self.kv if isinstance(self.kv, ShotFile) else dict(self.kv)
        return replace(self, kv=kv, files=dict(self.files))


class _Hold(NamedTuple):
    """Staged shots that are kept while later calls write."""

    stage: Stage
    kv: dict[SiteKey, tuple[Tensor, Tensor]]


class _Plan(NamedTuple):
    """Where every shot is to be."""

    entries: dict[Hashable, CachedShot]
    history: list[Hashable]
    kept: dict[Hashable, _Kept]
    tiers: dict[Hashable, Tier]
    moved: dict[Hashable, dict[SiteKey, KV] | ShotFile]  # what leaves its tier, where it is to be

    def in_rows(self, storage: Storage) -> bool:
        """Whether the history is to stand in rows."""
        return storage == "native" and all(self.tiers[i] == "device" for i in self.history)


_PLACES: dict[Tier, str] = {"device": "on the device", "host": "in host memory", "disk": "in files"}


def _written(site: Site) -> tuple[Tensor, Tensor]:
    """What the present call has written to a site."""
    if site.staged is not None:
        return site.staged
    if site.row is None:
        return empty(site.size, 0, site.device)
    start = sum(segment.tokens for segment in site.standing)
    here = slice(start, start + site.written)
    return site.row.k[:, here], site.row.v[:, here]


def _end_to_end(history: Sequence[CachedShot]) -> list[CachedShot]:
    origins = accumulate((entry.extent for entry in history), initial=0)
    return [replace(entry, origin=origin) for entry, origin in zip(history, origins, strict=False)]


def _over(needed: str, place: str, limit: int) -> str:
    return (
        f"budget: {needed}, but {place}={limit}; give a larger budget, a folder=, a storage in 8 bits, drop shots, or "
        "select fewer"
    )
