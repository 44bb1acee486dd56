"""The run that shows Long Context Tuning working: from MP4 files to scenes whose colours agree, in a few minutes.

Scenes of a small world are written to disk as videos and scripts and read back. A single-shot MMDiT learns them shot by
shot, so it has to guess every shot's colours anew. (It is retrofitted from the start, which changes nothing for single
shots.) Tuned on scenes, it sees them whole; a short context-causal tuning lets it go shot after shot through the KV
cache. All of it is the code that ``lct tune`` and ``lct generate`` run; nothing is mocked, and every number comes from
the run.
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

from lct_core.cli.progress import Stages
from lct_core.cli.sheet import SceneRows, contact_sheet
from lct_core.codec import LinearCodec
from lct_core.data import VideoScene
from lct_core.demo import extras
from lct_core.demo.dataset import FPS, PATCH, SIZE, make_codec, read_scenes, write_scenes
from lct_core.demo.film import film
from lct_core.demo.generate import Generator, Shots
from lct_core.demo.metrics import adherence, appearance_error
from lct_core.demo.plots import loss_curves, modes
from lct_core.demo.report import GOALS, LABELS, key, report
from lct_core.demo.settings import Settings
from lct_core.demo.world import sample_scene
from lct_core.losses import tuning_loss
from lct_core.noise import keyed_generator
from lct_core.plugins import registry
from lct_core.scene_model import SceneModel, retrofit
from lct_core.training import METRICS, Report, Stage, single_shots, to_row, tune

_ON_SHEET, _ON_FILM = 3, 6  # scenes
_SHOWN = ("data", "independent", "joint", "ar_causal")
_OURS = ".written-by-lct-demo"  # marks a folder that a later run may write to again


def run(out: Path, settings: Settings, *, console: Console) -> dict[str, Any]:
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
        for part, count in {"train": settings.scenes, "held_out": settings.held_out}.items():
            random = keyed_generator(settings.seed, part)
            scenes = [sample_scene(settings.shots, generator=random) for _ in range(count)]
            write_scenes(out / "data" / part, scenes, progress=progress)
        data, held_out = (read_scenes(out / "data" / part, progress=progress) for part in ("train", "held_out"))
        codec = make_codec(data)
        source, model = _model(codec, settings)
        parameters = sum(p.numel() for p in model.backbone.parameters())
        generator = Generator(
            model=model,
            codec=codec,
            scripts=[scene.script for scene in held_out],
            seed=settings.seed,
            steps=settings.euler_steps,
            guidance=settings.guidance,
            t_c=settings.t_c,
        )
        truth = [torch.stack(shots) for shots in zip(*(scene.shots for scene in held_out), strict=True)]
        videos: dict[str, Shots] = {"data": truth}
        losses: dict[str, float] = {}

        def generate(mode: str, make: Callable[[], Shots]) -> None:
            with progress(f"generate, {LABELS[mode]}"):
                videos[mode] = make()

        def after(stage: Stage) -> None:
            """What is measured between the stages."""
            losses[stage.name] = _single_shot_loss(model, codec, held_out)
            if stage.name == "single_shot":
                generate("independent", generator.independent)
            elif stage.name == "bidirectional":
                generate("joint", generator.joint)
                generate("conditional", lambda: generator.conditional({0: truth[0]}))
                generate("ar_bidirectional", generator.ar_bidirectional)
                generate("ar_causal_before", generator.ar_causal)
            else:
                generate("ar_causal", generator.ar_causal)

        steps = {stage.name: stage.steps for stage in settings.stages()}
        bars: dict[str, Callable[..., None]] = {}
        curves: dict[str, list[tuple[int, str, float]]] = {stage.name: [] for stage in settings.stages()}

        def on_step(step: Report) -> None:
            if step.stage not in bars:
                bars[step.stage] = progress.open(f"train, {step.stage}", steps[step.stage])
            bars[step.stage](step.loss)
            curves[step.stage].append((step.step, step.kind, step.loss))

        tune(
            out,
            model,
            settings.stages(),
            data,
            codec,
            seed=settings.seed,
            about={
                "source": source,
                "scheme": model.scheme,
                "size": [*data[0].shots[0].shape[1:]],
                "area": SIZE * SIZE,
                "multiple": PATCH,
                "fps": FPS,
                "max_frames": 125,
            },
            save_every=max(stage.steps for stage in settings.stages()),
            on_step=on_step,
            on_stage=after,
        )
        more = extras.run(out, generator, settings, progress=progress)

    scripts = [scene.script for scene in held_out]
    texts = [[shot.text for shot in script.shots] for script in scripts]
    metrics: dict[str, Any] = {
        "parameters": parameters,
        "parameters_added": sum(p.numel() for p in model.backbone.parameters()) - parameters,
    }
    for mode, shots in videos.items():
        given = 1 if mode == "conditional" else 0  # a given shot has a look, but no adherence of the model's
        metrics |= {key(mode, name): value for name, value in _measure(shots, texts, given=given).items()}
    metrics |= {
        "single_shot_loss_before": losses["single_shot"],
        "single_shot_loss_after": losses["bidirectional"],
        "single_shot_loss_after_causal": losses["causal"],
        **more,
    }
    rows = [
        SceneRows(texts[i], {LABELS[mode]: [shot[i] for shot in videos[mode]] for mode in _SHOWN})
        for i in range(len(texts))
    ]
    title = "Scenes never seen in training. No text tells a colour: only the other shots do."
    contact_sheet(out / "contact_sheet.png", rows[:_ON_SHEET], title=title)
    film(
        out / "scenes.mp4",
        [SceneRows(row.texts, {k: v for k, v in row.rows.items() if k != LABELS["data"]}) for row in rows[:_ON_FILM]],
        fps=FPS,
    )
    loss_curves(out / "losses.png", curves)
    shown = {mode: label for mode, label in LABELS.items() if mode != "data"}
    modes(
        out / "modes.png",
        {label: metrics[key(mode, "error")] for mode, label in shown.items()},
        {label: metrics[key(mode, "adherence")] for mode, label in shown.items()},
        goals={LABELS[mode]: metrics["independent_error"] / times for mode, times in GOALS.items()},
    )
    metrics |= {"seconds": perf_counter() - started, **asdict(settings)}
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
    for old in (*out.glob("*.pt"), out / METRICS, *(out / name for name in extras.FILES)):
        old.unlink(missing_ok=True)


def _model(codec: LinearCodec, settings: Settings) -> tuple[dict[str, Any], SceneModel]:
    """A new single-shot model, retrofitted: called on one shot, it is still what it was, to the last bit."""
    options = {
        "channels": codec.channels,
        "text_width": codec.text_width,
        "width": settings.width,
        "depth": settings.depth,
        "heads": settings.heads,
        "patch": [1, 1, 1],
        "theta": 100.0,  # periods of 6 to 199 positions: a shot takes 5, a scene about 25
        "position_embedding": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = retrofit(registry().build("mmdit", **options), batch_shots=True)
    return {"backbone": "mmdit", "options": options, "codec": codec.state()}, model


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
