"""``lct direct``: what is typed is done, what was done is there when it is resumed, and what is wrong is one line."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch

from lct_core.checkpoints.model_card import ModelCard
from lct_core.checkpoints.tuned import Tuned
from lct_core.cli import main
from lct_core.codec import LinearCodec
from lct_core.data import read_scene, read_video, write_image
from lct_core.plugins import registry
from lct_core.session import Book, Session, live
from lct_core.training import save_checkpoint

WORDS = ["[shot", "cut]", "character", "1", "a", "red", "square", "the", "moves", "plain", "wall"]
SCRIPT = """Global Prompt: Character 1: a square. A plain wall.

Shot 1. A red square.

Shot 2. The square moves.

Shot 3 (continues). Character 1 moves.
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "script.txt").write_text(SCRIPT)
    options = {"channels": 3, "text_width": len(WORDS), "width": 24, "depth": 1, "heads": 2, "patch": [1, 1, 1]}
    codec = LinearCodec(mean=torch.full((768,), 0.5), components=torch.eye(768)[:3], vocabulary=WORDS)
    source = {"backbone": "mmdit", "options": options, "codec": codec.state()}
    card = ModelCard(source=source, scheme="anchored", size=(2, 32, 32), area=4096, multiple=16, fps=8.0, max_frames=9)
    torch.manual_seed(0)
    made = registry().build("mmdit", **options).state_dict()
    weights = {name: 0.2 * torch.randn(weight.shape) for name, weight in made.items()}  # of which no gate is closed
    for pattern in ("context_causal", "bidirectional", "own_shot"):
        content = {"about": card.state(), "stage": "last", "stages": [{"name": "last", "max_shots": 3}]}
        save_checkpoint(tmp_path / f"{pattern}.pt", {**content, "pattern": pattern, "model": weights})


@pytest.fixture
def direct(capsys, monkeypatch):
    """Runs the command with some typed lines; returns its lines of output, and of errors."""

    def run(*arguments, say="", code=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO(say))
        assert main(["direct", *map(str, arguments)]) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return [line.rstrip() for line in out.splitlines()], err.splitlines()

    return run


def begin(direct, say="", *options, out="s", checkpoint="context_causal.pt"):
    return direct("script.txt", checkpoint, "--out", out, "--steps", 1, *options, say=say)


def opened(folder="s"):
    """The session, by the library."""
    tuned = Tuned.load(Path(Book.read(Path(folder)).about["checkpoint"]))
    return Session.open(folder, *tuned.build(torch.device("cpu")))


def test_a_session_through_a_pipe(direct, tmp_path):
    out, err = begin(
        direct,
        """
        # a comment, and an empty line

        generate
        keep
        generate t_c 300 seed 7
        redo
        keep
        history 1
        generate 3
        keep
        generate prompt "A plain wall." from none continues
        keep
        scene
        """,
    )
    assert err == []
    assert out[0] == "s: branch main, 0 of 3 shots kept; no take yet. help lists the commands."
    said = [line for line in out if line.startswith(("take", "kept", "  s/"))]
    assert said == [
        "take 1: shot 1, seeing no other shot; seed 0",
        "  s/takes/0001/contact_sheet.png",
        "  s/takes/0001/shot_1.mp4",
        "kept: take 1 of shot 1",
        "take 2: shot 2, seeing shot 1; seed 7",
        "  s/takes/0002/contact_sheet.png",
        "  s/takes/0002/shot_2.mp4",
        "take 3: shot 2, seeing shot 1; seed 7, draw 1",
        "  s/takes/0003/contact_sheet.png",
        "  s/takes/0003/shot_2.mp4",
        "kept: take 3 of shot 2",
        "take 4: shot 3, seeing shot 1; seed 0",
        "  s/takes/0004/contact_sheet.png",
        "  s/takes/0004/shot_3.mp4",
        "kept: take 4 of shot 3",
        "take 5: shot 4, seeing no other shot; seed 0",
        "  s/takes/0005/contact_sheet.png",
        "  s/takes/0005/shot_4.mp4",
        "kept: take 5 of shot 4",
        "  s/scene",
        "  s/scene/contact_sheet.png",
        "  s/scene/scene.mp4",
    ]
    assert [line for line in out if "> " in line][1:3] == ["main, shot 1> generate", "main, shot 1> keep"]
    session = opened()
    assert session.kept == {1: 1, 2: 3, 3: 4, 4: 5}
    assert [(row.history, row.t_c) for row in session.shots] == [((), 100), ((1,), 300), ((1,), 100), ((), 100)]
    assert read_video("s/scene/scene.mp4").shape == (3, 8, 32, 32)
    assert [shot.cut for shot in read_scene("s/scene").script.shots] == [True, True, False, False]
    assert out[-1] == "saved: s/cache"  # all is, at the end
    assert (tmp_path / "s" / "cache" / "positive" / "index.json").is_file()


def test_it_goes_on_where_it_was_left(direct):
    begin(direct, "generate\nkeep\ngenerate\nquit\ngenerate 3")
    out, err = direct("s", say="keep\ngenerate\nsh")
    assert err == []
    assert (
        out[0]
        == "s: branch main, 1 of 3 shots kept; the present one is take 2, of shot 2, not kept. help lists the commands."
    )
    rows = [line.split()[:4] for line in out if line.strip().startswith(("1  ", "2  ", "3  "))]
    assert rows == [["1", "kept", "1", "100"], ["2", "kept", "2", "1"], ["3", "made", "3", "1,"]]
    begin(direct, "generate\nkeep\n" * 2 + "generate", out="whole")
    ours, theirs = opened().latents, opened("whole").latents
    assert all(torch.equal(ours[n], theirs[n]) for n in (1, 2))
    third = [opened(folder)._archive.latents(opened(folder).present, 3) for folder in ("s", "whole")]
    assert torch.equal(*third)


@pytest.mark.parametrize("saved", [True, False])
def test_under_bfloat16_it_goes_on_with_the_same_bits(direct, tmp_path, saved):
    """From the saved cache, which holds bfloat16, and where that is gone, from keys that are written again."""
    begin(direct, "generate\nkeep\n" * 2 + "generate", "--bf16", out="whole")
    begin(direct, "generate\nkeep\n" * 2, "--bf16")
    if not saved:
        shutil.rmtree(tmp_path / "s" / "cache")
    direct("s", say="generate")
    begin(direct, "generate\nkeep\n" * 2 + "generate", out="float32")
    whole, ours, wide = (
        session._archive.latents(session.present, 3) for session in map(opened, ("whole", "s", "float32"))
    )
    assert torch.equal(whole, ours)
    assert not torch.equal(whole, wide)


def test_storage_and_tiers_of_the_cache(direct, tmp_path):
    """In 8 bits shots are seen otherwise; in files, they are not."""
    say = "generate\nkeep\n" * 2 + "generate"
    files = ("--on-device", 0.0000115, "--on-host", 0)
    begin(direct, say, out="plain")
    begin(direct, say, *files, out="tiers")
    begin(direct, say, "--storage", "int8", *files, "--cache-folder", tmp_path / "disk", out="int8")
    assert (tmp_path / "disk").is_dir()
    _, err = direct("int8", *files, say="generate")
    assert err == []
    plain, tiers, int8 = map(opened, ("plain", "tiers", "int8"))
    assert int8.settings.sampling.storage == "int8"
    takes = [
        [session._archive.latents(take, 3) for take in session._book.takes[2:]] for session in (plain, tiers, int8)
    ]
    assert torch.equal(takes[0][0], takes[1][0])
    assert not torch.equal(takes[0][0], takes[2][0])
    assert torch.equal(*takes[2])
    _, err = begin(direct, "generate", "--on-device", 0, "--on-host", 0, out="none")
    assert len(err) == 1
    assert err[0].startswith("error: budget: ")


def test_a_wrong_command_is_one_line_and_the_session_goes_on(direct, tmp_path):
    write_image(tmp_path / "hero.png", torch.rand(3, 1, 32, 32))
    wrong = {
        "histroy 1": "'histroy': expected one of generate, keep, redo, history, look, give, undo, branch, switch, ",
        "g": "'g': which of generate, give?",
        "s": "'s': which of switch, shots, scene, save?",
        'generate "': "No closing quotation",
        "generate 9": "shots: got 9, expected one from 1 to 3, or the next with a prompt",
        "generate one": "got 'one', expected shots, or one of from, prompt, seed, t_c, continues, cut, recompute",
        "generate -1": "got '-1', expected shots, or one of from",
        "generate from": "from: expected shots after it, such as 1 3; none; or recent",
        "generate from 2": "history: shot 2 not kept, expected some of [1]",
        "generate seed": "seed: expected a value after it",
        "generate seed x": "seed: got 'x', expected a whole number",
        'generate prompt "[SHOT CUT] A wall."': "prompt: got '[SHOT CUT] A wall.', expected it without [SHOT CUT]",
        "generate t_c 2000": "t_c: got 2000.0, expected a level from 0",
        "generate prompt zebra": "prompt: 'zebra' in '[SHOT CUT] zebra' is not among the words that this codec knows",
        "redo t_c 3": "got 't_c', expected one of seed",
        "keep all": "got 'all', expected numbers of shots",
        "keep 1": "stale: shot 1 is not stale, and no other is; without a shot, keep is for the present take",
        "history": "history: expected shots, such as 1 3; none; or recent",
        "give 2": "give: expected a shot and a file, such as 2 hero.png",
        "give 2 none.png": "none.png: no such file, expected an image",
        "look 1": "got '1' after the command, expected nothing",
        "branch": "expected one name after the command",
        "switch other": "name: got 'other', expected one of main",
        "scene a b": "scene: expected a folder, or nothing",
    }
    _, err = begin(direct, "generate\nkeep\n" + "\n".join(wrong) + "\ngive 2 hero.png\ngenerate\nkeep\n")
    assert len(err) == len(wrong)
    for line, words in zip(err, wrong.values(), strict=True):
        assert line.startswith(f"error: {words}")
    assert [row.state for row in opened().shots] == ["kept", "given", "kept"]


def test_every_other_command(direct):
    out, err = begin(
        direct,
        """
        generate
        keep
        generate 2 recompute
        keep
        branch wide
        generate 1 prompt "A wall moves."
        keep
        undo
        redo
        keep
        keep 2
        history recent
        switch main
        look
        save
        scene elsewhere
        help
        """,
    )
    assert err == []
    stale = "stale: shot 2, made from what was replaced since; not seen by others until generated again, "
    assert stale + "or kept as is (keep 2)" in out
    assert "kept: take 5 of shot 2" in out
    assert "branch main, 2 of 3 shots kept; the present one is take 2, of shot 2, kept" in out
    assert out[-2] == "A command may be cut short, as long as it is the only one that begins so."
    session = opened()
    assert session.kept == {1: 1, 2: 2}
    session.switch("wide")
    assert session.kept == {1: 4, 2: 5}
    assert not session.stale
    assert len(read_scene("elsewhere").shots) == 2


def test_an_interruption_gives_up_a_take_alone(direct, monkeypatch):
    shoot = live.Director.shoot
    calls = []

    def interrupted(director, *arguments, **more):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return shoot(director, *arguments, **more)

    monkeypatch.setattr(live.Director, "shoot", interrupted)
    out, err = begin(direct, "generate\nkeep\ngenerate\ngenerate\nkeep")
    assert err == []
    assert "interrupted: a take in progress is given up; all before it stands" in out
    assert opened().kept == {1: 1, 2: 2}


def test_a_bidirectional_model_runs_its_history_again(direct):
    begin(direct, "generate 1 2\nkeep\ngenerate\nkeep", checkpoint="bidirectional.pt")
    session = opened()
    assert session.kept == {1: 1, 2: 1, 3: 2}
    assert not session.present.cached
    assert session.present.history == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["script.txt"], "CHECKPOINT: got none with script.txt, expected a file that lct tune wrote; or script.txt "),
        (["none.txt", "context_causal.pt"], "none.txt: no such file"),
        (["."], "session.json: no such file, expected a session's folder"),
        (["script.txt", "own_shot.pt"], "own_shot.pt: tuned on single shots, and makes each by itself"),
        (["script.txt", "context_causal.pt", "--out", "s"], "s: already holds a session; go on with that"),
        (["script.txt", "context_causal.pt", "--size", "2x30x32"], "size: frames: got 2 of 30 x 32 pixels"),
        (["s", "--steps", "3"], "--steps: s is a session, which has its own settings; leave it out"),
        (["s", "--storage", "int8"], "--storage: s is a session, which has its own settings; leave it out"),
        (["script.txt", "bidirectional.pt", "--storage", "int8"], "--storage: bidirectional.pt was tuned with bidirec"),
        (["script.txt", "bidirectional.pt", "--on-host", "1"], "--on-host: bidirectional.pt was tuned with bidirectio"),
        (["s", "--on-device", "-1"], "Invalid value for '--on-device': -1.0 is not in the range"),
        (["nowhere"], "CHECKPOINT: got none with nowhere, expected a file that lct tune wrote; or nowhere to be the "),
        (["s", "other.pt"], "s: made with another model: model: its weights differ"),
    ],
)
def test_what_can_not_begin_is_one_line(direct, arguments, words, tmp_path):
    begin(direct)
    if "other.pt" in arguments:
        content = torch.load(tmp_path / "context_causal.pt", weights_only=True)
        content["model"] = {name: weight + 1 for name, weight in content["model"].items()}
        torch.save(content, tmp_path / "other.pt")
    out, err = direct(*arguments, say="generate", code=2)
    assert out == []
    assert len(err) == 1
    assert words in err[0]
    assert err[0].startswith("lct direct: error: ")
    assert not (tmp_path / "runs").exists()


def test_the_checkpoint_may_have_moved(direct, tmp_path):
    begin(direct, "generate")
    (tmp_path / "context_causal.pt").rename(tmp_path / "moved.pt")
    _, err = direct("s", code=2)
    assert "context_causal.pt: no such file" in err[0]
    out, _ = direct("s", "moved.pt", say="keep")
    assert "kept: take 1 of shot 1" in out
    assert out[-1] == "saved: nothing is new"  # no key was needed


def test_help_has_a_session(direct):
    out, _ = direct("--help")
    text = "\n".join(out)
    assert "lct direct runs/cafe" in text
    assert 'generate 3 prompt "Close up of Character 1." from 1 2' in text
    for option in ("--steps", "--guidance", "--negative", "--t-c", "--size", "--fps", "--window", "--device", "--seed"):
        assert option in text
