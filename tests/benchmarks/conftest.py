"""Fixtures that the tests of this folder share."""

import pytest

from benchmarks import gate, harness
from lct_core import Registry
from tests.benchmarks.contenders import KERNELS, announce, crash, spec


@pytest.fixture(autouse=True)
def _small_roofline(monkeypatch):
    monkeypatch.setitem(harness.MULTIPLIED, "cpu", 64)
    monkeypatch.setitem(harness.COPIED, "cpu", 2**16)


@pytest.fixture
def kernels(monkeypatch):
    """A registry with kernels of every kind, and one that refuses."""

    registry = Registry()
    announce(
        registry, *(spec(n, kernel) for n, kernel in KERNELS.items()), spec("picky", crash, refusals=["not today"])
    )
    monkeypatch.setattr(harness, "registry", lambda: registry)
    monkeypatch.setattr(gate, "registry", lambda: registry)
    monkeypatch.setattr("lct_core.attention.registry", lambda: registry)
    gate._check.cache_clear()
    yield registry
    gate._check.cache_clear()
