"""Fixtures that the tests of this folder share."""

import os

import pytest


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    """A process that is killed leaves what it wrote with the system: fsync is for a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
