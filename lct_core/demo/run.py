"""The run that shows Long Context Tuning working: from MP4 files to scenes whose colours agree, in a few minutes.

Scenes of a small world are written to disk as videos and scripts and read back. A single-shot MMDiT learns them shot by
shot, so it has to guess every shot's colours anew. (It is retrofitted from the start, which changes nothing for single
shots.) Tuned on scenes, it sees them whole; a context-causal tuning lets it go shot after shot through the KV cache. It
is the code that ``lct tune`` and ``lct generate`` run; nothing is mocked, and every number comes from the run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from lct_core.checkpoints import ModelCard
from lct_core.checkpoints.model_card import small_mmdit
from lct_core.codec import LinearCodec
from lct_core.data import SceneFolders, VideoScene
from lct_core.demo import extras
from lct_core.demo.dataset import FPS, READING, make_codec, read_scenes, write_scenes
from lct_core.demo.film import film
from lct_core.demo.generate import SceneBatch, Shots
from lct_core.demo.metrics import adherence, appearance_error
from lct_core.demo.plots import loss_curves, modes
from lct_core.demo.report import FILES, GOALS, LABELS, key, report
from lct_core.demo.settings import DemoSettings
from lct_core.demo.world import sample_scene
from lct_core.generation import Sampling
from lct_core.losses import tuning_loss
from lct_core.noise import keyed_generator
from lct_core.pictures.sheet import SceneRows, contact_sheet
from lct_core.plugins import registry
from lct_core.progress import Stages
from lct_core.scene_model import SceneModel, retrofit
from lct_core.training import METRICS, Report, Stage, single_shots, to_row, tune

_ON_SHEET, _ON_FILM = 3, 6  # scenes
_SHOWN = ("independent", "joint", "ar_causal")  # modes
Curve = list[tuple[int, str, float]]
_OURS = ".written-by-lct-demo"  # marks a folder that a later run may write to again


def run(out: Path, settings: DemoSettings, *, console: Console) -> dict[str, Any]:
    """Write, read, train, retrofit, tune, generate in every mode and measure.

    Args:
        out: Folder for ``metrics.json``, pictures, videos, checkpoints and the data set.
        settings: What it costs.
        console: Where progress and the table go.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ImportError: PyAV is not installed.
        FileExistsError: ``out`` holds something else.
    """
    started = perf_counter()
    _claim(out)
    with Stages(console) as progress:
        data, held_out = _data(out / "data", settings, progress)
        codec = make_codec(data)
        card, model, parameters = _model(codec, data, settings)
        generator = SceneBatch(
            model=model,
            codec=codec,
            scripts=[scene.script for scene in held_out],
            seed=settings.seed,
            sampling=Sampling(steps=settings.euler_steps, guidance=settings.guidance, t_c=settings.t_c).encoded(codec),
        )
        truth = [torch.stack(shots) for shots in zip(*(scene.shots for scene in held_out), strict=True)]
        videos: dict[str, Shots] = {"data": truth}
        losses: dict[str, float] = {}
        more: dict[str, Any] = {}

        def after(stage: Stage) -> None:
            """What is generated and measured with a stage's weights."""
            losses[stage.name] = _single_shot_loss(model, codec, held_out)
            for mode, make in _modes(generator, truth)[stage.name].items():
                with progress(f"generate, {LABELS[mode]}"):
                    videos[mode] = make()
            if stage.name == "bidirectional" and settings.composed:
                more.update(extras.compose(out, generator, settings, progress=progress))
            if stage.name == "causal" and settings.long_shots:
                more.update(extras.accumulate(out, generator, settings, progress=progress))

        stages = settings.stages()
        steps = {stage.name: stage.steps for stage in stages}
        bars = progress.named(steps, prefix="train, ")
        curves: dict[str, Curve] = {name: [] for name in steps}

        def on_step(step: Report) -> None:
            bars(step.stage)(step.loss)
            curves[step.stage].append((step.step, step.kind, step.loss))

        tune(
            out,
            model,
            stages,
            data,
            codec,
            seed=settings.seed,
            about=card.state(),
            save_every=max(steps.values()),
            on_step=on_step,
            on_stage=after,
        )

    metrics: dict[str, Any] = {
        "parameters": parameters,
        "parameters_added": sum(p.numel() for p in model.backbone.parameters()) - parameters,
    }
    texts = [[shot.text for shot in scene.script.shots] for scene in held_out]
    for mode, shots in videos.items():
        given = 1 if mode == "conditional" else 0  # a given shot has a look, but no adherence of the model's
        metrics |= {key(mode, name): value for name, value in _measure(shots, texts, given=given).items()}
    metrics |= {
        "single_shot_loss_before": losses["single_shot"],
        "single_shot_loss_after": losses["bidirectional"],
        "single_shot_loss_after_causal": losses["causal"],
        **more,
    }
    _pictures(out, metrics, videos, texts, curves)
    metrics |= {"seconds": perf_counter() - started, **asdict(settings), "long_t_c": list(settings.long_t_c)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    report(metrics, out, console)
    return metrics


def _claim(out: Path) -> None:
    """Make ``out`` this run's, and clear what an earlier run of the demo left there.

    Raises:
        FileExistsError: it holds something that no demo wrote.
    """
    if out.exists() and any(out.iterdir()) and not (out / _OURS).exists():
        raise FileExistsError(f"{out}: holds something else than a run of the demo, so it is left alone; choose --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / _OURS).touch()
    for old in (*out.glob("*.pt"), *(out / name for name in (METRICS, *FILES))):
        old.unlink(missing_ok=True)


def _data(root: Path, settings: DemoSettings, progress: Stages) -> tuple[SceneFolders, SceneFolders]:
    """The training and the held-out scenes, written to disk and read back."""
    parts = {"train": settings.scenes, "held_out": settings.held_out}
    for part, count in parts.items():
        random = keyed_generator(settings.seed, part)
        scenes = [sample_scene(settings.shots, generator=random) for _ in range(count)]
        write_scenes(root / part, scenes, progress=progress)
    data, held_out = (read_scenes(root / part, progress=progress) for part in parts)
    return data, held_out


def _model(codec: LinearCodec, data: SceneFolders, settings: DemoSettings) -> tuple[ModelCard, SceneModel, int]:
    """A new single-shot model, retrofitted, with the number of parameters that it had before."""
    source = small_mmdit(codec, width=settings.width, depth=settings.depth, heads=settings.heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        dit = registry().build(source["backbone"], **source["options"])
    parameters = sum(p.numel() for p in dit.parameters())
    card = ModelCard(source=source, scheme="anchored", size=[*data[0].shots[0].shape[1:]], **READING)
    return card, retrofit(dit, scheme=card.scheme, batch_shots=True), parameters


def _modes(generator: SceneBatch, truth: Shots) -> dict[str, dict[str, Callable[[], Shots]]]:
    """What is generated after which stage."""
    return {
        "single_shot": {"independent": generator.independent},
        "bidirectional": {
            "joint": generator.joint,
            "conditional": lambda: generator.conditional({0: truth[0]}),
            "ar_bidirectional": generator.ar_bidirectional,
            "ar_causal_before": generator.ar_causal,
        },
        "causal": {"ar_causal": generator.ar_causal},
    }


def _pictures(
    out: Path,
    metrics: dict[str, Any],
    videos: dict[str, Shots],
    texts: Sequence[Sequence[str]],
    curves: dict[str, Curve],
) -> None:
    """The contact sheet, the film and the plots."""

    def rows(shown: Sequence[str], count: int) -> list[SceneRows]:
        return [
            SceneRows(scene, {LABELS[mode]: [shot[i] for shot in videos[mode]] for mode in shown})
            for i, scene in enumerate(texts[:count])
        ]

    title = "Scenes never seen in training. No text tells a colour: only the other shots do."
    contact_sheet(out / "contact_sheet.png", rows(("data", *_SHOWN), _ON_SHEET), title=title)
    film(out / "scenes.mp4", rows(_SHOWN, _ON_FILM), fps=FPS)
    loss_curves(out / "losses.png", curves)
    shown = {mode: label for mode, label in LABELS.items() if mode != "data"}
    modes(
        out / "modes.png",
        {label: metrics[key(mode, "error")] for mode, label in shown.items()},
        {label: metrics[key(mode, "adherence")] for mode, label in shown.items()},
        goals={LABELS[mode]: metrics["independent_error"] / times for mode, times in GOALS.items()},
    )


@torch.no_grad()
def _single_shot_loss(model: SceneModel, codec: LinearCodec, held_out: Sequence[VideoScene]) -> float:
    """Eq. 1 on held-out single shots, with the same noise and levels each time."""
    random = keyed_generator("single-shot loss")
    examples = single_shots(held_out, codec, count=512, dropout=0.0, generator=random)
    row = to_row(examples, generator=random)
    return tuning_loss(model, row.scenes, row.levels, row.noise).mean.item()


def _measure(shots: Shots, texts: Sequence[Sequence[str]], *, given: int = 0) -> dict[str, float]:
    """A mode's appearance error, in its parts, over all shots; and adherence, over those that were generated."""
    errors = [appearance_error([shot[i] for shot in shots], scene) for i, scene in enumerate(texts)]
    return {
        "error": mean(e.total for e in errors),
        "error_character": mean(e.character for e in errors),
        "error_background": mean(e.background for e in errors),
        "adherence": mean(
            adherence(shots[k][i], text) for i, scene in enumerate(texts) for k, text in enumerate(scene) if k >= given
        ),
    }
