"""Where everything that a cache holds is to stand.

:func:`arrange` decides it, and may raise; :func:`carry_out` moves the tensors there.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from lct_core.cache.budget import Storage
from lct_core.cache.holdings import HeldShot, Holdings
from lct_core.cache.rows import PlacedShot, Row, SiteRows, empty
from lct_core.cache.shots import CachedShot, Space, StagedShots, Tier
from lct_core.cache.tiers import KV, NOTHING, ShotFile, SiteKey, bring, copied, copies, write_shot
from lct_core.layout import consecutive


class Writing(NamedTuple):
    """How many tokens the current call writes to the sites of a space."""

    space: Space
    tokens: int


class Arrangement(NamedTuple):
    """Where every shot is to be.

    Args:
        entries: What is known of each shot, as users will see it.
        history: The selected ones, in order.
        kept: Every shot that stays.
        tiers: Where each is to be.
        moved: Copies, made already, of the shots that go to host memory or to files.
        writing: What the current call writes.
    """

    entries: dict[Hashable, CachedShot]
    history: list[Hashable]
    kept: dict[Hashable, HeldShot]
    tiers: dict[Hashable, Tier]
    moved: dict[Hashable, dict[SiteKey, KV] | ShotFile]
    writing: Writing | None

    @property
    def shown(self) -> list[CachedShot]:
        """The selected history."""
        return [self.entries[i] for i in self.history]

    def in_rows(self, storage: Storage) -> bool:
        """Whether the history is to stand in rows."""
        return storage == "native" and all(self.tiers[i] == "device" for i in self.history)

    def behind(self, space: Space) -> int | None:
        """How many tokens the current call writes to a space; None while it writes to another, or there is no call."""
        return self.writing.tokens if self.writing and self.writing.space == space else None


def arrange(
    here: Holdings,
    history: Sequence[CachedShot],
    kept: dict[Hashable, HeldShot] | None = None,
    *,
    copying: StagedShots | None = None,
    writing: Writing | None = None,
) -> Arrangement:
    """Decide where every shot is to be. May raise; changes nothing.

    Args:
        here: What the cache holds.
        history: The shots that are to be seen.
        kept: What it is to hold (default: what it holds).
        copying: Staged shots that are about to be copied, see :meth:`KVCache.hold`.
        writing: What the current call writes.

    Raises:
        ValueError: where the budget has no room, or the policy does not rank the shots.
        OSError: where a file can't be written.
    """
    kept = here.kept if kept is None else kept
    entries = {i: replace(each.entry, selected=False) for i, each in kept.items()}
    entries |= {entry.id: replace(entry, selected=True) for entry in history}
    tiers: dict[Hashable, Tier] = {
        i: kept[i].wish or ("device" if entry.selected else entry.tier) for i, entry in entries.items()
    }
    target = Arrangement(entries, [entry.id for entry in history], kept, tiers, {}, writing)
    if (here.budget.device, here.budget.host) != (None, None):
        _fit(here, target, copying)
    for i, tier in tiers.items():
        if tier != "device" and tier != entries[i].tier:
            target.moved[i] = _elsewhere(here, kept[i], tier)
    return target


def carry_out(here: Holdings, target: Arrangement, *, keep_staged: bool = True) -> None:
    """Bring every shot to its place, one site after another, and free what is no longer needed."""
    here.watch()
    if not keep_staged:
        here.last_call = here.hold = None
    here.working.resize({})
    here.kept, here.history = target.kept, target.history
    for i, elsewhere in target.moved.items():
        target.kept[i].kv = elsewhere
        target.kept[i].entry = replace(target.kept[i].entry, tier=target.tiers[i])
    for kept in target.kept.values():
        if kept.entry.tier == "disk" and target.tiers[kept.entry.id] == "device":
            kept.kv = {**kept.kv}
    running = here.device_bytes
    for key, site in here.sites.items():
        before = {id(x): x.nbytes for x in here.on_device(key, site)}
        row, standing, staged, kv = _rearranged(here, key, site, target, keep_staged=keep_staged)
        near = [x for i, each in kv.items() if target.tiers[i] == "device" for x in each if x is not None]
        after = {id(x): x.nbytes for x in (*((row.k, row.v) if row else ()), *(staged or ()), *near)}
        here.peak = max(here.peak, running + sum(n for x, n in after.items() if x not in before))
        running += sum(after.values()) - sum(before.values())
        site.row, site.standing, site.staged = row, standing, staged
        site.current_tokens = site.current_tokens if keep_staged else 0
        for i, each in kv.items():
            own = target.kept[i].kv
            assert isinstance(own, dict)
            own[key] = each
    for i, kept in target.kept.items():
        kept.entry = replace(target.entries[i], tier=target.tiers[i])
    here.resize()


def afford(here: Holdings, nbytes: tuple[int, int]) -> None:
    """Refuse tensors that the device's budget has no room for, before they are made."""
    limit, needed = here.budget.device, here.device_bytes + sum(nbytes)
    needed += here.working.wanted - here.working.nbytes
    if limit is not None and needed > limit:
        raise ValueError(_over(f"{needed} bytes on the device, behind {len(here.history)} shots", "device", limit))


# How an arrangement is made.


def _fit(here: Holdings, target: Arrangement, copying: StagedShots | None) -> None:
    """Send shots from the device to host memory, then from there to files, until the budget has room.

    Those that the policy ranks last leave first.
    """
    sizes = [site.size for site in here.sites.values()]
    nbytes = {
        i: sum(sum(size.nbytes(entry.tokens(size.space), here.storage)) for size in sizes)
        for i, entry in target.entries.items()
    }
    shots = list(target.entries.values())
    ranking = list(here.budget.policy(shots))
    if len(ranking) != len(shots) or set(ranking) != set(target.entries):
        raise ValueError(f"policy: it ranks {ranking}, expected each of {list(target.entries)} once")
    ranking.sort(key=lambda i: target.kept[i].wish != "device")

    def leave(tier: Tier, further: Tier, limit: int | None, needed: Callable[[], int]) -> None:
        while limit is not None and needed() > limit:
            going = next((i for i in reversed(ranking) if target.tiers[i] == tier and nbytes[i]), None)
            if going is None or (further == "disk" and here.budget.folder is None):
                raise ValueError(_over(f"{needed()} bytes {_PLACES[tier]}, for {len(shots)} shots", tier, limit))
            target.tiers[going] = further

    leave("device", "host", here.budget.device, lambda: _peak_of(here, target, copying))
    in_host = lambda: sum(nbytes[i] for i, at in target.tiers.items() if at == "host")  # noqa: E731
    leave("host", "disk", here.budget.host, in_host)


def _peak_of(here: Holdings, target: Arrangement, copying: StagedShots | None) -> int:
    """Most bytes on the device while :func:`carry_out` runs, and in the next call."""
    in_rows = target.in_rows(here.storage)
    stays = {i for i, kept in target.kept.items() if kept.entry.tier == target.tiers[i] == "device"}
    running = here.device_bytes - here.working.nbytes
    running -= sum(kept.nbytes for i, kept in here.kept.items() if kept.entry.tier == "device" and i not in stays)
    peak = running
    for key, site in here.sites.items():
        space, size = site.size.space, site.size
        placed = here.placed(target.shown, space)
        start = sum(shot.tokens for shot in placed)
        behind = target.behind(space)
        behind = here.reserve.get(space, 0) if behind is None else behind
        before = sum(x.nbytes for x in site.staged or ()) + (site.row.nbytes if site.row else 0)
        if not in_rows:
            after = fresh = sum(size.nbytes(here.reserve.get(space, 0)))
        elif site.row is not None and _stays(here, site, placed, behind):
            after, fresh = site.row.nbytes, 0
        else:
            after = fresh = sum(size.nbytes(start + behind))
        for i, entry in target.entries.items():
            if target.tiers[i] != "device" or not entry.tokens(space):
                continue
            own = target.kept[i].kv.get(key, NOTHING) if i in stays else NOTHING
            wanted = _stored(here, entry, space, in_rows=in_rows)
            for nbytes, x, is_wanted in zip(size.nbytes(entry.tokens(space), here.storage), own, wanted, strict=True):
                before += nbytes * (x is not None)
                after += nbytes * is_wanted
                fresh += nbytes * (is_wanted and x is None)
        if copying is not None:
            after += sum(size.nbytes(copying.tokens(space)))
            fresh += sum(size.nbytes(copying.tokens(space)))
        peak = max(peak, running + fresh)
        running += after - before
    working = {} if in_rows else here.working_sizes(target.shown)
    return max(peak, running + here.working.nbytes_of(working))


def _elsewhere(here: Holdings, kept: HeldShot, tier: Tier) -> dict[SiteKey, KV] | ShotFile:
    """A shot's keys and values in host memory or in a file."""
    if tier != "disk":
        return {key: _in_host(here, kept, key, site) for key, site in here.sites.items()}
    if kept.files:
        return next(iter(kept.files.values()))
    if here.budget.folder is None:
        raise ValueError(
            f'tier: got "disk" for {kept.entry.id!r}, but the cache has no folder for files, expected '
            "KVCache(budget=Budget(folder=...))"
        )
    file = write_shot(here.budget.folder, kept.entry.id, {key: here.original(kept, key) for key in here.sites})
    kept.files[file.path.parent] = file
    return file


def _in_host(here: Holdings, kept: HeldShot, key: SiteKey, site: SiteRows) -> KV:
    own = kept.kv.get(key, NOTHING) if kept.entry.tier == "device" and site.device.type == "cpu" else NOTHING
    pinned = site.device.type == "cuda"
    return KV(
        *(
            copied(y, "cpu", pinned=pinned) if x is None else x  # on a CPU, the same memory
            for x, y in zip(own, here.original(kept, key), strict=True)
        )
    )


# What the decision and its carrying out share.


def _stays(here: Holdings, site: SiteRows, placed: tuple[PlacedShot, ...], behind: int) -> bool:
    """Whether a site's row can be used further: its shots stay where they are, and the others fit behind them."""
    done = len(site.standing)
    if site.row is None or placed[:done] != site.standing:
        return False
    start, stop = (sum(shot.tokens for shot in part) for part in (site.standing, placed))
    if start == stop and not behind:
        return True
    return (start == stop or not site.current_tokens) and site.row.takes(start, stop + behind, branch=here.me)


def _stored(here: Holdings, entry: CachedShot, space: Space, *, in_rows: bool) -> tuple[bool, bool]:
    """Whether a shot on the device needs tensors of its own for its keys, and for its values, beside the row.

    A selected shot that stands in rows needs none, except that one moved along the diagonal keeps its original keys.
    """
    inside = in_rows and entry.selected
    return not inside or here.steps(entry, space) != 0, not inside


# How it is carried out.


def _rearranged(
    here: Holdings, key: SiteKey, site: SiteRows, target: Arrangement, *, keep_staged: bool
) -> tuple[Row | None, tuple[PlacedShot, ...], tuple[Tensor, Tensor] | None, dict[Hashable, KV]]:
    """A site as it is to be: its row and what stands there, staged shots, and the shots that are on the device."""
    space, in_rows = site.size.space, target.in_rows(here.storage)
    placed = here.placed(target.shown, space) if in_rows else ()
    behind = target.behind(space) or 0
    written = site.current_tokens if keep_staged else 0
    stop = sum(shot.tokens for shot in placed)
    stays = in_rows and _stays(here, site, placed, behind)
    row, done = (site.row, len(site.standing)) if stays else (None, 0)
    if in_rows and row is None and (placed or written):
        room = stop + max(behind or here.reserve.get(space, 0), written)
        row = Row(*empty(site.size, here.room(space, room), site.device), here.me, stop)
    spans = consecutive(shot.tokens for shot in placed)
    for shot, span in list(zip(placed, spans, strict=True))[done:]:
        assert row is not None
        _put(here, target.kept[shot.id], key, row.k[:, span.slice], row.v[:, span.slice], shot)
        row.owner, row.used = here.me, stop
    kv = {
        i: _near(here, kept, key, target.entries[i], in_rows=in_rows)
        for i, kept in target.kept.items()
        if target.tiers[i] == "device"
    }
    staged = site.staged
    if written and in_rows and (staged is not None or not stays):
        assert row is not None
        for part, x in zip((row.k, row.v), site.current, strict=True):
            part[:, stop : stop + written] = x
    if written and not in_rows and staged is None:
        staged = copies(site.current, site.device)
    return row, placed, None if in_rows else staged, kv


def _put(here: Holdings, kept: HeldShot, key: SiteKey, keys: Tensor, values: Tensor, shot: PlacedShot) -> None:
    """Bring a shot to its place in a new row: as it stands in the old one, or from where it was written."""
    site = here.sites[key]
    if shot in site.standing and site.row is not None:
        spans = consecutive(each.tokens for each in site.standing)
        span = spans[site.standing.index(shot)].slice
        keys.copy_(site.row.k[:, span])
        values.copy_(site.row.v[:, span])
        return
    k, v = here.original(kept, key)
    bring(k, keys, here.turn(shot.steps, keys))
    bring(v, values)


def _near(here: Holdings, kept: HeldShot, key: SiteKey, entry: CachedShot, *, in_rows: bool) -> KV:
    """The tensors of its own that a shot on the device has at a site, see :func:`_stored`."""
    site = here.sites[key]
    if not entry.tokens(site.size.space):
        return kept.kv.get(key, NOTHING)
    reusable = kept.entry.tier == "device" or (kept.entry.tier == "host" and site.device.type == "cpu")
    own = kept.kv.get(key, NOTHING) if reusable else NOTHING
    wanted = _stored(here, entry, site.size.space, in_rows=in_rows)
    return KV(
        *(
            (x if x is not None else copied(y, site.device)) if is_wanted else None
            for x, y, is_wanted in zip(own, here.original(kept, key), wanted, strict=True)
        )
    )


_PLACES: dict[Tier, str] = {"device": "on the device", "host": "in host memory", "disk": "in files"}


def _over(needed: str, place: str, limit: int) -> str:
    return (
        f"budget: {needed}, but {place}={limit}; give a larger budget, a folder=, a storage in 8 bits, drop shots, or "
        "select fewer"
    )
