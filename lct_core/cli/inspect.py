"""``lct inspect``: shots as pictures and numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click
import torch

from lct_core.cli import options
from lct_core.cli.shots import EXAMPLE, Cost, Size, costs, parse_shots
from lct_core.coordinates import Scheme
from lct_core.packing import plan_rows
from lct_core.patterns import PATTERNS
from lct_core.pictures import attention, coordinates, packing

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 120  # columns; a narrower terminal wraps lines rather than lose numbers


@click.command("inspect")
@click.argument("shots", metavar="[SHOT ...]", nargs=-1)
@click.option("--scheme", type=click.Choice(get_args(Scheme)), default="paper", show_default=True, help="Coordinates.")
@click.option(
    "--pattern", type=click.Choice([*PATTERNS]), default="bidirectional", show_default=True, help="Who sees whom."
)
@click.option("--text-last", is_flag=True, help="A shot's text comes after its video in the row.")
@click.option(
    "--budget", type=options.COUNT, metavar="TOKENS", help="Most tokens in a packed row.  [default: the largest scene]"
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the packing's order.")
@click.option(
    "--layers", type=options.COUNT, default=20, show_default=True, help="Blocks (the default size is the paper's 3B)."
)
@options.heads
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default="runs/inspect",
    show_default=True,
    help="Where the pictures go.",
)
def command(
    shots: tuple[str, ...],
    scheme: Scheme,
    pattern: str,
    text_last: bool,
    budget: int | None,
    seed: int,
    layers: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    dtype: str,
    out: Path,
) -> None:
    """Draw shots, and count what they cost.

    The pictures show where their tokens stand, who sees whom, and how scenes are packed into rows.

    A SHOT is written TEXT:FRAMESxHEIGHTxWIDTH, in tokens after patchify. A leading "global:" makes it the global prompt
    with its dummy video, first in its scene; / as an argument begins the next scene. Without a SHOT, an example is
    shown.

    \b
    Example:
      lct inspect global:20:1x6x6 12:4x6x6 8:2x8x5 / 9:3x6x6 --pattern context_causal
    """
    from rich.console import Console

    kv_heads = options.check_kv_heads(heads, kv_heads)
    layout = parse_shots(shots or EXAMPLE, text_first=not text_last)
    size = Size(layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=options.DTYPES[dtype])
    budget = max(span.size for span in layout.scene_spans) if budget is None else budget
    rows = plan_rows(
        [[shot.tokens for shot in scene] for scene in layout.scenes],
        budget=budget,
        generator=torch.Generator().manual_seed(seed),
        max_shots=max(map(len, layout.scenes)),  # to look at a scene is allowed, however long it is
    )
    plan = PATTERNS[pattern](layout)

    console = Console(highlight=False)
    if not shots:
        console.print(f"No SHOT given, so this is the example: lct inspect {' '.join(EXAMPLE)}\n", soft_wrap=True)
    console.print(_table(costs(layout, plan, size, scheme=scheme)), width=_WIDTH, crop=False)
    console.print(
        f"Attention {pattern}, coordinates {scheme}. Pairs: queries and keys that meet, in one head of one layer.\n"
        f"FLOPs of one forward attention and bytes of the KV cache: all {layers} layers, {heads} query heads and\n"
        f"{kv_heads} key-value heads of {head_dim} channels, {dtype}, batch 1.\n",
        soft_wrap=True,
    )
    figures = {
        "coordinates.png": coordinates.coordinates_figure(layout, scheme=scheme),
        "attention.png": attention.plan_figure(layout, plan, pattern=pattern),
        "packing.png": packing.packing_figure(layout, rows, budget=budget),
    }
    for name, figure in figures.items():
        path = out / name
        try:
            out.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise ValueError(f"--out: got {str(out)!r}, expected a folder to write to: {error}") from error
        click.echo(path)


def _table(rows: Sequence[Cost]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("scene", no_wrap=True)
    table.add_column("shot", no_wrap=True)
    for name in ("text", "video", "tokens", "starts at", "pairs", "FLOPs", "KV cache"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(
            "" if row.scene is None else str(row.scene),
            row.name,
            f"{row.text:,}",
            f"{row.video:,}",
            f"{row.text + row.video:,}",
            "" if row.start is None else f"{row.start:,}",
            short(row.pairs),
            short(row.flops),
            short(row.cache, binary=True) + "B",
            end_section=i == len(rows) - 2 or (i + 1 < len(rows) and row.scene != rows[i + 1].scene),
        )
    return table


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
