"""``lct inspect``: pictures and costs of a scene."""

import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from matplotlib.figure import Figure

from lct_core import (
    KVCache,
    Layout,
    Shot,
    coordinates,
)
from lct_core.cache import StagedShots
from lct_core.cli import inspect, main
from lct_core.cli.shots import EXAMPLE, ModelSize, costs, parse_shots
from lct_core.patterns import PATTERNS, bidirectional
from lct_core.pictures import coordinates as drawn, packing
from lct_core.pictures.style import shot_names, starts
from lct_core.testing.strategies import layouts
from tests.cli.arguments import NINE, PICTURES, refused

SIZE = ModelSize(layers=3, heads=8, kv_heads=2, head_dim=16, dtype=torch.bfloat16)


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
    chain = list(itertools.chain(*drawn.boxes(layout, scheme=scheme)))
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
    ends = (0,) * len(layout.shots)
    staged = StagedShots(layout.shots, torch.zeros(1, len(ends)), ends, ends)
    with cache.writing(staged, scheme="paper", diagonal=None, pairing=None) as write:
        for block in range(SIZE.layers):
            kv = torch.zeros(1, layout.tokens, SIZE.kv_heads, SIZE.head_dim, dtype=SIZE.dtype)
            write((block, "self"), "tokens", kv, kv)
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
