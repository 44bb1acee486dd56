"""What the attention kernels answer to a request."""

from collections.abc import Sequence
from typing import NamedTuple

from lct_core.plugins import KernelRequest, PluginError, Registry


class KernelRow(NamedTuple):
    """A kernel's answer to a request; ``rank`` is None for one that must be asked for by name."""

    name: str
    rank: int | None
    refusals: list[str]


def kernel_rows(registry: Registry, request: KernelRequest) -> list[KernelRow]:
    """A registry's kernels in the order that ``kernel="auto"`` follows, each with its reasons to refuse a request."""
    rows = []
    for name, rank in registry.ranks(request).items():
        try:
            refusals = registry.refusals(name, request)
        except PluginError as error:
            refusals = [str(error)]
        rows.append(KernelRow(name, rank, refusals))
    return rows


def auto_choice(rows: Sequence[KernelRow]) -> str | None:
    """The kernel that ``kernel="auto"`` takes; None where all refuse."""
    return next((row.name for row in rows if row.rank is not None and not row.refusals), None)
