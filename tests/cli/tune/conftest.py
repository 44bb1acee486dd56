"""Fixtures that the tests of this folder share."""

import io
import sys
import zlib
from contextlib import redirect_stdout
from textwrap import dedent

import pytest

import lct_core.cli.tune
from lct_core.cli import main
from tests.cli.tune.scenes import FACTORIES, FEW, write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    return write_data(root, [(4, 32, 48), (1, 24, 24)], [(2, 24, 32), (4, 48, 32)], [(3, 24, 24), (2, 32, 24)])


@pytest.fixture(scope="session")
def tuned(data, tmp_path_factory):
    """A finished run, and what it printed."""
    out = tmp_path_factory.mktemp("tuned") / "new" / "run"
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["tune", str(data), "--out", str(out), *FEW]) == 0
    return out, printed.getvalue()


@pytest.fixture
def asked(monkeypatch):
    """What the command asks of the library's ``tune``, which does nothing."""
    calls = {}

    def tune(out, model, stages, data, codec, **options):
        calls.update(out=out, model=model, stages=stages, data=data, codec=codec, **options)

    monkeypatch.setattr(lct_core.cli.tune, "tune", tune)
    return calls


@pytest.fixture
def factory(tmp_path, request):
    """The name of a module in the current folder, new for every test."""
    name = f"own_model_{zlib.crc32(request.node.name.encode())}"
    (tmp_path / f"{name}.py").write_text(dedent(FACTORIES))
    yield name
    sys.modules.pop(name, None)
