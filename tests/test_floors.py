"""The house stands: a room imports only from rooms below it, no two modules import each other, and the core knows none
of its backbones and plugins. Read from the source, imports inside functions and under TYPE_CHECKING included.
"""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
while not (ROOT / "pyproject.toml").exists():
    ROOT = ROOT.parent

#: The rooms of lct_core, from the ground up.
ROOMS = [
    *("_describe", "layout", "coordinates", "rope", "noise", "packing", "paths", "script", "data"),
    *("files", "lineage", "progress", "plan", "patterns", "rectangles"),
    *("backbone", "plugins", "attention", "routing", "codec"),
    *("fingerprint", "cache", "engine", "denoiser", "scene_model", "experts"),
    *("losses", "checkpoints", "training", "generation", "pictures", "session", "cost"),
    *("demo", "testing", "cli"),
]

#: What the packages at the front of each line never import.
STRANGERS = {
    "lct_core": ("lct_backbones", "lct_plugins", "tests", "benchmarks", "diffusers"),
    "lct_backbones": ("lct_plugins", "tests", "benchmarks", "lct_core.cli"),
    "lct_plugins": ("lct_backbones", "tests", "benchmarks", "lct_core.cli"),
    "benchmarks": ("tests", "lct_core.cli"),
}
FOLDERS = {
    "lct_core": "lct_core",
    "lct_backbones": "backbones/lct_backbones",
    "lct_plugins": "plugins/lct_plugins",
    "benchmarks": "benchmarks",
}


class Import(NamedTuple):
    """An import: by which module, in which line, from which module, and where that has it from."""

    by: str
    line: int
    said: str
    of: str

    def __str__(self) -> str:
        return f"{FILES[self.by].relative_to(ROOT)}:{self.line} imports {self.said}"


def modules(package: str) -> dict[str, Path]:
    folder = ROOT / FOLDERS[package]
    names = {path: path.relative_to(folder.parent).with_suffix("").parts for path in sorted(folder.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in names.items()}


FILES = {name: path for package in FOLDERS for name, path in modules(package).items()}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


@cache
def handed_on(package: str) -> dict[str, tuple[str, str]]:
    """Where an ``__init__`` has its names from, if it does nothing but hand them on."""
    statements = tree(package).body[1:] if FILES[package].name == "__init__.py" else []
    lists = (ast.Assign, ast.AnnAssign)  # __all__
    if not all(isinstance(statement, (ast.ImportFrom, *lists)) for statement in statements):
        return {}
    froms = [statement for statement in statements if isinstance(statement, ast.ImportFrom)]
    return {alias.asname or alias.name: (node.module or "", alias.name) for node in froms for alias in node.names}


def origin(module: str, name: str) -> str:
    """The module that ``from module import name`` is about."""
    if f"{module}.{name}" in FILES:
        return f"{module}.{name}"
    if module in FILES and name in (names := handed_on(module)):
        return origin(*names[name])
    return module


def imports(module: str) -> Iterator[Import]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (Import(module, node.lineno, alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{FILES[module].relative_to(ROOT)}:{node.lineno} has a relative import"
            for alias in node.names:
                member, said = f"{node.module}.{alias.name}", node.module or ""
                of = origin(said, alias.name)
                yield Import(module, node.lineno, member if member in FILES else said, of)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                Import(module, node.lineno, *[arg.value] * 2) for arg in node.args if isinstance(arg, ast.Constant)
            )


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


#: The imports of the core, but those of its face, which hands everything on.
CORE = [
    one
    for module in FILES
    if inside(module, "lct_core") and module != "lct_core" and not handed_on(module)
    for one in imports(module)
    if inside(one.of, "lct_core")
]


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_its_floor():
    assert len(set(ROOMS)) == len(ROOMS)
    assert {room(module) for module in FILES if inside(module, "lct_core") and module != "lct_core"} == set(ROOMS)


def test_a_room_imports_only_from_rooms_below_it():
    floor = {name: i for i, name in enumerate(ROOMS)} | {"__init__": len(ROOMS)}
    up = [one for one in CORE if max(floor[room(one.said)], floor[room(one.of)]) > floor[room(one.by)]]
    assert not up, "upward:\n" + "\n".join(map(str, up))


def test_no_modules_import_each_other():
    edges = [one for one in CORE if one.of != one.by]
    graph: dict[str, set[str]] = {one.by: set() for one in edges}
    for one in edges:
        graph[one.by].add(one.of)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]
        steps = [one for a, b in pairwise(circle) for one in edges if (one.by, one.of) == (a, b)]
        raise AssertionError("in a circle:\n" + "\n".join(map(str, steps))) from None


def test_packages_import_no_strangers():
    wrong = [
        one
        for package, strangers in STRANGERS.items()
        for module in FILES
        if inside(module, package)
        for one in imports(module)
        if any(inside(one.of, stranger) for stranger in strangers)
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_face_names_modules_that_are_there():
    """What the package hands on is listed in its stub, from where each name is imported when it is first used."""
    stub = ast.parse((ROOT / "lct_core" / "__init__.pyi").read_text())
    named = {node.module for node in ast.walk(stub) if isinstance(node, ast.ImportFrom)}
    assert named
    assert not named - set(FILES)
