"""What only the full run shows: errors that accumulate over many shots, and composition (paper, 4.2 and 4.3)."""

from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from lct_core.demo.dataset import FRAMES, SIZE
from lct_core.demo.generate import SceneBatch
from lct_core.demo.metrics import adherence, composition_error, drift
from lct_core.demo.plots import accumulation
from lct_core.demo.settings import DemoSettings
from lct_core.demo.world import ENVIRONMENT_TEXT, environment_image, identity_image, identity_text, sample_scene
from lct_core.generation import recent
from lct_core.noise import keyed_generator
from lct_core.pictures.sheet import SceneRows, contact_sheet
from lct_core.progress import Stages
from lct_core.script import ScriptShot


def accumulate(out: Path, generator: SceneBatch, settings: DemoSettings, *, progress: Stages) -> dict[str, Any]:
    """Many shots in a row, through the KV cache, for several noise levels of the history.

    Every shot sees the last that fit the window in which the model was trained, which must be context-causal by now.
    """
    random = keyed_generator(settings.seed, "long scenes")
    scenes = [sample_scene(settings.long_shots, generator=random) for _ in range(settings.held_out)]
    long = replace(generator, scripts=[scene.script for scene in scenes])
    drifts: dict[float, list[float]] = {}
    adherences: dict[float, list[float]] = {}
    first_scene = {}
    for t_c in settings.long_t_c:
        with progress(f"{settings.long_shots} shots in a row, t_c {t_c:g}"):
            shots = replace(long, sampling=replace(long.sampling, t_c=t_c)).ar_causal(history=recent(settings.shots))
        first_scene[f"t_c {t_c:g}"] = [shot[0] for shot in shots]
        of_scenes = [drift([shot[i] for shot in shots], scene.texts) for i, scene in enumerate(scenes)]
        drifts[t_c] = [mean(values) for values in zip(*of_scenes, strict=True)]
        adherences[t_c] = [
            mean(adherence(shot[i], scene.texts[k]) for i, scene in enumerate(scenes)) for k, shot in enumerate(shots)
        ]
    accumulation(out / "accumulation.png", drifts, adherences)
    contact_sheet(out / "long_scene.png", [SceneRows(scenes[0].texts, first_scene)])
    return {
        "long_drift": {f"{t_c:g}": values for t_c, values in drifts.items()},
        "long_adherence": {f"{t_c:g}": values for t_c, values in adherences.items()},
    }


def compose(out: Path, generator: SceneBatch, settings: DemoSettings, *, progress: Stages) -> dict[str, Any]:
    """A shot of one scene's character before another scene's wall, each given as an image.

    The model must be bidirectional still. The two were never paired in training, nor were portraits before a grey wall,
    or walls without anybody, ever seen. The measure beside it is of the same shots without the images.
    """
    random = keyed_generator(settings.seed, "composition")
    pairs = [tuple(sample_scene(1, generator=random) for _ in range(2)) for _ in range(settings.composed)]
    scripts = []
    for who, _ in pairs:
        shots = (identity_text(who), ENVIRONMENT_TEXT, who.shots[0].text)
        scripts.append(replace(who.script, shots=tuple(ScriptShot(text=text) for text in shots)))
    composer = replace(generator, scripts=scripts, frames=(1, 1, FRAMES))
    given = {
        0: torch.stack([identity_image(who, size=SIZE) for who, _ in pairs]),
        1: torch.stack([environment_image(where, size=SIZE) for _, where in pairs]),
    }
    with progress("compose identity and environment images"):
        composed = composer.conditional(given)
        alone = replace(generator, scripts=[replace(script, shots=script.shots[-1:]) for script in scripts]).joint()
    errors = {
        name: [
            composition_error(shot[i], who.shots[0].text, identity=who.character, environment=where.background)
            for i, (who, where) in enumerate(pairs)
        ]
        for name, shot in {"composed": composed[2], "without_images": alone[0]}.items()
    }
    contact_sheet(
        out / "composition.png",
        [
            SceneRows([shot.text for shot in script.shots], {"composed": [shot[i] for shot in composed]})
            for i, script in enumerate(scripts[:4])
        ],
        title="A character and a wall, each given as an image, never paired in training",
    )
    return {
        f"{name}_{part}": mean(getattr(error, part) for error in values)
        for name, values in errors.items()
        for part in ("character", "background")
    }
