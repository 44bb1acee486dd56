"""``lct tune``: a few steps on a few small scenes; every option arrives."""

import shutil
import weakref
from dataclasses import asdict, replace

import pytest
import torch

from lct_core.checkpoints.model_card import ModelCard, fit_codec
from lct_core.cli import main
from lct_core.data import SceneFolders
from lct_core.training import Stage, load_checkpoint, paper_stages
from tests.cli.tune.scenes import FEW, STAGES, log, refused, same, weights, write_data

pytest.importorskip("av")


# --- a run ---


def test_files(tuned):
    out, printed = tuned
    assert {path.name for path in out.iterdir()} == {
        "checkpoint.pt",
        "metrics.jsonl",
        *(f"{name}.pt" for name in STAGES),
    }
    lines = printed.splitlines()
    assert lines[-3:] == [str(out / f"{name}.pt") for name in STAGES]
    assert lines[0].startswith("read scenes: 3 of 3, ")
    for line, (name, steps) in zip(lines[1:4], STAGES.items(), strict=True):
        assert line.startswith(f"{name}: {steps} of {steps}, ")
        assert ", loss " in line


def test_the_log_has_every_step(tuned):
    out, _ = tuned
    rows = log(out)
    assert [(row["stage"], row["step"]) for row in rows] == [
        (name, step + 1) for name, steps in STAGES.items() for step in range(steps)
    ]
    kinds = ["single_shot"] * 2 + ["single_shot", "scene"] * 3
    assert [row["kind"] for row in rows] == kinds
    for row in rows:
        assert row.keys() == {"stage", "step", "kind", "shots", "loss", "learning_rate", "gradient_norm"}
        assert row["loss"] > 0
        assert row["gradient_norm"] > 0
        assert 0 < row["learning_rate"] <= 1e-2
        assert row["shots"] in ((4,) if row["kind"] == "single_shot" else (1, 2))


def test_checkpoints_say_how_to_make_the_model_again(tuned):
    out, _ = tuned
    found = {}
    for name in STAGES:
        saved = load_checkpoint(out / f"{name}.pt")
        assert saved["stage"] == name
        patterns = {"single_shot": "own_shot", "bidirectional": "bidirectional", "causal": "context_causal"}
        assert saved["pattern"] == patterns[name]
        about = saved["about"]
        (described,) = about["data"]
        assert described.startswith("3 scenes, ")
        card = ModelCard.from_state(about, out / f"{name}.pt")
        assert {**vars(card), "source": None} == {
            "source": None,
            "scheme": "anchored",
            "size": [4, 32, 48],
            "area": 64 * 64,
            "multiple": 8,
            "fps": 12.0,
            "max_frames": 125,
        }
        model, codec = card.build()
        model.backbone.load_state_dict(saved["model"])
        codec.text("Character 1: a red square goes left. [SHOT CUT] The square moves.")
        found[name] = saved["model"]
    assert not same(found["single_shot"], found["bidirectional"])
    assert not same(found["bidirectional"], found["causal"])


def test_the_same_seed_gives_the_same_weights(tuned, data, tmp_path):
    out, _ = tuned
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert main(["tune", str(data), *FEW, "--seed", "0", "--device", "cpu"]) == 0
    assert torch.equal(torch.rand(1), expected)
    assert same(weights(tmp_path / "runs" / "tune" / "causal.pt"), weights(out / "causal.pt"))
    assert log(tmp_path / "runs" / "tune") == log(out)
    assert main(["tune", str(data), *FEW, "--seed", "1", "--out", "other"]) == 0
    assert not same(weights(tmp_path / "other" / "causal.pt"), weights(out / "causal.pt"))


@pytest.mark.parametrize("scheme", ["anchored", "paper"])
def test_scheme(tuned, data, tmp_path, scheme):
    out, _ = tuned
    assert main(["tune", str(data), *FEW, "--scheme", scheme, "--out", "run", "--causal-steps", "0"]) == 0
    saved = load_checkpoint(tmp_path / "run" / "bidirectional.pt")
    assert saved["about"]["scheme"] == scheme
    assert same(saved["model"], weights(out / "bidirectional.pt")) == (scheme == "anchored")


# --- which stages, and with which numbers ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"single_shot": 10_000, "bidirectional": 135_000, "causal": 9_000}),
        (["--scheme", "paper"], {"single_shot": 10_000, "bidirectional": 135_000, "causal": 9_000}),
        (["--model", "FACTORY"], {"bidirectional": 135_000, "causal": 9_000}),
        (
            ["--model", "FACTORY", "--scheme", "paper"],
            {"single_shot": 10_000, "bidirectional": 135_000, "causal": 9_000},
        ),
        (["--model", "FACTORY", "--single-shot-steps", "3", "--steps", "0"], {"single_shot": 3, "causal": 9_000}),
        (["--single-shot-steps", "0"], {"bidirectional": 135_000, "causal": 9_000}),
        (["--steps", "0", "--causal-steps", "5"], {"single_shot": 10_000, "causal": 5}),
        (["--causal-steps", "0"], {"single_shot": 10_000, "bidirectional": 135_000}),
    ],
)  # fmt: skip
def test_stages(data, asked, factory, options, expected):
    options = [f"{factory}:make" if option == "FACTORY" else option for option in options]
    assert main(["tune", str(data), *options]) == 0
    papers = {stage.name: stage for stage in paper_stages("paper")}
    assert asked["stages"] == [replace(papers[name], steps=steps) for name, steps in expected.items()]
    assert asked["model"].scheme == ("paper" if "paper" in options else "anchored")
    assert asked["resume"] is False
    assert asked["save_every"] == 500
    assert asked["single_shot_data"] is None


def test_options_arrive_in_the_checkpoint(data, tmp_path):
    options = {
        "--single-shot-steps": 1,
        "--steps": 3,
        "--causal-steps": 1,
        "--learning-rate": 3e-3,
        "--batch": 2,
        "--scene-batch": 3,
        "--max-shots": 1,
        "--area": 576,
        "--multiple": 12,
        "--fps": 6,
        "--max-frames": 3,
        "--save-every": 2,
        "--seed": 5,
    }
    arguments = [str(part) for option in options.items() for part in option]
    assert main(["tune", str(data), *arguments, "--bf16", "--out", "run"]) == 0
    saved = load_checkpoint(tmp_path / "run" / "causal.pt")
    common = {"learning_rate": 3e-3, "single_shot_batch": 2, "scene_batch": 3, "max_shots": 1, "precision": "bf16"}
    assert saved["stages"] == [
        asdict(Stage(name="single_shot", steps=1, scene_share=0.0, pattern="own_shot", **common)),
        asdict(Stage(name="bidirectional", steps=3, **common)),
        asdict(Stage(name="causal", steps=1, pattern="context_causal", **common)),
    ]
    assert saved["seed"] == 5
    about = saved["about"]
    assert about["source"]["codec"]["mean"].shape == (3 * 12 * 12,)
    assert {key: about[key] for key in ("size", "area", "multiple", "fps", "max_frames")} == {
        "size": [2, 24, 24],  # 4 of 32 x 48 in the file: of 12 frames per second, of at most 576 pixels
        "area": 576,
        "multiple": 12,
        "fps": 6.0,
        "max_frames": 3,
    }
    assert [row["shots"] for row in log(tmp_path / "run")] == [2, 2, 3, 2, 2]


def test_bf16_is_another_arithmetic(tuned, data, tmp_path):
    out, _ = tuned
    assert main(["tune", str(data), *FEW, "--bf16", "--out", "run"]) == 0
    assert not same(weights(tmp_path / "run" / "causal.pt"), weights(out / "causal.pt"))
    rough, exact = log(tmp_path / "run"), log(out)
    assert [row["kind"] for row in rough] == [row["kind"] for row in exact]
    for i in range(STAGES["single_shot"]):  # later the weights have gone apart: Adam's first steps take signs alone
        assert rough[i]["loss"] == pytest.approx(exact[i]["loss"], rel=4 * 2**-8)  # bfloat16 has 8 bits


def test_checkpointing_changes_nothing_but_memory(tuned, data, asked, tmp_path, monkeypatch):
    out, _ = tuned
    for options in ([], ["--checkpointing"]):
        assert main(["tune", str(data), *FEW, *options]) == 0
        assert asked["model"].gradient_checkpointing == bool(options)
    monkeypatch.undo()
    assert main(["tune", str(data), *FEW, "--checkpointing", "--out", str(tmp_path / "run")]) == 0
    assert same(weights(tmp_path / "run" / "causal.pt"), weights(out / "causal.pt"))


# --- data ---


def test_single_shots_of_another_folder(data, asked, tmp_path, monkeypatch):
    texts = ["A disc.", "A disc rolls."]
    other = write_data(tmp_path / "more", [(2, 24, 24), (1, 24, 24)], texts=texts)
    assert main(["tune", str(data), "--single-shots", str(other)]) == 0
    assert len(asked["data"]) == 3
    (scene,) = asked["single_shot_data"]
    assert [shot.text for shot in scene.script.shots] == texts
    asked["codec"].text("The red disc rolls")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "more", "--single-shots", str(data), *FEW, "--out", "run"]) == 0
    assert load_checkpoint(tmp_path / "run" / "causal.pt")["about"]["size"] == [2, 24, 24]


def test_bad_scenes_can_be_left_out(data, asked, tmp_path, capsys):
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "scene_2" / "shot_2.mp4").write_bytes(b"no video")
    (broken / "scene_10").mkdir()
    line = refused(capsys, ["broken"])
    assert "broken/scene_2/shot_2.mp4" in line
    assert main(["tune", "broken", "--skip-bad"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("read broken: 4 of 4")
    assert lines[1].startswith("skipped broken/scene_2: shot 2 of scene_2: broken/scene_2/shot_2.mp4: can't be decoded")
    assert lines[2].startswith("skipped broken/scene_10: broken/scene_10/script.txt: no such file")
    assert lines[3] == "2 of 4 scenes skipped"
    assert [scene.name for scene in asked["data"]] == ["scene_1", "scene_3"]
    assert asked["about"]["data"][0].startswith("2 scenes, ")


def test_no_more_than_a_scene_is_held_at_once(data, monkeypatch):
    """Where scenes don't fit into memory, each reading is let go before the next."""
    alive, most = weakref.WeakSet(), 0
    read = SceneFolders._read

    def counted(self, folder):
        nonlocal most
        scene = read(self, folder)
        alive.add(scene)
        most = max(most, len(alive))
        return scene

    scenes = SceneFolders(data, multiple=8, memory=0)
    kept = fit_codec([*scenes], patch=8)
    monkeypatch.setattr(SceneFolders, "_read", counted)
    codec = fit_codec(scenes, patch=8)
    assert most == 2  # the next is there before the last goes
    assert codec.vocabulary == kept.vocabulary
    assert torch.equal(codec.components, kept.components)
