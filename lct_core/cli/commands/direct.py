"""``lct direct``: a scene made shot by shot, by what a director types."""

from pathlib import Path
from typing import Any

import click

from lct_core.cli import options


@click.command("direct", short_help="Make a scene shot by shot.")
@click.argument("script", type=options.FILE)
@click.argument("checkpoint", type=options.FILE, required=False)
@click.option("--out", type=options.FOLDER, default=Path("runs/direct"), help="Folder of the session.")
@options.sampling
@click.option("--t-c", type=options.LEVEL, default=100.0, help="Noise level at which shots are seen by later ones.")
@click.option(
    "--window",
    type=options.COUNT,
    help="Most shots that are seen, the current one counted.  [default: as many as in training]",
)
@options.video
@options.storage
@options.tiers
@options.device
@options.seed
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Make the scene of SCRIPT with CHECKPOINT, a file that lct tune or lct demo wrote, shot by shot.

    A command a line is read from the terminal, or from a pipe: generate a shot, look at it, keep it or do it again,
    choose what the next one sees. What was generated is on disk before the next line is read. lct direct FOLDER goes on
    with a session, whatever ended it. What does not fit --on-device and --on-host is kept in files, in the session's
    own folder unless --cache-folder names another.

    \b
    Examples:
      lct direct script.txt runs/demo/causal.pt --out runs/cafe
      lct direct runs/cafe

    \b
    A session:
      generate                      shot 1, as the script says
      keep
      generate t_c 300              shot 2; later shots are to see it at noise level 300
      redo                          the same with other noise
      keep
      generate from 1               shot 3 sees shot 1 alone
      branch close                  try another way from here
      generate 3 prompt "Close up of Character 1." from 1 2
      keep
      shots                         where every shot stands
      scene                         write the scene's folder
    """
    from lct_core.cli.direct import run

    run(ctx, **given)
