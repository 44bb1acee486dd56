"""``lct tune`` stopped and resumed."""

import shutil

import pytest

from lct_core.cli import main
from lct_core.codec import LinearCodec
from lct_core.training import load_checkpoint, loop, save_checkpoint
from tests.cli.tune.scenes import FEW, STAGES, log, refused, same, weights, write_data

pytest.importorskip("av")


# --- going on ---


@pytest.mark.parametrize("at", [4, 6, 8], ids=["before a checkpoint of stage 2", "after one", "in stage 3"])
def test_a_resumed_run_equals_an_unbroken_one(tuned, data, tmp_path, monkeypatch, capsys, at):
    out, _ = tuned
    losses, calls = loop.tuning_loss, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return losses(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "tuning_loss", interrupted)
        assert main(["tune", str(data), *FEW, "--save-every", "2", "--out", "run"]) == 130
    assert not (tmp_path / "run" / "causal.pt").exists()
    capsys.readouterr()
    assert main(["tune", str(data), *FEW, "--resume", "--out", "run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "run/causal.pt"
    for name in STAGES:
        assert same(weights(tmp_path / "run" / f"{name}.pt"), weights(out / f"{name}.pt"))
    assert log(tmp_path / "run") == log(out)


def test_a_finished_run_can_be_resumed_and_stays(tuned, data, tmp_path):
    run = shutil.copytree(tuned[0], tmp_path / "run")
    (run / "causal.pt").unlink()
    assert main(["tune", str(data), *FEW, "--resume", "--out", "run"]) == 0
    assert same(weights(run / "causal.pt"), weights(tuned[0] / "causal.pt"))
    assert log(run) == log(tuned[0])


def test_a_resumed_run_keeps_its_codec(tuned, data, tmp_path, monkeypatch):
    """Another number of threads would fit it differently in the last bits."""
    run = shutil.copytree(tuned[0], tmp_path / "run")

    def fit(*_, **__):
        raise AssertionError("fitted again")

    monkeypatch.setattr(LinearCodec, "fit", fit)
    assert main(["tune", str(data), *FEW, "--resume", "--out", "run"]) == 0
    assert same(weights(run / "causal.pt"), weights(tuned[0] / "causal.pt"))


def test_other_data_of_the_same_size_are_another_run(tuned, data, tmp_path, capsys):
    shutil.copytree(tuned[0], tmp_path / "run")
    moved = shutil.copytree(data, tmp_path / "moved")
    assert main(["tune", "moved", *FEW, "--resume", "--out", "run"]) == 0
    capsys.readouterr()
    script = moved / "scene_3" / "script.txt"
    written = script.read_bytes()
    for change in (
        lambda: (moved / "scene_3").rename(moved / "scene_4"),
        lambda: shutil.copytree(data / "scene_1", moved / "scene_5"),
        lambda: script.write_bytes(written.swapcase()),
    ):
        shutil.rmtree(moved)
        shutil.copytree(data, moved)
        change()
        line = refused(capsys, ["moved", *FEW, "--resume", "--out", "run"])
        assert "about.data[0] = '3 scenes, " in line


def test_a_checkpoint_that_does_not_say_how_to_make_its_model(tuned, data, tmp_path, capsys):
    run = shutil.copytree(tuned[0], tmp_path / "run")
    saved = load_checkpoint(run / "checkpoint.pt")
    save_checkpoint(run / "checkpoint.pt", {**saved, "about": {}})
    line = refused(capsys, [data, *FEW, "--resume", "--out", "run"])
    assert line.startswith("run/checkpoint.pt: does not say its model's source, scheme, size, area, multiple, fps, m")


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "run: holds a run already, so it is left alone; resume it, or choose another folder"),
        (["--resume", "--steps", "5"], "run/checkpoint.pt: its run has stages[1].steps = 4, not 5; resume with the"),
        (["--resume", "--bf16"], "stages[2].precision = 'fp32', not 'bf16'"),
        (["--resume", "--seed", "1"], "its run has seed = 0, not 1;"),
        (["--resume", "--scheme", "paper"], "about.scheme = 'anchored', not 'paper'"),
        (["--resume", "--fps", "6"], "about.fps = 12.0, not 6.0"),
        (["--resume", "--single-shots", "other"], "1 entries in about.data, not 2"),
        (["--resume", "--model", "own:make"], "--model: got own:make, but run/checkpoint.pt is of a run without --m"),
    ],
)  # fmt: skip
def test_another_run_in_the_way(tuned, data, tmp_path, capsys, options, words):
    write_data(tmp_path / "other", [(1, 24, 24), (1, 24, 24)])
    run = shutil.copytree(tuned[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert words in refused(capsys, [data, *FEW, *options, "--out", "run"])
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_finished_stage_is_nothing_to_go_on_from(tuned, data, tmp_path, capsys):
    run = shutil.copytree(tuned[0], tmp_path / "run")
    shutil.copy(run / "causal.pt", run / "checkpoint.pt")
    line = refused(capsys, [data, *FEW, "--resume", "--out", "run"])
    assert line == "run/checkpoint.pt: holds a finished stage, expected a checkpoint to go on from"
