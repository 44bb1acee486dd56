"""Which code a result is of."""

from benchmarks import harness, provenance
from tests.benchmarks.contenders import TINY


def test_a_result_holds_until_its_sources_change(kernels, tmp_path, monkeypatch):
    assert provenance.standing(TINY, tmp_path) is None
    measurement = harness.measure(TINY, kernels=["sdpa"])
    provenance.write(measurement, tmp_path)
    assert provenance.standing(TINY, tmp_path)["times"]
    assert provenance.standing(TINY.scaled(64), tmp_path) is None
    for part, change in (("machine", {"threads": 0}), ("versions", {"torch": "0"}), ("source", {"digest": "0"})):
        provenance.write(measurement | {part: measurement[part] | change}, tmp_path)
        assert provenance.standing(TINY, tmp_path) is None


def test_the_source_is_told_without_a_repository(monkeypatch, tmp_path):
    def nowhere(*command):
        raise FileNotFoundError("git")

    known = provenance.source()
    monkeypatch.setattr(provenance, "_output", nowhere)
    assert provenance.source.__wrapped__() == {"commit": None, "dirty": None, "digest": known["digest"]}
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.source.__wrapped__()["digest"] != known["digest"]
