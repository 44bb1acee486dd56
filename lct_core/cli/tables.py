"""Tables and numbers as commands print them."""

from typing import Any

from rich import box
from rich.table import Table


def table(first: str, *others: str, numbers: bool = False, wrap: bool = True, gap: int = 1, **style: Any) -> Table:
    """An empty table without lines but that under its heading.

    Args:
        first: The column of names.
        others: The columns beside it.
        numbers: Whether these hold numbers.
        wrap: Whether these may take several lines.
        gap: Characters between two columns.
        style: What else :class:`rich.table.Table` takes.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, gap - 1), **style)
    made.add_column(first, no_wrap=True)
    for name in others:
        made.add_column(name, justify="right" if numbers else "left", no_wrap=not wrap)
    return made


def short(number: float, *, binary: bool = False) -> str:
    """A number to at most four digits with its prefix: steps of 1000, or of 1024 with ``binary``.

    Below a million without ``binary`` every digit is shown.
    """
    if not binary and number < 1_000_000:
        return f"{number:,} "
    step, prefixes = (1024, ["", "Ki", "Mi", "Gi", "Ti", "Pi"]) if binary else (1000, ["", *"kMGTPE"])
    power = 0
    while number >= step and power < len(prefixes) - 1:
        number, power = number / step, power + 1
    return f"{number:,.{0 if number >= 1000 or not power else 1}f} {prefixes[power]}"
