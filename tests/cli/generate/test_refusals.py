"""``lct generate``: refusals are one line."""

import shutil

import pytest
import torch

from lct_core.cli import main
from lct_core.data import read_scene, write_image, write_video
from lct_core.training import load_checkpoint, save_checkpoint
from tests.cli.generate.clips import clip, refused

av = pytest.importorskip("av")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "script.txt: no such file, expected a script file"),
        ("", "script.txt: line 1: no shot, expected at least one: "),
        ("Shot 1. A red square.\n\nShot 3. The square.", "script.txt: line 3: got 'Shot 3. The square.', expected"),
        ("Shot 1. A red square.\n\nShot 2. Character 4 moves.", "script.txt: line 3: shot 2 refers to Character 4, "),
        ("Shot 1. A zebra.", "prompt: 'zebra' in '[SHOT CUT] A zebra.' is not among the words that this codec knows: "),
        ("Global Prompt: Zebras.\n\nShot 1. A wall.", "prompt: 'zebras' in 'Zebras.' is not among the words that this"),
    ],
)  # fmt: skip
def test_a_bad_script_is_one_line(run, tmp_path, capsys, text, words):
    (tmp_path / "script.txt").unlink()
    if text is not None:
        (tmp_path / "script.txt").write_text(text)
    assert refused(capsys, ["script.txt", run / "causal.pt"]).startswith(words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "model.pt: no such file, expected a checkpoint that lct tune wrote"),
        (lambda run: b"", "model.pt: can't be read as a checkpoint; is the file complete?"),
        (lambda run: b"no checkpoint", "model.pt: can't be read as a checkpoint; is the file complete?"),
        (
            lambda run: (run / "causal.pt").read_bytes()[:-1000],
            "model.pt: can't be read as a checkpoint; is the file complete?",
        ),
        (lambda run: {"model": {}}, "model.pt: not a checkpoint that lct tune wrote, expected one in the format"),
        (lambda run: torch.nn.Linear(1, 1), "model.pt: can't be read as a checkpoint"),
        (lambda run: (run / "checkpoint.pt").read_bytes(), "model.pt: a stage that is not finished, expected one of"),
    ],
    ids=["no file", "empty", "text", "cut off", "another file of torch", "a pickled model", "an unfinished stage"],
)
def test_a_bad_checkpoint_is_one_line(run, tmp_path, capsys, content, words):
    content = content and content(run)
    if isinstance(content, bytes):
        (tmp_path / "model.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "model.pt")
    assert refused(capsys, ["script.txt", "model.pt"]).startswith(words)
    assert not (tmp_path / "runs").exists()


def test_weights_and_a_description_that_do_not_fit(run, tmp_path, capsys):
    saved = load_checkpoint(run / "causal.pt")
    saved["about"]["source"]["options"]["width"] = 48
    save_checkpoint(tmp_path / "model.pt", saved)
    line = refused(capsys, ["script.txt", "model.pt"])
    assert line.startswith("model.pt: its weights are not of the mmdit that it describes: Error(s) in loading")


def test_a_checkpoint_that_does_not_say_how_to_make_its_model(run, tmp_path, capsys):
    saved = load_checkpoint(run / "causal.pt")
    save_checkpoint(tmp_path / "model.pt", {**saved, "about": {}})
    line = refused(capsys, ["script.txt", "model.pt"])
    assert line.startswith("model.pt: does not say its model's source, scheme, size, area, multiple, fps, max_frames, ")
    save_checkpoint(tmp_path / "model.pt", {**saved, "about": {**saved["about"], "size": [4, 24]}})
    line = refused(capsys, ["script.txt", "model.pt"])
    assert line.startswith("model.pt: what it says of its model makes no sense: size: got [4, 24], expected frames, ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mode", "causal"], "--mode: got causal, but RUN/bidirectional.pt was tuned with bidirectional attention; "),
        (["--mode", "conditional"], "--mode: got conditional without a given shot; add --given SHOT=FILE, or use"),
        (["--mode", "joint", "--given", "1=image.png"], "--mode: got joint with a given shot, expected conditional, "),
        (["--mode", "best"], "Invalid value for '--mode': 'best' is not one of 'joint', 'conditional', "),
        (["--given", "image.png"], "--given: got 'image.png', expected SHOT=FILE with a shot from 1 to 3"),
        (["--given", "1="], "--given: got '1=', expected SHOT=FILE with a shot from 1 to 3"),
        (["--given", "one=image.png"], "--given: got 'one=image.png', expected SHOT=FILE with a shot from 1 to 3"),
        (["--given", "0=image.png"], "--given: got '0=image.png', expected SHOT=FILE with a shot from 1 to 3"),
        (["--given", "4=image.png"], "--given: got '4=image.png', expected SHOT=FILE with a shot from 1 to 3"),
        (["--given", "1=image.png", "--given", "1=video.mp4"], "--given: got shot 1 twice, expected each once"),
        (["--given", "1=none.png"], "none.png: no such file, expected an image"),
        (["--given", "1=none.mp4"], "none.mp4: no such file, expected a video"),
        (["--given", "1=script.txt"], "script.txt: can't be decoded as an image"),
        (["--given", "1=broken.mp4"], "broken.mp4: can't be decoded as a video"),
        (
            ["--given", "1=image.png", "--given", "2=image.png", "--given", "3=video.mp4"],
            "--given: all 3 shots are given, expected at least one left to generate",
        ),
        (["--size", "24x32"], "--size: got '24x32', expected frames, height and width, like 4x64x64"),
        (["--size", "2x24x32\n"], "--size: got '2x24x32\\n', expected frames, height and width, like 4x64x64"),
        (["--size", "-2x24x32"], "--size: got '-2x24x32', expected frames, height and width, like 4x64x64"),
        (["--size", "0x24x32"], "--size: frames: got 0 of 24 x 32 pixels, expected at least one, height and width "),
        (["--size", "2x25x32"], "--size: frames: got 2 of 25 x 32 pixels, expected at least one, height and width "),
        (["--t-c", "1001"], "Invalid value for '--t-c': 1001.0 is not in the range 0<=x<=1000."),
        (["--t-c", "-1"], "Invalid value for '--t-c': -1.0 is not in the range 0<=x<=1000."),
        (["--t-c", "nan"], "Invalid value for '--t-c': 'nan' is not a finite number."),
        (["--guidance", "inf"], "Invalid value for '--guidance': 'inf' is not a finite number."),
        (["--guidance", "nan"], "Invalid value for '--guidance': 'nan' is not a finite number."),
        (
            ["--mode", "autoregressive", "--given", "3=image.png"],
            "--given: got shot 3 without shot 1, which would be generated without seeing it; give the first "
            "shots, or use --mode conditional",
        ),
        (["--negative", "zebra"], "prompt: 'zebra' in 'zebra' is not among the words that this codec knows: "),
        (["--negative-global", "zebra"], "prompt: 'zebra' in 'zebra' is not among the words that this codec knows: "),
        (["--steps", "0"], "Invalid value for '--steps': 0 is not in the range 1<=x"),
        (["--mode", "joint", "--t-c", "300"], "--t-c: got 300, but joint generation has no given and no earlier "),
        (["--storage", "int8"], "--storage: got it, but joint generation has no KV cache; leave it out, or "),
        (["--on-host", "1"], "--on-device, --on-host, --cache-folder: got it, but joint generation has no KV cache; "),
        (["--window", "2"], "--window: got 2, but joint generation makes all shots at once; leave it out"),
        (["--window", "0"], "Invalid value for '--window': 0 is not in the range 1<=x"),
        (["--fps", "0"], "Invalid value for '--fps': 0.0 is not in the range 0.01<=x<=1000."),
        (["--fps", "nan"], "Invalid value for '--fps': 'nan' is not a finite number."),
        (["--seed", "-1"], "Invalid value for '--seed': -1 is not in the range 0<=x"),
        (["--device", "nowhere"], "--device: got 'nowhere', which torch can't use here: "),
        (["--device", "meta"], "--device: got 'meta', which torch can't use here: "),
        (["--out", "script.txt"], "Invalid value for '--out': Directory 'script.txt' is a file."),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(run, tmp_path, capsys, options, words):
    write_image("image.png", clip(1, 24, 24))
    write_video("video.mp4", clip(2, 24, 24), fps=8)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "RUN").symlink_to(run)
    assert refused(capsys, ["script.txt", "RUN/bidirectional.pt", *options]).startswith(words)
    assert not (tmp_path / "runs").exists()


def test_missing_arguments(capsys):
    assert refused(capsys, []) == "Missing argument 'SCRIPT'."
    assert refused(capsys, ["script.txt"]) == "Missing argument 'CHECKPOINT'."


@pytest.mark.parametrize("name", ["script.txt", "shot_2.mp4", "shot_7.png"])
def test_a_scene_in_the_way_is_left_alone(run, tmp_path, capsys, name):
    (tmp_path / "out").mkdir()
    shutil.copy("script.txt", tmp_path / "out" / name)
    line = refused(capsys, ["script.txt", run / "causal.pt", "--out", "out"])
    assert line == "out: already holds a scene, so it is left alone; choose another --out"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_sizes_that_no_video_can_have(run, tmp_path, capsys):
    few = ["--multiple", "5", "--steps", "1", "--single-shot-steps", "0", "--causal-steps", "0"]
    assert main(["tune", str(run.parent / "data"), *few]) == 0
    capsys.readouterr()
    arguments = ["script.txt", "runs/tune/bidirectional.pt", "--steps", "2"]
    line = refused(capsys, [*arguments, "--out", "out"])
    assert line == (
        "--size: got a video of 25 x 30 pixels, expected even ones, as MP4 files need; choose another size, for "
        "example multiples of 10"
    )
    write_video("given.MP4", clip(2, 26, 36), fps=8)
    line = refused(capsys, [*arguments, "--size", "1x25x25", "--given", "2=given.MP4", "--out", "out"])
    assert line == (
        "--given: given.MP4, of 3 x 25 x 35 as it is read: got a video of 25 x 35 pixels, expected even ones, as MP4 "
        "files need; crop or scale the file, for example to multiples of 10"
    )
    assert not (tmp_path / "out").exists()
    assert main(["generate", *arguments, "--size", "1x25x25", "--out", "out"]) == 0
    assert not (tmp_path / "out" / "scene.mp4").exists()
    assert [(*shot.shape[1:],) for shot in read_scene(tmp_path / "out").shots] == [(1, 25, 25)] * 3
