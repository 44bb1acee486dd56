"""What ``lct`` loads before a command does its work: nothing of torch, and no command but the one asked for."""

import os
import subprocess
import sys
from importlib import import_module
from typing import get_args

import click
import pytest
import torch

from lct_core.cache.budget import STORAGES
from lct_core.cli import COMMANDS, kernels, options
from lct_core.coordinates import Scheme
from lct_core.generation.takes import Mode
from lct_core.generation.write import Write
from lct_core.patterns import PATTERNS

HEAVY = ("torch", "matplotlib", "rich", "numpy", "lct_core.plugins")
_REPORT = (
    "import sys; from lct_core.cli import main; code = main({arguments!r}); print([*sys.modules], file=sys.stderr)"
)


def loaded(*arguments):
    """The modules that a process has loaded after ``lct`` with some arguments, and what it printed."""
    code = _REPORT.format(arguments=[*arguments])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr, done.stdout


def completed(words):
    """What the shell offers after some words, the last of them begun."""
    code = "import atexit, sys; from lct_core.cli import main\n"
    code += "atexit.register(lambda: print([*sys.modules], file=sys.stderr)); main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "_LCT_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        },
    )
    return done.stderr, [line.partition(",")[2] for line in done.stdout.splitlines()]


def commands():
    return {name: import_module(f"lct_core.cli.commands.{name}").command for name in COMMANDS}


@pytest.mark.parametrize(
    "arguments", [(), ("--help",), ("-h",), ("--version",), *((name, "--help") for name in COMMANDS)]
)
def test_help_loads_no_torch(arguments):
    modules, printed = loaded(*arguments)
    assert printed
    assert not [name for name in HEAVY if f"'{name}'" in modules]
    asked = arguments[0] if arguments and arguments[0] in COMMANDS else None
    assert [name for name in COMMANDS if f"'lct_core.cli.commands.{name}'" in modules] == ([asked] if asked else [])


def test_a_mistake_in_the_command_line_loads_no_torch():
    for arguments in (["nothing"], ["tune", "--nothing"], ["generate"]):
        modules, _ = loaded(*arguments)
        assert not [name for name in HEAVY if f"'{name}'" in modules]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("lct ", {*COMMANDS}),
        ("lct t", {"tune"}),
        ("lct tune --", {"--resume", "--device", "--help"}),
        ("lct plan s.txt --mode ", {*options.MODES}),
        ("lct generate --device cpu --st", {"--steps", "--storage"}),
        ("lct bench ", {"attention", "compare", "report"}),
        ("lct bench attention --k", {"--kernel"}),
    ],
)
def test_completion_loads_no_torch(words, offered):
    modules, found = completed(words)
    assert offered <= {*found}
    assert "'click'" in modules
    assert not [name for name in HEAVY if f"'{name}'" in modules]


def test_the_summaries_are_those_of_the_commands():
    assert {name: command.get_short_help_str(limit=80) for name, command in commands().items()} == COMMANDS
    assert [*COMMANDS] == sorted(COMMANDS)


def test_choices_are_those_of_the_library():
    assert get_args(Scheme) == options.SCHEMES
    assert (*PATTERNS,) == options.PATTERNS
    assert get_args(Mode) == options.MODES
    assert get_args(Write) == options.WRITES
    assert options.STORAGES == STORAGES
    assert (*kernels.USES,) == options.USES
    for name in (*options.DTYPES, *options.CHECKED_DTYPES):
        assert isinstance(getattr(torch, name), torch.dtype)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("bench", "demo")])
def test_the_work_of_a_command_takes_its_options(name):
    command, run = commands()[name], import_module(f"lct_core.cli.{name}").run
    taken = {*run.__annotations__} - {"return", "ctx"}
    given = {parameter.name for parameter in command.params if isinstance(parameter, click.Option | click.Argument)}
    assert taken - {"fields", "numbers"} <= given
    assert taken >= given or taken & {"fields", "numbers"}
