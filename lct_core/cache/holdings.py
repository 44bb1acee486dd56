"""What a cache holds, and where: plain data. ``arrangement.py`` decides where it goes, ``changes.py`` changes it."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lct_core.cache.budget import STORAGES, Budget, Storage
from lct_core.cache.rows import PlacedShot, SiteRows, empty
from lct_core.cache.shots import CachedShot, Space, StagedShots, Tier
from lct_core.cache.tiers import KV, NOTHING, Pair, ShotFile, SiteKey, Stored, bring
from lct_core.cache.working import WorkingRows
from lct_core.coordinates import Scheme
from lct_core.layout import consecutive
from lct_core.rope import Pairing, Rotation, diagonal_rotation


@dataclass(eq=False)
class HeldShot:
    """A shot: what is known of it, its keys as they were written and its values.

    Args:
        entry: What users see of it.
        kv: Its keys and values at every site; None for what stands in the site's row.
        errors: The error of storage in 8 bits, of its keys and of its values.
        files: Its files, by folder.
        wish: Where :meth:`KVCache.move` put it, whatever the policy says.
    """

    entry: CachedShot
    kv: dict[SiteKey, KV] | ShotFile
    errors: tuple[float, float] | None = None
    files: dict[Path, ShotFile] = field(default_factory=dict)
    wish: Tier | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what does not stand in rows."""
        return sum(kv.nbytes for kv in self.kv.values())

    def twin(self) -> "HeldShot":
        """The same for a fork: tensors and files are shared, they never change."""
        kv = self.kv if isinstance(self.kv, ShotFile) else dict(self.kv)
        return replace(self, kv=kv, files=dict(self.files))


class Hold(NamedTuple):
    """Copies of staged shots, which later calls do not overwrite."""

    shots: StagedShots
    kv: dict[SiteKey, tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Holdings:
    """All that a cache holds.

    Args:
        capacity: As :class:`KVCache` takes it.
        storage: As :class:`KVCache` takes it.
        budget: As :class:`KVCache` takes it.
        branch: As :class:`KVCache` takes it.
        kept: Every shot, in the order of their appending.
        history: The selected ones, in the order in which they are seen.
        sites: What every attention site has, in the order in which they are called.
        reserve: Most tokens that a call has written, by space.
        working: Rows that a history is copied to for each site's attention, where it does not stand in rows.
        last_call: The shots that the last call wrote.
        hold: Shots of an earlier call, copied by :meth:`KVCache.hold`.
        scheme: Of the model that wrote the shots.
        diagonal: The angles of one step along the diagonal.
        pairing: Which channels are rotated together.
        peak: Most bytes on the device until the last change.
        me: Marks the rows that this branch owns, see :class:`Row`.
    """

    capacity: int
    storage: Storage
    budget: Budget
    branch: str = ""
    kept: dict[Hashable, HeldShot] = field(default_factory=dict)
    history: list[Hashable] = field(default_factory=list)
    sites: dict[SiteKey, SiteRows] = field(default_factory=dict)
    reserve: dict[Space, int] = field(default_factory=dict)
    working: WorkingRows = field(default_factory=WorkingRows)
    last_call: StagedShots | None = None
    hold: Hold | None = None
    scheme: Scheme | None = None
    diagonal: Tensor | None = None
    pairing: Pairing | None = None
    peak: int = 0
    me: object = field(default_factory=object)

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise ValueError(f"storage: got {self.storage!r}, expected one of {list(STORAGES)}")
        if not isinstance(self.capacity, int) or isinstance(self.capacity, bool) or self.capacity < 0:
            raise ValueError(f"capacity: got {self.capacity!r}, expected a number of tokens, 0 or more")

    def fork(self) -> "Holdings":
        """The same for another branch: rows, tensors and files are shared. What is staged stays behind."""
        kept = {i: each.twin() for i, each in self.kept.items()}
        twin = Holdings(self.capacity, self.storage, self.budget, self.branch, kept, [*self.history])
        twin.reserve = dict(self.reserve)
        twin.scheme, twin.diagonal, twin.pairing = self.scheme, self.diagonal, self.pairing
        for key, site in self.sites.items():
            if site.row is not None and site.row.owner is self.me and not site.current_tokens:
                site.row.owner = None
            twin.sites[key] = SiteRows(site.size, site.device, site.row, site.standing)
        twin.resize()
        return twin

    # Its shots.

    @property
    def held(self) -> tuple[CachedShot, ...]:
        """Every shot: the selected history, then the others as they were appended."""
        return (*self.shots, *(kept.entry for kept in self.kept.values() if not kept.entry.selected))

    @property
    def ids(self) -> tuple[Hashable, ...]:
        """The ids of every shot, the selected history first."""
        return tuple(entry.id for entry in self.held)

    @property
    def staged(self) -> StagedShots | None:
        """What :meth:`KVCache.append` would take: what :meth:`KVCache.hold` copied, else what the last call wrote."""
        return self.hold.shots if self.hold else self.last_call

    @property
    def shots(self) -> tuple[CachedShot, ...]:
        """The selected history, in the order in which it is seen."""
        return tuple(self.kept[i].entry for i in self.history)

    def tokens(self, space: Space) -> int:
        """How many keys it has at the sites of a space."""
        return sum(self.kept[i].entry.tokens(space) for i in self.history)

    @property
    def in_rows(self) -> bool:
        """Whether it stands in rows: all of it is on the device as the model attends to it."""
        return self.storage == "native" and all(self.kept[i].entry.tier == "device" for i in self.history)

    def steps(self, entry: CachedShot, space: Space) -> int:
        """How far a shot's keys are from where they were written: text that is cross-attended has no place."""
        placed = space != "text" and self.diagonal is not None and self.pairing is not None
        return entry.origin - entry.written if placed else 0

    def placed(self, history: Iterable[CachedShot], space: Space) -> tuple[PlacedShot, ...]:
        """How a history stands in a row; shots without tokens there are left out."""
        each = (PlacedShot(entry.id, entry.tokens(space), self.steps(entry, space)) for entry in history)
        return tuple(shot for shot in each if shot.tokens)

    def turn(self, steps: int, like: Tensor) -> Rotation | None:
        """The constant rotation R(steps) of keys that are so many steps from where they were written."""
        if not steps or self.diagonal is None or self.pairing is None:
            return None
        by = diagonal_rotation(steps, like, diagonal=self.diagonal, pairing=self.pairing)
        return Rotation(by.cos.expand(like.shape[1], -1, -1), by.sin.expand(like.shape[1], -1, -1), self.pairing)

    # Bytes.

    @property
    def bytes_by_tier(self) -> dict[Tier, int]:
        """Bytes on the device, in host memory and in files."""
        tiers: dict[Tier, int] = {"device": self.device_bytes, "host": 0, "disk": 0}
        for kept in self.kept.values():
            if kept.entry.tier != "device":
                tiers[kept.entry.tier] += kept.nbytes
        return tiers

    @property
    def device_bytes(self) -> int:
        """Bytes of keys and values on the device, of this cache and of what it shares with forks."""
        found = [x for key, site in self.sites.items() for x in self.on_device(key, site)]
        held = [x for kv in self.hold.kv.values() for x in kv] if self.hold else []
        return sum({id(x): x.nbytes for x in (*found, *held)}.values()) + self.working.nbytes

    def on_device(self, key: SiteKey, site: SiteRows) -> list[Stored]:
        """The tensors on the device for a site."""
        near = [kept.kv[key] for kept in self.kept.values() if kept.entry.tier == "device" and key in kept.kv]
        row = [] if site.row is None else [site.row.k, site.row.v]
        return [*row, *(site.staged or ()), *(x for kv in near for x in kv if x is not None)]

    def watch(self, passing: int = 0) -> None:
        """Update the peak, temporary bytes included."""
        self.peak = max(self.peak, self.device_bytes + passing)

    def room(self, space: Space, tokens: int) -> int:
        """How long a row is made that must hold so many tokens."""
        return tokens if space == "text" or self.budget.device is not None else max(tokens, self.capacity)

    # Where keys and values are, and how they come to be attended to.

    def original(self, kept: HeldShot, key: SiteKey) -> Pair:
        """A shot's keys as they were written, and its values, wherever they are."""
        site, own = self.sites[key], kept.kv.get(key, NOTHING)
        if own.k is not None and own.v is not None:
            return own.k, own.v
        tokens = kept.entry.tokens(site.size.space)
        if not tokens or site.row is None:
            return empty(site.size, tokens, site.device)
        spans = consecutive(shot.tokens for shot in site.standing)
        span = spans[[shot.id for shot in site.standing].index(kept.entry.id)].slice
        return site.row.k[:, span] if own.k is None else own.k, site.row.v[:, span]

    def resize(self) -> None:
        """Set the size of the working rows: none where the history stands in rows."""
        self.working.resize({} if self.in_rows else self.working_sizes(self.shots))

    def working_sizes(self, history: Sequence[CachedShot]) -> dict[torch.device, tuple[int, int]]:
        """Bytes of keys and of values in a working row of every device: for the longest history and call."""
        sizes: dict[torch.device, tuple[int, int]] = {}
        for site in self.sites.values():
            space = site.size.space
            tokens = sum(entry.tokens(space) for entry in history) + self.reserve.get(space, 0)
            most, here = sizes.get(site.device, (0, 0)), site.size.nbytes(tokens)
            sizes[site.device] = max(most[0], here[0]), max(most[1], here[1])
        return sizes

    def brought(self, key: SiteKey) -> tuple[Tensor, Tensor]:
        """A working row that begins with a site's history; it holds until the next site's turn."""
        site = self.sites[key]
        return self.working.history(key, site, self._row_tokens(site), self._bring)

    def bring_ahead(self, key: SiteKey) -> None:
        """Have the history of the next site brought; behind the last, that of the first, for the next call."""
        if self.history:
            order = list(self.sites)
            following = order[(order.index(key) + 1) % len(order)]
            site = self.sites[following]
            self.working.ahead(following, site, self._row_tokens(site), self._bring)

    def _row_tokens(self, site: SiteRows) -> int:
        return self.tokens(site.size.space) + self.reserve.get(site.size.space, 0)

    def _bring(self, key: SiteKey, keys: Tensor, values: Tensor) -> None:
        space = self.sites[key].size.space
        for entry, span in zip(self.shots, consecutive(e.tokens(space) for e in self.shots), strict=True):
            if span.size:
                k, v = self.original(self.kept[entry.id], key)
                bring(k, keys[:, span.slice], self.turn(self.steps(entry, space), keys[:, span.slice]))
                bring(v, values[:, span.slice])
