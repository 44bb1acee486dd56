"""What a call of the model writes: its shots' keys and values, site by site, behind the history."""

from collections.abc import Callable

from torch import Tensor

from lct_core.cache.arrangement import Writing, afford, arrange, carry_out
from lct_core.cache.budget import SiteSize
from lct_core.cache.holdings import Holdings
from lct_core.cache.rows import Row, SiteRows, empty, fill
from lct_core.cache.shots import Space
from lct_core.cache.tiers import SiteKey
from lct_core.rope import RowParts

WriteKeys = Callable[[SiteKey, Space, Tensor | RowParts, Tensor], tuple[Tensor, Tensor]]


def write(here: Holdings, key: SiteKey, space: Space, k: Tensor | RowParts, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write one site's keys and values behind the history; return both with it, as views."""
    site = _site(here, key, space, k, v)
    start = here.tokens(space)
    stop = start + k.shape[1]
    _make_room(here, site, start, stop)
    if here.in_rows:
        if site.row is None or not site.row.takes(start, stop, branch=here.me):  # nothing stands in it
            site.row = None
            room = here.room(space, stop)
            afford(here, site.size.nbytes(room))
            site.row = Row(*empty(site.size, room, site.device), here.me, used=0)
        if stop > start:
            site.row.owner = here.me
        keys, values = site.row.k, site.row.v
        fill(keys[:, start:stop], k)
        fill(values[:, start:stop], v)
    else:
        fits = site.staged is not None and site.staged[0].shape[1] == stop - start
        if site.staged is None or not fits:
            site.staged = None
            afford(here, site.size.nbytes(stop - start))
            site.staged = empty(site.size, stop - start, site.device)
        keys, values = here.brought(key)
        if not fits:  # other sites have theirs of the last call still
            here.watch()
        fill(keys[:, start:stop], k)
        fill(values[:, start:stop], v)
        for whole, row in zip(site.staged, (keys, values), strict=True):
            whole.copy_(row[:, start:stop])
        here.bring_ahead(key)
    site.current_tokens = stop - start
    return keys[:, :stop], values[:, :stop]


def _site(here: Holdings, key: SiteKey, space: Space, k: Tensor | RowParts, v: Tensor) -> SiteRows:
    """The site that a call writes to: made where it is new, or of another size or device than in the last call."""
    size = SiteSize(space, k.shape[0], k.shape[2], (k.shape[3], v.shape[3]), k.dtype)
    site = here.sites.get(key)
    if site is None and any(kept.entry.tokens(space) for kept in here.kept.values()):
        raise ValueError(
            f"cache: it holds {len(here.kept)} shots, but nothing for block {key[0]}, site {key[1]!r}; "
            "a cache belongs to the model and branch that filled it"
        )
    if site is not None and here.kept and size != site.size:
        was = site.size
        raise ValueError(
            f"cache: it holds keys of batch {was.entries}, heads and channels {[was.heads, was.channels[0]]}, "
            f"{was.dtype}; this call has {size.entries}, {[size.heads, size.channels[0]]}, {size.dtype}; "
            "use another cache"
        )
    if site is not None and here.kept and v.device != site.device:
        raise ValueError(
            f"cache: its keys belong on {site.device}, this call's are on {v.device}; run the model there, or save "
            f"the cache and load it with device={str(v.device)!r}"
        )
    if site is None or (size, v.device) != (site.size, site.device):
        site = here.sites[key] = SiteRows(size, v.device)
        here.resize()
    return site


def _make_room(here: Holdings, site: SiteRows, start: int, stop: int) -> None:
    """Before a call writes: make longer rows where they are full, and send shots away where the device is full."""
    space, before = site.size.space, dict(here.reserve)
    behind = start and here.in_rows
    full = behind and not (site.row and site.row.takes(start, stop, branch=here.me))
    if not full and stop - start <= before.get(space, -1):
        return
    here.reserve[space] = max(stop - start, before.get(space, 0))
    try:
        target = arrange(here, here.shots, writing=Writing(space, stop - start))
    except BaseException:
        here.reserve = before
        raise
    carry_out(here, target)
