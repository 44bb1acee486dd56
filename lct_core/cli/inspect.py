"""``lct inspect``: shots as pictures and numbers."""

from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from lct_core.cli import options
from lct_core.cli.shots import EXAMPLE, ModelSize, ShotCost, costs, parse_shots
from lct_core.cli.tables import short, table
from lct_core.coordinates import Scheme
from lct_core.packing import plan_rows
from lct_core.patterns import PATTERNS
from lct_core.pictures import attention, coordinates, packing

_WIDTH = 120  # columns; a narrower terminal wraps lines rather than lose numbers


def run(
    *,
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
    """Print what shots cost, and draw them; the arguments are the command's."""
    kv_heads = options.check_kv_heads(heads, kv_heads)
    layout = parse_shots(shots or EXAMPLE, text_first=not text_last)
    size = ModelSize(layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=getattr(torch, dtype))
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


def _table(rows: Sequence[ShotCost]) -> Table:
    columns = "shot", "text", "video", "tokens", "starts at", "pairs", "FLOPs", "KV cache"
    made = table("scene", *columns, numbers=True, wrap=False)
    made.columns[1].justify = "left"
    for i, row in enumerate(rows):
        made.add_row(
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
    return made
