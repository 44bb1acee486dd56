"""What an installation would tell of the library, for a Python that can install nothing and runs it from its source.

``python -m benchmarks.source_tree FOLDER`` writes its name, version and entry points there, and needs nothing but
Python; with FOLDER on the path beside the source, plugins are found.
"""

import sys
import tomllib
from pathlib import Path


def main(folder: Path) -> None:
    """Write ``lct_core-<version>.dist-info`` into a folder."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{n} = {p}" for n, p in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
