"""``lct generate``: a scene from a script and a model that ``lct tune`` made."""

from pathlib import Path
from typing import Any

import click

from lct_core.cli import options


@click.command("generate", short_help="Generate the scene of a script.")
@click.argument("script", type=options.FILE)
@click.argument("checkpoint", type=options.FILE)
@click.option(
    "--out",
    type=options.FOLDER,
    default=Path("runs/generate"),
    help="Folder for script.txt, the shots, scene.mp4 and contact_sheet.png.",
)
@click.option(
    "--mode",
    type=click.Choice(options.MODES),
    help="joint: all shots at once; conditional: the same, from given shots; autoregressive: shot after shot; "
    "causal: the same through the KV cache.  "
    "[default: causal for a context-causal model; for another joint, or conditional with --given]",
)
@click.option(
    "--given",
    metavar="SHOT=FILE",
    multiple=True,
    help="A video or image that is shot SHOT, counted from 1; can be repeated.",
)
@options.sampling
@click.option("--t-c", type=options.LEVEL, help="Noise level of given and of earlier shots, 0 to 1000.  [default: 100]")
@click.option(
    "--window",
    type=options.COUNT,
    help="Shot after shot: most shots that are seen, the current one counted.  [default: as many as in training]",
)
@options.video
@options.storage
@options.tiers
@options.device
@options.seed
def command(**given: Any) -> None:
    """Generate the scene of SCRIPT with CHECKPOINT, a file that lct tune or lct demo wrote.

    Writes a scene folder, so that what was generated can be given again, with scene.mp4 and contact_sheet.png.

    \b
    Examples:
      lct generate script.txt runs/tune/bidirectional.pt --out runs/scene
      lct generate script.txt runs/tune/bidirectional.pt --given 1=hero.png --given 2=place.mp4
      lct generate script.txt runs/tune/causal.pt --t-c 300
    """
    from lct_core.cli.generate import run

    run(**given)
