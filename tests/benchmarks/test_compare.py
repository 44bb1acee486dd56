"""Two runs compared."""

import json
import re

import pytest

from benchmarks import compare, provenance
from lct_core.cli import main
from tests.benchmarks.contenders import GPU, gpu_record


def files(tmp_path, old, new):
    for name, record in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    return tmp_path / "old.json", tmp_path / "new.json"


@pytest.mark.parametrize(
    ("rate", "gemm", "slower"),
    [(500, 790, False), (491, 790, False), (480, 790, True), (450, 711, False), (480, 711, False), (560, 900, False)],
)
def test_what_became_slower_by_its_share_of_the_gemm(tmp_path, rate, gemm, slower):
    old, new = files(tmp_path, gpu_record(GPU[0], gemm=790), gpu_record(GPU[0], rate=rate, gemm=gemm))
    (change,) = compare.compare(old, new)
    assert change.speed == pytest.approx(rate / gemm / (500 / 790))
    assert change.slower is slower
    assert main(["bench", "compare", str(old), str(new)]) == int(slower)


def test_a_fall_within_the_spreads_is_noise(tmp_path):
    new = gpu_record(GPU[0], rate=470)
    old, path = files(tmp_path, gpu_record(GPU[0]), new)
    assert compare.compare(old, path)[0].slower
    new["times"]["mine"]["low"] *= 0.9
    old, path = files(tmp_path, gpu_record(GPU[0]), new)
    assert not compare.compare(old, path)[0].slower
    old, path = files(tmp_path, gpu_record(GPU[0]), gpu_record(GPU[0], rate=470))
    assert not compare.compare(old, path, tolerance=0.1)[0].slower


def test_results_without_a_gemm_are_compared_by_time(tmp_path):
    old, new = gpu_record(GPU[0]), gpu_record(GPU[0], rate=400)
    for record in (old, new):
        del record["times"]["gemm"]
    (change,) = compare.compare(*files(tmp_path, old, new))
    assert (change.by, change.slower) == ("time", True)
    assert change.speed == pytest.approx(0.8)


def test_a_lost_kernel_is_a_regression(tmp_path):
    gone = gpu_record(GPU[0])
    del gone["times"]["mine"]
    (change,) = compare.compare(*files(tmp_path, gpu_record(GPU[0]), gone))
    assert (change.slower, change.why) == (False, "not measured")
    (change,) = compare.compare(*files(tmp_path, gpu_record(GPU[0]), gone | {"lost": {"mine": "wrong"}}))
    assert (change.slower, change.why) == (True, "lost: wrong")


def test_only_like_is_compared_with_like(tmp_path, capsys):
    old = gpu_record(GPU[0])
    others = {
        "gpu is Some GPU in OLD and Other in NEW": gpu_record(GPU[0], machine=old["machine"] | {"gpu": "Other"}),
        f"{GPU[0].name}: heads is 24 in OLD and 3 in NEW": gpu_record(GPU[0], shape=GPU[0].shape | {"heads": 3}),
    }
    for words, new in others.items():
        paths = files(tmp_path, old, new)
        with pytest.raises(ValueError, match=re.escape(words)):
            compare.compare(*paths)
        assert len(compare.compare(*paths, anyway=True)) == 1
        assert main(["bench", "compare", *map(str, paths)]) == 2
        assert words in capsys.readouterr().err
    paths = files(tmp_path, old, gpu_record(GPU[1]))
    with pytest.raises(ValueError, match=f"only OLD has {GPU[0].name}; only NEW has {GPU[1].name}; no case is in both"):
        compare.compare(*paths)
    with pytest.raises(ValueError, match="no case is in both"):
        compare.compare(*paths, anyway=True)


def test_folders_are_compared_case_by_case(tmp_path):
    for folder, rates in (("old", (500, 500)), ("new", (500, 400))):
        for case, rate in zip(GPU[:2], rates, strict=True):
            provenance.write(gpu_record(case, rate=rate), tmp_path / folder)
    changes = compare.compare(tmp_path / "old", tmp_path / "new")
    assert {change.case: change.slower for change in changes} == {GPU[0].name: False, GPU[1].name: True}
    assert compare.render(changes).endswith("1 of 2 slower")
