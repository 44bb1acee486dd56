"""Lines of every adapter, and their median, without and with imports: ``python scripts/adapter_lines.py``.

Counted are lines of code, as ruff formats them at 120 columns: no docstrings, comments or empty lines.
"""

import ast
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

BACKBONES = Path(__file__).parents[1] / "backbones" / "lct_backbones"
NOT_ADAPTERS = {"plugin.py", "support.py", "mmdit.py"}  # the last holds a whole model


class Lines(NamedTuple):
    """Of code, without and with imports."""

    own: int
    all: int


def code_lines(source: str) -> Lines:
    """Lines on which some code stands."""
    nodes = list(ast.walk(ast.parse(source)))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = _lines(node.body[0] for node in nodes if isinstance(node, documented) and ast.get_docstring(node))
    imports = _lines(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return Lines(len(lines - docstrings - imports), len(lines - docstrings))


def _lines(nodes: Iterable[ast.stmt]) -> set[int]:
    return {line for node in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def main() -> None:
    """Print the table."""
    files = sorted(path for path in BACKBONES.glob("[!_]*.py") if path.name not in NOT_ADAPTERS)
    counts = {path.stem: code_lines(path.read_text()) for path in files}
    for name, (own, everything) in counts.items():
        print(f"{own:5} {everything:5}  {name}")
    own, everything = (median(column) for column in zip(*counts.values(), strict=True))
    print(f"{own:5g} {everything:5g}  median of {len(counts)} adapters")


if __name__ == "__main__":
    main()
