"""Tables as commands print them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(first: str, *others: str, numbers: bool = False) -> "Table":
    """An empty table without lines but that under its heading.

    Args:
        first: The column of names.
        others: The columns beside it.
        numbers: Whether these hold numbers.
    """
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column(first, no_wrap=True)
    for name in others:
        made.add_column(name, justify="right" if numbers else "left")
    return made
