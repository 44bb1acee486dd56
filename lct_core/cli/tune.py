"""``lct tune``: Long Context Tuning on a folder of one's own scenes."""

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from lct_core.checkpoints import ModelCard
from lct_core.checkpoints.factory import load
from lct_core.checkpoints.model_card import Source, fit_codec, small_mmdit
from lct_core.cli.machine import seeded, usable, within_memory
from lct_core.cli.options import OWN_AREA, OWN_MULTIPLE, SMALL_AREA, SMALL_MULTIPLE
from lct_core.cli.user_code import current_folder_on_path, own_code
from lct_core.coordinates import Scheme
from lct_core.data import SceneFolders, scene_folders
from lct_core.progress import Stages
from lct_core.training import CHECKPOINT, Report, Stage, load_checkpoint, paper_stages, tune
from lct_core.training.run import check_folder

_LARGEST_PATCH = 32  # pixels: the principal components of larger ones take minutes and gigabytes
_LESS_MEMORY = "lower --area, --max-frames, --max-shots, --scene-batch or --batch, or add --checkpointing or --bf16"


def run(
    *,
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
    device: str,
    seed: int,
    **numbers: Any,
) -> None:
    """Tune a model on folders of scenes; the arguments are the command's."""
    where = usable(device)
    stages = _stages(new=model is None or scheme == "paper", **numbers)
    reading = _reading(area, multiple, small=model is None) | {"fps": fps, "max_frames": max_frames}
    check_folder(out, resume=resume)
    with (
        current_folder_on_path(),
        own_code(model),
        within_memory(where, fix=_LESS_MEMORY),
        Stages(Console(highlight=False)) as progress,
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
        scene_model.backbone.to(where)
        bars = progress.named({stage.name: stage.steps for stage in stages})

        def on_step(report: Report) -> None:
            bars(report.stage)(report.loss, completed=report.step)

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
            on_step=on_step,
        )
    click.echo("\n".join(str(out / f"{stage.name}.pt") for stage in stages))


def _stages(
    *, new: bool, single_shot_steps: int | None, steps: int, causal_steps: int, bf16: bool, **numbers: Any
) -> list[Stage]:
    """The paper's stages with the numbers of the command line; those of no steps are left out."""
    single, both, causal = paper_stages("paper")
    counts = (single.steps if new else 0) if single_shot_steps is None else single_shot_steps, steps, causal_steps
    stages = [
        replace(stage, steps=count, precision="bf16" if bf16 else "fp32", **numbers)
        for stage, count in zip((single, both, causal), counts, strict=True)
        if count
    ]
    if not stages:
        raise ValueError("--steps: got no step in any stage, expected at least one; see --single-shot-steps, --steps")
    return stages


def _reading(area: int | None, multiple: int | None, *, small: bool) -> dict[str, Any]:
    """The size at which videos are read."""
    multiple = multiple or (SMALL_MULTIPLE if small else OWN_MULTIPLE)
    area = area or (SMALL_AREA if small else OWN_AREA)
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


def _read(root: Path, progress: Stages, *, skip_bad: bool, **reading: Any) -> SceneFolders:
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
