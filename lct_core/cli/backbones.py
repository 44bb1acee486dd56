"""``lct backbones``: the installed backbone families."""

from collections.abc import Sequence
from typing import NamedTuple

import click

from lct_core.plugins.hooks import Support
from lct_core.plugins.registry import Registry, registry


class BackboneRow(NamedTuple):
    """One line of the table."""

    name: str
    summary: str
    handles: tuple[str, ...]
    builds: bool
    tested_with: str


def backbone_rows(registry: Registry) -> list[BackboneRow]:
    """What a registry knows of its backbones; no model library is imported."""
    return [
        BackboneRow(spec.name, spec.summary, spec.handles, spec.build is not None, spec.tested_with)
        for spec in registry.backbones.values()
    ]


def support_table(registry: Registry) -> str:
    """What is served, and what is refused and why, as Markdown: the table in the README."""
    specs = registry.backbones.items()
    served = [(name, *row) for name, spec in specs for row in spec.support]
    refused = [(full.rpartition(".")[2], why) for _, spec in specs for full, why in spec.refuses.items()]
    header = ("backbone", *Support._fields)
    return "\n".join([*_markdown(header, served), "", *_markdown(("refused", "because"), sorted(refused))])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


@click.command("backbones")
@click.option("--support", is_flag=True, help="Print what is served in detail, and what is refused, as Markdown.")
def command(support: bool) -> None:
    """List the backbone families whose models can be retrofitted.

    \b
    Example:
      lct backbones --support
    """
    if support:
        click.echo(support_table(registry()))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what it is")
    table.add_column("model classes", no_wrap=True)
    for row in backbone_rows(registry()):
        notes = [*(["(can build one)"] if row.builds else []), *([f"({row.tested_with})"] if row.tested_with else [])]
        table.add_row(row.name, row.summary, "\n".join([*(full.rpartition(".")[2] for full in row.handles), *notes]))
    Console(highlight=False).print(table)
