"""``lct backbones``: the installed backbone families."""

from collections.abc import Sequence

import click
from rich.console import Console

from lct_core.cli.tables import table
from lct_core.plugins import Registry, Support, registry


def support_table(registry: Registry) -> str:
    """What is served, and what is refused and why, as Markdown: the table in the README."""
    specs = registry.backbones.items()
    served = [(name, *row) for name, spec in specs for row in spec.support]
    refused = [(full.rpartition(".")[2], why) for _, spec in specs for full, why in spec.refuses.items()]
    header = ("backbone", *Support._fields)
    return "\n".join([*_markdown(header, served), "", *_markdown(("refused", "because"), sorted(refused))])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def run(*, support: bool) -> None:
    """Print the backbone families, or what of them is served and refused; no model library is imported."""
    if support:
        click.echo(support_table(registry()))
        return
    made = table("name", "what it is", "model classes", gap=2)
    made.columns[2].no_wrap = True
    for spec in registry().backbones.values():
        classes = [full.rpartition(".")[2] for full in spec.handles]
        notes = [f"({note})" for note in ("can build one" if spec.build else "", spec.tested_with) if note]
        made.add_row(spec.name, spec.summary, "\n".join(classes + notes))
    Console(highlight=False).print(made)
