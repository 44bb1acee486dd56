"""The run that shows Long Context Tuning working: from MP4 files to scenes whose colours agree, in a few minutes.

A small world is written to disk and read back (:mod:`lct_core.demo.world`, :mod:`lct_core.data`). A single-shot MMDiT
learns it shot by shot, so it has to guess every shot's colours anew. Retrofitted and tuned, every shot at a noise level
of its own, it sees the scene; a short context-causal tuning lets it go shot after shot through the KV cache. Nothing is
mocked, and every number comes from the run.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from lct_core.data.scenes import Clip, read_scene, scene_folders, write_scene
from lct_core.demo.metrics import adherence, appearance_error
from lct_core.demo.sampling import causal, independent, joint
from lct_core.demo.sheet import SceneRows, contact_sheet
from lct_core.demo.training import Clips, StepLoss, long_context_loss, optimise, single_shot_loss
from lct_core.demo.world import VOCABULARY, render, sample_scene, tokenize
from lct_core.noise import shot_noise
from lct_core.plugins import registry
from lct_core.scene_model import retrofit

_FILE_SIZE, _SIZE, _FRAMES, _FPS = 192, 24, 4, 12  # pixels in the files, pixels for the model, frames, per second
_ON_SHEET = 3  # scenes
_OURS = ".written-by-lct-demo"  # marks a data set that a later run may replace
_GOALS = {"joint appearance error, times below independent": 3.0, "joint adherence, share of independent": 0.8}
_LABELS = {"data": "data", "independent": "independent", "joint": "joint", "ar_causal": "causal, KV cache"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the run costs; all of it ours, chosen for minutes on two cores.

    Args:
        seed: Of all randomness.
        scenes: Scenes in the training set.
        shots: Shots in each of them.
        held_out: Scenes to generate, never seen in training.
        held_out_shots: Shots in each of them.
        width: The model's.
        depth: The model's.
        batch: Shots in a single-shot step.
        scene_batch: Scenes in a scene step.
        single_shot_steps: Of the first stage, at ``single_shot_rate``.
        tuning_steps: Of Long Context Tuning, at ``tuning_rate``.
        causal_steps: Of context-causal tuning, at ``causal_rate``.
        euler_steps: Of generation (paper, A.2: 32).
        t_c: Noise level of the history in shot-after-shot generation, 0-1000 (paper, 4.2: 100-500).
    """

    seed: int = 0
    scenes: int = 500
    shots: int = 4
    held_out: int = 32
    held_out_shots: int = 4
    width: int = 96
    depth: int = 5
    batch: int = 4
    scene_batch: int = 1
    single_shot_steps: int = 3000
    single_shot_rate: float = 4e-3
    tuning_steps: int = 4800
    tuning_rate: float = 3e-3
    causal_steps: int = 600
    causal_rate: float = 1.5e-3
    euler_steps: int = 32
    t_c: float = 100.0


def run(out: Path, settings: Settings, *, data: Path | None = None, console: Console) -> dict[str, Any]:
    """Write, read, train, retrofit, tune, generate and measure.

    Args:
        out: Folder for ``metrics.json``, ``contact_sheet.png`` and, unless ``data`` is given, the data set.
        settings: What it costs.
        data: A data set that an earlier run wrote: a folder with ``train`` and ``held_out``.
        console: Where progress and the table go.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ValueError, FileNotFoundError: for media or texts that are missing, broken or not of the demo's world, by name.
    """
    started = perf_counter()
    generator = torch.Generator().manual_seed(settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    with _Stages(console) as stages:
        if data is None:
            data = out / "data"
            _write(data, settings, stages)
        (clips, _), (held_out, texts) = (_read(data / part, stages) for part in ("train", "held_out"))

        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)  # the model's initial weights
            dit = registry().build(
                "mmdit",
                channels=3,
                text_width=len(VOCABULARY),
                width=settings.width,
                depth=settings.depth,
                heads=4,
                patch=(1, 4, 4),
                theta=100.0,  # periods of 6 to 199 positions: a shot takes 6, a scene 24
            )
        parameters = sum(p.numel() for p in dit.parameters())
        prompts, noise = list(held_out.texts.unbind(1)), _noise(held_out, settings.seed)
        generated = {"data": list(held_out.videos.unbind(1))}

        def train(stage: str, loss: StepLoss, steps: int, rate: float) -> None:
            with stages(stage, steps) as advance:
                optimise(dit, loss, steps=steps, learning_rate=rate, generator=generator, on_step=advance)

        single = single_shot_loss(dit, clips, batch=settings.batch)
        train("train on single shots", single, settings.single_shot_steps, settings.single_shot_rate)
        with stages("generate shots independently"):
            generated["independent"] = independent(dit, prompts, noise, steps=settings.euler_steps)

        model = retrofit(dit)

        def tuning(pattern: str) -> StepLoss:
            return long_context_loss(model, clips, single, batch=settings.scene_batch, pattern=pattern)

        train("long context tuning", tuning("bidirectional"), settings.tuning_steps, settings.tuning_rate)
        with stages("generate scenes jointly"):
            generated["joint"] = joint(model, prompts, noise, steps=settings.euler_steps)
        train("context-causal tuning", tuning("context_causal"), settings.causal_steps, settings.causal_rate)
        with stages("generate shot after shot, KV cache"):
            generated["ar_causal"] = causal(model, prompts, noise, steps=settings.euler_steps, t_c=settings.t_c)

    videos = {mode: [(shot.clamp(-1, 1) + 1) / 2 for shot in shots] for mode, shots in generated.items()}
    metrics: dict[str, Any] = {"parameters_added": sum(p.numel() for p in model.backbone.parameters()) - parameters}
    for mode, shots in videos.items():
        metrics |= {f"{mode}_{name}": value for name, value in _measure(shots, texts).items()}
    metrics |= {"seconds": perf_counter() - started, **asdict(settings)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    contact_sheet(
        out / "contact_sheet.png",
        [
            SceneRows(texts[scene], {label: [shot[scene] for shot in videos[mode]] for mode, label in _LABELS.items()})
            for scene in range(min(_ON_SHEET, len(texts)))
        ],
        title="Scenes never seen in training. No text tells a colour: only the other shots do.",
    )
    _report(metrics, parameters, out, console)
    return metrics


class _Stages:
    """Progress, stage by stage: bars with the time left on a terminal, else a line for each stage that is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<36}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextmanager
    def __call__(self, name: str, steps: int = 1) -> Iterator[Callable[..., None]]:
        """A stage; what it yields is called after every step, with the loss where there is one."""
        started, task = perf_counter(), self._progress.add_task(name, total=steps, note="")

        def advance(loss: float | None = None) -> None:
            self._progress.update(task, advance=1, note="" if loss is None else f"loss {loss:.4f}")

        yield advance
        self._progress.update(task, completed=steps)
        if not self._console.is_terminal:
            self._console.print(f"{name}: {perf_counter() - started:.0f} s")


def _write(root: Path, settings: Settings, stages: _Stages) -> None:
    """Render the training and held-out scenes to MP4 files with their texts, in place of an earlier run's."""
    generator = torch.Generator().manual_seed(settings.seed)
    if root.exists() and not (root / _OURS).exists():
        raise FileExistsError(f"{root}: not a data set of the demo's, so it is left alone; choose another --out")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    (root / _OURS).touch()
    parts = {
        "train": (settings.scenes, settings.shots),
        "held_out": (settings.held_out, settings.held_out_shots),
    }
    for part, (scenes, shots) in parts.items():
        with stages(f"write {scenes} scenes, {part}", scenes) as advance:
            for number in range(1, scenes + 1):
                scene = sample_scene(shots, generator=generator)
                videos = render(scene, size=_FILE_SIZE, frames=_FRAMES)
                clips = [Clip(text, video) for text, video in zip(scene.texts, videos, strict=True)]
                write_scene(root / part / f"scene_{number}", clips, fps=_FPS)
                advance()


def _read(root: Path, stages: _Stages) -> tuple[Clips, list[list[str]]]:
    """Read scenes of equally many shots back from disk, small, in [-1, 1], with encoded texts and as they stand."""
    folders = scene_folders(root)
    scenes = []
    with stages(f"read {len(folders)} scenes, {root.name}", len(folders)) as advance:
        for folder in folders:
            scenes.append(read_scene(folder, area=_SIZE * _SIZE))
            shape, first = [clip.frames.shape for clip in scenes[-1]], scenes[0][0].frames.shape
            if shape != [first] * len(scenes[0]) or list(first[2:]) != [_SIZE, _SIZE]:
                raise ValueError(
                    f"{folder}: got shots of channels, frames, height, width {[tuple(s) for s in shape]}, expected "
                    f"{len(scenes[0])} square ones of {first[1]} frames, as in {folders[0].name}: scenes are batched"
                )
            advance()
    videos = torch.stack([torch.stack([clip.frames for clip in scene]) for scene in scenes])
    texts = [[clip.text for clip in scene] for scene in scenes]
    encoded = torch.stack([_encode(folder, scene) for folder, scene in zip(folders, texts, strict=True)])
    return Clips(videos * 2 - 1, encoded), texts


def _encode(folder: Path, texts: Sequence[str]) -> Tensor:
    try:
        return torch.stack([tokenize(text) for text in texts])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _noise(clips: Clips, seed: int) -> list[Tensor]:
    """Where every shot of every scene starts: the same for all modes."""
    scenes, shots, *shape = clips.videos.shape
    return [
        torch.stack([shot_noise(tuple(shape), seed=seed, step=0, scene=scene, shot=shot) for scene in range(scenes)])
        for shot in range(shots)
    ]


def _measure(shots: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """A mode's appearance error, in its parts, and prompt adherence, over all scenes."""
    errors = [appearance_error([shot[i] for shot in shots], scene) for i, scene in enumerate(texts)]
    return {
        "error": mean(e.total for e in errors),
        "error_character": mean(e.character for e in errors),
        "error_background": mean(e.background for e in errors),
        "adherence": mean(
            adherence(shots[k][i], text) for i, scene in enumerate(texts) for k, text in enumerate(scene)
        ),
    }


def _report(metrics: dict[str, Any], parameters: int, out: Path, console: Console) -> None:
    """The table that a person reads."""
    table = Table(title=f"Appearance error, {metrics['held_out']} held-out scenes of {metrics['held_out_shots']} shots")
    table.add_column("", no_wrap=True)
    for column in ("error", "character", "background", "below independent", "adherence"):
        table.add_column(column, justify="right")
    for mode, label in _LABELS.items():
        error, baseline = metrics[f"{mode}_error"], metrics["independent_error"]
        table.add_row(
            label,
            f"{error:.3f}",
            f"{metrics[f'{mode}_error_character']:.3f}",
            f"{metrics[f'{mode}_error_background']:.3f}",
            "" if mode == "data" else f"{baseline / error:.1f} x" if error else "-",
            f"{metrics[f'{mode}_adherence']:.3f}",
        )
    console.print(table)
    reached = (
        metrics["independent_error"] / metrics["joint_error"],
        metrics["joint_adherence"] / metrics["independent_adherence"] if metrics["independent_adherence"] else 0.0,
    )
    for (what, goal), value in zip(_GOALS.items(), reached, strict=True):
        console.print(f"{what}: {value:.2f}, goal {goal:g}, {'met' if value >= goal else 'NOT MET'}")
    console.print(
        f"{parameters:,} parameters, {metrics['parameters_added']} added; {metrics['euler_steps']} Euler steps, no "
        f"guidance, t_c {metrics['t_c']:g}; seed {metrics['seed']}; {metrics['seconds']:.0f} s"
    )
    console.print(f"{out / 'contact_sheet.png'}\n{out / 'metrics.json'}", soft_wrap=True)
