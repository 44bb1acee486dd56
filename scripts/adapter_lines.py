"""Lines of every adapter, and their median: ``python scripts/adapter_lines.py``.

Counted are lines of code, as ruff formats them at 120 columns: imports too, no docstrings, comments or empty lines.
"""

import ast
import io
import tokenize
from pathlib import Path
from statistics import median

BACKBONES = Path(__file__).parents[1] / "backbones" / "lct_backbones"
NOT_ADAPTERS = {"plugin.py", "mmdit.py"}  # the second holds a whole model


def code_lines(source: str) -> int:
    """Lines on which some code stands."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def main() -> None:
    """Print the table."""
    files = sorted(path for path in BACKBONES.glob("[!_]*.py") if path.name not in NOT_ADAPTERS)
    counts = {path.stem: code_lines(path.read_text()) for path in files}
    for name, count in counts.items():
        print(f"{count:5}  {name}")
    print(f"{median(counts.values()):5g}  median of {len(counts)} adapters")


if __name__ == "__main__":
    main()
