"""``lct generate``: what it writes is what the library generates, for every mode and option; refusals are one line."""

import io
import shutil
import sys
import zlib
from contextlib import redirect_stdout
from fractions import Fraction
from importlib import import_module
from itertools import product
from textwrap import dedent

import pytest
import torch

import lct_core.cli.generate
from lct_core import generation
from lct_core.checkpoints.model_card import ModelCard
from lct_core.cli import main
from lct_core.data import VideoScene, read_image, read_scene, read_video, write_image, write_scene, write_video
from lct_core.generation import negative_texts, start_scene
from lct_core.script import Script, ScriptShot, read_script
from lct_core.training import load_checkpoint, save_checkpoint

av = pytest.importorskip("av")

MODES = ("joint", "conditional", "autoregressive")  # and causal, of a causal model
SIZE = (2, 24, 32)  # of the first training shot
SCRIPT = """
    Global Prompt: Character 1: a square. A plain wall.

    Shot 1. A red square.

    Shot 2. The square moves.

    Shot 3 (continues). Character 1 moves.
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "script.txt").write_text(dedent(SCRIPT))


def clip(frames, height, width, *, seed=0):
    """A colour that changes across the frame and in time."""
    colour = torch.rand(3, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    across, in_time = torch.linspace(-0.2, 0.2, width), torch.linspace(-0.2, 0.2, frames)[:, None, None]
    return (colour + across + in_time).clamp(0, 1).expand(3, frames, height, width)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ``lct tune``."""
    root = tmp_path_factory.mktemp("tuned")
    script = Script(
        shots=(ScriptShot(text="A red square."), ScriptShot(text="The square moves.")),
        description="Character 1: a square. A plain wall.",
    )
    for number, sizes in enumerate([(SIZE, (1, 24, 24)), ((3, 32, 24), (2, 24, 24))], 1):
        shots = tuple(clip(*size, seed=10 * number + i) for i, size in enumerate(sizes))
        write_scene(root / "data" / f"scene_{number}", VideoScene(script=script, shots=shots), fps=8)
    arguments = ["--single-shot-steps", "2", "--steps", "6", "--causal-steps", "2", "--learning-rate", "1e-2"]
    with redirect_stdout(io.StringIO()):
        assert main(["tune", str(root / "data"), "--out", str(root / "run"), "--fps", "8", *arguments]) == 0
    return root / "run"


@pytest.fixture
def lct(run, tmp_path, monkeypatch):
    """Runs the command with one of the run's checkpoints; returns the frames before a file makes them 8 bits."""
    scenes = []

    def write(folder, scene, *, fps):
        scenes.append(scene)
        write_scene(folder, scene, fps=fps)

    monkeypatch.setattr(lct_core.cli.generate, "write_scene", write)

    def generate(checkpoint, *options, out=None, steps=2):
        out = out or f"out_{len(scenes)}"
        arguments = ["script.txt", run / f"{checkpoint}.pt", *options, "--out", out, "--steps", steps]
        assert main(["generate", *map(str, arguments)]) == 0
        return scenes[-1].shots

    return generate


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refused(capsys, arguments):
    """The one line that bad input gets."""
    assert main(["generate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert "Usage" not in out + err
    assert err.startswith("lct generate: error: ")
    return err.removeprefix("lct generate: error: ").strip()


# --- what is generated ---


def directly(
    run, checkpoint, mode, *, clips=None, sizes=(SIZE,) * 3, seed=0, t_c=100.0, window=9, shift=1, scale=7.5, **texts
):
    """The same with the library alone."""
    saved = load_checkpoint(run / f"{checkpoint}.pt")
    model, codec = ModelCard.from_state(saved["about"], checkpoint).build()
    model.backbone.load_state_dict(saved["model"])
    scene = start_scene(read_script("script.txt"), codec, sizes, seed=seed)
    given = {i + 1: codec.encode(frames)[None] for i, frames in (clips or {}).items()}  # the global shot comes first
    guidance = generation.Guidance(scale=scale, **negative_texts(codec, **texts))
    common = {"steps": generation.schedule(2, shift=shift), "guidance": guidance}
    if mode == "causal":
        common |= {"history": generation.recent(window), "seed": seed}
        latents = generation.causal(model, scene, given, t_c=t_c, **common)
    elif mode == "autoregressive":
        common |= {"pattern": saved["pattern"], "history": generation.recent(window), "seed": seed}
        latents = generation.autoregressive(model, scene, given, t_c=t_c, **common)
    elif given:
        latents = generation.conditional(model, scene, given, t_c=t_c, pattern=saved["pattern"], **common)
    else:
        latents = generation.joint(model, scene, pattern=saved["pattern"], **common)
    assert latents[0] is None
    return [(clips or {}).get(i, codec.decode(z[0])) for i, z in enumerate(latents[1:])]


@pytest.mark.parametrize(
    ("checkpoint", "mode"),
    [("single_shot", "joint"), *product(["bidirectional", "causal"], MODES), ("causal", "causal")],
)
def test_every_mode_is_the_librarys(lct, run, checkpoint, mode, capsys):
    write_video("given.mp4", clip(3, 32, 16), fps=8)
    i = 0 if checkpoint == "causal" else 1  # there only the first shots are seen by others
    clips = {i: read_video("given.mp4")} if mode == "conditional" else {}
    given = ["--given", f"{i + 1}=given.mp4"] if clips else []
    frames = lct(checkpoint, "--mode", mode, *given)
    sizes = [SIZE] * 3
    if clips:
        sizes[i] = (3, 32, 16)
    assert [(*shot.shape[1:],) for shot in frames] == sizes
    assert same(frames, directly(run, checkpoint, mode, clips=clips, sizes=sizes))
    steps = 2 if mode in ("joint", "conditional") else 6
    assert capsys.readouterr().out.splitlines()[0].startswith(f"generate, {mode}: {steps} of {steps}, ")


@pytest.mark.parametrize("mode", ["conditional", "autoregressive", "causal"])
def test_options_arrive(lct, run, mode):
    write_image("given.png", clip(1, 24, 24))
    clips = {0: read_image("given.png")}
    options = {
        "--given": "1=given.png",
        "--seed": 3,
        "--t-c": 300,
        "--shift": 3,
        "--guidance": 2,
        "--negative": "a wall",
        "--negative-global": "Character 1",
        "--size": "3x16x40",
    }
    if mode != "conditional":
        options["--window"] = 2
    frames = lct("causal", "--mode", mode, *(part for option in options.items() for part in option))
    expected = directly(
        run,
        "causal",
        mode,
        clips=clips,
        sizes=[(1, 24, 24), (3, 16, 40), (3, 16, 40)],
        seed=3,
        t_c=300.0,
        shift=3.0,
        scale=2.0,
        window=2,
        shot="a wall",
        overall="Character 1",
    )
    assert same(frames, expected)


@pytest.mark.parametrize(
    ("checkpoint", "given", "mode"),
    [
        ("single_shot", False, "joint"),
        ("bidirectional", False, "joint"),
        ("bidirectional", True, "conditional"),
        ("causal", False, "causal"),
        ("causal", True, "causal"),
    ],
)
def test_the_default_mode(lct, capsys, checkpoint, given, mode):
    write_image("given.png", clip(1, 24, 24))
    lct(checkpoint, *(["--given", "1=given.png"] if given else []))
    assert capsys.readouterr().out.startswith(f"generate, {mode}: ")


@pytest.mark.parametrize("checkpoint", ["bidirectional", "causal"])
def test_the_seed_alone_decides(lct, tmp_path, checkpoint):
    first, again, other = lct(checkpoint), lct(checkpoint, "--seed", 0, "--device", "cpu"), lct(checkpoint, "--seed", 1)
    assert same(first, again)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    one, two, three = ((tmp_path / f"out_{i}" / "contact_sheet.png").read_bytes() for i in range(3))
    assert one == two != three
    for name in ("shot_1.mp4", "scene.mp4"):  # whose bytes tell the second in which they were written
        one, two, three = (read_video(tmp_path / f"out_{i}" / name) for i in range(3))
        assert torch.equal(one, two)
        assert not torch.equal(one, three)


@pytest.mark.parametrize("option", ["--negative", "--negative-global"])
def test_negative_prompts_count_where_there_is_guidance(lct, option):
    assert not same(lct("bidirectional"), lct("bidirectional", option, "A plain wall."))
    unguided = lct("bidirectional", "--guidance", 1)
    assert same(unguided, lct("bidirectional", "--guidance", 1, option, "A plain wall."))
    assert not same(unguided, lct("bidirectional"))


@pytest.mark.parametrize("mode", ["autoregressive", "causal"])
def test_the_window_and_the_level_of_the_history(lct, mode):
    far, near, noisy = (
        lct("causal", "--mode", mode, *options) for options in ([], ["--window", 2], ["--t-c", 900])
    )  # the history of shot 3 is 1 and 2, or 2
    assert same(far[:2], near[:2])
    assert not torch.equal(far[2], near[2])
    assert torch.equal(far[0], noisy[0])
    assert not torch.equal(far[1], noisy[1])


def test_storage_and_tiers_of_the_cache(run, lct, tmp_path, capsys):
    """In 8 bits earlier shots are seen otherwise; in files, they are not."""
    near = lct("causal")
    little = ["--on-device", 0.0002, "--on-host", 0]
    assert same(near, lct("causal", *little, "--cache-folder", "files"))
    assert (tmp_path / "files").is_dir()
    eight = lct("causal", "--storage", "int8")
    assert not any(torch.equal(a, b) for a, b in zip(near, eight, strict=True))  # the global prompt is seen by all
    assert all((a - b).abs().max() < 0.05 for a, b in zip(near, eight, strict=True))
    capsys.readouterr()
    line = refused(capsys, ["script.txt", run / "causal.pt", *little, "--out", "out"])
    assert line.startswith("budget: ")


def test_more_steps_and_a_script_without_global_prompt(lct, tmp_path):
    assert not same(lct("bidirectional"), lct("bidirectional", steps=3))
    (tmp_path / "script.txt").write_text("Shot 1. A red square.\n\nShot 2. The square moves.\n")
    for mode in ("joint", "autoregressive", "causal"):
        assert len(lct("causal", "--mode", mode)) == 2


def test_bf16_is_another_arithmetic(lct):
    exact, rough = lct("causal", steps=4), lct("causal", "--bf16", steps=4)
    assert not same(exact, rough)
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).abs().max() < 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--given", "2=image.png"], "--given: got shot 2 without shot 1, which would be generated without seeing"),
        (
            ["--given", "1=image.png", "--given", "3=image.png"],
            "--given: got shot 3 without shot 2, which would be generated ",
        ),
        (
            ["--mode", "conditional", "--given", "3=image.png"],
            "--given: got shot 3 without shot 1, which would be generated ",
        ),
    ],
)
def test_a_context_causal_model_takes_the_first_shots(run, tmp_path, capsys, options, words):
    write_image("image.png", clip(1, 24, 24))
    line = refused(capsys, ["script.txt", run / "causal.pt", *options])
    assert line.startswith(words)
    assert line.endswith("give the first shots, or use a model of bidirectional attention")
    assert not (tmp_path / "runs").exists()


# --- what is written ---


def test_what_is_written_is_a_scene(lct, tmp_path, capsys):
    frames = lct("bidirectional", out="runs/new/scene")
    out = tmp_path / "runs" / "new" / "scene"
    assert {path.name for path in out.iterdir()} == {
        "script.txt",
        *(f"shot_{i}.mp4" for i in (1, 2, 3)),
        "contact_sheet.png",
        "scene.mp4",
    }
    assert capsys.readouterr().out.splitlines()[1:] == [
        "runs/new/scene",
        "runs/new/scene/contact_sheet.png",
        "runs/new/scene/scene.mp4",
    ]
    scene = read_scene(out)
    assert scene.script == read_script("script.txt")
    for shot, expected in zip(scene.shots, frames, strict=True):
        assert shot.shape == expected.shape
        assert (shot - expected).mean((2, 3)).abs().max() < 0.02  # colour is stored for 2 x 2 pixels
    assert read_video(out / "scene.mp4").shape == (3, 6, 24, 32)
    assert read_image(out / "contact_sheet.png").shape[2] > 100


def test_images_are_written_to_the_last_bit(lct, tmp_path):
    frames = lct("bidirectional", "--size", "1x24x24", out="images")
    for shot, expected in zip(read_scene(tmp_path / "images").shots, frames, strict=True):
        assert (shot - expected).abs().max() <= 0.5001 / 255
    assert read_video(tmp_path / "images" / "scene.mp4").shape == (3, 3, 24, 24)


@pytest.mark.parametrize(("options", "fps"), [([], 8), (["--fps", 24], 24), (["--fps", 29.97], Fraction(30000, 1001))])
def test_frames_per_second(lct, tmp_path, options, fps):
    lct("bidirectional", *options, out="out")
    for name in ("shot_2.mp4", "scene.mp4"):
        with av.open(str(tmp_path / "out" / name)) as container:
            assert float(container.streams.video[0].average_rate) == pytest.approx(float(fps), rel=1e-4)


def test_given_shots_keep_their_size(lct, tmp_path, capsys):
    write_video("given.mp4", clip(3, 100, 200), fps=16)
    write_image("given.png", clip(1, 40, 24, seed=1))
    first, second, third = lct("bidirectional", "--given", "3=given.png", "--given", "1=given.mp4", out="out")
    assert first.shape == (3, 2, 48, 88)  # every second frame; at most 64 x 64 pixels, of multiples of 8
    assert torch.equal(first, read_video("given.mp4", area=64 * 64, multiple=8, fps=8))
    assert second.shape == (3, *SIZE)
    assert torch.equal(third, read_image("given.png"))
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "script.txt",
        "shot_1.mp4",
        "shot_2.mp4",
        "shot_3.png",
        "contact_sheet.png",
    }
    assert capsys.readouterr().out.splitlines()[-1] == "out/contact_sheet.png"
    assert [(*shot.shape[1:],) for shot in read_scene(out).shots] == [(2, 48, 88), SIZE, (1, 40, 24)]


def test_an_image_as_large_as_the_videos_is_one_frame_of_the_scene(lct, tmp_path):
    write_image("given.png", clip(1, 24, 32))
    lct("bidirectional", "--given", "2=given.png", out="out")
    assert read_video(tmp_path / "out" / "scene.mp4").shape == (3, 2 + 1 + 2, 24, 32)


def test_what_was_generated_can_be_given(lct, tmp_path):
    lct("bidirectional", out="first")
    frames = lct("bidirectional", "--given", "1=first/shot_1.mp4", out="second")
    assert torch.equal(frames[0], read_video(tmp_path / "first" / "shot_1.mp4"))


# --- a model of one's own ---

FACTORIES = """
    import torch
    from lct_core import registry
    from lct_core.codec import LinearCodec

    WORDS = "[shot cut] character 1 a red square the moves plain wall".split()

    class Codec(LinearCodec):
        # takes 1, 5, 9, ... frames, needs what lies beside this file, and would record gradients

        def latent_shape(self, frames, height, width):
            if frames % 4 != 1:
                raise ValueError(f"frames: got {frames}, expected 1 + 4 n")
            return super().latent_shape(frames, height, width)

        def decode(self, latents):
            from LATE import GAIN
            assert not torch.is_grad_enabled()
            return super().decode(latents).to(torch.bfloat16) * 1.001 * torch.nn.Parameter(torch.tensor(GAIN))

        def encode(self, frames):
            assert not torch.is_grad_enabled()
            return super().encode(frames)

    class Broken(LinearCodec):
        def decode(self, latents):
            return torch.ones(2) + torch.ones(3)

    def particular():
        model, codec = make()
        return model, Codec(**codec.state())

    def broken():
        model, codec = make()
        return model, Broken(**codec.state())

    def make(width=24):
        model = registry().build(
            "mmdit", channels=3, text_width=len(WORDS), width=width, depth=1, heads=2, patch=(1, 1, 1)
        )
        return model, LinearCodec(mean=torch.full((768,), 0.5), components=torch.eye(768)[:3], vocabulary=WORDS)
"""


@pytest.fixture
def own(tmp_path):
    """The name of a module in the current folder, new for every test."""
    name = f"generated_model_{zlib.crc32(str(tmp_path).encode())}"
    (tmp_path / f"{name}.py").write_text(dedent(FACTORIES).replace("LATE", f"{name}_late"))
    (tmp_path / f"{name}_late.py").write_text("GAIN = 1.0")
    yield name
    sys.modules.pop(name, None)
    sys.modules.pop(f"{name}_late", None)


def checkpoint_of(factory):
    """A checkpoint of a factory's model, untrained."""
    module, name = factory.split(":")
    model, _ = getattr(import_module(module), name)()
    card = ModelCard(
        source={"factory": factory}, scheme="anchored", size=(5, 16, 16), area=4096, multiple=16, fps=8.0, max_frames=9
    )
    content = {"about": card.state(), "stage": "bidirectional", "pattern": "bidirectional"}
    save_checkpoint("own.pt", {**content, "model": model.state_dict()})


def test_a_codec_of_ones_own(own, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        checkpoint_of(f"{own}:particular")
    path = [*sys.path]
    arguments = ["script.txt", "own.pt", "--steps", "1"]
    assert main(["generate", *arguments, "--out", "one"]) == 0
    assert sys.path == path
    assert [(*shot.shape[1:],) for shot in read_scene(tmp_path / "one").shots] == [(5, 16, 16)] * 3
    capsys.readouterr()
    line = refused(capsys, [*arguments, "--size", "4x16x16", "--out", "two"])
    assert line == "--size: frames: got 4, expected 1 + 4 n"
    write_video("given.mp4", clip(3, 16, 32), fps=8)
    line = refused(capsys, [*arguments, "--given", "1=given.mp4", "--out", "two"])
    assert line == "--given: given.mp4, of 3 x 16 x 32 as it is read: frames: got 3, expected 1 + 4 n"
    assert not (tmp_path / "two").exists()


def test_a_codec_that_fails(own, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        checkpoint_of(f"{own}:broken")
    line = refused(capsys, ["script.txt", "own.pt", "--steps", "1"])
    assert line.startswith(f"MODULE:FACTORY: the model or the codec of {own}:broken raised RuntimeError: The size of")
    assert f"{own}.py:" in line


def test_out_of_memory_is_one_line(run, capsys, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has none.")

    monkeypatch.setattr(generation, "causal", too_large)
    line = refused(capsys, ["script.txt", run / "causal.pt"])
    assert line == (
        "--device: cpu is out of memory; choose a smaller --size or --window, add --bf16, or with --mode causal set "
        "--storage or --on-device "
        "(CUDA out of memory. Tried to allocate 20.00 MiB)"
    )


def test_a_mistake_of_the_library_shows(run, monkeypatch):
    def mistaken(*_, **__):
        raise RuntimeError("ours")

    monkeypatch.setattr(generation, "causal", mistaken)
    with pytest.raises(RuntimeError, match="ours"):
        main(["generate", "script.txt", str(run / "causal.pt")])


def test_a_model_of_ones_own(run, own, tmp_path, monkeypatch, capsys):
    name, module = own, tmp_path / f"{own}.py"
    few = ["--steps", "2", "--causal-steps", "0", "--fps", "8"]
    assert main(["tune", str(run.parent / "data"), "--model", f"{name}:make", *few]) == 0
    arguments = ["generate", "script.txt", "runs/tune/bidirectional.pt", "--steps", "2"]
    for out in ("one", "two"):  # its weights are the checkpoint's, whatever the factory draws
        assert main([*arguments, "--out", out]) == 0
    assert same(*(read_scene(tmp_path / out).shots for out in ("one", "two")))
    assert [(*shot.shape[1:],) for shot in read_scene(tmp_path / "one").shots] == [(2, 32, 32)] * 3
    capsys.readouterr()
    monkeypatch.setattr(sys.modules[name].make, "__defaults__", (32,))
    line = refused(capsys, [*arguments[1:], "--out", "three"])
    assert line.startswith(f"runs/tune/bidirectional.pt: its weights are not of {name}:make: Error(s) in loading")
    del sys.modules[name]
    module.unlink()
    line = refused(capsys, [*arguments[1:], "--out", "three"])
    assert line == f"MODULE:FACTORY: got '{name}:make', but there is no module '{name}' here or installed"


# --- bad input ---


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


@pytest.mark.parametrize("options", [["--mode", "autoregressive"], ["--given", "1=image.png"]])
def test_a_model_of_single_shots_makes_each_by_itself(run, tmp_path, capsys, options):
    write_image("image.png", clip(1, 24, 24))
    line = refused(capsys, ["script.txt", run / "single_shot.pt", *options])
    assert line.endswith("was tuned on single shots and makes each by itself; use bidirectional.pt or causal.pt")


def test_the_window_is_the_models_own_unless_it_is_told(run, tmp_path, capsys):
    """Made as if it had been trained on two shots at most."""
    saved = load_checkpoint(run / "causal.pt")
    stages = [{**stage, "max_shots": 2} for stage in saved["stages"]]
    save_checkpoint(tmp_path / "narrow.pt", {**saved, "stages": stages})
    for out, options in {"default": [], "two": ["--window", "2"], "three": ["--window", "3"]}.items():
        assert main(["generate", "script.txt", "narrow.pt", "--steps", "1", "--out", out, *options]) == 0
    default, two, three = (read_scene(tmp_path / out).shots[-1] for out in ("default", "two", "three"))
    assert torch.equal(default, two)
    assert not torch.equal(default, three)
    capsys.readouterr()
    assert main(["generate", "script.txt", "narrow.pt", "--steps", "1", "--mode", "joint", "--out", "joint"]) == 0
    assert capsys.readouterr().err == "note: 3 shots at once; the model was trained on at most 2\n"


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
