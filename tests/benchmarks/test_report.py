"""The report: tables, goals and plots of what was measured."""

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.cases import REFERENCE_GEMM
from lct_core.cli import main
from tests.benchmarks.contenders import GPU, gpu_record

ROOT = Path(__file__).parents[2]


def row_of(lines, name):
    (line,) = [line for line in lines if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_was_not_measured_is_said_case_by_case():
    lines = report.hopper([])
    for case in GPU:
        cells = row_of(lines, case.name)
        assert cells[2:4] == [str(case.tflops), case.published]
        assert cells[4:] == ["", "**not measured**", "", "", ""]


def test_goals_are_relative_to_the_same_runs_gemm():
    case = next(case for case in GPU if case.name == "gpu-B1-forward")  # 590
    slower = gpu_record(case, rate=500.0, gemm=0.9 * REFERENCE_GEMM)
    assert row_of(report.hopper([slower]), case.name)[4:] == ["mine", "500", "70%", "531", "**no**"]
    assert row_of(report.hopper([gpu_record(case, rate=590.0)]), case.name)[-1] == "yes"
    near = gpu_record(case, rate=590.1)  # it is the ratio within rounds that was held to the goal
    near["comparisons"][0] |= {"median": 0.74, "met": False}
    assert row_of(report.hopper([near]), case.name)[6:] == ["74%", "590", "**no**"]
    small = gpu_record(case, comparisons=[])
    assert row_of(report.hopper([small]), case.name)[5:] == ["500", "63%", "", ""]
    lost = gpu_record(case, times={}, lost={"mine": "wrong: by far"})
    assert row_of(report.hopper([lost]), case.name)[4:] == ["mine", "**not timed**: wrong: by far", "", "", "**no**"]


def test_the_report_has_every_result_and_a_plot(tmp_path):
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    for case in GPU:
        lost = {"crashed": "RuntimeError: boom"} if "-C1-" in case.name else {}
        (tmp_path / f"{case.name}.json").write_text(json.dumps(gpu_record(case, lost=lost)))
    report.main(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "not measured" not in text
    for path in tmp_path.glob("*.json"):
        assert f"| {path.stem} |" in text
    for name in ("rates.png", "rates-gpu.png"):
        assert f"]({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "| crashed | **lost**: RuntimeError: boom | gpu-C1-forward |" in text
    assert "| picky | not today | all |" in text
    assert "Some GPU, driver 1, CUDA 1; torch 1; source abcdef" in text
    assert "1700 (1600 to 1800)" in text


def test_a_measurement_shows_tables_of_its_own(tmp_path):
    rows = [{"what": "a", "value": 0.12345, "count": 12345, "met": True}, {"what": "b", "met": False}]
    shown = gpu_record(GPU[0], tables=[{"title": "Mine", "about": "Of two.", "rows": rows}])
    (tmp_path / "mine.json").write_text(json.dumps(shown))
    ((title, _, about, _, *lines),) = report.tables(report.load(tmp_path))
    assert title == "## Mine"
    assert about.startswith("Of two. Measured on Some GPU")
    assert lines == [
        "| what | value | count | met |",
        "|---|---:|---:|---|",
        "| a | 0.123 | 12,345 | yes |",
        "| b |  |  | **no** |",
    ]


def test_a_single_size_is_no_plot(tmp_path):
    assert not report.plot([gpu_record(GPU[0])], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(FileNotFoundError, match="no results, expected"):
        report.main(tmp_path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"{", "got no JSON: Expecting"),
        (b"\xff{}", "got no JSON: 'utf-8' codec can't decode"),
        (b"[]", "it lacks an object"),
        (
            b'{"some": "object"}',
            "it lacks name, date, device, rounds, machine, versions, source, shape, times, comparisons",
        ),
        ({"times": {"x": 1}}, "it lacks x"),
        ({"times": {"x": {"seconds": 0, "low": 1, "high": 1, "gflops_per_second": 0}}}, "it lacks seconds"),
        ({"machine": []}, "it lacks machine"),
        ({"shape": {}}, "it lacks pattern, direction, dtype, queries, keys"),
        ({"comparisons": [{}]}, "it lacks what, median, low, high"),
        ({"lost": None}, "it lacks lost"),
        ({"tables": [{"title": "no rows"}]}, "it lacks about, rows"),
    ],
)
def test_a_file_that_is_no_result_is_one_line(capsys, tmp_path, text, fault):
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else json.dumps(gpu_record(GPU[0]) | text).encode())
    for arguments in (["report", tmp_path], ["compare", path, path], ["compare", tmp_path, tmp_path]):
        assert main(["bench", *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"lct bench {arguments[0]}: error: {path}: expected a result as make bench writes it, ")
        assert fault in err
        assert err.count("\n") == 1
