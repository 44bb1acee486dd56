"""``lct backbones`` and ``lct kernels``: what is there, and what serves which plan."""

import re
from textwrap import dedent

import pytest
import torch
from hypothesis import given, strategies as st

from lct_backbones.mmdit import PAPER_3B, MMDiT
from lct_core import (
    BackboneSpec,
    KernelRequest,
    KernelSpec,
    Registry,
    hookimpl,
    registry,
)
from lct_core.cli import asked, backbones, kernels, main
from lct_core.patterns import bidirectional, context_causal, own_and_global_text
from lct_core.testing.strategies import layouts
from tests.cli.arguments import refused


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
    monkeypatch.setattr(backbones, "registry", lambda: plugged)
    assert main(["backbones"]) == 0
    *_, mine, built, other, second, tested = [line.split() for line in capsys.readouterr().out.strip().splitlines()]
    assert (mine, built) == (["mine", "my", "own", "Y"], ["(can", "build", "one)"])
    assert (other, second, tested) == (["other", "another", "B"], ["C"], ["(a", "1.2)"])


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
