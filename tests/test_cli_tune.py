"""``lct tune``: a few steps on a few small scenes; every option arrives, every refusal is one line."""

import io
import json
import shutil
import sys
import zlib
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from textwrap import dedent

import pytest
import torch

import lct_core.training
from lct_core.cli import main
from lct_core.cli.source import make
from lct_core.data import VideoScene, write_scene
from lct_core.script import Script, ScriptShot
from lct_core.training import Stage, load_checkpoint, loop, paper_stages

pytest.importorskip("av")

FEW = ["--single-shot-steps", "2", "--steps", "4", "--causal-steps", "2", "--learning-rate", "1e-2"]
STAGES = {"single_shot": 2, "bidirectional": 4, "causal": 2}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def clip(frames, height, width, *, seed):
    """A colour that changes across the frame and in time."""
    colour = torch.rand(3, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    across, in_time = torch.linspace(-0.2, 0.2, width), torch.linspace(-0.2, 0.2, frames)[:, None, None]
    return (colour + across + in_time).clamp(0, 1).expand(3, frames, height, width)


def write_data(root, *sizes, texts=("A red square.", "The square moves.")):
    for number, shots in enumerate(sizes, 1):
        script = Script(
            shots=tuple(ScriptShot(text=text) for text in texts),
            characters={1: "a square"},
            storyline="Character 1 goes left.",
        )
        clips = tuple(clip(*size, seed=10 * number + i) for i, size in enumerate(shots))
        write_scene(root / f"scene_{number}", VideoScene(script=script, shots=clips), fps=12)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    return write_data(root, [(4, 32, 48), (1, 24, 24)], [(2, 24, 32), (4, 48, 32)], [(3, 24, 24), (2, 32, 24)])


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    """A finished run, and what it printed."""
    out = tmp_path_factory.mktemp("tuned") / "new" / "run"
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["tune", str(data), "--out", str(out), *FEW]) == 0
    return out, printed.getvalue()


@pytest.fixture
def asked(monkeypatch):
    """What the command asks of the library's ``tune``, which does nothing."""
    calls = {}

    def tune(out, model, stages, data, codec, **options):
        calls.update(out=out, model=model, stages=stages, data=data, codec=codec, **options)

    monkeypatch.setattr(lct_core.training, "tune", tune)
    return calls


def log(out):
    """The lines of metrics.jsonl, without the seconds."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows


def weights(path):
    return load_checkpoint(path)["model"]


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def refused(capsys, arguments):
    """The one line that bad input gets."""
    assert main(["tune", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert "Usage" not in out + err
    assert err.startswith("lct tune: error: ")
    return err.removeprefix("lct tune: error: ").strip()


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
        assert saved["pattern"] == ("context_causal" if name == "causal" else "bidirectional")
        about = saved["about"]
        assert about["scheme"] == "anchored"
        assert {key: about[key] for key in ("size", "area", "multiple", "fps", "max_frames")} == {
            "size": [4, 32, 48],
            "area": 64 * 64,
            "multiple": 8,
            "fps": 12.0,
            "max_frames": 125,
        }
        model, codec = make(about["source"], scheme=about["scheme"])
        model.backbone.load_state_dict(saved["model"])
        codec.text("Character 1: a red square goes left. [SHOT CUT] The square moves.")
        found[name] = saved["model"]
    assert not same(found["single_shot"], found["bidirectional"])
    assert not same(found["bidirectional"], found["causal"])


def test_the_same_seed_gives_the_same_weights_and_leaves_torchs_own_alone(tuned, data, tmp_path):
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
        asdict(Stage(name="single_shot", steps=1, scene_share=0.0, **common)),
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
    for rough, exact in zip(log(tmp_path / "run"), log(out), strict=True):
        assert rough["loss"] == pytest.approx(exact["loss"], rel=4 * 2**-8)  # bfloat16 has 8 bits


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


# --- going on ---


@pytest.mark.parametrize("at", [4, 6, 8], ids=["before a checkpoint of stage 2", "after one", "in stage 3"])
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(tuned, data, tmp_path, monkeypatch, capsys, at):
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


# --- a model of one's own ---

FACTORIES = """
    import torch
    from lct_core import registry
    from lct_core.codec import LinearCodec

    WORDS = "[shot cut] character 1 a red square the moves goes left".split()

    def codec(channels=3, words=WORDS):
        return LinearCodec(mean=torch.full((768,), 0.5), components=torch.eye(768)[:channels], vocabulary=words)

    def model():
        return registry().build("mmdit", channels=3, text_width=11, width=24, depth=1, heads=2, patch=(1, 1, 1))

    def make():
        return model(), codec()

    def adapted():
        return registry().adapter(model()), codec()

    def fails():
        raise RuntimeError("no\\nluck")

    def takes(one):
        return one

    def without_codec():
        return model()

    def wrong_codec():
        return model(), "codec"

    def wrong_way_round():
        return codec(), model()

    def unknown_model():
        return torch.nn.Linear(1, 1), codec()

    def other_channels():
        return model(), codec(channels=4)

    def other_words():
        return model(), codec(words=list("abcdefghijk"))

    def nothing():
        pass

    number = 3
"""


@pytest.fixture
def factory(tmp_path, request):
    """The name of a module in the current folder, new for every test."""
    name = f"own_model_{zlib.crc32(request.node.name.encode())}"
    (tmp_path / f"{name}.py").write_text(dedent(FACTORIES))
    yield name
    sys.modules.pop(name, None)


def test_a_model_and_an_adapter_of_ones_own(data, tmp_path, factory):
    path = [*sys.path]
    for made in ("make", "adapted"):
        assert main(["tune", str(data), "--model", f"{factory}:{made}", *FEW, "--out", made]) == 0
        saved = load_checkpoint(tmp_path / made / "bidirectional.pt")
        assert saved["about"]["source"] == {"factory": f"{factory}:{made}"}
        assert saved["about"]["area"] == 480 * 480
        assert saved["about"]["multiple"] == 16
        assert saved["about"]["size"] == [4, 32, 48]
        assert {row["stage"] for row in log(tmp_path / made)} == {*STAGES}
    assert same(weights(tmp_path / "make" / "causal.pt"), weights(tmp_path / "adapted" / "causal.pt"))
    assert not same(weights(tmp_path / "make" / "causal.pt"), saved["model"])
    assert sys.path == path


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ("", "MODULE:FACTORY: got '', expected a module and a function in it, like my_adapter:make"),
        ("{}", "MODULE:FACTORY: got '{}', expected a module and a function in it, like my_adapter:make"),
        ("no_such_module:make", "MODULE:FACTORY: got 'no_such_module:make', but there is no module 'no_such_module'"),
        ("{}:mak", "but {} has no 'mak'; what it has to call: ['registry', 'LinearCodec', 'codec', 'model', 'make'"),
        ("{}:number", "MODULE:FACTORY: {}:number is a int, expected a function that takes no argument"),
        ("{}:fails", "MODULE:FACTORY: {}:fails() raised RuntimeError: no; luck"),
        ("{}:takes", "MODULE:FACTORY: {}:takes() raised TypeError: takes() missing 1 required positional argument"),
        ("{}:nothing", "MODULE:FACTORY: {}:nothing() returned NoneType, expected (model, codec)"),
        ("{}:without_codec", "MODULE:FACTORY: {}:without_codec() returned MMDiT, expected (model, codec)"),
        ("{}:wrong_codec", "returned ['MMDiT', 'str'], expected (model, codec): a model (nn.Module) or an adapter"),
        ("{}:wrong_way_round", "returned ['LinearCodec', 'MMDiT'], expected (model, codec)"),
        ("{}:unknown_model", "no backbone handles torch.nn.modules.linear.Linear; there are: mmdit: "),
        ("{}:other_channels", "expected [batch, 3, frames, height, width]"),
        ("{}:other_words", "prompt: "),
    ],
)  # fmt: skip
def test_a_factory_that_does_not_fit(data, capsys, factory, made, words):
    assert words.format(factory) in refused(capsys, [data, "--model", made.format(factory), *FEW])


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Missing argument 'DATA'."),
        (["nowhere"], "nowhere: no such folder, expected a folder of scene folders"),
        (["empty"], "empty: no scene folder, expected one folder per scene"),
        (["DATA/scene_1"], "DATA/scene_1: no scene folder, expected one folder per scene"),
        (["DATA/scene_1/script.txt"], "DATA/scene_1/script.txt: no such folder, expected a folder of scene folders"),
        (["DATA", "--single-shots", "nowhere"], "nowhere: no such folder, expected a folder of scene folders"),
        (["DATA", "--steps", "-1"], "Invalid value for '--steps': -1 is not in the range x>=0."),
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
        (["DATA", "--resume"], "runs/tune/checkpoint.pt: no such file, expected a checkpoint that lct tune wrote"),
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "run: holds a run already, so it is left alone; resume it, or choose another folder"),
        (["--resume", "--steps", "5"], "run/checkpoint.pt: its run has stages[1].steps = 4, not 5; resume with the"),
        (["--resume", "--bf16"], "stages[2].precision = 'fp32', not 'bf16'"),
        (["--resume", "--seed", "1"], "its run has seed = 0, not 1;"),
        (["--resume", "--scheme", "paper"], "about.scheme = 'anchored', not 'paper'"),
        (["--resume", "--fps", "6"], "about.fps = 12.0, not 6.0"),
        (["--resume", "--single-shots", "other"], "another about.source.codec.mean"),
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
