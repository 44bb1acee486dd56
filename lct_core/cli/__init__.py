"""The ``lct`` command: one file for each of its commands, and one line here that adds it."""

import sys
from collections.abc import Sequence

import click

from lct_core.cli import backbones, bench, conformance, demo, direct, generate, inspect, kernels, plan, tune
from lct_core.plugins.hooks import PluginError


class _Lct(click.Group):
    """What the library refuses is the user's to mend, as click's own usage errors are; all say which command it was."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError, PluginError) as error:
            raise click.UsageError(str(error), self._place(ctx)) from error
        except click.UsageError as error:
            error.ctx = error.ctx or self._place(ctx)
            raise

    def _place(self, ctx: click.Context) -> click.Context:
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        return ctx if command is None else click.Context(command, parent=ctx, info_name=command.name)


@click.group(cls=_Lct, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
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


lct.add_command(inspect.command)
lct.add_command(backbones.command)
lct.add_command(kernels.command)
lct.add_command(conformance.command)
lct.add_command(tune.command)
lct.add_command(plan.command)
lct.add_command(generate.command)
lct.add_command(direct.command)
lct.add_command(demo.command)
lct.add_command(bench.command)


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
