"""``lct direct``: a scene made shot by shot, by what a director types."""

from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from lct_core.checkpoints.factory import current_folder_on_path, own_code
from lct_core.checkpoints.tuned import Tuned
from lct_core.cli.options import (
    COUNT,
    LEVEL,
    budget,
    device,
    sampling,
    seed,
    seeded,
    storage,
    tiers,
    video,
    within_memory,
)
from lct_core.cli.shell import LESS_MEMORY, Shell
from lct_core.cli.tuned import parse_size
from lct_core.script import read_script
from lct_core.session import Book, Session
from lct_core.session.session import check_new

_TIERS = ("on_device", "on_host", "cache_folder")
_OWN = ("checkpoint", "device", *_TIERS)  # the machine's: may be said again when a session is resumed


@click.command("direct", short_help="Make a scene shot by shot.")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/direct"),
    show_default=True,
    help="Folder of the session.",
)
@sampling
@click.option(
    "--t-c", type=LEVEL, default=100.0, show_default=True, help="Noise level at which shots are seen by later ones."
)
@click.option(
    "--window", type=COUNT, help="Most shots that are seen, the current one counted.  [default: as many as in training]"
)
@video
@storage
@tiers
@device
@seed
@click.pass_context
def command(
    ctx: click.Context,
    script: Path,
    checkpoint: Path | None,
    out: Path,
    size: str | None,
    window: int | None,
    fps: float | None,
    bf16: bool,
    on_device: float | None,
    on_host: float | None,
    cache_folder: Path | None,
    device: torch.device,
    seed: int,
    **numbers: Any,
) -> None:
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
    folder = out
    about: dict[str, Any] = {"bf16": bf16}
    said = [name for name, value in ctx.params.items() if ctx.get_parameter_source(name) != ParameterSource.DEFAULT]
    if resumed := script.is_dir():
        if extra := [name for name in said if name not in ("script", *_OWN)]:
            raise ValueError(f"{_option(extra[0])}: {script} is a session, which has its own settings; leave it out")
        folder, book = script, Book.read(script)
        about, seed = dict(book.about), book.settings.seed
        checkpoint = checkpoint or (Path(about["checkpoint"]) if "checkpoint" in about else None)
    if checkpoint is None:
        raise ValueError(
            f"CHECKPOINT: got none with {script}, expected a file that lct tune wrote; or {script} to be the folder of "
            "a session"
        )
    if not resumed:
        read = read_script(script)
        check_new(folder)
    tuned = Tuned.load(checkpoint)
    card = tuned.card
    if tuned.pattern == "own_shot":
        raise ValueError(
            f"{checkpoint}: tuned on single shots, and makes each by itself; use bidirectional.pt or causal.pt"
        )
    if tuned.pattern != "context_causal" and (unused := [name for name in said if name in ("storage", *_TIERS)]):
        raise ValueError(
            f"{_option(unused[0])}: {checkpoint} was tuned with {tuned.pattern} attention, which runs the history "
            "again and has no KV cache; leave it out"
        )
    near = budget(on_device, on_host, cache_folder)
    from rich.console import Console

    with current_folder_on_path(), seeded(seed), torch.no_grad():
        with own_code(card.factory), within_memory(device, fix=LESS_MEMORY):
            if resumed:
                session = Session.open(folder, *tuned.build(device), budget=near)
            else:
                session = Session.create(
                    folder,
                    *tuned.build(device),
                    read,
                    size=parse_size(size, card.size),
                    window=window or tuned.window,
                    pattern=tuned.pattern,
                    fps=fps or card.fps,
                    reading=card.reading,
                    about={**about, "checkpoint": str(checkpoint.absolute())},
                    seed=seed,
                    budget=near,
                    **numbers,
                )
        with torch.autocast(device.type, torch.bfloat16, enabled=about.get("bf16", False)):
            Shell(session, Console(highlight=False, markup=False), device=device, factory=card.factory).run()


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
