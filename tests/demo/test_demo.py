"""The demo, at a size at which it takes seconds and learns nothing: it runs whole, and says what it wrote."""

import io
import json
from dataclasses import asdict, replace
from math import isfinite
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import lct_core.demo.run
from lct_core.cli import main
from lct_core.data import read_image, read_scene, read_video, scene_folders
from lct_core.demo.report import FILES, LABELS, verdicts
from lct_core.demo.run import run
from lct_core.demo.settings import DemoSettings
from lct_core.script import read_script
from lct_core.training import load_checkpoint

pytest.importorskip("av")


TINY = DemoSettings(
    scenes=4,
    shots=2,
    held_out=2,
    width=24,
    depth=2,
    heads=2,
    single_shot_batch=2,
    scene_batch=1,
    single_shot_steps=2,
    tuning_steps=4,
    causal_steps=2,
    euler_steps=2,
    guidance=2.0,
)
WITH_EXTRAS = replace(TINY, long_shots=3, long_t_c=(0.0, 500.0), composed=2)
PICTURES = ("contact_sheet.png", "modes.png", "losses.png")
EXTRAS = ("accumulation.png", "long_scene.png", "composition.png")
STAGES = ("single_shot", "bidirectional", "causal")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two runs in one folder, the first with another seed: what both returned, and what the second printed."""
    out = tmp_path_factory.mktemp("demo")
    other = run(out, replace(TINY, seed=1), console=Console(quiet=True))
    (out / "data" / "train" / "scene_5").mkdir()
    (out / "notes.txt").touch()
    printed = io.StringIO()
    metrics = run(out, WITH_EXTRAS, console=Console(file=printed, width=160))
    return SimpleNamespace(out=out, other=other, metrics=metrics, printed=printed.getvalue())


def test_metrics_are_written_as_returned(finished):
    metrics = finished.metrics
    assert (finished.out / "metrics.json").read_text() == json.dumps(metrics, indent=2) + "\n"
    assert (asdict(WITH_EXTRAS) | {"long_t_c": list(WITH_EXTRAS.long_t_c)}).items() <= metrics.items()
    assert metrics["parameters_added"] == 0
    saved = load_checkpoint(finished.out / "causal.pt")
    assert metrics["parameters"] == sum(weight.numel() for weight in saved["model"].values())
    assert metrics["seconds"] > 0
    modes = ("data", "independent", "joint", "conditional", "ar_bidirectional", "ar_causal")
    for mode, end in [*((mode, "") for mode in modes), ("ar_causal", "_before")]:
        assert 0 <= metrics[f"{mode}_adherence{end}"] <= 1
        character, background = (metrics[f"{mode}_error_{part}{end}"] for part in ("character", "background"))
        assert metrics[f"{mode}_error{end}"] == pytest.approx(character + background)
        assert character >= 0 <= background
    for end in ("before", "after", "after_causal"):
        assert isfinite(metrics[f"single_shot_loss_{end}"])


def test_the_extras_are_measured(finished):
    metrics = finished.metrics
    assert metrics["long_drift"].keys() == metrics["long_adherence"].keys() == {"0", "500"}
    for name in ("long_drift", "long_adherence"):
        assert all(len(values) == 3 and all(map(isfinite, values)) for values in metrics[name].values())
    assert all(values[0] == 0 < values[1] for values in metrics["long_drift"].values())
    assert metrics["long_drift"]["0"] != metrics["long_drift"]["500"]
    for name in ("composed", "without_images"):
        assert all(isfinite(metrics[f"{name}_{part}"]) for part in ("character", "background"))
    assert metrics["composed_background"] != metrics["without_images_background"]


def test_the_data_come_back_from_disk_as_the_world_has_them(finished):
    assert finished.metrics["data_error"] < 0.01
    assert finished.metrics["data_adherence"] > 0.95
    for part, count in (("train", 4), ("held_out", 2)):
        folders = scene_folders(finished.out / "data" / part)
        assert [folder.name for folder in folders] == [f"scene_{i}" for i in range(1, count + 1)]
        for folder in folders:
            scene = read_scene(folder)
            assert [shot.shape for shot in scene.shots] == [(3, 4, 96, 96)] * 2
    scripts = {folder.parent.name: read_script(folder / "script.txt") for folder in folders}
    assert "colour" in scripts["held_out"].global_prompt()


def test_files(finished):
    assert {path.name for path in finished.out.iterdir()} == {
        ".written-by-lct-demo",
        "notes.txt",
        "data",
        "metrics.json",
        "metrics.jsonl",
        "checkpoint.pt",
        *(f"{name}.pt" for name in STAGES),
        "scenes.mp4",
        *PICTURES,
        *EXTRAS,
    }
    for name in (*PICTURES, *EXTRAS):
        picture = read_image(finished.out / name)
        assert min(picture.shape[2:]) > 100
        assert picture.std() > 0.01
    assert read_video(finished.out / "scenes.mp4").shape[1] == 2 * 2 * 4  # scenes, shots, frames
    rows = [json.loads(line) for line in (finished.out / "metrics.jsonl").read_text().splitlines()]
    steps = dict(zip(STAGES, (2, 4, 2), strict=True))
    assert [(row["stage"], row["step"]) for row in rows] == [(s, i + 1) for s in STAGES for i in range(steps[s])]


def test_what_is_printed(finished):
    metrics, lines = finished.metrics, finished.printed.splitlines()
    stages = [line.rsplit(": ", 1)[0] for line in lines if " of " in line and "held-out" not in line]
    for words in ("write 4 scenes, train", "read 2 scenes, held_out", "generate, joint", "3 shots in a row, t_c 500"):
        assert words in stages
    for name in STAGES:
        assert any(line.startswith(f"train, {name}: ") and ", loss " in line for line in lines)
    for mode, label in LABELS.items():
        (row,) = (line for line in lines if line.startswith(f"\N{BOX DRAWINGS LIGHT VERTICAL} {label} "))
        end = "_before" if mode.endswith("_before") else ""
        name = mode.removesuffix("_before")
        for measure in ("error", "error_character", "error_background", "adherence"):
            assert f" {metrics[f'{name}_{measure}{end}']:.3f} " in row
    judged = [line for line in lines if line.startswith(("met ", "NOT MET "))]
    assert judged == [
        f"{'met    ' if met else 'NOT MET'}  {what}: {value:.3g}, goal {goal}"
        for what, value, goal, met in verdicts(metrics)
    ]
    assert "0 added; 2 Euler steps, guidance 2 in every mode, t_c 100; seed 0; " in finished.printed
    assert lines[-len(FILES) :] == [str(finished.out / name) for name in FILES]


def test_the_seed_alone_decides(finished, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    again = run(tmp_path, WITH_EXTRAS, console=Console(quiet=True))
    assert torch.equal(torch.rand(1), expected)  # torch's own randomness is neither used nor changed
    assert {**again, "seconds": 0} == {**finished.metrics, "seconds": 0}
    for mode in ("independent", "joint", "conditional", "ar_bidirectional", "ar_causal"):
        assert finished.other[f"{mode}_error"] != finished.metrics[f"{mode}_error"]
    assert finished.other["single_shot_loss_before"] != finished.metrics["single_shot_loss_before"]
    assert not finished.other.keys() & {"long_drift", "composed_character"}


def test_pictures_of_an_earlier_run_are_removed(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".written-by-lct-demo", "single_shot.pt", "metrics.jsonl", "notes.txt", *EXTRAS):
        (out / name).touch()
    lct_core.demo.run._claim(out)
    assert {path.name for path in out.iterdir()} == {".written-by-lct-demo", "notes.txt"}


def test_a_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").touch()
    assert main(["demo", "--out", str(tmp_path)]) == 2
    line = (
        f"lct demo: error: {tmp_path}: holds something else than a run of the demo, so it is left alone; choose --out"
    )
    assert capsys.readouterr().err == f"{line}\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "thesis.txt"]


@pytest.mark.parametrize("checkpoint", STAGES)
def test_lct_generate_takes_the_demos_models(finished, tmp_path, checkpoint):
    held_out = finished.out / "data" / "held_out" / "scene_1"
    arguments = [held_out / "script.txt", finished.out / f"{checkpoint}.pt", "--out", tmp_path / "out", "--steps", 2]
    given = [] if checkpoint == "single_shot" else ["--given", f"1={held_out / 'shot_1.mp4'}"]
    assert main(["generate", *map(str, [*arguments, *given])]) == 0
    scene = read_scene(tmp_path / "out")
    assert scene.script == read_script(held_out / "script.txt")
    assert [shot.shape for shot in scene.shots] == [(3, 4, 24, 24)] * 2
    if given:
        shown = read_scene(held_out, area=24 * 24, multiple=6).shots[0]
        assert (scene.shots[0] - shown).mean((2, 3)).abs().max() < 0.02
