"""The README does what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lct_core.cli.backbones import support_table
from lct_core.plugins import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_example_prints_what_the_readme_says():
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL).groups()
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == output


def test_the_support_table_is_the_registrys():
    (table,) = re.findall(r"<!-- support -->\n(.*?)<!-- /support -->", README, re.DOTALL)
    assert table.strip() == support_table(registry())


@pytest.mark.parametrize("page", ["README.md", "docs/long-generation.md", "docs/sparse.md"])
def test_every_python_block_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(blocks)], check=True)
