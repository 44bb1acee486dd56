"""``lct backbones``: the installed backbone families."""

from typing import Any

import click


@click.command("backbones")
@click.option("--support", is_flag=True, help="Print what is served in detail, and what is refused, as Markdown.")
def command(**given: Any) -> None:
    """List the backbone families whose models can be retrofitted.

    \b
    Example:
      lct backbones --support
    """
    from lct_core.cli.backbones import run

    run(**given)
