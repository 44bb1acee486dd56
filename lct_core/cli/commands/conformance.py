"""``lct conformance``: measure what must hold on one's own model or adapter."""

from typing import Any

import click

from lct_core.cli import options


@click.command("conformance")
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option(
    "--scheme",
    "schemes",
    type=click.Choice(options.SCHEMES),
    multiple=True,
    help="Coordinates; can be repeated.  [default: all]",
)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(options.CHECKED_DTYPES),
    multiple=True,
    help="Can be repeated.  [default: all]",
)
def command(**given: Any) -> int:
    """Measure what must hold, on your own model.

    FACTORY is a function of MODULE, which may lie in the current folder. It takes no argument and returns a small model
    that an installed backbone handles, or an adapter (a lct_core.Backbone) around one. The exit code is 1 if anything
    failed.

    \b
    Example:
      lct conformance my_adapter:make_model --dtype float32
    """
    from lct_core.cli.conformance import run

    return run(**given)
