"""``lct tune``: Long Context Tuning on a folder of one's own scenes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
import torch

from lct_core.checkpoints.factory import current_folder_on_path, load, own_code
from lct_core.checkpoints.model_card import ModelCard, Source, fit_codec, small_mmdit
from lct_core.cli.options import COUNT, COUNT_OR_NONE, FINITE, FPS, POSITIVE, device, seed, seeded, within_memory
from lct_core.coordinates import Scheme
from lct_core.data import SceneFolders, scene_folders
from lct_core.training import CHECKPOINT, Report, Stage, load_checkpoint, paper_stages, tune
from lct_core.training.run import check_folder

if TYPE_CHECKING:
    from lct_core.progress import Stages

_OWN_AREA, _SMALL_AREA = 480 * 480, 64 * 64  # pixels: the paper's; what a small model on a CPU can do
_OWN_MULTIPLE, _SMALL_MULTIPLE = 16, 8  # pixels: what autoencoder and patches usually need; the small model's patch
_LARGEST_PATCH = 32  # pixels: the principal components of larger ones take minutes and gigabytes
_LESS_MEMORY = "lower --area, --max-frames, --max-shots, --scene-batch or --batch, or add --checkpointing or --bf16"


@click.command("tune", short_help="Tune a model on a folder of scenes.")
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
    help="A function that takes no argument and returns (model, codec): your DiT or its adapter, and what encodes its "
    "videos and prompts.  [default: a small MMDiT on pixels, trained from nothing]",
)
@click.option(
    "--single-shots", type=click.Path(path_type=Path), help="Scene folders to take single shots from.  [default: DATA]"
)
@click.option(
    "--scheme",
    type=click.Choice(get_args(Scheme)),
    default="anchored",
    show_default=True,
    help="Where tokens stand: as the model knows it inside a shot, or as in the paper, which it has to learn.",
)
@click.option(
    "--single-shot-steps",
    type=COUNT_OR_NONE,
    help="Steps of the first stage, single shots alone.  [default: 0 with --model and the anchored scheme, else 10000]",
)
@click.option(
    "--steps", type=COUNT_OR_NONE, default=135_000, show_default=True, help="Steps of the bidirectional stage."
)
@click.option(
    "--causal-steps", type=COUNT_OR_NONE, default=9_000, show_default=True, help="Steps of the context-causal stage."
)
@click.option("--learning-rate", type=POSITIVE, default=1e-4, show_default=True, help="Peak of every stage.")
@click.option(
    "--level-mean",
    type=FINITE,
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
    help="Height and width are made multiples of this; it is the small MMDiT's patch.  "
    f"[default: {_OWN_MULTIPLE} with --model, else {_SMALL_MULTIPLE}]",
)
@click.option("--fps", type=FPS, default=12.0, show_default=True, help="Frames per second to sample videos at.")
@click.option("--max-frames", type=COUNT, default=125, show_default=True, help="Most frames that a shot may have.")
@click.option("--bf16", is_flag=True, help="Run the model under bfloat16 autocast.")
@click.option("--checkpointing", is_flag=True, help="Recompute activations in the backward pass, to save memory.")
@click.option("--skip-bad", is_flag=True, help="Leave broken scenes out, and say which.")
@click.option("--save-every", type=COUNT, default=500, show_default=True, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out, with the same data and settings.")
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
    single shots where they are needed, then scenes and single shots in turn, bidirectional, then context-causal. Each
    leaves a file that lct generate takes.

    \b
    Example:
      lct tune my_scenes --out runs/mine --single-shot-steps 3000 --steps 4000 --causal-steps 500 --learning-rate 3e-3
    """
    from rich.console import Console

    from lct_core.progress import Stages

    stages = _stages(new=model is None or scheme == "paper", **numbers)
    reading = _reading(area, multiple, small=model is None) | {"fps": fps, "max_frames": max_frames}
    check_folder(out, resume=resume)
    console = Console(highlight=False)
    with (
        current_folder_on_path(),
        own_code(model),
        within_memory(device, fix=_LESS_MEMORY),
        Stages(console) as progress,
    ):
        source = _source(model, saved=out / CHECKPOINT if resume else None)
        roots = [data, *([single_shots] if single_shots else [])]
        sets = [_read(root, progress, skip_bad=skip_bad, **reading) for root in roots]
        card = ModelCard(
            source=source or small_mmdit(fit_codec(*sets, patch=reading["multiple"])),
            scheme=scheme,
            size=sets[0][0].shots[0].shape[1:],
            **reading,
        )
        prints = [_fingerprint(root, scenes) for root, scenes in zip(roots, sets, strict=True)]
        with seeded(seed):  # a new model's weights
            scene_model, codec = card.build(gradient_checkpointing=checkpointing)
        scene_model.backbone.to(device)
        tune(
            out,
            scene_model,
            stages,
            sets[0],
            codec,
            seed=seed,
            about={**card.state(), "data": prints},
            resume=resume,
            save_every=save_every,
            single_shot_data=sets[1] if single_shots else None,
            on_step=_bars(progress, stages),
        )
    click.echo("\n".join(str(out / f"{stage.name}.pt") for stage in stages))


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
) -> list[Stage]:
    """The paper's stages with the numbers of the command line; those of no steps are left out."""
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


def _reading(area: int | None, multiple: int | None, *, small: bool) -> dict[str, Any]:
    """The size at which videos are read."""
    multiple = multiple or (_SMALL_MULTIPLE if small else _OWN_MULTIPLE)
    area = area or (_SMALL_AREA if small else _OWN_AREA)
    if multiple * multiple > area:
        raise ValueError(
            f"--multiple: got {multiple}, but its square exceeds the {area} pixels of --area; lower it, or raise --area"
        )
    if small and multiple > _LARGEST_PATCH:
        raise ValueError(f"--multiple: got {multiple}, expected at most {_LARGEST_PATCH}, the small MMDiT's patch")
    return {"area": area, "multiple": multiple}


def _source(model: str | None, *, saved: Path | None) -> Source | None:
    """Where the model comes from, None for one yet to be made; mistakes show here, before any scene is read.

    A run that is resumed keeps its codec: another machine, or number of threads, would fit it differently in the last
    bits.
    """
    if saved is not None:
        card = ModelCard.from_state(load_checkpoint(saved).get("about", {}), saved)
        if card.factory != model:
            was = "without --model" if card.factory is None else f"with --model {card.factory}"
            raise ValueError(f"--model: got {model or 'none'}, but {saved} is of a run {was}; resume with the same")
        return card.source
    if model is None:
        return None
    load(model)
    return {"factory": model}


def _read(root: Path, progress: "Stages", *, skip_bad: bool, **reading: Any) -> SceneFolders:
    """The scenes of a folder, with a word on those that are left out."""
    with progress(f"read {root.name}", len(scene_folders(root))) as advance:
        scenes = SceneFolders(root, skip_bad=skip_bad, on_scene=advance, **reading)
    for folder, reason in scenes.skipped:
        progress.say(f"skipped {folder}: {reason}")
    if scenes.skipped:
        progress.say(f"{len(scenes.skipped)} of {len(scenes.skipped) + len(scenes)} scenes skipped")
    return scenes


def _fingerprint(root: Path, scenes: SceneFolders) -> str:
    """What tells a data set from another, so that a run is not resumed on other scenes; no video is read for it."""
    skipped = {folder for folder, _ in scenes.skipped}
    digest = blake2b(digest_size=8)
    for folder in scene_folders(root):
        if folder not in skipped:
            sizes = sorted((file.name, file.stat().st_size) for file in folder.iterdir())
            digest.update(repr((folder.name, sizes, (folder / "script.txt").read_bytes())).encode())
    return f"{len(scenes)} scenes, {digest.hexdigest()}"


def _bars(progress: "Stages", stages: Sequence[Stage]) -> Callable[[Report], None]:
    """A bar for every stage, from its first step on."""
    steps = {stage.name: stage.steps for stage in stages}
    bars: dict[str, Callable[..., None]] = {}

    def on_step(report: Report) -> None:
        if report.stage not in bars:
            bars[report.stage] = progress.open(report.stage, steps[report.stage])
        bars[report.stage](report.loss, completed=report.step)

    return on_step
