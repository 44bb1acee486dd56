"""Fixtures that the tests of this folder share."""

import sys
import zlib
from textwrap import dedent

import pytest

from tests.cli.arguments import MODULE


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def factories(tmp_path, request):
    """A module in the current folder, new for every test."""
    name = f"factories_{zlib.crc32(request.node.name.encode())}"
    (tmp_path / f"{name}.py").write_text(dedent(MODULE))
    yield name
    sys.modules.pop(name, None)
