"""``lct direct``: a scene made shot by shot, by what a director types."""

from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console

from lct_core.checkpoints import Tuned
from lct_core.cli.machine import seeded, usable, within_memory
from lct_core.cli.sampling import parse_size, sampling_of
from lct_core.cli.shell import LESS_MEMORY, Shell
from lct_core.cli.user_code import current_folder_on_path, own_code
from lct_core.script import read_script
from lct_core.session import Book, Session
from lct_core.session.book import check_new

_TIERS = ("on_device", "on_host", "cache_folder")
_OWN = ("checkpoint", "device", *_TIERS)  # the machine's: may be said again when a session is resumed


def run(
    ctx: click.Context,
    *,
    script: Path,
    checkpoint: Path | None,
    out: Path,
    size: str | None,
    window: int | None,
    fps: float | None,
    bf16: bool,
    device: str,
    seed: int,
    **fields: Any,
) -> None:
    """Begin a session, or go on with one, and read commands; the arguments are the command's."""
    where = usable(device)
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
    sampling = sampling_of(window=window or tuned.window, **fields)
    with current_folder_on_path(), seeded(seed), torch.no_grad():
        with own_code(card.factory), within_memory(where, fix=LESS_MEMORY):
            if resumed:
                session = Session.open(folder, *tuned.build(where), budget=sampling.budget)
            else:
                session = Session.create(
                    folder,
                    *tuned.build(where),
                    read,
                    size=parse_size(size, card.size),
                    pattern=tuned.pattern,
                    fps=fps or card.fps,
                    reading=card.reading,
                    about={**about, "checkpoint": str(checkpoint.absolute())},
                    seed=seed,
                    sampling=sampling,
                )
        with torch.autocast(where.type, torch.bfloat16, enabled=about.get("bf16", False)):
            Shell(session, Console(highlight=False, markup=False), device=where, factory=card.factory).run()


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
