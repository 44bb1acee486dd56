"""``lct demo``: the run that shows Long Context Tuning working."""

from pathlib import Path

import click

from lct_core.cli import options


@click.command("demo")
@click.option(
    "--out",
    type=options.FOLDER,
    default=Path("runs/demo"),
    help="Folder for metrics.json, pictures, videos, models and the data set.",
)
@click.option("--quick", is_flag=True, help="About a quarter of the time: the same code, weaker numbers.")
@click.option(
    "--full", is_flag=True, help="Better numbers; errors over 12 shots in a row; composition from two images."
)
@options.seed
def command(out: Path, quick: bool, full: bool, seed: int) -> None:
    """Train, retrofit, tune and generate, in minutes on two cores.

    Writes scenes of a small world as videos and scripts, reads them back, trains a single-shot MMDiT on them, retrofits
    and tunes it, and generates scenes never seen in training, in every mode. The text of a shot never tells a colour:
    only the other shots do. lct generate takes the models that it leaves.

    \b
    Example:
      lct demo --out runs/demo --seed 1
    """
    from rich.console import Console

    from lct_core.demo import settings
    from lct_core.demo.run import run

    if quick and full:
        raise ValueError("--quick, --full: got both, expected one or none")
    make = settings.quick if quick else settings.full if full else settings.DemoSettings
    run(out, make(seed=seed), console=Console(highlight=False))
