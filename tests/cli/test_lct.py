"""The command as a whole: help, bad input, interruptions, and as a process."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from lct_core import (
    PluginError,
)
from lct_core.cli import backbones, kernels, main
from tests.cli.arguments import PICTURES, refused

# --- the command as a whole ---


def test_help_and_version(capsys):
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    first, second, third = capsys.readouterr().out.split("Usage: lct ")[1:]
    assert first == second == third
    assert "..." not in first.split("Commands:")[1]  # nothing is cut off
    for command in ("inspect", "backbones", "kernels", "conformance", "tune", "generate", "demo"):
        assert f"\n  {command} " in first
        assert main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert re.search(rf"Examples?:\n    lct {command}\b", out)
        if command in ("tune", "generate", "demo"):
            assert not re.search("[<>]=?x|None|RANGE", out)  # ranges that only keep nonsense out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lct {version('lct-core')}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nothing"], "lct: error: No such command 'nothing'."),
        (["--nothing"], "lct: error: No such option '--nothing'."),
        (["kernels", "--nothing"], "lct kernels: error: No such option '--nothing'."),
        (["backbones", "extra"], "lct backbones: error: Got unexpected extra argument (extra)"),
        (["conformance"], "lct conformance: error: Missing argument 'MODULE:FACTORY'."),
        (
            ["inspect", "--scheme", "x"],
            "lct inspect: error: Invalid value for '--scheme': 'x' is not one of 'paper', 'an",
        ),
        (["inspect", "--pattern"], "lct inspect: error: Option '--pattern' requires an argument."),
        (["inspect", "--layers", "0"], "lct inspect: error: Invalid value for '--layers': 0 is not in the range 1<=x"),
        (["inspect", "--heads", "x"], "lct inspect: error: Invalid value for '--heads': 'x' is not a valid integer"),
        (["inspect", "--seed", "-1"], "lct inspect: error: Invalid value for '--seed': -1 is not in the range 0<=x"),
        (["inspect", "--dtype", "int8"], "lct inspect: error: Invalid value for '--dtype': 'int8' is not one of"),
        (
            ["inspect", "--heads", "16", "--kv-heads", "3"],
            "lct inspect: error: --kv-heads: got 3, expected a divisor of the 16 of --heads",
        ),
        (
            ["kernels", "--kv-heads", "5"],
            "lct kernels: error: --kv-heads: got 5, expected a divisor of the 16 of --heads",
        ),
        (
            ["inspect", "--budget", "100", "12:4x6x6"],
            "lct inspect: error: scenes: scene 0 (counting from 0) has 156 tokens",
        ),
        (
            ["inspect", "1:1x1x1", "global:1:1x1x1"],
            "lct inspect: error: scenes: shot 1 of scene 0 (counting from 0) is gl",
        ),
        (["inspect", "/"], "lct inspect: error: scenes: scene 0 (counting from 0) has no shot, expected at least one"),
        (["inspect", "1:1x1x1", "/"], "lct inspect: error: scenes: scene 1 (counting from 0) has no shot"),
        (["kernels", "--device", "nowhere"], "lct kernels: error: --device: got 'nowhere', which torch can't use here"),
        (["kernels", "--device", "cuda:99"], "lct kernels: error: --device: got 'cuda:99', which torch can't use here"),
        (["kernels", "1:1x1"], "lct kernels: error: SHOT: got '1:1x1', expected TEXT:FRAMESxHEIGHTxWIDTH in tokens"),
        (["kernels", "--pattern", "x"], "lct kernels: error: Invalid value for '--pattern': 'x' is not one of 'bidir"),
        (
            ["kernels", "--pattern", "text"],
            "lct kernels: error: --pattern: got text, but text is part of self-attention here; expected another, or",
        ),
        (
            ["kernels", "--pattern", "cached", "--grad"],
            "lct kernels: error: --grad: got it with --pattern cached, but a KV cache has no gradients; leave it out",
        ),
        (["kernels", "--size", "1x2x2"], "lct kernels: error: --size: got 1x2x2 without --script; give SHOTs, in tok"),
        (["kernels", "--text", "3"], "lct kernels: error: --text: got 3 without --script; give SHOTs, in tokens"),
        (["kernels", "--script", "s"], "lct kernels: error: --script: got no model, expected --backbone or --model"),
        (
            ["kernels", "--script", "s", "1:1x1x1", "2:1x1x1"],
            "lct kernels: error: SHOT: got 1:1x1x1 2:1x1x1 beside --script; leave one of the two out",
        ),
        (
            ["kernels", "--script", "s", "--backbone", "mmdit", "--size", "1x2x2"],
            "lct kernels: error: --script: got it without --text, expected both, like --size 21x60x104 --text 512",
        ),
        (
            ["kernels", "--script", "s", "--backbone", "mmdit", "--size", "1x2x3", "--text", "1"],
            "lct kernels: error: --size: got '1x2x3', expected latent frames, height and width below 100,000, multip",
        ),
        (
            ["kernels", "--script", "s", "--backbone", "mmdit", "--size", "2x2", "--text", "1"],
            "lct kernels: error: --size: got '2x2', expected latent frames, height and width below 100,000, "
            "multiples of the patch (1, 2, 2), like 21x60x104",
        ),
        (
            ["kernels", "--script", "absent.txt", "--backbone", "mmdit", "--size", "1x2x2", "--text", "1"],
            "lct kernels: error: absent.txt: no such file, expected a script file",
        ),
        (["kernels", "--backbone", "x"], "lct kernels: error: --backbone: got 'x', expected one of cogvideox, cosmos,"),
        (
            ["kernels", "--backbone", "mmdit", "--model", "a:b"],
            "lct kernels: error: --model: got a:b beside --backbone; leave one of the two out",
        ),
        (
            ["kernels", "--backbone", "mmdit", "--heads", "6", "--kv-heads", "4"],
            "lct kernels: error: --kv-heads: got 4, expected a divisor of the 6 of --heads",
        ),
        (
            ["kernels", "--backbone", "mmdit", "--kv-heads", "3"],
            "lct kernels: error: --kv-heads: got 3, expected a divisor of the 16 of --heads",
        ),
        (
            ["kernels", "--backbone", "flux"],
            "lct kernels: error: SHOT (the example): got 4 frames, expected 1, as FluxTransformer2DModel takes them",
        ),
        (
            ["kernels", "--backbone", "cogvideox", "7:2x3x3"],
            "lct kernels: error: SHOT: got 7 text tokens, expected 226, as CogVideoXTransformer3DModel takes them",
        ),
        (
            ["kernels", "--backbone", "wan", "0:2x3x3"],
            "lct kernels: error: SHOT: layout: shot 0 (in row order) has no text to attend to, expected text > 0",
        ),
        (
            ["kernels", "--backbone", "wan", "1:1x1x1", "/", "global:2:1x3x3"],
            "lct kernels: error: SHOT: got a scene of a global prompt alone, expected a shot after it; add one",
        ),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, line):
    assert refused(capsys, arguments).startswith(line)


@pytest.mark.parametrize(
    "shot",
    ["", "12", "12:4x6", "12:4x6x6x6", "12;4x6x6", "12:4X6X6", ":4x6x6", "a:4x6x6", "1.5:4x6x6", "+1:4x6x6", " 1:4x6x6",
     "1:4x6x6/", "//", "Global:1:1x1x1", "global:4x6x6", "shot:1:1x1x1", "100000:1x1x1", "1:1x1x100000", "1:1x1x1\n",
     "\N{ARABIC-INDIC DIGIT ONE}:1x1x1"],
)  # fmt: skip
def test_a_malformed_shot(capsys, shot):
    line = refused(capsys, ["inspect", "1:1x1x1", shot])
    assert line == (
        f"lct inspect: error: SHOT: got {shot!r}, expected TEXT:FRAMESxHEIGHTxWIDTH in tokens, each below 100,000, "
        "like 12:4x6x6, with global: before it for a global shot, or / between scenes"
    )


def test_an_empty_grid(capsys):
    line = refused(capsys, ["inspect", "3:0x6x6"])
    assert line.startswith(
        "lct inspect: error: SHOT: got '3:0x6x6': grid: got (0, 6, 6), expected three ints of at least 1"
    )


def test_a_message_of_several_lines_becomes_one(capsys, monkeypatch):
    def broken():
        raise PluginError("plugin 'x' cannot be loaded; there are:\n  a: one\n  b: two\nmend it")

    monkeypatch.setattr(backbones, "registry", broken)
    line = refused(capsys, ["backbones"])
    assert line == "lct backbones: error: plugin 'x' cannot be loaded; there are: a: one; b: two; mend it"


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(kernels, "registry", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["kernels"])


def test_interrupted(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "registry", interrupted)
    assert main(["kernels"]) == 130
    assert capsys.readouterr().err.strip() == ""


# --- as a process ---


def lct(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "lct_core.cli", *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_a_process(tmp_path):
    done = lct("inspect", "2:1x2x2", "--out", "pictures")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("".join(f"pictures/{name}\n" for name in PICTURES))
    assert all((tmp_path / "pictures" / name).is_file() for name in PICTURES)


def test_a_process_that_refuses():
    done = lct("inspect", "2:1x2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lct inspect: error: SHOT: got '2:1x2', expected")
    assert done.stderr.count("\n") == 1


def test_a_process_that_is_interrupted(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\n\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore\n\n"
        "def make():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    done = lct("conformance", "slow:make")
    assert done.returncode == 130
    assert done.stderr.strip() == ""


def test_pyplot_is_left_alone():
    code = (
        "import sys\nfrom lct_core.cli import main\n"
        "assert not {'matplotlib', 'rich'} & {*sys.modules}, 'loaded too early'\n"
        "main(['inspect', '1:1x1x1'])\nassert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
