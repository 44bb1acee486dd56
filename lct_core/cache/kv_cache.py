"""The cache itself: which shots it holds, which of them are seen, in what order, and what the engine asks of it."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lct_core.cache.arrangement import Writing, afford, carry_out, planned
from lct_core.cache.budget import STORAGES, Budget, SiteSize, Storage
from lct_core.cache.holdings import Hold, Holdings, Kept
from lct_core.cache.quantize import relative_error
from lct_core.cache.rows import Row, Site, empty, fill
from lct_core.cache.shots import CachedShot, Space, Stage, Tier
from lct_core.cache.tiers import KV, SiteKey, copied, copies, quantized
from lct_core.coordinates import Scheme
from lct_core.layout import Range, consecutive
from lct_core.rope import Pairing, RowParts, same_angles

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
        ValueError: for an unknown storage, a capacity that is no number of tokens, and a budget that is none.
    """

    def __init__(
        self, *, capacity: int = 0, storage: Storage = "native", budget: Budget | None = None, branch: str = ""
    ) -> None:
        if storage not in STORAGES:
            raise ValueError(f"storage: got {storage!r}, expected one of {list(STORAGES)}")
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 0:
            raise ValueError(f"capacity: got {capacity!r}, expected a number of tokens, 0 or more")
        if not isinstance(budget, Budget | None):
            raise ValueError(f"budget: got {budget!r}, expected Budget(device=..., host=..., folder=...) or None")
        self._own, self._branch = Holdings(capacity, storage, budget or Budget()), branch

    # What it knows.

    @property
    def shots(self) -> tuple[CachedShot, ...]:
        """The selected history, in the order in which it is seen."""
        return self._own.shots

    @property
    def held(self) -> tuple[CachedShot, ...]:
        """Every shot that the cache holds: the selected history, then the others as they were appended."""
        return (*self.shots, *(kept.entry for kept in self._own.kept.values() if not kept.entry.selected))

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
        return self._own.hold.stage if self._own.hold else self._own.stage

    @property
    def errors(self) -> dict[Hashable, tuple[float, float]]:
        """What storage in 8 bits costs each shot's keys and its values: the largest error at any site, relative to the
        largest magnitude there."""
        return {i: kept.errors for i, kept in self._own.kept.items() if kept.errors}

    @property
    def bytes_by_tier(self) -> dict[Tier, int]:
        """Bytes on the device, spare room, working rows and staged shots included; in host memory; in files."""
        tiers: dict[Tier, int] = {"device": self._own.device_bytes, "host": 0, "disk": 0}
        for kept in self._own.kept.values():
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
        return max(self._own.peak, self._own.device_bytes)

    def spans(self) -> dict[Hashable, Range]:
        """Where the tokens of the selected history lie in the row that a call sees."""
        return dict(zip(self._own.history, consecutive(entry.shot.tokens for entry in self.shots), strict=True))

    def dependents(self, *ids: Hashable) -> tuple[Hashable, ...]:
        """The shots of the cache whose keys and values hold something of any of these, directly or through others.

        Args:
            ids: Shots that the cache holds, or whose traces it does.

        Raises:
            ValueError: for an id that it knows nothing of.
        """
        traces = {i for kept in self._own.kept.values() for i in kept.entry.saw}
        if unknown := [i for i in ids if i not in self._own.kept and i not in traces]:
            raise ValueError(f"ids: {unknown} are not in the cache; it holds {list(self.ids)}")
        found = set(ids)
        while more := {i for i, kept in self._own.kept.items() if i not in found and found & set(kept.entry.saw)}:
            found |= more
        return tuple(i for i in self._own.kept if i in found - set(ids))

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
        together(self._appending(ids, prompts))

    def hold(self) -> None:
        """Keep a copy of what the last call wrote: :meth:`append` then takes it, whatever later calls write.

        Raises:
            ValueError: where no call has written since the last append, select or reposition, or the budget has no
                room.
        """
        together(self._holding())

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
        together(self._selecting(ids, reposition))

    def reorder(self, ids: Iterable[Hashable], *, reposition: bool = True) -> None:
        """Put the selected history in another order.

        Args:
            ids: The selected shots, all of them.
            reposition: As for :meth:`select`.

        Raises:
            ValueError: for other shots than the selected ones, or a budget that has no room.
        """
        together(self._reordering(ids, reposition))

    def reposition(self, origins: Sequence[int] | None = None) -> None:
        """Move the history's shots along the diagonal, each as one body, by the constant rotation R(steps).

        Equals having rotated the same keys at the new places from the start, to 1e-6 of the largest key in float32; in
        bfloat16 a moved key has one rounding more. Always one rotation from where a shot was written: its keys as they
        were written are kept until it is back there.

        Args:
            origins: For every selected shot, where on the diagonal it is to start (default: end to end from 0).

        Raises:
            ValueError: for the wrong number of origins, others than whole numbers, or a budget that has no room.
        """
        together(self._repositioning(origins))

    def drop(self, *ids: Hashable) -> None:
        """Forget shots and free what they took. The others stay where they stand on the diagonal.

        Raises:
            ValueError: for an unknown or repeated id.
        """
        together(self._dropping(ids))

    def pin(self, *ids: Hashable) -> None:
        """Have shots kept near the model before others, see :func:`lct_core.cache.recency`.

        Raises:
            ValueError: for an unknown or repeated id, or a policy that does not rank the shots.
        """
        together(self._pinning(ids, True))

    def unpin(self, *ids: Hashable) -> None:
        """Have shots kept near the model no longer than others.

        Raises:
            ValueError: for an unknown or repeated id, or a policy that does not rank the shots.
        """
        together(self._pinning(ids, False))

    def move(self, *ids: Hashable, tier: Tier) -> None:
        """Say where shots are to be from now on. A budget moves the others first; one that is too small moves these.

        Args:
            ids: Shots of this cache.
            tier: ``"device"``, ``"host"`` or ``"disk"``.

        Raises:
            ValueError: for an unknown tier, unknown or repeated ids, no folder for files, or a budget without room.
        """
        together(self._moving(ids, tier))

    def fork(self) -> "KVCache":
        """A cache of the same shots that goes its own way: for trying several continuations.

        Nothing is copied now. The first that writes behind the shared history goes on in its rows; the other copies
        them when it writes. What is staged but not appended stays behind.
        """
        twin = KVCache(branch=self._branch)
        twin._own = self._own.fork()
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
            ValueError: where the history was written under another coordinate scheme, or with other RoPE angles.
        """
        own = self._own
        if own.kept and scheme != own.scheme:
            raise ValueError(
                f"cache: its shots were written in scheme {own.scheme!r}, this model's is {scheme!r}; use another cache"
            )
        if own.kept and not (pairing == own.pairing and same_angles(own.diagonal, diagonal)):
            raise ValueError(
                "cache: its shots were written by a model with other RoPE angles than this one; use another cache, or "
                "the model that wrote it"
            )
        own.stage, own.scheme, own.diagonal, own.pairing = None, scheme, diagonal, pairing
        for site in own.sites.values():
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
        own, site = self._own, self._site(key, space, k, v)
        start = own.tokens(space)
        stop = start + k.shape[1]
        self._make_room(site, start, stop)
        if own.in_rows:
            if site.row is None or not site.row.takes(start, stop, branch=own.me):  # nothing stands in it
                site.row = None
                room = own.room(space, stop)
                afford(own, site.size.nbytes(room))
                site.row = Row(*empty(site.size, room, site.device), own.me, used=0)
            if stop > start:
                site.row.owner = own.me
            keys, values = site.row.k, site.row.v
            fill(keys[:, start:stop], k)
            fill(values[:, start:stop], v)
        else:
            fits = site.staged is not None and site.staged[0].shape[1] == stop - start
            if site.staged is None or not fits:
                site.staged = None
                afford(own, site.size.nbytes(stop - start))
                site.staged = empty(site.size, stop - start, site.device)
            keys, values = own.brought(key)
            if not fits:  # other sites have theirs of the last call still
                own.watch()
            fill(keys[:, start:stop], k)
            fill(values[:, start:stop], v)
            for whole, row in zip(site.staged, (keys, values), strict=True):
                whole.copy_(row[:, start:stop])
            own.bring_ahead(key)
        site.written = stop - start
        return keys[:, :stop], values[:, :stop]

    def stage(self, stage: Stage) -> None:
        """End a call: what it wrote can be kept with :meth:`append`."""
        self._own.stage = stage

    # How it does it: up to its yield a change may fail, and has changed nothing; behind it, it is carried out.

    def _known(self, ids: Iterable[Hashable]) -> list[Hashable]:
        chosen = list(ids)
        if unknown := [i for i in chosen if not isinstance(i, Hashable) or i not in self._own.kept]:
            raise ValueError(f"ids: {unknown} are not in the cache; it holds {list(self.ids)}")
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"ids: got {chosen}, expected every shot once")
        return chosen

    @contextmanager
    def _appending(self, ids: Sequence[Hashable], prompts: Sequence[str]) -> Iterator[None]:
        own, stage = self._own, self.staged
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
        if taken := [i for n, i in enumerate(ids) if i in own.kept or i in ids[:n]]:
            raise ValueError(f"ids: {taken} are taken; the cache holds {list(self.ids)}")
        entries = [
            CachedShot(
                id=i,
                shot=stage.shots[n],
                level=tuple(stage.levels[:, n].tolist()),
                written=stage.origins[n],
                origin=stage.origins[n],
                extent=stage.extents[n],
                saw=(*own.history, *(other for other in ids if other != i)),
                prompt=prompts[n] if prompts else "",
                branch=self._branch,
            )
            for n, i in enumerate(ids)
        ]
        in_rows = own.hold is None and own.in_rows
        if not in_rows and own.budget.device is not None and (own.storage != "native" or len(ids) > 1):
            entries = [replace(entry, tier="host") for entry in entries]  # until there is a place on the device
        new = [Kept(e, *(({}, None) if in_rows else self._taken(stage, n))) for n, e in enumerate(entries)]
        before = own.kept, [(site, site.standing, site.staged) for site in own.sites.values()]
        own.kept = own.kept | {kept.entry.id: kept for kept in new}
        history = [*self.shots, *entries]
        for site in own.sites.values():
            if in_rows:  # where they stand already
                site.standing = own.segments(history, site.size.space)
            elif own.storage == "native":
                site.staged = None  # it is the shot's own now
        try:
            plan = planned(own, history)
            yield
        except BaseException:
            own.kept, sites = before
            for site, standing, staged in sites:
                site.standing, site.staged = standing, staged
            raise
        own.stage = own.hold = None
        for site in own.sites.values():
            site.written = 0
            if in_rows and site.row is not None and site.row.owner is own.me:
                site.row.used = sum(segment.tokens for segment in site.standing)
        carry_out(own, plan)

    def _taken(self, stage: Stage, n: int) -> tuple[dict[SiteKey, KV], tuple[float, float] | None]:
        """What was written of a staged shot, as tensors of its own, and what 8 bits cost it.

        Where the budget limits the device, they leave it at once, site by site, until there is a place for them.
        """
        own, passing = self._own, 0
        kvs: dict[SiteKey, KV] = {}
        errors: list[list[float]] = []
        own.watch()
        own.working.release()  # there is room for 8 bits then
        for key, site in own.sites.items():
            leaving = own.budget.device is not None and site.device.type != "cpu"
            where, pinned = ("cpu" if leaving else site.device), leaving and site.device.type == "cuda"
            whole = own.hold.kv[key] if own.hold else site.current
            span = consecutive(getattr(shot, site.size.space) for shot in stage.shots)[n].slice
            parts: list[Tensor] = [x[:, span] for x in whole]
            if own.storage != "native":
                small = [quantized(x, own.storage) for x in parts]
                errors.append([relative_error(x, q) for x, q in zip(parts, small, strict=True) if not x.is_meta])
                if leaving:
                    passing = max(passing, sum(x.nbytes for x in small))
                    small = [copied(x, where, pinned=pinned) for x in small]
                kvs[key] = KV(*small)
            elif len(stage.shots) == 1:
                kvs[key] = KV(*whole)
            else:
                kvs[key] = KV(*(copied(x, where, pinned=pinned) for x in parts))
        own.watch(passing)
        worst = [max(each) for each in zip(*errors, strict=True)]
        return kvs, (worst[0], worst[1]) if worst else None

    @contextmanager
    def _holding(self) -> Iterator[None]:
        own, stage = self._own, self._own.stage
        if stage is None:
            raise ValueError(
                "hold: no call has written to this cache since the last append, select or reposition; "
                "call the scene model with cache=cache first"
            )
        plan = planned(own, own.shots, held=stage)
        yield
        own.hold = None  # one that is held already is given up
        carry_out(own, plan)
        kv = {}
        for key, site in own.sites.items():
            kv[key] = site.current if site.staged else copies(site.current, site.device)
            site.staged, site.written = None, 0
        own.hold, own.stage = Hold(stage, kv), None

    @contextmanager
    def _selecting(self, ids: Iterable[Hashable], reposition: bool) -> Iterator[None]:
        chosen = self._known(ids)
        history = [self._own.kept[i].entry for i in chosen]
        if any(entry.shot.role == "global" for entry in history[1:]):
            raise ValueError(f"ids: got {chosen}, expected a global shot to come first, as in its scene")
        with self._showing(_end_to_end(history) if reposition else history):
            yield

    @contextmanager
    def _reordering(self, ids: Iterable[Hashable], reposition: bool) -> Iterator[None]:
        chosen, history = list(ids), self._own.history
        if len(chosen) != len(history) or set(chosen) != set(history):
            raise ValueError(f"ids: got {chosen}, expected the selected shots, {history}, in another order")
        with self._selecting(chosen, reposition):
            yield

    @contextmanager
    def _repositioning(self, origins: Sequence[int] | None) -> Iterator[None]:
        history = self.shots
        if origins is not None and len(origins) != len(history):
            raise ValueError(f"origins: got {len(origins)}, expected {len(history)}, one for each selected shot")
        if wrong := [origin for origin in origins or () if not isinstance(origin, int)]:
            raise ValueError(f"origins: got {wrong}, expected whole numbers: steps along the diagonal")
        placed = [replace(e, origin=origin) for e, origin in zip(history, origins or (), strict=False)]
        with self._showing(_end_to_end(history) if origins is None else placed):
            yield

    @contextmanager
    def _showing(self, history: Sequence[CachedShot]) -> Iterator[None]:
        """Let calls see other shots, or the same elsewhere: what is staged was written behind others."""
        plan = planned(self._own, history)
        yield
        carry_out(self._own, plan, keep_stage=False)

    @contextmanager
    def _dropping(self, ids: Sequence[Hashable]) -> Iterator[None]:
        own, gone = self._own, set(self._known(ids))
        kept = {i: each for i, each in own.kept.items() if i not in gone}
        plan = planned(own, [entry for entry in own.shots if entry.id not in gone], kept)
        yield
        carry_out(own, plan, keep_stage=gone.isdisjoint(own.history))
        if not kept and self.staged is None:
            own.sites, own.reserve = {}, {}
            own.resize()

    @contextmanager
    def _pinning(self, ids: Sequence[Hashable], pinned: bool) -> Iterator[None]:
        own, chosen = self._own, self._known(ids)
        kept = own.kept | {i: replace(own.kept[i], entry=replace(own.kept[i].entry, pinned=pinned)) for i in chosen}
        plan = planned(own, [kept[i].entry for i in own.history], kept)
        yield
        carry_out(own, plan)

    @contextmanager
    def _moving(self, ids: Sequence[Hashable], tier: Tier) -> Iterator[None]:
        if tier not in ("device", "host", "disk"):
            raise ValueError(f'tier: got {tier!r}, expected "device", "host" or "disk"')
        own, chosen = self._own, self._known(ids)
        plan = planned(own, own.shots, own.kept | {i: replace(own.kept[i], wish=tier) for i in chosen})
        if elsewhere := [i for i in chosen if plan.tiers[i] != tier]:
            raise ValueError(
                f"ids: {elsewhere} do not fit on the {tier}, of which the budget is {getattr(own.budget, tier)} "
                "bytes; give a larger one, drop shots, or select fewer"
            )
        yield
        carry_out(own, plan)

    def _site(self, key: SiteKey, space: Space, k: Tensor | RowParts, v: Tensor) -> Site:
        """A site that a call writes to, new or of the size and on the device that it had."""
        size = SiteSize(space, k.shape[0], k.shape[2], (k.shape[3], v.shape[3]), k.dtype)
        site = self._own.sites.get(key)
        if site is None and any(kept.entry.tokens(space) for kept in self._own.kept.values()):
            raise ValueError(
                f"cache: it holds {len(self._own.kept)} shots, but nothing for block {key[0]}, site {key[1]!r}; "
                "a cache belongs to the model and branch that filled it"
            )
        if site is not None and self._own.kept and size != site.size:
            was = site.size
            raise ValueError(
                f"cache: it holds keys of batch {was.entries}, heads and channels {[was.heads, was.channels[0]]}, "
                f"{was.dtype}; this call has {size.entries}, {[size.heads, size.channels[0]]}, {size.dtype}; "
                "use another cache"
            )
        if site is not None and self._own.kept and v.device != site.device:
            raise ValueError(
                f"cache: its keys belong on {site.device}, this call's are on {v.device}; run the model there, or save "
                f"the cache and load it with device={str(v.device)!r}"
            )
        if site is None or (size, v.device) != (site.size, site.device):
            site = self._own.sites[key] = Site(size, v.device)
            self._own.resize()
        return site

    def _make_room(self, site: Site, start: int, stop: int) -> None:
        """Let rows have room behind the history, and shots leave the device where they must, before a call writes."""
        own, space, before = self._own, site.size.space, dict(self._own.reserve)
        behind = start and own.in_rows
        full = behind and not (site.row and site.row.takes(start, stop, branch=own.me))
        if not full and stop - start <= before.get(space, -1):
            return
        own.reserve[space] = max(stop - start, before.get(space, 0))
        try:
            plan = planned(own, own.shots, writing=Writing(space, stop - start))
        except BaseException:
            own.reserve = before
            raise
        carry_out(own, plan)


def together(*changes: AbstractContextManager[None]) -> None:
    """Make changes, all or none: each is planned first, which may fail, then carried out."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)


def _end_to_end(history: Sequence[CachedShot]) -> list[CachedShot]:
    origins = accumulate((entry.extent for entry in history), initial=0)
    return [replace(entry, origin=origin) for entry, origin in zip(history, origins, strict=False)]
