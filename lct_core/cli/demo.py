"""``lct demo``: the run that shows Long Context Tuning working."""

from pathlib import Path

import click


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for metrics.json, contact_sheet.png and the data set.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Data set that an earlier run wrote, RUN/data.  [default: write a new one]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all randomness.")
def command(out: Path, data: Path | None, seed: int) -> None:
    """Train, retrofit, tune and generate, in minutes on two cores.

    Writes scenes of a small world as MP4 files, reads them back, trains a single-shot MMDiT on them, retrofits and
    tunes it, and generates scenes never seen in training: independently, jointly, and shot after shot through the KV
    cache.

    \b
    Example:
      lct demo --out runs/demo --seed 1
    """
    from rich.console import Console

    from lct_core.demo.run import Settings, run

    try:
        run(out, Settings(seed=seed), data=data, console=Console(highlight=False))
    except (OSError, ImportError) as error:
        raise click.UsageError(str(error)) from error
