"""Working rows: the history of one site at a time, brought from where it is kept while another is attended to."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lct_core.cache.budget import SiteSize
from lct_core.cache.rows import SiteRows
from lct_core.cache.tiers import SiteKey

Bring = Callable[[SiteKey, Tensor, Tensor], None]


def rows_at_once(device: torch.device) -> int:
    """How many working rows a device has: a second one where copies run beside attention."""
    return 2 if device.type == "cuda" else 1


class WorkingRows:
    """The rows that all sites of a device share, where the history is not at hand for each.

    On a GPU the next site's history is brought by a thread, on a stream beside the model's: not before the attention is
    done that last used the row, and that of the next site not before it has come. Elsewhere it is brought when it is
    needed.

    Args:
        sizes: Bytes of keys and of values in a row of every device.
        kind: The kind of device that they are for (default: that which they are on; tensors on ``meta`` stand for any).
    """

    def __init__(self, sizes: dict[torch.device, tuple[int, int]] | None = None, *, kind: str | None = None) -> None:
        self._rows: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        self._sizes, self._kind = sizes or {}, kind
        self._turn = 0
        self._ahead: _Brought | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._thread: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(WorkingRows, kind=self._kind), (self._sizes,)  # a copy makes rows of its own

    @property
    def nbytes(self) -> int:
        """Bytes of the rows there are."""
        return sum(x.nbytes for rows in self._rows.values() for row in rows for x in row)

    @property
    def wanted(self) -> int:
        """Bytes of the rows that are made when they are needed."""
        return self.nbytes_of(self._sizes)

    def nbytes_of(self, sizes: dict[torch.device, tuple[int, int]]) -> int:
        """Bytes of all rows of such sizes."""
        return sum(self._at_once(device) * sum(nbytes) for device, nbytes in sizes.items())

    def resize(self, sizes: dict[torch.device, tuple[int, int]]) -> None:
        """Give up what was brought ahead, and rows of another size: so many bytes of keys and of values."""
        self._settle()
        self._sizes = sizes
        self._rows = {device: rows for device, rows in self._rows.items() if self._fits(device, rows)}

    def release(self) -> None:
        """Give up the rows there are, until they are needed again."""
        self._settle()
        self._rows = {}

    def history(self, key: SiteKey, site: SiteRows, tokens: int, bring: Bring) -> tuple[Tensor, Tensor]:
        """A row of so many tokens that begins with a site's history."""
        if self._ahead is None or self._ahead.key != key:
            self._settle()
            self._ahead = self._brought(key, site, tokens, bring)
        _, row, _ = self._ahead
        self._settle()
        return row

    def ahead(self, key: SiteKey, site: SiteRows, tokens: int, bring: Bring) -> None:
        """Begin to bring the history of the site that comes next."""
        if site.device.type == "cuda":
            self._ahead = self._brought(key, site, tokens, bring)

    def _settle(self) -> None:
        """Let what comes next wait for what is under way."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.copies is not None:
            copies = ahead.copies.result()
            torch.cuda.current_stream(ahead.row[0].device).wait_event(copies)

    def _brought(self, key: SiteKey, site: SiteRows, tokens: int, bring: Bring) -> "_Brought":
        device = site.device
        if device not in self._rows:
            self._rows[device] = [self._made(device) for _ in range(self._at_once(device))]
        self._turn = (self._turn + 1) % len(self._rows[device])
        row = _view(self._rows[device][self._turn], site.size, tokens)
        if device.type != "cuda":
            bring(key, *row)
            return _Brought(key, row, None)
        free = torch.cuda.current_stream(device).record_event()  # behind the attention that last used this row
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side = self._streams[device]

        def work() -> torch.cuda.Event:
            with torch.cuda.device(device), torch.cuda.stream(side), torch.no_grad():
                side.wait_event(free)
                bring(key, *row)
                for x in row:
                    x.record_stream(side)
                return side.record_event()

        self._thread = self._thread or ThreadPoolExecutor(1, "lct-cache")
        return _Brought(key, row, self._thread.submit(work))

    def _at_once(self, device: torch.device) -> int:
        return rows_at_once(device if self._kind is None else torch.device(self._kind))

    def _made(self, device: torch.device) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):
            keys, values = (torch.empty(n, dtype=torch.uint8, device=device) for n in self._sizes[device])
        return keys, values

    def _fits(self, device: torch.device, rows: list[tuple[Tensor, Tensor]]) -> bool:
        return self._sizes.get(device) == tuple(x.nbytes for x in rows[0])


class _Brought(NamedTuple):
    key: SiteKey
    row: tuple[Tensor, Tensor]
    copies: "Future[torch.cuda.Event] | None"


def _view(row: tuple[Tensor, Tensor], size: SiteSize, tokens: int) -> tuple[Tensor, Tensor]:
    """The beginning of a row as the keys and values of a site."""
    keys, values = (
        x[:nbytes].view(size.dtype).view(size.entries, tokens, size.heads, channels)
        for x, nbytes, channels in zip(row, size.nbytes(tokens), size.channels, strict=True)
    )
    return keys, values
