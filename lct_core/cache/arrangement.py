"""Where everything that a cache holds is to stand: planned first, which may fail, then carried out."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from lct_core.cache.budget import Storage
from lct_core.cache.holdings import Holdings, Kept
from lct_core.cache.rows import Row, Segment, Site, empty
from lct_core.cache.shots import CachedShot, Space, Stage, Tier
from lct_core.cache.tiers import KV, NOTHING, ShotFile, SiteKey, copied, copies, place, write_shot
from lct_core.layout import consecutive


class Writing(NamedTuple):
    """How many tokens the present call writes to the sites of a space."""

    space: Space
    tokens: int


class Plan(NamedTuple):
    """Where every shot is to be.

    Args:
        entries: What is known of each, as it will be seen.
        history: The selected ones, in order.
        kept: Every shot that stays.
        tiers: Where each is to be.
        moved: What leaves its tier, where it is to be already.
        writing: What the present call writes.
    """

    entries: dict[Hashable, CachedShot]
    history: list[Hashable]
    kept: dict[Hashable, Kept]
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
        """How many tokens the present call writes to a space, if it is its turn."""
        return self.writing.tokens if self.writing and self.writing.space == space else None


def planned(
    here: Holdings,
    history: Sequence[CachedShot],
    kept: dict[Hashable, Kept] | None = None,
    *,
    held: Stage | None = None,
    writing: Writing | None = None,
) -> Plan:
    """Where every shot is to be. What can fail comes here, and changes nothing.

    Args:
        here: What the cache holds.
        history: The shots that are to be seen.
        kept: What it is to hold (default: what it holds).
        held: What is to be held besides.
        writing: What the present call writes.

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
    plan = Plan(entries, [entry.id for entry in history], kept, tiers, {}, writing)
    if (here.budget.device, here.budget.host) != (None, None):
        _fit(here, plan, held)
    for i, tier in tiers.items():
        if tier != "device" and tier != entries[i].tier:
            plan.moved[i] = _elsewhere(here, kept[i], tier)
    return plan


def carry_out(here: Holdings, plan: Plan, *, keep_stage: bool = True) -> None:
    """Bring every shot to its place, one site after another, and free what is in the way."""
    here.watch()
    if not keep_stage:
        here.stage = here.hold = None
    here.working.resize({})
    here.kept, here.history = plan.kept, plan.history
    for i, elsewhere in plan.moved.items():
        plan.kept[i].kv = elsewhere
        plan.kept[i].entry = replace(plan.kept[i].entry, tier=plan.tiers[i])
    for kept in plan.kept.values():
        if kept.entry.tier == "disk" and plan.tiers[kept.entry.id] == "device":
            kept.kv = {**kept.kv}
    running = here.device_bytes
    for key, site in here.sites.items():
        before = {id(x): x.nbytes for x in here.on_device(key, site)}
        row, standing, staged, kv = _arranged(here, key, site, plan, keep_stage=keep_stage)
        near = [x for i, each in kv.items() if plan.tiers[i] == "device" for x in each if x is not None]
        after = {id(x): x.nbytes for x in (*((row.k, row.v) if row else ()), *(staged or ()), *near)}
        here.peak = max(here.peak, running + sum(n for x, n in after.items() if x not in before))
        running += sum(after.values()) - sum(before.values())
        site.row, site.standing, site.staged = row, standing, staged
        site.written = site.written if keep_stage else 0
        for i, each in kv.items():
            own = plan.kept[i].kv
            assert isinstance(own, dict)
            own[key] = each
    for i, kept in plan.kept.items():
        kept.entry = replace(plan.entries[i], tier=plan.tiers[i])
    here.resize()


def afford(here: Holdings, nbytes: tuple[int, int]) -> None:
    """Refuse what the device has no room for, before it is made."""
    limit, needed = here.budget.device, here.device_bytes + sum(nbytes)
    needed += here.working.wanted - here.working.nbytes
    if limit is not None and needed > limit:
        raise ValueError(_over(f"{needed} bytes on the device, behind {len(here.history)} shots", "device", limit))


# How a plan is made.


def _fit(here: Holdings, plan: Plan, held: Stage | None) -> None:
    """Send shots away from the device, then from host memory, until the budget has room: the least worthy first."""
    sizes = [site.size for site in here.sites.values()]
    nbytes = {
        i: sum(sum(size.nbytes(entry.tokens(size.space), here.storage)) for size in sizes)
        for i, entry in plan.entries.items()
    }
    shots = list(plan.entries.values())
    ranking = list(here.budget.policy(shots))
    if len(ranking) != len(shots) or set(ranking) != set(plan.entries):
        raise ValueError(f"policy: it ranks {ranking}, expected each of {list(plan.entries)} once")
    ranking.sort(key=lambda i: plan.kept[i].wish != "device")

    def leave(tier: Tier, further: Tier, limit: int | None, needed: Callable[[], int]) -> None:
        while limit is not None and needed() > limit:
            going = next((i for i in reversed(ranking) if plan.tiers[i] == tier and nbytes[i]), None)
            if going is None or (further == "disk" and here.budget.folder is None):
                raise ValueError(_over(f"{needed()} bytes {_PLACES[tier]}, for {len(shots)} shots", tier, limit))
            plan.tiers[going] = further

    leave("device", "host", here.budget.device, lambda: _peak_of(here, plan, held))
    in_host = lambda: sum(nbytes[i] for i, at in plan.tiers.items() if at == "host")  # noqa: E731
    leave("host", "disk", here.budget.host, in_host)


def _peak_of(here: Holdings, plan: Plan, held: Stage | None) -> int:
    """Most bytes on the device on the way to a plan and in the next call: what :func:`carry_out` and it will take."""
    in_rows = plan.in_rows(here.storage)
    stays = {i for i, kept in plan.kept.items() if kept.entry.tier == plan.tiers[i] == "device"}
    running = here.device_bytes - here.working.nbytes
    running -= sum(
        kv.nbytes
        for i, kept in here.kept.items()
        if kept.entry.tier == "device" and i not in stays
        for kv in kept.kv.values()
    )
    peak = running
    for key, site in here.sites.items():
        space, size = site.size.space, site.size
        segments = here.segments(plan.shown, space)
        start = sum(segment.tokens for segment in segments)
        behind = plan.behind(space)
        behind = here.reserve.get(space, 0) if behind is None else behind
        before = sum(x.nbytes for x in site.staged or ()) + (site.row.nbytes if site.row else 0)
        if not in_rows:
            after = fresh = sum(size.nbytes(here.reserve.get(space, 0)))
        elif site.row is not None and _stays(here, site, segments, behind):
            after, fresh = site.row.nbytes, 0
        else:
            after = fresh = sum(size.nbytes(start + behind))
        for i, entry in plan.entries.items():
            if plan.tiers[i] != "device" or not entry.tokens(space):
                continue
            own = plan.kept[i].kv.get(key, NOTHING) if i in stays else NOTHING
            wanted = _own(here, entry, space, in_rows=in_rows)
            for nbytes, x, is_wanted in zip(size.nbytes(entry.tokens(space), here.storage), own, wanted, strict=True):
                before += nbytes * (x is not None)
                after += nbytes * is_wanted
                fresh += nbytes * (is_wanted and x is None)
        if held is not None:
            after += sum(size.nbytes(held.tokens(space)))
            fresh += sum(size.nbytes(held.tokens(space)))
        peak = max(peak, running + fresh)
        running += after - before
    working = {} if in_rows else here.working_sizes(plan.shown)
    return max(peak, running + here.working.nbytes_of(working))


def _elsewhere(here: Holdings, kept: Kept, tier: Tier) -> dict[SiteKey, KV] | ShotFile:
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


def _in_host(here: Holdings, kept: Kept, key: SiteKey, site: Site) -> KV:
    own = kept.kv.get(key, NOTHING) if kept.entry.tier == "device" and site.device.type == "cpu" else NOTHING
    pinned = site.device.type == "cuda"
    return KV(
        *(
            copied(y, "cpu", pinned=pinned) if x is None else x  # on a CPU, the same memory
            for x, y in zip(own, here.original(kept, key), strict=True)
        )
    )


# What is the same for a plan and for its carrying out.


def _stays(here: Holdings, site: Site, segments: tuple[Segment, ...], behind: int) -> bool:
    """Whether a site's row can go on: what stands in it stands there still, and there is room for the rest."""
    done = len(site.standing)
    if site.row is None or segments[:done] != site.standing:
        return False
    start, stop = (sum(segment.tokens for segment in part) for part in (site.standing, segments))
    if start == stop and not behind:
        return True
    return (start == stop or not site.written) and site.row.takes(start, stop + behind, branch=here.me)


def _own(here: Holdings, entry: CachedShot, space: Space, *, in_rows: bool) -> tuple[bool, bool]:
    """Whether a shot on the device has keys and values of its own: in a row the original keys, where it was moved."""
    inside = in_rows and entry.selected
    return not inside or here.steps(entry, space) != 0, not inside


# How it is carried out.


def _arranged(
    here: Holdings, key: SiteKey, site: Site, plan: Plan, *, keep_stage: bool
) -> tuple[Row | None, tuple[Segment, ...], tuple[Tensor, Tensor] | None, dict[Hashable, KV]]:
    """A site as it is to be: its row and what stands there, staged shots, and the shots that are on the device."""
    space, in_rows = site.size.space, plan.in_rows(here.storage)
    segments = here.segments(plan.shown, space) if in_rows else ()
    behind = plan.behind(space) or 0
    written = site.written if keep_stage else 0
    stop = sum(segment.tokens for segment in segments)
    stays = in_rows and _stays(here, site, segments, behind)
    row, done = (site.row, len(site.standing)) if stays else (None, 0)
    if in_rows and row is None and (segments or written):
        room = stop + max(behind or here.reserve.get(space, 0), written)
        row = Row(*empty(site.size, here.room(space, room), site.device), here.me, stop)
    spans = consecutive(segment.tokens for segment in segments)
    for segment, span in list(zip(segments, spans, strict=True))[done:]:
        assert row is not None
        _put(here, plan.kept[segment.id], key, row.k[:, span.slice], row.v[:, span.slice], segment)
        row.owner, row.used = here.me, stop
    kv = {
        i: _near(here, kept, key, plan.entries[i], in_rows=in_rows)
        for i, kept in plan.kept.items()
        if plan.tiers[i] == "device"
    }
    staged = site.staged
    if written and in_rows and (staged is not None or not stays):
        assert row is not None
        for part, x in zip((row.k, row.v), site.current, strict=True):
            part[:, stop : stop + written] = x
    if written and not in_rows and staged is None:
        staged = copies(site.current, site.device)
    return row, segments, None if in_rows else staged, kv


def _put(here: Holdings, kept: Kept, key: SiteKey, keys: Tensor, values: Tensor, segment: Segment) -> None:
    """Bring a shot to its place in a new row: as it stands in the old one, or from where it was written."""
    site = here.sites[key]
    if segment in site.standing and site.row is not None:
        spans = consecutive(each.tokens for each in site.standing)
        span = spans[site.standing.index(segment)].slice
        keys.copy_(site.row.k[:, span])
        values.copy_(site.row.v[:, span])
        return
    k, v = here.original(kept, key)
    place(k, keys, here.turn(segment.steps, keys))
    place(v, values)


def _near(here: Holdings, kept: Kept, key: SiteKey, entry: CachedShot, *, in_rows: bool) -> KV:
    """What a shot on the device has of its own there."""
    site = here.sites[key]
    if not entry.tokens(site.size.space):
        return kept.kv.get(key, NOTHING)
    reusable = kept.entry.tier == "device" or (kept.entry.tier == "host" and site.device.type == "cpu")
    own = kept.kv.get(key, NOTHING) if reusable else NOTHING
    wanted = _own(here, entry, site.size.space, in_rows=in_rows)
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
