"""``lct backbones``: the installed backbone families."""

from typing import NamedTuple

import click

from lct_core.plugins import Registry, registry


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


@click.command("backbones")
def command() -> None:
    """List the backbone families whose models can be retrofitted.

    \b
    Example:
      lct backbones
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what it is")
    table.add_column("model classes", overflow="fold")
    table.add_column("can build")
    table.add_column("tested with")
    for row in backbone_rows(registry()):
        table.add_row(
            row.name, row.summary, "\n".join(row.handles), "yes" if row.builds else "no", row.tested_with or "-"
        )
    Console(highlight=False).print(table)
