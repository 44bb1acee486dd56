"""``lct tune``: every refusal is one line."""

import shutil

import pytest

from tests.cli.tune.scenes import FEW, refused

pytest.importorskip("av")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Missing argument 'DATA'."),
        (["nowhere"], "nowhere: no such folder, expected a folder of scene folders"),
        (["empty"], "empty: no scene folder, expected one folder per scene"),
        (["DATA/scene_1"], "DATA/scene_1: no scene folder, expected one folder per scene"),
        (["DATA/scene_1/script.txt"], "DATA/scene_1/script.txt: no such folder, expected a folder of scene folders"),
        (["DATA", "--single-shots", "nowhere"], "nowhere: no such folder, expected a folder of scene folders"),
        (["DATA", "--steps", "-1"], "Invalid value for '--steps': -1 is not in the range 0<=x"),
        (["DATA", "--steps", "0", "--single-shot-steps", "0", "--causal-steps", "0"], "--steps: got no step in any st"),
        (["DATA", "--learning-rate", "0"], "Invalid value for '--learning-rate': 0.0 is not in the range x>0."),
        (["DATA", "--learning-rate", "nan"], "Invalid value for '--learning-rate': 'nan' is not a finite number."),
        (["DATA", "--learning-rate", "inf"], "Invalid value for '--learning-rate': 'inf' is not a finite number."),
        (["DATA", "--batch", "0"], "Invalid value for '--batch': 0 is not in the range 1<=x"),
        (["DATA", "--scene-batch", "0"], "Invalid value for '--scene-batch': 0 is not in the range 1<=x"),
        (["DATA", "--max-shots", "0"], "Invalid value for '--max-shots': 0 is not in the range 1<=x"),
        (["DATA", "--save-every", "0"], "Invalid value for '--save-every': 0 is not in the range 1<=x"),
        (["DATA", "--max-frames", "3"], "shot 1 of scene_1: DATA/scene_1/shot_1.mp4: more than 3 frames at 12 frames"),
        (["DATA", "--fps", "0.000001"], "Invalid value for '--fps': 1e-06 is not in the range 0.01<=x<=1000."),
        (["DATA", "--multiple", "100"], "--multiple: got 100, but its square exceeds the 4096 pixels of --area"),
        (["DATA", "--area", "63"], "--multiple: got 8, but its square exceeds the 63 pixels of --area"),
        (["DATA", "--multiple", "33"], "--multiple: got 33, expected at most 32, the small MMDiT's patch"),
        (["DATA", "--scheme", "mine"], "Invalid value for '--scheme': 'mine' is not one of 'paper', 'anchored'."),
        (["DATA", "--seed", "-1"], "Invalid value for '--seed': -1 is not in the range 0<=x"),
        (["DATA", "--seed", str(2**64)], f"Invalid value for '--seed': {2**64} is not in the range 0<=x"),
        (["DATA", "--device", "nowhere"], "--device: got 'nowhere', which torch can't use here: "),
        (["DATA", "--device", "meta"], "--device: got 'meta', which torch can't use here: "),
        (["DATA", "--out", "file"], "Invalid value for '--out': Directory 'file' is a file."),
        (["DATA", "--resume"], "runs/tune/checkpoint.pt: no such file, expected the checkpoint of a run to resume"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(data, tmp_path, capsys, options, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "DATA").symlink_to(data)
    assert refused(capsys, options).startswith(words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda scene: (scene / "shot_1.mp4").write_bytes(b"no video"), "broken/scene_1/shot_1.mp4: can't be decoded"),
        (lambda scene: (scene / "shot_1.mp4").unlink(), "broken/scene_1/shot_1.mp4: no such file, expected the shot's"),
        (lambda scene: (scene / "shot_3.png").touch(), "shot_3.png: not in the script, whose shots are 1 to 2; add"),
        (lambda scene: (scene / "shot_1.png").touch(), "shot_1.png: expected one file per shot; remove the others"),
        (lambda scene: (scene / "script.txt").unlink(), "broken/scene_1/script.txt: no such file, expected the scene"),
        (lambda scene: (scene / "script.txt").write_text("Shot 1. A.\nShot 3. B."), "script.txt: line 2: got 'Shot 3."),
        (lambda scene: (scene / "script.txt").write_bytes(b"Shot 1. \xff"), "broken/scene_1/script.txt: not UTF-8"),
    ],
    ids=["broken video", "no video", "a video too many", "two files", "no script", "broken script", "not UTF-8"],
)  # fmt: skip
def test_a_broken_scene_is_one_line(data, tmp_path, capsys, break_it, words):
    break_it(shutil.copytree(data, tmp_path / "broken") / "scene_1")
    assert words in refused(capsys, ["broken", *FEW])
    assert not (tmp_path / "runs").exists()


def test_all_scenes_are_bad(tmp_path, capsys):
    (tmp_path / "data" / "scene_1").mkdir(parents=True)
    line = refused(capsys, ["data", "--skip-bad"])
    assert line.startswith("data: all scenes are bad (1), the first: data/scene_1/script.txt: no such file")
