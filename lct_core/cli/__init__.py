"""The ``lct`` command. Help and completion load neither torch nor the library, only a command's work does."""

import sys
from collections.abc import Sequence
from importlib import import_module

import click

from lct_core.cli.group import Group

COMMANDS = {
    "backbones": "List the backbone families whose models can be retrofitted.",
    "bench": "Time attention kernels, compare two runs, render results.",
    "conformance": "Measure what must hold, on your own model.",
    "demo": "Train, retrofit, tune and generate, in minutes on two cores.",
    "direct": "Make a scene shot by shot.",
    "generate": "Generate the scene of a script.",
    "inspect": "Draw shots, and count what they cost.",
    "kernels": "List the attention kernels, and why any of them refuses.",
    "plan": "Say what it takes to generate a scene, before it is generated.",
    "tune": "Tune a model on a folder of scenes.",
}
"""What every command does. Its options are in the module of its name in ``commands``, its work in the one beside."""


class _Lct(Group):
    """Imports the command that is asked for alone."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and import_module(f"lct_core.cli.commands.{name}").command, rest


@click.group(
    cls=_Lct,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_name="lct-core", prog_name="lct", message="%(prog)s %(version)s")
@click.pass_context
def lct(ctx: click.Context) -> None:
    """Long Context Tuning: see it work, tune a model on scenes, generate scenes, look at shots, backbones and kernels.

    \b
    Examples:
      lct demo --quick
      lct inspect 12:4x6x6 8:2x6x6
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _name, _summary in COMMANDS.items():
    lct.add_command(click.Command(_name, short_help=_summary))  # in the place of the one that is yet to be imported


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``lct`` command.

    Args:
        arguments: What follows ``lct`` on the command line (default: the process's own).

    Returns:
        The exit code: 0, 1 where a check failed, 2 for bad input (one line on stderr), 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = lct.main([*arguments], prog_name="lct", standalone_mode=False)
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "lct"
        click.echo(f"{where}: error: {_one_line(error.format_message())}", err=True)
        return 2
    except click.Abort:
        return 130
    return code if isinstance(code, int) else 0


def _one_line(message: str) -> str:
    """A message on one line: a colon at a line's end introduces the next line, anything else is followed by ``;``."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "".join(line + (" " if line.endswith((":", ",", ";")) else "; ") for line in lines[:-1]) + lines[-1]
