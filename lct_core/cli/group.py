"""A group of commands whose errors are one line."""

import sys

import click


class Group(click.Group):
    """What the library refuses is the user's to mend, as click's own usage errors are; all say which command it was."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command that was asked for; what it refuses is a usage error."""
        try:
            return super().invoke(ctx)
        except _refusals() as error:
            raise click.UsageError(str(error), self._place(ctx)) from error
        except click.UsageError as error:
            error.ctx = error.ctx or self._place(ctx)
            raise

    def _place(self, ctx: click.Context) -> click.Context:
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        return ctx if command is None else click.Context(command, parent=ctx, info_name=command.name)


def _refusals() -> tuple[type[Exception], ...]:
    """What the library refuses with; a PluginError can only come from a module that is loaded by then."""
    hooks = sys.modules.get("lct_core.plugins.hooks")
    return (ValueError, OSError, ImportError, *([hooks.PluginError] if hooks else []))
