import itertools
import re
import struct
import subprocess
import sys
import zlib
from importlib.metadata import version
from textwrap import dedent

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from lct_backbones.mmdit import PAPER_3B, MMDiT
from lct_core import (
    BackboneSpec,
    KernelRequest,
    KernelSpec,
    KVCache,
    Layout,
    PluginError,
    Registry,
    Shot,
    coordinates,
    hookimpl,
    registry,
)
from lct_core.cli import asked, backbones, conformance, inspect, kernels, main
from lct_core.cli.shots import EXAMPLE, Size, costs, parse_shots
from lct_core.patterns import PATTERNS, bidirectional, context_causal, own_and_global_text
from lct_core.pictures import attention, packing, style
from lct_core.pictures import coordinates as coordinate_figures
from lct_core.pictures.style import shot_names, starts
from lct_core.testing.strategies import layouts

PICTURES = ["coordinates.png", "attention.png", "packing.png"]
NINE = ["global:250:1x30x30", *(f"{180 + 20 * (k % 4)}:{[31, 16, 1][k % 3]}x30x{[30, 36][k % 2]}" for k in range(9))]
SIZE = Size(layers=3, heads=8, kv_heads=2, head_dim=16, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def pixels(path):
    """The bytes of a PNG's picture, unpacked: proof that it is one, and of its size."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    packed, at = b"", 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + size]
        at += size + 12
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
    return width, height, rows


def refused(capsys, arguments):
    """The one line that bad input gets."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert "Usage" not in out + err
    return err.strip()


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
        (["kernels", "--device", "nowhere"], "lct kernels: error: --device: got 'nowhere', expected a device of this"),
        (["kernels", "--device", "cuda:99"], "lct kernels: error: --device: got 'cuda:99', expected a device of this"),
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


# --- inspect ---


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["12:4x6x6"],
        ["0:1x1x1"],
        ["global:3:1x2x2"],
        ["0:4x6x6", "0:2x8x4", "/", "0:1x2x3"],
        [*NINE, "--pattern", "context_causal"],
        [*NINE, "--scheme", "anchored", "--text-last", "--pattern", "own_shot"],
        ["99999:99999x99999x99999", "0:1x1x1", "--scheme", "anchored"],
        ["1:2x3x4"] * 24,
        [*["1:2x3x4", "/"] * 20, "5:1x2x3", "--budget", "1000", "--seed", "3"],
        ["5:1x1x4000", "5:4x5x6"],
    ],
)
def test_pictures(arguments, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert main(["inspect", *arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3:] == [str(out / name) for name in PICTURES]
    for name in PICTURES:
        width, height, rows = pixels(out / name)
        assert width >= 1000
        assert height >= 300
        assert len(np.unique(rows)) > 50
        assert (rows.max(1) > rows.min(1)).mean() > 0.3  # something is drawn in many lines


def test_pictures_go_to_runs_by_default(tmp_path):
    assert main(["inspect", "1:1x1x1"]) == 0
    assert sorted(p.name for p in (tmp_path / "runs" / "inspect").iterdir()) == sorted(PICTURES)
    assert main(["inspect", "1:1x1x1"]) == 0  # an existing folder is fine


def test_out_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "Invalid value for '--out': Directory 'file' is a file." in refused(capsys, ["inspect", "--out", "file"])
    line = refused(capsys, ["inspect", "--out", "file/under"])
    assert line.startswith("lct inspect: error: --out: got 'file/under', expected a folder to write to: ")


def test_the_example_is_said(capsys):
    assert main(["inspect"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said == f"No SHOT given, so this is the example: lct inspect {' '.join(EXAMPLE)}"
    layout = parse_shots(EXAMPLE)
    assert layout.shots[0].role == "global"
    assert len(layout.scenes[0]) == 5
    assert len(set(layout.scenes[0])) == 5
    assert len(layout.scenes) > 1


def test_parse():
    layout = parse_shots(["global:7:1x6x6", "12:4x6x5", "/", "0:1x2x3"], text_first=False)
    assert layout == Layout(
        [[Shot(7, (1, 6, 6), "global"), Shot(12, (4, 6, 5))], [Shot(0, (1, 2, 3))]], text_first=False
    )
    assert shot_names(layout) == ["global", "shot 1", "shot 1"]


@given(layout=layouts(), scheme=st.sampled_from(["paper", "anchored"]))
def test_starts_and_boxes_are_where_the_tokens_stand(layout, scheme):
    coords = coordinates(layout, scheme=scheme)
    places = starts(layout, scheme=scheme)
    chain = list(itertools.chain(*coordinate_figures.boxes(layout, scheme=scheme)))
    for span, shot, start, box in zip(layout.spans, layout.shots, places, chain, strict=True):
        tokens = coords[span.slice]
        video = tokens[shot.text :] if layout.text_first else tokens[: shot.video]
        assert start == box.start == tokens.min()
        assert video.min(0).values.tolist() == [box.corner] * 3
        assert (video.max(0).values + 1 - box.corner).tolist() == list(box.shot.grid)


@given(layout=layouts(), pattern=st.sampled_from([*PATTERNS]))
def test_costs_are_the_librarys(layout, pattern):
    plan = PATTERNS[pattern](layout)
    *shots, total = costs(layout, plan, SIZE, scheme="paper")
    dense = plan.dense()
    for row, span, shot in zip(shots, layout.spans, layout.shots, strict=True):
        assert row.pairs == dense[span.slice].sum()
        assert (row.text, row.video) == (shot.text, shot.video)
        assert row.flops == 3 * 4 * 8 * 16 * row.pairs
    assert total.pairs == plan.pairs == dense.sum()
    assert total.flops == 3 * plan.flops(heads=8, head_dim=16)
    assert total.text + total.video == layout.tokens
    assert total.name == "all"
    assert (total.scene, total.start) == (None, None)
    for field in ("text", "video", "pairs", "flops", "cache"):
        assert getattr(total, field) == sum(getattr(row, field) for row in shots)


@given(layout=layouts(max_scenes=1))
def test_cache_bytes_are_what_a_cache_holds(layout):
    cache = KVCache()
    for block in range(SIZE.layers):
        kv = torch.zeros(1, layout.tokens, SIZE.kv_heads, SIZE.head_dim, dtype=SIZE.dtype)
        cache.write((block, "self"), "tokens", kv, kv)
    assert costs(layout, bidirectional(layout), SIZE, scheme="paper")[-1].cache == cache.nbytes


def test_the_table(capsys):
    arguments = ["global:3:1x2x2", "5:2x3x3", "/", "2:1x2x2", "--pattern", "context_causal", "--layers", "2"]
    assert (
        main(["inspect", *arguments, "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--dtype", "float32"]) == 0
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # pairs: 7², 23 · 30, 6²; FLOPs: 2 · 4 · 8 · 4 · pairs; bytes: 2 · 2 · 2 · 8 · 4 · tokens
    assert ["1", "global", "3", "4", "7", "0", "49", "12,544", "1.8", "KiB"] in lines
    assert ["1", "shot", "1", "5", "18", "23", "5", "690", "176,640", "5.8", "KiB"] in lines
    assert ["2", "shot", "1", "2", "4", "6", "0", "36", "9,216", "1.5", "KiB"] in lines
    assert ["all", "10", "26", "36", "775", "198,400", "9.0", "KiB"] in lines


@pytest.mark.parametrize(
    ("number", "binary", "text"),
    [
        (0, False, "0 "),
        (999_999, False, "999,999 "),
        (1_000_000, False, "1.0 M"),
        (2.5e12, False, "2.5 T"),
        (10**30, False, "1,000,000,000,000 E"),
        (320, True, "320 "),
        (1536, True, "1.5 Ki"),
        (3 * 2**40, True, "3.0 Ti"),
    ],
)
def test_short_numbers(number, binary, text):
    assert inspect.short(number, binary=binary) == text


def test_budget_seed_and_rows(monkeypatch):
    drawn = []

    def packing_figure(layout, rows, *, budget):
        drawn.append((rows, budget))
        return Figure()

    monkeypatch.setattr(packing, "packing_figure", packing_figure)
    scenes = ["1:1x3x3", "/", "1:1x2x2", "/", "0:1x5x1"]
    for extra in ([], ["--budget", "40"], ["--seed", "5"]):
        assert main(["inspect", *scenes, *extra]) == 0
    assert [sorted(map(sorted, rows)) for rows, _ in drawn] == [[[0], [1, 2]], [[0, 1, 2]], [[0], [1, 2]]]
    assert [budget for _, budget in drawn] == [10, 40, 10]
    assert main(["inspect", *["1:1x1x1"] * 12]) == 0  # longer than the paper's window is fine to look at


@pytest.mark.parametrize("text_first", [True, False])
def test_plan_picture_has_every_attended_pair_and_no_other(text_first):
    layout = parse_shots(EXAMPLE, text_first=text_first)
    plan = context_causal(layout)
    (axes,) = attention.plan_figure(layout, plan, pattern="context_causal").axes
    tiles, blocks = (axes.collections[k].get_paths() for k in (0, 1))
    for paths in (tiles, blocks):
        drawn = torch.zeros(plan.queries, plan.keys, dtype=torch.int64)
        for path in paths:
            (x0, y0), (x1, y1) = path.vertices.min(0).astype(int), path.vertices.max(0).astype(int)
            drawn[y0:y1, x0:x1] += 1
        assert torch.equal(drawn, plan.dense().long())


def test_packing_picture_has_every_token_once():
    layout = parse_shots(EXAMPLE)
    (axes,) = packing.packing_figure(layout, [[1, 2], [0]], budget=500).axes
    assert sum(bar.get_width() for bar in axes.patches) == 1000
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [117, 78, 82, 223, 50, 168, 75, 156, 42, 9]


@given(
    centres=st.lists(st.floats(0, 100), min_size=1, max_size=20).map(sorted),
    gap=st.floats(0.01, 10),
)
def test_spread_labels(centres, gap):
    last = centres[-1] + gap
    places = style.spread(centres, gap, last=last)
    assert len(places) == len(centres)
    assert all(b - a > gap - 1e-9 for a, b in itertools.pairwise(places))
    assert places[-1] <= last + 1e-9
    if all(b - a >= gap for a, b in itertools.pairwise(centres)):
        assert places == pytest.approx(centres)


def test_the_palette_has_a_colour_for_each_of_nine_shots():
    assert len({*style.shot_colours(parse_shots(NINE))}) == 10


# --- backbones and kernels ---


class Plugin:
    @hookimpl
    def lct_backbones(self):
        return [
            BackboneSpec(name="other", summary="another", handles=("a.B", "a.C"), adapter="a:D", tested_with="a 1.2"),
            BackboneSpec(name="mine", summary="my own", handles=("x.Y",), adapter="x:Z", build="x:Y"),
        ]

    @hookimpl
    def lct_kernels(self):
        return [
            KernelSpec(name="late", summary="comes late", load=print, refusals=lambda _: [], rank=200),
            KernelSpec(
                name="fussy", summary="refuses", load=print, refusals=lambda r: [f"no {r.dtype}", "nor"], rank=1
            ),
            KernelSpec(name="asked", summary="by name", load=print, refusals=lambda _: []),
        ]


@pytest.fixture
def plugged():
    registry = Registry()
    registry.register(Plugin(), name="plugin")
    return registry


def test_backbones(plugged, monkeypatch, capsys):
    assert backbones.backbone_rows(plugged) == [
        ("mine", "my own", ("x.Y",), True, ""),
        ("other", "another", ("a.B", "a.C"), False, "a 1.2"),
    ]
    monkeypatch.setattr(backbones, "registry", lambda: plugged)
    assert main(["backbones"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mine", "my", "own", "Y"] in lines
    assert ["(can", "build", "one)"] in lines
    assert ["other", "another", "B"] in lines
    assert ["C"] in lines
    assert ["(a", "1.2)"] in lines


SCENE = ["global:2:1x2x2", "3:2x2x2", "1:1x3x3", "/", "4:1x2x2"]  # tokens: 6 + 11 + 10, and 8


def table_rows(out):
    """What was printed, cut into words at two spaces or more."""
    return [re.split(r" {2,}", line.strip()) for line in out.splitlines()]


def test_kernels(plugged, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "registry", lambda: plugged)
    options = ["--device", "cpu", "--dtype", "float16", "--heads", "8", "--kv-heads", "4", "--head-dim", "64"]
    assert main(["kernels", *SCENE, *options]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:2] == [
        "2 scenes, 3 shots, 1 global prompt, 25 video tokens, 10 text tokens",
        "float16 on cpu, 8 query heads and 4 key-value heads of 64",
    ]
    lines = [line.split() for line in out.splitlines()]
    assert ["bidirectional", "no", "35", "35", str(27**2 + 8**2), "packed", "sdpa"] in lines
    assert ["context_causal", "yes", "35", "35", str(6 * 6 + 11 * 17 + 10 * 27 + 8**2), "overlapping", "sdpa"] in lines
    assert ["cached", "no", "10", "27", "270", "dense", "sdpa"] in lines
    cells = table_rows(out)
    answers = [cells.index([name, *[answer] * 3]) for name, answer in (
        ("fussy", "refused: 1, 2"), ("sdpa", "auto"), ("late", "available"), ("asked", "by name"),
        ("reference", "by name"),
    )]  # fmt: skip
    assert answers == sorted(answers)
    assert cells.count(["1", "no torch.float16"]) == cells.count(["2", "nor"]) == 1
    assert ["late", "comes late"] in cells
    assert ["fussy", "refuses"] in cells


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [("bidirectional", "no"), ("context_causal", "yes"), ("cached", "no")]),
        (["--grad"], [("bidirectional", "yes"), ("context_causal", "yes"), ("cached", "no")]),
        (["--no-grad"], [("bidirectional", "no"), ("context_causal", "no"), ("cached", "no")]),
        (["--pattern", "context_causal"], [("context_causal", "yes")]),
        (["--pattern", "cached", "--no-grad"], [("cached", "no")]),
    ],
)
def test_kernels_of_some_patterns(capsys, options, expected):
    assert main(["kernels", "--device", "cpu", *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    patterns = ("bidirectional", "context_causal", "cached")
    assert [(row[0], row[1]) for row in rows if row and row[0] in patterns and row[1] in ("yes", "no")] == expected


class Choosy:
    """Kernels whose ranks and refusals depend on the request in every way that ours do."""

    @hookimpl
    def lct_kernels(self):
        def spec(name, rank, refusals):
            return KernelSpec(name=name, summary=name, load=lambda: name, refusals=refusals, rank=rank)

        return [
            spec("overlap", lambda r: 1 if r.plan.form == "overlapping" else None, lambda r: []),
            spec("forward", 2, lambda r: ["gradients: pip install 'x[y]'"] if r.grad else []),
            spec("long", lambda r: 3 if r.plan.keys > 30 else 200, lambda r: ["form"] * (r.plan.form == "gathered")),
        ]


@given(layout=layouts(), cross=st.booleans(), grad=st.booleans())
def test_what_is_said_of_auto_is_what_attend_does(layout, cross, grad):
    choosy = Registry()
    choosy.register(Choosy(), name="choosy")
    try:
        plans = kernels.scene_plans(layout, cross=cross)
    except ValueError:  # a global prompt alone, or a shot without text
        assert cross
        return
    for plan in plans.values():
        request = KernelRequest(plan, torch.device("cpu"), torch.float32, 4, 2, 16, grad)
        choice = kernels.auto_choice(kernels.kernel_rows(choosy, request))
        loaded = choosy.kernel("auto", request)
        assert loaded == choice if isinstance(loaded, str) else choice == "sdpa"


@given(layout=layouts(), cross=st.booleans())
def test_the_plans_of_a_scene(layout, cross):
    attending = layout.video_only if cross else layout
    try:
        plans = kernels.scene_plans(layout, cross=cross)
    except ValueError:
        assert cross
        assert any(scene[-1].role == "global" for scene in layout.scenes) or not all(s.text for s in layout.shots)
        return
    assert [*plans] == ["bidirectional", "context_causal", "cached", *(["text"] if cross else [])]
    assert torch.equal(plans["bidirectional"].dense(), bidirectional(attending).dense())
    assert torch.equal(plans["context_causal"].dense(), context_causal(attending).dense())
    scene = max(range(len(layout.scenes)), key=lambda i: len(layout.scenes[i]))
    last, span = attending.spans[attending.scene_shots[scene][-1]], attending.scene_spans[scene]
    assert torch.equal(plans["cached"].dense(), context_causal(attending).dense()[last.slice, span.slice])
    if cross:
        assert torch.equal(plans["text"].dense(), own_and_global_text(layout).dense())


def test_a_kernel_that_crashes_is_a_reason_of_its_own(monkeypatch, capsys):
    class Broken:
        @hookimpl
        def lct_kernels(self):
            return [KernelSpec(name="torn", summary="s", load=print, refusals=lambda _: 1 / 0, rank=1)]

    registry = Registry()
    registry.register(Broken(), name="broken")
    monkeypatch.setattr(kernels, "registry", lambda: registry)
    assert main(["kernels", "--device", "cpu"]) == 0
    cells = table_rows(capsys.readouterr().out)
    assert ["torn", *["refused: 1"] * 3] in cells
    assert any(row[0] == "1" and "kernel 'torn' is broken: ZeroDivisionError" in row[1] for row in cells if row[1:])


def test_reasons_are_printed_as_they_are(monkeypatch, capsys):
    choosy = Registry()
    choosy.register(Choosy(), name="choosy")
    monkeypatch.setattr(kernels, "registry", lambda: choosy)
    assert main(["kernels", "--device", "cpu"]) == 0
    cells = table_rows(capsys.readouterr().out)
    assert ["1", "gradients: pip install 'x[y]'"] in cells
    assert ["forward", "auto", "refused: 1", "auto"] in cells
    assert ["overlap", "by name", "auto", "by name"] in cells


def test_auto_choice(plugged):
    rows = [kernels.KernelRow("a", 1, ["no"]), kernels.KernelRow("b", None, [])]
    assert kernels.auto_choice(rows) is None
    assert kernels.auto_choice([*rows, kernels.KernelRow("c", 3, [])]) == "c"


SCRIPT = """
    A.1 Character
    Character 1: A man.
    Shot 1. Character 1 stands.
    Shot 2. Character 1 sits.
    Shot 3. An empty room.
"""


def test_kernels_of_a_script_and_a_joint_backbone(tmp_path, capsys):
    (tmp_path / "s.txt").write_text(dedent(SCRIPT))
    arguments = ["--script", "s.txt", "--backbone", "mmdit", "--size", "2x8x6", "--text", "5", "--device", "cpu"]
    assert main(["kernels", *arguments]) == 0
    out = capsys.readouterr().out
    with torch.device("meta"):
        paper = registry().adapter(MMDiT(**PAPER_3B)).traits
    assert out.splitlines()[:3] == [
        "1 scene, 3 shots, 1 global prompt, 84 video tokens, 20 text tokens",  # patches of 1 x 2 x 2
        "MMDiT, text in joint attention",
        f"bfloat16 on cpu, {paper.heads} query heads and {paper.kv_heads} key-value heads of {paper.head_dim}",
    ]
    rows = [line.split() for line in out.splitlines()]
    assert ["bidirectional", "no", "104", "104", f"{104**2:,}", "dense", "sdpa"] in rows  # 5 + 12, 3 times 5 + 24
    assert ["cached", "no", "29", "104", f"{29 * 104:,}", "dense", "sdpa"] in rows
    assert not any(row[:1] == ["text"] for row in rows)


def test_kernels_of_a_script_and_a_cross_attending_backbone(tmp_path, capsys):
    (tmp_path / "s.txt").write_text(dedent(SCRIPT))
    arguments = ["--script", "s.txt", "--backbone", "wan", "--size", "21x60x104", "--text", "512", "--heads", "12"]
    assert main(["kernels", *arguments, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:3] == [
        "1 scene, 3 shots, 1 global prompt, 98,280 video tokens, 2,048 text tokens",
        "WanTransformer3DModel, text in cross attention",
        "bfloat16 on cpu, 12 query heads and 12 key-value heads of 128",
    ]
    rows = [line.split() for line in out.splitlines()]
    assert ["context_causal", "yes", "98,280", "98,280", "6.4", "G", "overlapping", "sdpa"] in rows
    assert ["cached", "no", "32,760", "98,280", "3.2", "G", "dense", "sdpa"] in rows
    assert ["text", "yes", "98,280", "2,048", "100.6", "M", "gathered", "sdpa"] in rows


def test_a_script_without_a_global_prompt(tmp_path, capsys):
    (tmp_path / "s.txt").write_text("Shot 1. A room.\nShot 2. A door.\n")
    arguments = ["--script", "s.txt", "--backbone", "mmdit", "--size", "1x4x4", "--text", "5"]
    assert main(["kernels", *arguments]) == 0
    assert capsys.readouterr().out.startswith("1 scene, 2 shots, 8 video tokens, 10 text tokens\n")


def test_kernels_of_every_backbone(capsys):
    refuse = []
    for name in registry().backbones:
        if main(["kernels", "226:1x4x4", "--backbone", name, "--device", "cpu"]) == 0:
            assert " attention\nbfloat16 on cpu, " in capsys.readouterr().out
        else:
            refuse.append(name)
            line = capsys.readouterr().err
            assert line.startswith(f"lct kernels: error: --backbone: {name}'s default ")
            assert line.endswith("; make the model that you want with --model MODULE:FACTORY\n")
    assert refuse == ["cosmos", "easyanimate"]  # their libraries' defaults are no model that there is


def test_a_backbone_without_its_library(plugged, monkeypatch, capsys):
    monkeypatch.setattr(asked, "registry", lambda: plugged)
    line = refused(capsys, ["kernels", "--backbone", "other"])
    assert line == "lct kernels: error: --backbone: other needs its library (a 1.2): No module named 'a'; install it"


def test_kernels_of_ones_own_model(factories, capsys):
    for factory in ("make", "make_adapter", "make_with_codec"):
        assert main(["kernels", "--model", f"{factories}:{factory}", "3:1x2x2", "--device", "cpu"]) == 0
        assert "\nbfloat16 on cpu, 2 query heads and 2 key-value heads of 16\n" in capsys.readouterr().out
    line = refused(capsys, ["kernels", "--model", f"{factories}:nothing"])
    assert f"--model: {factories}:nothing() returned a NoneType, expected a model (nn.Module) or an adapter" in line
    assert "no backbone handles" in refused(capsys, ["kernels", "--model", f"{factories}:linear"])
    torn = refused(capsys, ["kernels", "--model", f"{factories}:make_torn_adapter"])
    assert f"of {factories}:make_torn_adapter raised ZeroDivisionError: division by zero (" in torn
    assert "() raised RuntimeError: no luck" in refused(capsys, ["kernels", "--model", f"{factories}:fails"])


def test_the_installed_backbones_and_kernels(capsys, monkeypatch):
    assert main(["backbones"]) == 0
    assert "mmdit" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["kernels", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert {line.split()[0] for line in out.splitlines() if line.split()} >= {*registry().kernels}


# --- conformance ---

MODULE = """
    import torch
    from torch import nn
    from lct_core import registry

    def make():
        torch.manual_seed(0)
        model = registry().build("mmdit", channels=3, text_width=5, width=32, depth=2, heads=2)
        for parameter in model.parameters():  # a fresh model's gates are zero
            nn.init.normal_(parameter, std=0.2)
        return model

    def make_adapter():
        return registry().adapter(make())

    def fails():
        raise RuntimeError("no luck")

    def takes(one):
        return one

    def linear():
        return nn.Linear(1, 1)

    def make_with_codec():
        return make(), "a codec"

    def make_torn_adapter():
        adapter = make_adapter()
        adapter.example = lambda *_, **__: 1 / 0
        return adapter

    def nothing():
        return None

    class Holder:
        make = staticmethod(make)

    number = 3
"""


@pytest.fixture
def factories(tmp_path, request):
    """A module in the current folder, new for every test."""
    name = f"factories_{zlib.crc32(request.node.name.encode())}"
    (tmp_path / f"{name}.py").write_text(dedent(MODULE))
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("{}", "MODULE:FACTORY: got '{}', expected a module and a function in it, like my_adapter:make"),
        ("{}.py:make", "but there is no module '{}.py' here or installed"),
        ("./{}.py:make", "MODULE:FACTORY: got './"),
        ("{}:", "MODULE:FACTORY: got '{}:', expected a module and a function"),
        (":make", "MODULE:FACTORY: got ':make', expected a module and a function"),
        ("{}:make:make", "expected a module and a function"),
        (".{}:make", "expected a module and a function"),
        (
            "no_such_module_at_all:make",
            "got 'no_such_module_at_all:make', but there is no module 'no_such_module_at_all'",
        ),
        ("torch.no_such_part:make", "there is no module 'torch.no_such_part' here or installed"),
        ("{}:absent", "{} has no 'absent'; what it has to call: ["),
        ("{}:Holder.absent", "{} has no 'Holder.absent'"),
        ("{}:number", "{}:number is a int, expected a function that takes no argument"),
        ("{}:fails", "{}:fails() raised RuntimeError: no luck"),
        ("{}:takes", "{}:takes() raised TypeError: takes() missing 1 required positional argument: 'one'"),
        ("{}:nothing", "{}:nothing() returned a NoneType, expected a model (nn.Module) or an adapter"),
        ("{}:linear", "no backbone handles torch.nn.modules.linear.Linear; there are: cogvideox: "),
    ],
)
def test_no_factory(factories, capsys, factory, words):
    line = refused(capsys, ["conformance", factory.format(factories)])
    assert line.startswith("lct conformance: error: ")
    assert words.format(factories) in line


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_dependency", "raised ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("def", "raised SyntaxError: "),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, capsys, source, words):
    (tmp_path / "broken_factories.py").write_text(source)
    line = refused(capsys, ["conformance", "broken_factories:make"])
    assert line.startswith("lct conformance: error: MODULE:FACTORY: importing broken_factories raised")
    assert words in line


@pytest.mark.parametrize("option", ["--scheme", "--dtype"])
def test_conformance_options(factories, capsys, option):
    assert f"Invalid value for '{option}': 'x' is not one of" in refused(capsys, ["conformance", "a:b", option, "x"])


@pytest.fixture
def _one_thread():
    """Many threads on tiny tensors wait for one another where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_conformance_of_the_mmdit(factories, capsys):
    before = [*sys.path]
    assert main(["conformance", f"{factories}:make", "--scheme", "anchored", "--dtype", "float32"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"{len(lines)} checks, all hold"
    assert {line[8] for line in lines} >= set("12345678")
    assert all(line.startswith("ok  ") and "  error " in line and ", bound " in line for line in lines)
    assert sys.path == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {("paper", "anchored"), (torch.float32, torch.bfloat16)}),
        (
            ["--scheme", "anchored", "--scheme", "paper", "--dtype", "bfloat16"],
            {("anchored", "paper"), (torch.bfloat16,)},
        ),
    ],
)
def test_what_failed_is_said(factories, capsys, monkeypatch, options, expected):
    from lct_core.testing import conformance as suite

    def findings(factory, *, schemes, dtypes):
        assert {tuple(schemes), tuple(dtypes)} == expected
        yield suite.Finding(1, "one shot equals the base model", "paper, float32", 0.0, 0.0)
        yield suite.Finding(4, "cached equals uncached", "paper, float32", 0.125, 1e-6)
        yield suite.Finding(3, "the future does not matter", "paper, float32", float("nan"), 0.0)

    monkeypatch.setattr(suite, "conformance", findings)
    assert main(["conformance", f"{factories}:make", *options]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok      1  one shot equals the base model  [paper, float32]  error 0, bound 0",
        "FAILED  4  cached equals uncached  [paper, float32]  error 0.12, bound 1e-06",
        "FAILED  3  the future does not matter  [paper, float32]  error nan, bound 0",
        "2 of 3 checks FAILED, of invariants 3, 4",
    ]


def test_what_an_adapter_raises_fails_its_invariant_and_names_the_line(factories, capsys, monkeypatch):
    from lct_core.scene_model import SceneModel

    monkeypatch.setattr(SceneModel, "__call__", lambda *_, **__: [].pop())
    assert main(["conformance", f"{factories}:make", "--scheme", "paper", "--dtype", "float32"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAILED  3  raised IndexError: ") and "test_cli.py:" in line for line in lines)
    assert lines[-1].endswith("of invariants 1, 2, 3, 4, 5, 6, 7, 8, 9")


def test_an_adapter_that_cannot_batch_shots_fails_no_later_invariant(factories, capsys, monkeypatch):
    from lct_core.scene_model import SceneModel

    call = SceneModel.__call__

    def one_by_one(self, *arguments, **options):
        assert not self.batch_shots, "no batches"
        return call(self, *arguments, **options)

    monkeypatch.setattr(SceneModel, "__call__", one_by_one)
    assert main(["conformance", f"{factories}:make", "--scheme", "paper", "--dtype", "float32"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("checks FAILED, of invariants 5")


@pytest.mark.parametrize("factory", ["make", "make_adapter", "Holder.make"])
def test_factories(factories, monkeypatch, tmp_path, factory):
    monkeypatch.syspath_prepend(str(tmp_path))
    made = conformance.load_factory(f"{factories}:{factory}")()
    assert len(made.blocks) == 2


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
        "import os, signal, time\n\ndef make():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
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
