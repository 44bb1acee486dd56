"""``lct plan``: what it takes to generate a scene, before it is generated."""

from pathlib import Path
from typing import Any

import click

from lct_core.cli import options


@click.command("plan", short_help="Say what it takes to generate a scene, before it is generated.")
@click.argument("script", type=options.FILE)
@click.argument("checkpoint", type=options.FILE, required=False)
@click.option("--backbone", metavar="NAME", help="Instead of CHECKPOINT: a family of lct backbones, at its usual size.")
@click.option(
    "--model",
    metavar="MODULE:FACTORY",
    help="Your own model instead: a function that returns (model, codec), as for lct tune, or the model alone.",
)
@click.option(
    "--size",
    metavar="FxHxW",
    help="Frames, height and width of every shot: in pixels with CHECKPOINT, else in latents.  "
    "[default: as the first training shot]",
)
@click.option("--text", type=options.COUNT, metavar="TOKENS", help="Text tokens of every prompt, without CHECKPOINT.")
@click.option(
    "--shots", type=options.COUNT, help="Plan this many: the script's, cut short or repeated.  [default: all]"
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(options.MODES),
    multiple=True,
    help="Only this mode, with a table of its takes; can be repeated.  [default: all modes]",
)
@click.option("--steps", type=options.COUNT, default=32, help="Euler steps.")
@click.option("--window", type=options.COUNT, default=9, help="Most shots seen, with the current one.")
@click.option("--guidance/--no-guidance", default=True, help="Classifier-free guidance, which runs every pass twice.")
@click.option("--shared-history", is_flag=True, help="One cache for both branches, where text is cross-attended.")
@click.option(
    "--write",
    type=click.Choice(options.WRITES),
    default="pass",
    help="Keys and values: in a pass of their own, or as the nearest step wrote them.",
)
@options.storage
@options.tiers
@click.option("--dtype", type=click.Choice(options.DTYPES), help="Of the weights.  [default: as the model is made]")
@click.option(
    "--kernel", multiple=True, default=("auto",), show_default="auto", help="Attention kernel; can be repeated."
)
@options.device
@click.option(
    "--measure", "measuring", is_flag=True, help="Time a few passes of the model, and expect times from them."
)
@click.option("--every-tier", is_flag=True, help="With --measure: also time the other ways to keep the cache.")
@click.option(
    "--throughput",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON file that --measure writes, and without it is read.",
)
@click.option("--check", is_flag=True, help="Generate with every --mode, and say planned against measured.")
@options.seed
def command(**given: Any) -> None:
    """Say what it takes to generate the scene of SCRIPT: tokens, operations, bytes of the KV cache, memory and time.

    Of the model of CHECKPOINT, which lct tune or lct demo wrote, or of another one. No shot is given, but for the mode
    conditional the first. Operations are exact; memory is what torch allocates with its own attention.

    \b
    Examples:
      lct plan script.txt --backbone wan --size 21x60x104 --text 512 --shots 20 --dtype bfloat16
      lct plan script.txt runs/tune/causal.pt --mode causal --measure --check
    """
    from lct_core.cli.plan import run

    run(**given)
