"""``lct inspect``: shots as pictures and numbers."""

from typing import Any

import click

from lct_core.cli import options


@click.command("inspect")
@click.argument("shots", metavar="[SHOT ...]", nargs=-1)
@click.option("--scheme", type=click.Choice(options.SCHEMES), default="paper", help="Coordinates.")
@click.option("--pattern", type=click.Choice(options.PATTERNS), default="bidirectional", help="Who sees whom.")
@click.option("--text-last", is_flag=True, help="A shot's text comes after its video in the row.")
@click.option(
    "--budget", type=options.COUNT, metavar="TOKENS", help="Most tokens in a packed row.  [default: the largest scene]"
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of the packing's order.")
@click.option("--layers", type=options.COUNT, default=20, help="Blocks (the default size is the paper's 3B).")
@options.heads
@click.option("--out", type=options.FOLDER, metavar="DIR", default="runs/inspect", help="Where the pictures go.")
def command(**given: Any) -> None:
    """Draw shots, and count what they cost.

    The pictures show where their tokens stand, who sees whom, and how scenes are packed into rows.

    A SHOT is written TEXT:FRAMESxHEIGHTxWIDTH, in tokens after patchify. A leading "global:" makes it the global prompt
    with its dummy video, first in its scene; / as an argument begins the next scene. Without a SHOT, an example is
    shown.

    \b
    Example:
      lct inspect global:20:1x6x6 12:4x6x6 8:2x8x5 / 9:3x6x6 --pattern context_causal
    """
    from lct_core.cli.inspect import run

    run(**given)
