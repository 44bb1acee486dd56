"""The demo, at a size at which it takes seconds and learns nothing: it runs whole, and says what it read and wrote."""

import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from lct_core.cli import main
from lct_core.demo.run import Settings, _report, run

TINY = Settings(
    scenes=3,
    shots=2,
    held_out=2,
    held_out_shots=2,
    width=24,
    depth=2,
    batch=2,
    scene_batch=2,
    single_shot_steps=3,
    tuning_steps=4,
    causal_steps=2,
    euler_steps=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with (out / "console.txt").open("w") as file:
        return out, run(out, TINY, console=Console(file=file, width=160))


def test_metrics_are_written_as_returned(finished):
    out, metrics = finished
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["parameters_added"] == 0
    assert asdict(TINY).items() <= metrics.items()
    for mode in ("data", "independent", "joint", "ar_causal"):
        whole = metrics[f"{mode}_error_character"] + metrics[f"{mode}_error_background"]
        assert metrics[f"{mode}_error"] == pytest.approx(whole)
        assert 0 <= metrics[f"{mode}_adherence"] <= 1


def test_the_data_come_back_from_disk_as_the_world_has_them(finished):
    _, metrics = finished
    assert metrics["data_error"] < 0.01
    assert metrics["data_adherence"] > 0.95


def test_console_names_every_stage_and_file(finished):
    out, metrics = finished
    printed = (out / "console.txt").read_text()
    for words in ("train on single shots", "long context tuning", "context-causal tuning", "KV cache", "0 added"):
        assert words in printed
    assert f"{metrics['joint_error']:.3f}" in printed
    assert str(out / "contact_sheet.png") in printed
    assert (out / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_numbers(finished, tmp_path):
    out, metrics = finished
    again = run(tmp_path, TINY, data=out / "data", console=Console(quiet=True))
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}
    assert not (tmp_path / "data").exists()


def test_another_seed_other_numbers(finished, tmp_path):
    out, metrics = finished
    other = run(tmp_path, replace(TINY, seed=1), data=out / "data", console=Console(quiet=True))
    assert other["data_error"] == metrics["data_error"]
    assert other["joint_error"] != metrics["joint_error"]


def test_a_second_run_replaces_its_own_data_and_nobody_elses(finished, tmp_path):
    own, foreign = tmp_path / "own", tmp_path / "foreign"
    shutil.copytree(finished[0] / "data", own / "data")
    (own / "data" / "train" / "left over").touch()
    run(own, TINY, console=Console(quiet=True))
    assert not (own / "data" / "train" / "left over").exists()
    (foreign / "data").mkdir(parents=True)
    (foreign / "data" / "thesis.txt").touch()
    assert main(["demo", "--out", str(foreign)]) == 2
    assert (foreign / "data" / "thesis.txt").exists()


@pytest.mark.parametrize(("joint", "adherence", "verdicts"), [(0.1, 0.9, ["met", "met"]), (0.2, 0.7, ["NOT MET"] * 2)])
def test_goals_are_judged(joint, adherence, verdicts):
    console = Console(record=True, width=160, quiet=False, file=io.StringIO())
    scores = {
        f"{mode}_{name}": {"error": 0.5, "adherence": 1.0}.get(name, 0.2)
        for mode in ("data", "independent", "joint", "ar_causal")
        for name in ("error", "error_character", "error_background", "adherence")
    }
    scores |= {"joint_error": joint, "joint_adherence": adherence, "parameters_added": 0, "seconds": 1.0}
    _report({**scores, **asdict(TINY)}, 1, Path("out"), console)
    printed = [line for line in console.export_text().splitlines() if "goal" in line]
    assert [line.rsplit(", ", 1)[1] for line in printed] == verdicts


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: shutil.rmtree(data), "no such folder"),
        (lambda data: shutil.rmtree(data / "held_out"), "held_out"),
        (lambda data: (data / "train" / "scene_2" / "shot_1.mp4").write_bytes(b"no video"), "scene_2/shot_1.mp4"),
        (lambda data: (data / "train" / "scene_3" / "shot_2.txt").unlink(), "shot_2.txt"),
        (lambda data: (data / "train" / "scene_1" / "shot_1.txt").write_text("A cat."), "scene_1: text: got 'A cat.'"),
        (lambda data: (data / "train" / "scene_1" / "shot_2.txt").write_bytes(b"\xff"), "shot_2.txt) is not UTF-8"),
        (lambda data: [(data / "train" / "scene_2" / f"shot_2.{e}").unlink() for e in ("mp4", "txt")], "scene_2"),
    ],
    ids=[
        "no data",
        "no held-out",
        "broken video",
        "missing text",
        "text of another world",
        "not UTF-8",
        "a shot too few",
    ],
)
def test_bad_files_are_one_clear_line(finished, tmp_path, capsys, damage, words):
    data = shutil.copytree(finished[0] / "data", tmp_path / "data")
    damage(data)
    assert main(["demo", "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lct demo: error: ")
    assert words in line
