"""A whole run: stages one after the other, with logs, checkpoints and a way to go on."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from lct_core.checkpoints import load_checkpoint, save_checkpoint
from lct_core.codec import Codec
from lct_core.data import VideoScene
from lct_core.files import replacing
from lct_core.scene_model import SceneModel
from lct_core.training.loop import Report, Training, train
from lct_core.training.stage import Stage

_SHOWN = 3  # differences in an error
CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"


def tune(
    out: str | Path,
    model: SceneModel,
    stages: Sequence[Stage],
    data: Sequence[VideoScene],
    codec: Codec,
    *,
    seed: int,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    save_every: int = 500,
    single_shot_data: Sequence[VideoScene] | None = None,
    on_step: Callable[[Report], None] | None = None,
    on_stage: Callable[[Stage], None] | None = None,
) -> None:
    """Train stage after stage, each from the averaged weights of the one before.

    In ``out`` it writes ``metrics.jsonl``, a line for every step; ``checkpoint.pt``, to go on from; and at the end of
    each stage ``STAGE.pt``, the model. A run that was stopped and resumed gives the same weights as one that was not,
    bit for bit where the machine repeats itself, as a CPU does with one number of threads.

    Args:
        out: Folder, made where it is missing.
        model: A retrofitted model, trained in place.
        stages: What to do, see :func:`paper_stages`.
        data: Scenes.
        codec: Encodes pictures and prompts.
        seed: Of the run.
        about: What to keep beside the weights: how to make the model and the codec again.
        resume: Go on from ``checkpoint.pt`` instead of starting anew. Stages, seed and ``about`` must be the same.
        save_every: Steps between checkpoints; the end of a stage is one too, and the start of the run.
        single_shot_data: Where single shots come from (default: the scenes' own shots).
        on_step: Called after every step.
        on_stage: Called at the end of every stage, when the model has its weights.

    Raises:
        FileExistsError: ``out`` holds a run already and ``resume`` is False.
        FileNotFoundError: there is nothing to resume.
        ValueError: for two stages of one name, a checkpoint of another run, and as :func:`train` does.
    """
    out = Path(out)
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"stages: got {names}, expected at least one, each with a name of its own")
    if CHECKPOINT in [f"{name}.pt" for name in names]:
        raise ValueError(f"stages: got {names}, expected none whose file would be {CHECKPOINT}; choose another name")
    if save_every < 1:
        raise ValueError(f"save_every: got {save_every}, expected at least 1")
    settings = {"stages": [asdict(stage) for stage in stages], "seed": seed, "about": dict(about or {})}
    check_folder(out, resume=resume)
    first = 0
    training: Training | None
    if resume:
        saved = load_checkpoint(out / CHECKPOINT)
        _check_same(saved, settings, out / CHECKPOINT)
        first = names.index(saved["stage"])
        training = Training(model, stages[first])
        training.load_state_dict(saved["training"])
        del saved  # its weights and moments are in the training now
        _cut_log(out / METRICS, names, first, training.step)
    else:  # a run that stops before its first checkpoint can be resumed too
        out.mkdir(parents=True, exist_ok=True)
        training = Training(model, stages[first])
        _save(out, settings, training)
    with (out / METRICS).open("a", encoding="utf-8", buffering=1) as log:  # whole lines, on disk at once
        for stage in stages[first:]:
            training = training or Training(model, stage)
            started = perf_counter()

            def note(report: Report, started: float = started) -> None:
                log.write(json.dumps({**report._asdict(), "seconds": round(perf_counter() - started, 3)}) + "\n")
                if on_step is not None:
                    on_step(report)

            while training.step < stage.steps:
                train(
                    training,
                    data,
                    codec,
                    seed=seed,
                    steps=save_every - training.step % save_every,
                    single_shot_data=single_shot_data,
                    on_step=note,
                )
                _save(out, settings, training)
            training = None  # its averages and moments make room for the next stage's
            save_checkpoint(
                out / f"{stage.name}.pt",
                {**settings, "stage": stage.name, "pattern": stage.pattern, "model": model.backbone.state_dict()},
            )
            if on_stage is not None:
                on_stage(stage)


def _save(out: Path, settings: Mapping[str, Any], training: Training) -> None:
    save_checkpoint(out / CHECKPOINT, {**settings, "stage": training.stage.name, "training": training.state_dict()})


def check_folder(out: Path, *, resume: bool) -> None:
    """Refuse a folder that :func:`tune` would refuse, before data are read.

    Raises:
        FileExistsError: it holds a run already and ``resume`` is False.
        FileNotFoundError: there is nothing to resume.
    """
    if resume and not (out / CHECKPOINT).is_file():
        raise FileNotFoundError(f"{out / CHECKPOINT}: no such file, expected the checkpoint of a run to resume")
    if not resume and ((out / METRICS).exists() or (out / CHECKPOINT).exists()):
        raise FileExistsError(f"{out}: holds a run already, so it is left alone; resume it, or choose another folder")


def _check_same(saved: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with other settings than a run began with."""
    if "training" not in saved:
        raise ValueError(f"{path}: holds a finished stage, expected a checkpoint to go on from")
    if differences := list(_differences({name: saved[name] for name in settings}, settings)):
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ValueError(
            f"{path}: its run has {', '.join(differences[:_SHOWN])}{more}; resume with "
            "the same settings, or start another run in another folder"
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Where nested settings differ, in words."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        if len(old) != len(new):
            yield f"{len(old)} entries in {name}, not {len(new)}"
        else:
            for i, pair in enumerate(zip(old, new, strict=True)):
                yield from _differences(*pair, f"{name}[{i}]")
    elif any(isinstance(value, Mapping | list | tuple | Tensor) for value in (old, new)):
        if not (isinstance(old, Tensor) and isinstance(new, Tensor) and torch.equal(old, new)):
            yield f"another {name}"
    elif old != new:
        yield f"{name} = {old!r}, not {new!r}"


def _cut_log(path: Path, names: Sequence[str], stage: int, step: int) -> None:
    """Keep the log up to a checkpoint: what came after it is done again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    entries = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [line for line, entry in entries if (names.index(entry["stage"]), entry["step"]) <= (stage, step)]
    with replacing(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
