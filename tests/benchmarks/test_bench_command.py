"""``lct bench``: it measures, lists, compares and reports."""

import json
import re
import sys

import pytest
import torch

from benchmarks import harness, provenance, tiles
from benchmarks.cases import CASES
from lct_core.cli import bench, main
from tests.benchmarks.contenders import GPU, crash, gpu_record, mortal


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_help(capsys):
    assert main(["bench"]) == main(["bench", "--help"]) == 0
    first, second = capsys.readouterr().out.split("Usage: lct bench ")[1:]
    assert first == second
    assert "..." not in first.split("Commands:")[1]  # nothing is cut off
    for command in ("attention", "compare", "report"):
        assert main(["bench", command, "--help"]) == 0
        out = capsys.readouterr().out
        assert re.search(rf"Example:\n    lct bench {command}\b", out)
        assert not re.search("[<>]=?x|None|RANGE", out)


def test_the_command_measures(capsys, tmp_path, wide):
    case = ["--case", "cpu-packed-8k-fp32-forward", "--tokens", "300", "--rounds", "2", "--kernel", "auto"]
    assert main(["bench", "attention", *case, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "cpu-packed-8k-fp32-forward.json").read_text())
    assert record["shape"]["queries"] == pytest.approx(300, rel=0.05)
    assert record["rounds"] == 2
    gate, rate = record["gates"]["sdpa"], record["times"]["sdpa"]["gflops_per_second"]
    (line,) = [line for line in out.splitlines() if "sdpa (auto)" in line]
    assert f"{rate / 1e3:.3g}" in line
    assert f"{rate / record['roofline']['gemm_gflops_per_second']:.0%}" in line
    assert line.split("%")[1].strip() == f"{gate['error']:.1e} / {gate['bound']:.1e}"


def test_a_named_kernel_that_fails_is_an_error(kernels, capsys, wide):
    case = ["--case", "cpu-causal-4k-fp32-forward", "--tokens", "100", "--rounds", "1"]
    assert main(["bench", "attention", *case, "--kernel", "sdpa", "--kernel", "picky", "--kernel", "off"]) == 1
    out = capsys.readouterr().out
    assert "picky: not today\n" in out
    assert "off: wrong: the error of out is" in out


def test_a_hopper_case_runs_small_on_a_cpu(capsys, wide):
    case = ["--case", "gpu-C1-forward", "--device", "cpu", "--tokens", "200", "--rounds", "1", "--kernel", "sdpa"]
    assert main(["bench", "attention", *case]) == 0
    assert "gpu-C1-forward: 22 queries, 198 keys, 1 rounds" in capsys.readouterr().out


def test_the_command_lists_cases(capsys, wide):
    assert main(["bench", "attention", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(case.name in out for case in CASES)


def test_the_command_compares_and_reports(capsys, tmp_path):
    provenance.write(gpu_record(GPU[0]), tmp_path / "old")
    provenance.write(gpu_record(GPU[0], rate=300), tmp_path / "new")
    assert main(["bench", "compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert re.search(rf"{GPU[0].name} +mine +0.600 +% of GEMM +SLOWER\n1 of 1 slower\n$", capsys.readouterr().out)
    assert main(["bench", "compare", str(tmp_path / "old"), str(tmp_path / "old")]) == 0
    assert capsys.readouterr().out.endswith("1 compared, none slower\n")
    assert main(["bench", "report", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "report.md").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["attention", "--case", "x"], "--case: got 'x', expected a name that lct bench attention --list shows"),
        (["attention", "--kernel", "x"], "--kernel: got 'x', expected one of auto, cudnn-flex, flash-torch"),
        (["attention", "--tokens", "0"], "Invalid value for '--tokens': 0 is not in the range"),
        (["attention", "--device", "tpu"], "Invalid value for '--device': 'tpu' is not one of 'cpu', 'cuda'."),
        (["compare", "nowhere", "nowhere"], "Invalid value for 'OLD': Path 'nowhere' does not exist."),
        (["compare", ".", "."], ".: no results, expected *.json; measure first, with make bench"),
        (["report", "."], ".: no results, expected *.json; measure first, with make bench"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"lct bench {arguments[0]}: error: {line}")


def test_where_results_go_is_made_first(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(harness, "measure", crash)
    out = str(tmp_path / "file" / "folder")
    assert main(["bench", "attention", "--case", "cpu-causal-4k-fp32-forward", "--out", out]) == 2
    assert re.match(r"lct bench attention: error: .*Not a directory: .*folder", capsys.readouterr().err)


def test_the_command_says_how_to_go_on_after_a_loss(kernels, capsys, monkeypatch):
    monkeypatch.setattr(harness, "alive", mortal(1))
    case = ["--case", "cpu-causal-4k-fp32-forward", "--tokens", "100"]
    assert main(["bench", "attention", *case, "--kernel", "broken", "--kernel", "sdpa"]) == 1
    err = capsys.readouterr().err
    assert "{'broken': 'RuntimeError: no such engine'}; go on without, by --kernel with others\n" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("arguments", [["--case", "gpu-B2-forward"], ["--device", "cuda"]])
def test_a_gpu_that_is_not_there_is_one_line(capsys, arguments):
    assert main(["bench", "attention", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search("CUDA device.* here.*cpu", err)


def test_outside_a_clone_the_command_says_where_it_works(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_ROOT", tmp_path)
    assert main(["bench", "attention", "--list"]) == 2
    assert "benchmarks/ is not part of the installed package; clone the repository" in capsys.readouterr().err


def test_a_sweep_of_tiles_that_ends_early_leaves_what_it_has(monkeypatch, tmp_path):
    def sweep():
        yield {
            "shape": "B1",
            "direction": "forward",
            "tiling": dict.fromkeys("abcd", 1),
            "current": True,
            "why not": "wrong",
        }
        crash()

    for of, name, value in (
        (tiles, "sweep", sweep),
        (torch.cuda, "is_available", lambda: True),
        (provenance, "machine", lambda device: {}),
        (provenance, "versions", lambda device: {}),
        (sys, "argv", ["tiles", "--out", str(tmp_path / "new" / "tiles.json")]),
    ):
        monkeypatch.setattr(of, name, value)
    with pytest.raises(RuntimeError, match="no such engine"):
        tiles.main()
    (found,) = json.loads((tmp_path / "new" / "tiles.json").read_text())["results"]
    assert found["why not"] == "wrong"
