"""``lct tune``: Long Context Tuning on a folder of one's own scenes."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
import torch

from lct_core.cli.options import COUNT, FPS, POSITIVE, Finite, device, seed
from lct_core.coordinates import Scheme

_STEPS = click.IntRange(min=0)
_OWN_AREA, _SMALL_AREA = 480 * 480, 64 * 64  # pixels: the paper's; what a small model on a CPU can do
_LARGEST_PATCH = 32  # pixels: the principal components of larger ones take minutes and gigabytes


@click.command("tune")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/tune"),
    show_default=True,
    help="Folder for checkpoints and metrics.jsonl.",
)
@click.option(
    "--model",
    metavar="MODULE:FACTORY",
    help="A function that returns (model, codec): your DiT or its adapter, and what encodes its videos and prompts.  "
    "[default: a small MMDiT on pixels, trained from nothing]",
)
@click.option(
    "--single-shots", type=click.Path(path_type=Path), help="Scene folders to take single shots from.  [default: DATA]"
)
@click.option("--scheme", type=click.Choice(get_args(Scheme)), default="anchored", show_default=True)
@click.option(
    "--single-shot-steps",
    type=_STEPS,
    help="First, on single shots alone.  [default: 10000 where the model is new or the scheme is paper, else 0]",
)
@click.option("--steps", type=_STEPS, default=135_000, show_default=True, help="Bidirectional.")
@click.option("--causal-steps", type=_STEPS, default=9_000, show_default=True, help="Context-causal.")
@click.option("--learning-rate", type=POSITIVE, default=1e-4, show_default=True, help="Its peak.")
@click.option(
    "--level-mean",
    type=Finite(),
    default=0.0,
    show_default=True,
    help="Mean of the logit of noise levels; higher trains more on what scenes share, 1.1 is SD3's shift of 3.",
)
@click.option("--batch", type=COUNT, default=4, show_default=True, help="Single shots in a step.")
@click.option("--scene-batch", type=COUNT, default=1, show_default=True, help="Scenes in a step.")
@click.option("--max-shots", type=COUNT, default=9, show_default=True, help="Most shots of a scene in a step.")
@click.option(
    "--area",
    type=COUNT,
    help=f"Pixels per frame to shrink videos to.  [default: {_OWN_AREA} with --model, else {_SMALL_AREA}]",
)
@click.option(
    "--multiple",
    type=COUNT,
    help="Height and width are made multiples of this; the small MMDiT's patch.  [default: 16 with --model, else 8]",
)
@click.option("--fps", type=FPS, default=12.0, show_default=True, help="Frames per second to sample.")
@click.option("--max-frames", type=COUNT, default=125, show_default=True, help="Most frames of a shot.")
@click.option("--bf16", is_flag=True, help="Run the model under bfloat16 autocast.")
@click.option("--checkpointing", is_flag=True, help="Recompute activations in the backward pass, to save memory.")
@click.option("--skip-bad", is_flag=True, help="Leave broken scenes out, and say which.")
@click.option("--save-every", type=COUNT, default=500, show_default=True, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out, with the same settings.")
@device
@seed
def command(
    data: Path,
    out: Path,
    model: str | None,
    single_shots: Path | None,
    scheme: Scheme,
    area: int | None,
    multiple: int | None,
    fps: float,
    max_frames: int,
    checkpointing: bool,
    skip_bad: bool,
    save_every: int,
    resume: bool,
    device: torch.device,
    seed: int,
    **numbers: Any,
) -> None:
    """Tune a model on DATA, a folder of scene folders.

    A scene folder holds script.txt and, for each of its shots, shot_1.mp4 or shot_1.png. The stages are the paper's:
    single shots where they are needed, then scenes and single shots in turn, bidirectional, then context-causal.

    \b
    Example:
      lct tune my_scenes --out runs/mine --single-shot-steps 3000 --steps 4000 --causal-steps 500 --learning-rate 3e-3
    """
    from rich.console import Console

    from lct_core.cli.progress import Stages
    from lct_core.cli.source import make, small_mmdit
    from lct_core.data import SceneFolders, scene_folders
    from lct_core.training import Report, tune
    from lct_core.training.run import check_folder

    stages = _stages(new=model is None or scheme == "paper", **numbers)
    multiple = multiple or (8 if model is None else 16)
    area = area or (_SMALL_AREA if model is None else _OWN_AREA)
    if multiple * multiple > area:
        raise ValueError(
            f"--multiple: got {multiple}, but its square exceeds the {area} pixels of --area; lower it, or raise --area"
        )
    if model is None and multiple > _LARGEST_PATCH:
        raise ValueError(f"--multiple: got {multiple}, expected at most {_LARGEST_PATCH}, the small MMDiT's patch")
    check_folder(out, resume=resume)
    reading: dict[str, Any] = {"area": area, "multiple": multiple, "fps": fps, "max_frames": max_frames}
    console = Console(highlight=False)
    with Stages(console) as progress:

        def read(root: Path) -> SceneFolders:
            with progress(f"read {root.name}", len(scene_folders(root))) as advance:
                scenes = SceneFolders(root, skip_bad=skip_bad, on_scene=advance, **reading)
            for folder, reason in scenes.skipped:
                console.print(f"skipped {folder}: {reason}", soft_wrap=True, markup=False)
            if scenes.skipped:
                console.print(f"{len(scenes.skipped)} of {len(scenes.skipped) + len(scenes)} scenes skipped")
            return scenes

        scenes = read(data)
        single_shot_data = read(single_shots) if single_shots else None
        source = (
            {"factory": model}
            if model is not None
            else small_mmdit([*scenes, *(single_shot_data or [])], patch=multiple)
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # a new model's weights
            scene_model, codec = make(source, scheme=scheme, gradient_checkpointing=checkpointing)
        scene_model.backbone.to(device)
        bars: dict[str, Any] = {}

        def on_step(report: Report) -> None:
            if report.stage not in bars:
                bars[report.stage] = progress.open(
                    report.stage, next(s.steps for s in stages if s.name == report.stage)
                )
            bars[report.stage](report.loss, completed=report.step)

        tune(
            out,
            scene_model,
            stages,
            scenes,
            codec,
            seed=seed,
            about={"source": source, "scheme": scheme, "size": [*scenes[0].shots[0].shape[1:]], **reading},
            resume=resume,
            save_every=save_every,
            single_shot_data=single_shot_data,
            on_step=on_step,
        )
    console.print("\n".join(str(out / f"{stage.name}.pt") for stage in stages), soft_wrap=True, markup=False)


def _stages(
    *,
    new: bool,
    single_shot_steps: int | None,
    steps: int,
    causal_steps: int,
    learning_rate: float,
    level_mean: float,
    batch: int,
    scene_batch: int,
    max_shots: int,
    bf16: bool,
) -> list[Any]:
    """The paper's stages with the numbers of the command line; those of no steps are left out."""
    from lct_core.training import paper_stages

    single, both, causal = paper_stages("paper")
    counts = (single.steps if new else 0) if single_shot_steps is None else single_shot_steps, steps, causal_steps
    stages = [
        replace(
            stage,
            steps=count,
            learning_rate=learning_rate,
            level_mean=level_mean,
            single_shot_batch=batch,
            scene_batch=scene_batch,
            max_shots=max_shots,
            precision="bf16" if bf16 else "fp32",
        )
        for stage, count in zip((single, both, causal), counts, strict=True)
        if count
    ]
    if not stages:
        raise ValueError("--steps: got no step in any stage, expected at least one; see --single-shot-steps, --steps")
    return stages
