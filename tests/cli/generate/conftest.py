"""Fixtures that the tests of this folder share."""

import io
from contextlib import redirect_stdout
from textwrap import dedent

import pytest

from lct_core.cli import main
from lct_core.data import VideoScene, write_scene
from lct_core.script import Script, ScriptShot
from tests.cli.generate.clips import SCRIPT, SIZE, clip


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "script.txt").write_text(dedent(SCRIPT))


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of ``lct tune``."""
    root = tmp_path_factory.mktemp("tuned")
    script = Script(
        shots=(ScriptShot(text="A red square."), ScriptShot(text="The square moves.")),
        description="Character 1: a square. A plain wall.",
    )
    for number, sizes in enumerate([(SIZE, (1, 24, 24)), ((3, 32, 24), (2, 24, 24))], 1):
        shots = tuple(clip(*size, seed=10 * number + i) for i, size in enumerate(sizes))
        write_scene(root / "data" / f"scene_{number}", VideoScene(script=script, shots=shots), fps=8)
    arguments = ["--single-shot-steps", "2", "--steps", "6", "--causal-steps", "2", "--learning-rate", "1e-2"]
    with redirect_stdout(io.StringIO()):
        assert main(["tune", str(root / "data"), "--out", str(root / "run"), "--fps", "8", *arguments]) == 0
    return root / "run"
