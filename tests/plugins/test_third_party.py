"""An adapter as a distribution of its own: installed, found through the registry, proven by its own tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "lct-sketch"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a process in which the example is installed."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(target), str(EXAMPLE)], check=True)
    return {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(environment, cwd, *command):
    return subprocess.run([sys.executable, "-m", *command], env=environment, cwd=cwd, capture_output=True, text=True)


def test_its_own_tests_pass(installed, tmp_path):
    done = run(installed, tmp_path, "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"))
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b[1-9]\d* passed", done.stdout)


def test_it_is_listed_and_only_where_it_is_installed(installed, tmp_path):
    assert "Sketch " in run(installed, tmp_path, "lct_core.cli", "backbones").stdout
    without = {name: value for name, value in installed.items() if name != "PYTHONPATH"}
    assert "sketch" not in run(without, tmp_path, "lct_core.cli", "backbones").stdout


def test_conformance_from_the_command_line(installed, tmp_path):
    done = run(installed, tmp_path, "lct_core.cli", "conformance", "lct_sketch.model:tiny", "--dtype", "float32")
    assert done.returncode == 0, done.stdout
    assert "all hold" in done.stdout


def test_a_wrong_adapter_fails_the_command(installed, tmp_path):
    (tmp_path / "wrong.py").write_text(
        "from lct_sketch.adapter import SketchBackbone\n"
        "from lct_sketch.model import tiny\n"
        "class Wrong(SketchBackbone):\n"
        "    def rope(self, coords):\n"
        "        return 0.5 * super().rope(coords)\n"
        "def make():\n"
        "    return Wrong(tiny())\n"
    )
    done = run(installed, tmp_path, "lct_core.cli", "conformance", "wrong:make", "--dtype", "float32")
    assert done.returncode == 1
    assert re.search(r"FAILED\s+1\s+one shot equals the base model", done.stdout)


def test_the_page_shows_the_examples_own_code():
    page = (ROOT / "docs" / "retrofit.md").read_text()
    code = "\n".join(path.read_text() for path in [*EXAMPLE.rglob("*.py"), EXAMPLE / "pyproject.toml"])
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", page, flags=re.DOTALL)
    elsewhere = [block for block in blocks if block not in code]
    assert len(blocks) > 5
    assert [block.strip() for block in elsewhere] == [
        "model = lct_core.retrofit(dit, backbone=SketchBackbone(dit))"  # and what that is, test_sketch.py has
    ]
