"""``lct tune``: a few steps on a few small scenes; every option arrives, every refusal is one line."""

import io
import json
import re
import shutil
import sys
import weakref
import zlib
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from textwrap import dedent
from types import FunctionType

import pytest
import torch

import lct_core.cli.tune
from lct_core.checkpoints.model_card import ModelCard, fit_codec, small_mmdit
from lct_core.cli import main
from lct_core.codec import LinearCodec
from lct_core.data import SceneFolders, VideoScene, write_scene
from lct_core.script import Script, ScriptShot
from lct_core.training import Stage, load_checkpoint, loop, paper_stages, save_checkpoint

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

    monkeypatch.setattr(lct_core.cli.tune, "tune", tune)
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


# --- the card ---


CARD = {"scheme": "paper", "size": [4, 32, 48], "area": 4096, "multiple": 8, "fps": 12.0, "max_frames": 125}


def test_a_card_there_and_back():
    codec = LinearCodec(mean=torch.zeros(12), components=torch.eye(12)[:3], vocabulary=["a", "wall"], length=2)
    source = small_mmdit(codec, width=24, depth=1, heads=2)
    state = ModelCard(source=source, **CARD).state()
    card = ModelCard.from_state({**state, "data": ["1 scenes"]}, "model.pt")
    assert {**card.state(), "source": None} == {"source": None, **CARD}
    assert card.reading == {name: CARD[name] for name in ("area", "multiple", "fps", "max_frames")}
    model, made = card.build(gradient_checkpointing=True)
    assert (model.scheme, model.gradient_checkpointing, model.batch_shots) == ("paper", True, True)
    assert len(model.backbone.blocks) == 1
    assert torch.equal(made.text("A wall"), codec.text("A wall"))
    assert torch.equal(made.encode(torch.ones(3, 1, 4, 4)), codec.encode(torch.ones(3, 1, 4, 4)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": {}}, "source: got {}, expected a dict with ['factory'] or ['backbone', 'codec', 'options']"),
        ({"source": "a:b"}, "source: got 'a:b', expected a dict with"),
        ({"source": {"factory": "a:b", "codec": {}}}, "source: got ['codec', 'factory'], expected a dict with"),
        ({"source": {"factory": None}}, "source: got ['factory'], expected a string for factory or backbone"),
        ({"source": {"backbone": "mmdit", "options": {}, "codec": {"mean": 0}}}, "source: expected options as a dict"),
        ({"scheme": "mine"}, "scheme: got 'mine'"),
        ({"size": [4, 32]}, "size: got [4, 32], expected frames, height and width, like [4, 64, 64]"),
        ({"size": 4}, "size: got 4, expected frames, height and width"),
        ({"size": [4, 32, 0]}, "size: got [4, 32, 0], expected frames, height and width"),
        ({"area": None}, "area: got None, expected an int of at least 1"),
        ({"multiple": 8.0}, "multiple: got 8.0, expected an int of at least 1"),
        ({"max_frames": True}, "max_frames: got True, expected an int of at least 1"),
        ({"fps": 0}, "fps: got 0, expected a positive number of frames per second"),
        ({"fps": float("nan")}, "fps: got nan, expected a positive number of frames per second"),
    ],
)
def test_a_card_that_makes_no_sense(change, words):
    about = {"source": {"factory": "a:b"}, **CARD, **change}
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        ModelCard(**about)
    words = f"model.pt: what it says of its model makes no sense: {words}"
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        ModelCard.from_state(about, "model.pt")


def test_a_card_that_lacks_something():
    with pytest.raises(ValueError, match=r"^model\.pt: does not say its model's source, fps, expected a file of lct"):
        ModelCard.from_state({name: value for name, value in CARD.items() if name != "fps"}, "model.pt")


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

    class Late(LinearCodec):
        def encode(self, frames):
            from WORDS_OF import SCALE
            return super().encode(frames) * SCALE

    def late():
        return model(), Late(**codec().state())

    class Broken(LinearCodec):
        def encode(self, frames):
            return torch.ones(2) + torch.ones(3)

    def broken_codec():
        return model(), Broken(**codec().state())

    def broken_model():
        made = model()
        made.register_forward_pre_hook(lambda *_: torch.ones(2) + torch.ones(3))
        return made, codec()

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
        ("{}:unknown_model", "no backbone handles torch.nn.modules.linear.Linear; there are: cogvideox: "),
        ("{}:other_channels", "expected [batch, 3, frames, height, width]"),
        ("{}:other_words", "prompt: "),
        ("{}:broken_codec", "MODULE:FACTORY: the model or the codec of {}:broken_codec raised RuntimeError: The size "),
        ("{}:broken_model", "MODULE:FACTORY: the model or the codec of {}:broken_model raised RuntimeError: The size "),
        ("{}:broken_codec", "/{}.py:"),
    ],
)  # fmt: skip
def test_a_factory_that_does_not_fit(data, capsys, factory, made, words):
    assert words.format(factory) in refused(capsys, [data, "--model", made.format(factory), *FEW])


def test_what_a_model_or_codec_imports_late(data, tmp_path, factory):
    module = tmp_path / f"{factory}.py"
    module.write_text(module.read_text().replace("WORDS_OF", f"{factory}_scale"))
    (tmp_path / f"{factory}_scale.py").write_text("SCALE = 0.5")
    path = [*sys.path]
    assert main(["tune", str(data), "--model", f"{factory}:late", *FEW, "--out", "run"]) == 0
    assert sys.path == path
    del sys.modules[f"{factory}_scale"]


@pytest.mark.parametrize("own", [False, True])
def test_a_mistake_of_the_library_shows(data, factory, monkeypatch, own):
    def mistaken(*_, **__):
        return torch.ones(2) + torch.ones(3)

    monkeypatch.setattr(loop, "tuning_loss", FunctionType(mistaken.__code__, vars(loop)))
    with pytest.raises(RuntimeError, match="The size of tensor"):
        main(["tune", str(data), *(["--model", f"{factory}:make"] if own else []), *FEW])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has none.\nIf reserved"),
            "CUDA out of memory. Tried to allocate 20.00 MiB",
        ),
        (None, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000000 bytes"),
    ],
    ids=["of a GPU", "of the CPU"],
)
@pytest.mark.parametrize("own", [False, True])
def test_out_of_memory_is_one_line(data, factory, capsys, monkeypatch, error, said, own):
    def too_large(*_, **__):
        if error is not None:
            raise error
        torch.empty(10**18)

    monkeypatch.setattr(loop, "tuning_loss", too_large)
    line = refused(capsys, [data, *(["--model", f"{factory}:make"] if own else []), *FEW])
    assert line.startswith("--device: cpu is out of memory; lower --area, --max-frames, --max-shots, --scene-batch or")
    assert line.endswith(f"{said})")


def test_a_misspelt_model_is_refused_before_scenes_are_read(data, factory, capsys, monkeypatch):
    monkeypatch.setattr(lct_core.cli.tune, "SceneFolders", None)
    assert "has no 'mak'" in refused(capsys, [data, "--model", f"{factory}:mak"])


def test_weights_are_drawn_whatever_the_machine_has(data, asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # torch warns of slowness where it is to fork them all
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    assert main(["tune", str(data), *FEW]) == 0


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
