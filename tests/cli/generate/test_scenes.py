"""``lct generate``: what it writes is what the library generates, for every mode and option."""

from fractions import Fraction
from itertools import product

import pytest
import torch

import lct_core.cli.generate
from lct_core import generation
from lct_core.checkpoints.model_card import ModelCard
from lct_core.cli import main
from lct_core.data import read_image, read_scene, read_video, write_image, write_scene, write_video
from lct_core.generation import negative_texts, start_scene
from lct_core.script import read_script
from lct_core.training import load_checkpoint, save_checkpoint
from tests.cli.generate.clips import SIZE, clip, refused, same

av = pytest.importorskip("av")
MODES = ("joint", "conditional", "autoregressive")  # and causal, of a causal model


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


def test_an_image_of_the_videos_size_is_one_frame(lct, tmp_path):
    write_image("given.png", clip(1, 24, 32))
    lct("bidirectional", "--given", "2=given.png", out="out")
    assert read_video(tmp_path / "out" / "scene.mp4").shape == (3, 2 + 1 + 2, 24, 32)


def test_what_was_generated_can_be_given(lct, tmp_path):
    lct("bidirectional", out="first")
    frames = lct("bidirectional", "--given", "1=first/shot_1.mp4", out="second")
    assert torch.equal(frames[0], read_video(tmp_path / "first" / "shot_1.mp4"))


# --- bad input ---


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
