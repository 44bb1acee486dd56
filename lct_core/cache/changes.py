"""Changes to what a cache holds, each in two steps, so that several caches change together or none does.

Entering it, or making it: validate; it may raise, and then nothing has changed. Leaving it: commit.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate

from torch import Tensor

from lct_core.cache.arrangement import arrange, carry_out
from lct_core.cache.holdings import HeldShot, Hold, Holdings
from lct_core.cache.quantize import relative_error
from lct_core.cache.shots import CachedShot, StagedShots, Tier
from lct_core.cache.tiers import KV, SiteKey, copied, copies, quantized
from lct_core.layout import consecutive


def together(*changes: AbstractContextManager[None]) -> None:
    """Make changes, all or none: all are validated before the first is committed."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)


@contextmanager
def appending(here: Holdings, ids: Sequence[Hashable], prompts: Sequence[str]) -> Iterator[None]:
    """Keep the staged shots as history, see :meth:`KVCache.append`."""
    staged = _written("append", here.staged)
    _check_names(here, ids, prompts, len(staged.shots))
    entries = [
        CachedShot(
            id=i,
            shot=staged.shots[n],
            level=tuple(staged.levels[:, n].tolist()),
            written=staged.origins[n],
            origin=staged.origins[n],
            extent=staged.extents[n],
            saw=(*here.history, *(other for other in ids if other != i)),
            prompt=prompts[n] if prompts else "",
            branch=here.branch,
        )
        for n, i in enumerate(ids)
    ]
    in_rows = here.hold is None and here.in_rows
    if not in_rows and here.budget.device is not None and (here.storage != "native" or len(ids) > 1):
        entries = [replace(entry, tier="host") for entry in entries]  # until there is a place on the device
    new = [HeldShot(e, *(({}, None) if in_rows else _taken(here, staged, n))) for n, e in enumerate(entries)]
    before = here.kept, [(site, site.standing, site.staged) for site in here.sites.values()]
    here.kept = here.kept | {kept.entry.id: kept for kept in new}
    history = [*here.shots, *entries]
    for site in here.sites.values():
        if in_rows:  # where they stand already
            site.standing = here.placed(history, site.size.space)
        elif here.storage == "native":
            site.staged = None  # it is the shot's own now
    try:
        target = arrange(here, history)
        yield
    except BaseException:
        here.kept, sites = before
        for site, standing, site_staged in sites:
            site.standing, site.staged = standing, site_staged
        raise
    here.last_call = here.hold = None
    for site in here.sites.values():
        site.current_tokens = 0
        if in_rows and site.row is not None and site.row.owner is here.me:
            site.row.used = sum(shot.tokens for shot in site.standing)
    carry_out(here, target)


@contextmanager
def holding(here: Holdings) -> Iterator[None]:
    """Copy what the last call wrote, see :meth:`KVCache.hold`."""
    staged = _written("hold", here.last_call)
    target = arrange(here, here.shots, copying=staged)
    yield
    here.hold = None  # one that is held already is given up
    carry_out(here, target)
    kv = {}
    for key, site in here.sites.items():
        kv[key] = site.current if site.staged else copies(site.current, site.device)
        site.staged, site.current_tokens = None, 0
    here.hold, here.last_call = Hold(staged, kv), None


def selecting(here: Holdings, ids: Iterable[Hashable], reposition: bool) -> AbstractContextManager[None]:
    """Choose the shots that later calls see, see :meth:`KVCache.select`."""
    chosen = _known(here, ids)
    history = [here.kept[i].entry for i in chosen]
    if any(entry.shot.role == "global" for entry in history[1:]):
        raise ValueError(f"ids: got {chosen}, expected a global shot to come first, as in its scene")
    return _showing(here, _end_to_end(history) if reposition else history)


def reordering(here: Holdings, ids: Iterable[Hashable], reposition: bool) -> AbstractContextManager[None]:
    """Put the selected history in another order, see :meth:`KVCache.reorder`."""
    chosen, history = list(ids), here.history
    if len(chosen) != len(history) or set(chosen) != set(history):
        raise ValueError(f"ids: got {chosen}, expected the selected shots, {history}, in another order")
    return selecting(here, chosen, reposition)


def repositioning(here: Holdings, origins: Sequence[int] | None) -> AbstractContextManager[None]:
    """Move the selected history along the diagonal, see :meth:`KVCache.reposition`."""
    history = here.shots
    if origins is not None and len(origins) != len(history):
        raise ValueError(f"origins: got {len(origins)}, expected {len(history)}, one for each selected shot")
    if wrong := [origin for origin in origins or () if not isinstance(origin, int)]:
        raise ValueError(f"origins: got {wrong}, expected whole numbers: steps along the diagonal")
    placed = [replace(e, origin=origin) for e, origin in zip(history, origins or (), strict=False)]
    return _showing(here, _end_to_end(history) if origins is None else placed)


@contextmanager
def dropping(here: Holdings, ids: Sequence[Hashable]) -> Iterator[None]:
    """Forget shots, see :meth:`KVCache.drop`."""
    gone = set(_known(here, ids))
    kept = {i: each for i, each in here.kept.items() if i not in gone}
    target = arrange(here, [entry for entry in here.shots if entry.id not in gone], kept)
    yield
    carry_out(here, target, keep_staged=gone.isdisjoint(here.history))
    if not kept and here.staged is None:
        here.sites, here.reserve = {}, {}
        here.resize()


@contextmanager
def pinning(here: Holdings, ids: Sequence[Hashable], pinned: bool) -> Iterator[None]:
    """Pin or unpin shots, see :meth:`KVCache.pin`."""
    chosen = _known(here, ids)
    kept = here.kept | {i: replace(here.kept[i], entry=replace(here.kept[i].entry, pinned=pinned)) for i in chosen}
    target = arrange(here, [kept[i].entry for i in here.history], kept)
    yield
    carry_out(here, target)


@contextmanager
def moving(here: Holdings, ids: Sequence[Hashable], tier: Tier) -> Iterator[None]:
    """Say where shots are to be, see :meth:`KVCache.move`."""
    if tier not in ("device", "host", "disk"):
        raise ValueError(f'tier: got {tier!r}, expected "device", "host" or "disk"')
    chosen = _known(here, ids)
    target = arrange(here, here.shots, here.kept | {i: replace(here.kept[i], wish=tier) for i in chosen})
    if elsewhere := [i for i in chosen if target.tiers[i] != tier]:
        raise ValueError(
            f"ids: {elsewhere} do not fit on the {tier}, of which the budget is {getattr(here.budget, tier)} "
            "bytes; give a larger one, drop shots, or select fewer"
        )
    yield
    carry_out(here, target)


@contextmanager
def _showing(here: Holdings, history: Sequence[CachedShot]) -> Iterator[None]:
    """Let calls see other shots, or the same ones elsewhere; what is staged was written behind others, and goes."""
    target = arrange(here, history)
    yield
    carry_out(here, target, keep_staged=False)


def _written(verb: str, staged: StagedShots | None) -> StagedShots:
    if staged is None:
        raise ValueError(
            f"{verb}: no call has written to this cache since the last append, select or reposition; "
            "call the scene model with cache=cache first"
        )
    return staged


def _known(here: Holdings, ids: Iterable[Hashable]) -> list[Hashable]:
    chosen = list(ids)
    if unknown := [i for i in chosen if not isinstance(i, Hashable) or i not in here.kept]:
        raise ValueError(f"ids: {unknown} are not in the cache; it holds {list(here.ids)}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"ids: got {chosen}, expected every shot once")
    return chosen


def _check_names(here: Holdings, ids: Sequence[Hashable], prompts: Sequence[str], count: int) -> None:
    if len(ids) != count:
        raise ValueError(f"ids: got {len(ids)}, {list(ids)}, expected {count}, one for each shot of the last call")
    if len(prompts) not in (0, len(ids)) or isinstance(prompts, str):
        raise ValueError(f"prompts: got {prompts!r}, expected {len(ids)}, one for each id, or none")
    if unhashable := [i for i in ids if not isinstance(i, Hashable)]:
        raise ValueError(f"ids: got {unhashable}, expected hashable names, such as strings or numbers")
    if taken := [i for n, i in enumerate(ids) if i in here.kept or i in ids[:n]]:
        raise ValueError(f"ids: {taken} are taken; the cache holds {list(here.ids)}")


def _taken(here: Holdings, staged: StagedShots, n: int) -> tuple[dict[SiteKey, KV], tuple[float, float] | None]:
    """The keys and values of the n-th staged shot, as tensors of its own, and the error of storing them in 8 bits.

    Where the budget limits the device, they go to host memory site by site, until there is a place for them.
    """
    temporary = 0
    kvs: dict[SiteKey, KV] = {}
    errors: list[list[float]] = []
    here.watch()
    here.working.release()  # there is room for 8 bits then
    for key, site in here.sites.items():
        leaving = here.budget.device is not None and site.device.type != "cpu"
        where, pinned = ("cpu" if leaving else site.device), leaving and site.device.type == "cuda"
        whole = here.hold.kv[key] if here.hold else site.current
        span = consecutive(getattr(shot, site.size.space) for shot in staged.shots)[n].slice
        parts: list[Tensor] = [x[:, span] for x in whole]
        if here.storage != "native":
            small = [quantized(x, here.storage) for x in parts]
            errors.append([relative_error(x, q) for x, q in zip(parts, small, strict=True) if not x.is_meta])
            if leaving:
                temporary = max(temporary, sum(x.nbytes for x in small))
                small = [copied(x, where, pinned=pinned) for x in small]
            kvs[key] = KV(*small)
        elif len(staged.shots) == 1:
            kvs[key] = KV(*whole)
        else:
            kvs[key] = KV(*(copied(x, where, pinned=pinned) for x in parts))
    here.watch(temporary)
    worst = [max(each) for each in zip(*errors, strict=True)]
    return kvs, (worst[0], worst[1]) if worst else None


def _end_to_end(history: Sequence[CachedShot]) -> list[CachedShot]:
    origins = accumulate((entry.extent for entry in history), initial=0)
    return [replace(entry, origin=origin) for entry, origin in zip(history, origins, strict=False)]
