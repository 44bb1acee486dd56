"""``lct plan``: what it prints is what the library plans, it says what it then measures, and refusals are one line."""

import re
from textwrap import dedent

import pytest
import torch

from lct_backbones.mmdit import tiny
from lct_core import Shot, retrofit
from lct_core.cache.budget import STORAGES
from lct_core.checkpoints.model_card import ModelCard, small_mmdit
from lct_core.cli import main
from lct_core.cli.inspect import short
from lct_core.codec import LinearCodec
from lct_core.cost import Throughput, plan, throughput
from lct_core.training import save_checkpoint

SCRIPT = """
    Global Prompt: A wall.

    Shot 1. A red square.

    Shot 2. A square.
"""
MINE = """
    import torch
    from lct_backbones.mmdit import tiny as make
    from lct_core.codec import LinearCodec

    def empty():
        with torch.device("meta"):
            return make()

    def both():
        words = ["a", "red", "square", "wall", "[shot cut]"]
        codec = LinearCodec.fit([torch.rand(3, 2, 16, 16)], patch=4, channels=4, vocabulary=words)
        from lct_backbones.mmdit import MMDiT
        return MMDiT(channels=4, text_width=codec.text_width, width=32, depth=1, heads=2), codec
"""
MODEL = ("--model", "mine:make", "--size", "2x4x4", "--text", "3")
SCENE = [Shot(3, (1, 2, 2), "global"), *[Shot(3, (2, 2, 2))] * 2]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "script.txt").write_text(dedent(SCRIPT))
    (tmp_path / "mine.py").write_text(dedent(MINE))


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
    scene = [*SCENE, *[SCENE[1]] * 3]
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
    modes = [line.split()[0] for line in out.splitlines() if line.rstrip().endswith(" sdpa")]
    assert modes == ["joint", "conditional", "autoregressive", "causal"]
    assert "2 shots of 11 tokens, after a global prompt" in out
    assert re.search(r"kernels that serve .*causal: sdpa", out)
    ways = re.findall(r"(native|int8|fp8) +(on the device|in host memory) +(\S+ \S+)", out)
    assert [way[:2] for way in ways] == [
        (storage, place) for storage in STORAGES for place in ("on the device", "in host memory")
    ]
    a_shot = plan(retrofit(tiny()), SCENE, negative=SCENE, storage="int8").takes[1].cache
    assert {way[2] for way in ways if way[0] == "int8"} == {f"{short(a_shot, binary=True)}B"}


def test_what_does_not_fit_the_budget_is_said(capsys):
    out = ran(capsys, *MODEL, "--mode", "causal", "--storage", "int8", "--on-device", 2.25e-5)
    assert re.search(r"native +as budgeted .*over budget", out)
    assert re.search(r"int8 +as budgeted +\d", out)


def test_a_factory_that_brings_its_codec(capsys):
    out = ran(capsys, "--model", "mine:both", "--size", "2x16x16", "--mode", "causal", "--steps", 1, "--check")
    assert "cache planned" in out
    assert "within the 2% that it may be off" in out


def test_a_family_without_weights(capsys):
    out = ran(capsys, "--backbone", "mmdit", "--size", "4x8x8", "--text", 7, "--dtype", "bfloat16", "--mode", "joint")
    assert re.search(r"MMDiT of \S+ GiB, bfloat16, on cpu", out)


@pytest.mark.parametrize("mode", ["joint", "conditional", "autoregressive", "causal"])
def test_it_says_planned_against_measured(capsys, checkpoint, tmp_path, mode):
    Throughput(linear=1e9, attention=1e9, call=1e-3, where="a stand-in").save(tmp_path / "rates.json")
    options = ("--steps", 2, "--mode", mode, "--check", "--throughput", "rates.json")
    out = ran(capsys, checkpoint, *options)
    assert "a stand-in" in out
    said = re.search(rf"{mode}: planned (\S+) s, took (\S+) s: [+-][\d.]+%, (within|beyond) the 15% that", out)
    assert said is not None
    if mode == "causal":
        planned, held, off = re.search(r"cache planned (\S+ \S+), held (\S+ \S+): (\S+)%, within", out).groups()
        assert abs(float(off)) <= 2
        assert planned == held


def test_it_measures_and_keeps_what_it_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "_LEAST", 0.0)  # seconds of a pass
    out = ran(capsys, *MODEL, "--mode", "causal", "--measure", "--every-tier", "--throughput", "rates.json")
    assert "not known" not in out
    assert "times: as measured with MMDiT, float32, kernel auto, cpu" in out
    assert Throughput.load(tmp_path / "rates.json").linear > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected CHECKPOINT, --backbone or --model"),
        (("--backbone", "wan", *MODEL), "expected CHECKPOINT, --backbone or --model"),
        (("--backbone", "nobody", "--size", "4x8x8", "--text", 7), "--backbone: got 'nobody'"),
        (
            ("--backbone", "mmdit", "--size", "4x8x8", "--text", 7, "--measure"),
            "--measure: got it with a model that has no weights",
        ),
        (
            ("--backbone", "mmdit", "--size", "4x8x8", "--text", 7, "--mode", "joint", "--check"),
            "--check: got it with a model that has no weights",
        ),
        ((*MODEL[:4],), "--model: got it without --text"),
        ((*MODEL[:2], "--size", "2x3x4", "--text", 3), "--size: got '2x3x4'"),
        ((*MODEL[:2], "--size", "many", "--text", 3), "--size: got 'many'"),
        ((*MODEL, "--mode", "causal", "--kernel", "sdpa", "--kernel", "auto", "--check"), "one --kernel"),
        ((*MODEL, "--kernel", "sdpa", "--kernel", "auto", "--throughput", "rates.json"), "expected one --kernel"),
        ((*MODEL, "--every-tier"), "--every-tier: got it without --measure"),
        ((*MODEL, "--shared-history"), "shared_history: got True, but the text of MMDiT takes part"),
        ((*MODEL, "--shared-history", "--no-guidance"), "--shared-history: got it with --no-guidance"),
        (("--model", "mine:empty", *MODEL[2:], "--measure"), "--measure: got it with a model that has no weights"),
        (("--model", "mine:both"), "--model: got it without --size"),
        (("--model", "mine:both", "--size", "2x10x16"), "--size: "),
        (("--model", "mine:both", "--size", "2x16x16", "--text", 3), "--text: got 3 with a codec"),
        ((*MODEL, "--check"), "--check: expected at least one --mode"),
        ((*MODEL, "--kernel", "fastest"), "fastest"),
        ((*MODEL, "--throughput", "script.txt"), "script.txt: not a throughput"),
        ((*MODEL, "--on-device", 0, "--on-host", 0), "budget"),
        (("nowhere.pt",), "nowhere.pt"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_what_the_codec_says_is_not_asked(capsys, checkpoint):
    assert "--text: got 3 with a codec" in refused(capsys, checkpoint, "--text", 3)
    assert "--size: " in refused(capsys, checkpoint, "--size", "2x10x16")
