"""``lct plan``: what it prints is what the library plans, it says what it then measures, and refusals are one line."""

import re
from textwrap import dedent

import pytest
import torch

from lct_backbones.mmdit import tiny
from lct_core import Shot, retrofit
from lct_core.cli import main
from lct_core.cli.inspect import short
from lct_core.cli.source import ModelCard, small_mmdit
from lct_core.codec import LinearCodec
from lct_core.cost import Throughput, plan
from lct_core.training import save_checkpoint

SCRIPT = """
    Global Prompt: A wall.

    Shot 1. A red square.

    Shot 2. A square.
"""
MODEL = ("--model", "mine:make", "--size", "2x4x4", "--text", "3")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "script.txt").write_text(dedent(SCRIPT))
    (tmp_path / "mine.py").write_text("from lct_backbones.mmdit import tiny as make\n")


def ran(capsys, *arguments):
    assert main(["plan", "script.txt", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    assert main(["plan", "script.txt", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith("lct plan: error: ")
    return err


@pytest.fixture
def checkpoint(tmp_path):
    codec = LinearCodec.fit(
        [torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))],
        patch=8,
        channels=8,
        vocabulary=["a", "red", "square", "wall", "[shot cut]"],
    )
    source = small_mmdit(codec, width=32, depth=2, heads=2)
    card = ModelCard(source=source, scheme="anchored", size=[2, 16, 16], area=256, multiple=8, fps=8, max_frames=4)
    model, _ = card.build()
    state = {"model": model.backbone.state_dict(), "about": card.state(), "pattern": "context_causal"}
    save_checkpoint(tmp_path / "causal.pt", state)
    return "causal.pt"


def test_what_it_prints_is_what_the_library_plans(capsys):
    out = ran(capsys, *MODEL, "--steps", 4, "--shots", 5, "--mode", "causal")
    scene = [Shot(3, (1, 2, 2), "global"), *[Shot(3, (2, 2, 2))] * 5]
    expected = plan(retrofit(tiny()), scene, steps=4, negative=scene)
    causal = next(line for line in out.splitlines() if line.lstrip().startswith("causal") and "B" in line)
    for word in (short(expected.cost.total).strip(), short(expected.peak_cache, binary=True), "sdpa", "not known"):
        assert word in causal
    rows = re.findall(r"shot (\d)\s+([\d,]+)\s+([\d,]+)", out)
    assert [tuple(int(n.replace(",", "")) for n in row) for row in rows] == [
        (take.shots[0], take.tokens, take.seen) for take in expected.takes
    ]


def test_without_a_mode_all_are_there(capsys):
    out = ran(capsys, *MODEL)
    modes = [line.split()[0] for line in out.splitlines() if "sdpa" in line]
    assert modes == ["joint", "conditional", "autoregressive", "causal"]
    assert "2 shots of 11 tokens, after a global prompt" in out


def test_a_family_without_weights(capsys):
    out = ran(capsys, "--backbone", "mmdit", "--size", "4x8x8", "--text", 7, "--dtype", "bfloat16", "--mode", "joint")
    assert re.search(r"MMDiT of \S+ GiB, bfloat16, on cpu", out)


@pytest.mark.parametrize("mode", ["joint", "conditional", "autoregressive", "causal"])
def test_it_says_planned_against_measured(capsys, checkpoint, tmp_path, mode):
    Throughput(linear=1e9, attention=1e9, call=1e-3, where="a stand-in").save(tmp_path / "rates.json")
    options = ("--steps", 2, "--mode", mode, "--check", "--throughput", "rates.json")
    out = ran(capsys, checkpoint, *options)
    assert "a stand-in" in out
    said = re.search(rf"{mode}: planned (\S+) s, took (\S+) s: [+-]\d+%(.*)", out)
    assert said is not None
    if mode == "causal":
        planned, held, off = re.search(r"cache planned (\S+ \S+), held (\S+ \S+): (\S+)%", said[3]).groups()
        assert abs(float(off)) <= 2
        assert planned == held


def test_it_measures_and_keeps_what_it_measured(capsys, tmp_path):
    out = ran(capsys, *MODEL, "--measure", "--throughput", "rates.json")
    assert "not known" not in out
    assert "threads" in out
    assert Throughput.load(tmp_path / "rates.json").linear > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected CHECKPOINT, --backbone or --model"),
        (("--backbone", "wan", *MODEL), "expected CHECKPOINT, --backbone or --model"),
        (("--backbone", "nobody", "--size", "4x8x8", "--text", 7), "--backbone: got 'nobody'"),
        (("--backbone", "mmdit", "--size", "4x8x8", "--text", 7, "--measure"), "--measure: got it with --backbone"),
        (("--backbone", "mmdit", "--size", "4x8x8", "--text", 7, "--check"), "--check: got it with --backbone"),
        ((*MODEL[:4],), "--text: expected it without CHECKPOINT"),
        ((*MODEL[:2], "--size", "2x3x4", "--text", 3), "--size: got 2x3x4"),
        ((*MODEL[:2], "--size", "many", "--text", 3), "--size: got 'many'"),
        ((*MODEL, "--check"), "--check: got it without --mode"),
        ((*MODEL, "--kernel", "fastest"), "fastest"),
        ((*MODEL, "--throughput", "script.txt"), "script.txt: not a throughput"),
        ((*MODEL, "--on-device", 0, "--on-host", 0), "budget"),
        (("nowhere.pt",), "nowhere.pt"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_what_the_codec_says_is_not_asked(capsys, checkpoint):
    assert "--text: got 3 with CHECKPOINT" in refused(capsys, checkpoint, "--text", 3)
    assert "--size: " in refused(capsys, checkpoint, "--size", "2x10x16")
