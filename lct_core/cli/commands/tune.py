"""``lct tune``: Long Context Tuning on a folder of one's own scenes."""

from pathlib import Path
from typing import Any

import click

from lct_core.cli import options


@click.command("tune", short_help="Tune a model on a folder of scenes.")
@click.argument("data", type=options.FILE)
@click.option("--out", type=options.FOLDER, default=Path("runs/tune"), help="Folder for checkpoints and metrics.jsonl.")
@click.option(
    "--model",
    metavar="MODULE:FACTORY",
    help="A function that takes no argument and returns (model, codec): your DiT or its adapter, and what encodes its "
    "videos and prompts.  [default: a small MMDiT on pixels, trained from nothing]",
)
@click.option("--single-shots", type=options.FILE, help="Scene folders to take single shots from.  [default: DATA]")
@click.option(
    "--scheme",
    type=click.Choice(options.SCHEMES),
    default="anchored",
    help="Where tokens stand: as the model knows it inside a shot, or as in the paper, which it has to learn.",
)
@click.option(
    "--single-shot-steps",
    type=options.COUNT_OR_NONE,
    help="Steps of the first stage, single shots alone.  [default: 0 with --model and the anchored scheme, else 10000]",
)
@click.option("--steps", type=options.COUNT_OR_NONE, default=135_000, help="Steps of the bidirectional stage.")
@click.option("--causal-steps", type=options.COUNT_OR_NONE, default=9_000, help="Steps of the context-causal stage.")
@click.option("--learning-rate", type=options.POSITIVE, default=1e-4, help="Peak of every stage.")
@click.option(
    "--level-mean",
    type=options.FINITE,
    default=0.0,
    help="Mean of the logit of noise levels; higher trains more on what scenes share, 1.1 is SD3's shift of 3.",
)
@click.option("--batch", "single_shot_batch", type=options.COUNT, default=4, help="Single shots in a step.")
@click.option("--scene-batch", type=options.COUNT, default=1, help="Scenes in a step.")
@click.option("--max-shots", type=options.COUNT, default=9, help="Most shots of a scene in a step.")
@click.option(
    "--area",
    type=options.COUNT,
    help="Pixels per frame to shrink videos to.  "
    f"[default: {options.OWN_AREA} with --model, else {options.SMALL_AREA}]",
)
@click.option(
    "--multiple",
    type=options.COUNT,
    help="Height and width are made multiples of this; it is the small MMDiT's patch.  "
    f"[default: {options.OWN_MULTIPLE} with --model, else {options.SMALL_MULTIPLE}]",
)
@click.option("--fps", type=options.FPS, default=12.0, help="Frames per second to sample videos at.")
@click.option("--max-frames", type=options.COUNT, default=125, help="Most frames that a shot may have.")
@click.option("--bf16", is_flag=True, help="Run the model under bfloat16 autocast.")
@click.option("--checkpointing", is_flag=True, help="Recompute activations in the backward pass, to save memory.")
@click.option("--skip-bad", is_flag=True, help="Leave broken scenes out, and say which.")
@click.option("--save-every", type=options.COUNT, default=500, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out, with the same data and settings.")
@options.device
@options.seed
def command(**given: Any) -> None:
    """Tune a model on DATA, a folder of scene folders.

    A scene folder holds script.txt and, for each of its shots, shot_1.mp4 or shot_1.png. The stages are the paper's:
    single shots where they are needed, then scenes and single shots in turn, bidirectional, then context-causal. Each
    leaves a file that lct generate takes.

    \b
    Example:
      lct tune my_scenes --out runs/mine --single-shot-steps 3000 --steps 4000 --causal-steps 500 --learning-rate 3e-3
    """
    from lct_core.cli.tune import run

    run(**given)
