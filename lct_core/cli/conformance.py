"""``lct conformance``: measure what must hold on one's own model or adapter."""

from collections.abc import Callable
from typing import get_args

import click
import torch
from torch import nn

from lct_core.backbone.adapter import Backbone
from lct_core.checkpoints.factory import call, current_folder_on_path, load
from lct_core.coordinates import Scheme
from lct_core.plugins.registry import registry

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@click.command("conformance")
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option(
    "--scheme",
    "schemes",
    type=click.Choice(get_args(Scheme)),
    multiple=True,
    help="Coordinates; can be repeated.  [default: all]",
)
@click.option(
    "--dtype", "dtypes", type=click.Choice([*_DTYPES]), multiple=True, help="Can be repeated.  [default: all]"
)
@click.pass_context
def command(ctx: click.Context, factory: str, schemes: tuple[Scheme, ...], dtypes: tuple[str, ...]) -> None:
    """Measure what must hold, on your own model.

    FACTORY is a function of MODULE, which may lie in the current folder. It takes no argument and returns a small model
    that an installed backbone handles, or an adapter (a lct_core.Backbone) around one. The exit code is 1 if anything
    failed.

    \b
    Example:
      lct conformance my_adapter:make_model --dtype float32
    """
    from lct_core.testing.conformance import conformance

    with current_folder_on_path():
        make = load_factory(factory)
        findings = []
        for finding in conformance(
            make, schemes=schemes or get_args(Scheme), dtypes=[_DTYPES[d] for d in dtypes or _DTYPES]
        ):
            findings.append(finding)
            verdict = click.style("ok    ", fg="green") if finding.holds else click.style("FAILED", fg="red", bold=True)
            click.echo(
                f"{verdict}  {finding.invariant}  {finding.name}  [{finding.case}]  "
                f"error {finding.error:.2g}, bound {finding.bound:.2g}"
            )
    failed = sorted({finding.invariant for finding in findings if not finding.holds})
    if failed:
        count = sum(not finding.holds for finding in findings)
        click.echo(f"{count} of {len(findings)} checks FAILED, of invariants {', '.join(map(str, failed))}")
        ctx.exit(1)
    click.echo(f"{len(findings)} checks, all hold")


def load_factory(name: str) -> Callable[[], nn.Module | Backbone]:
    """Import ``MODULE:FACTORY`` and try it once.

    Raises:
        ValueError: where it can't be imported or called, or no installed backbone handles what it returns.
    """
    factory = load(name)
    made = call(factory, name)
    if not isinstance(made, nn.Module | Backbone):
        raise ValueError(
            f"MODULE:FACTORY: {name}() returned a {type(made).__name__}, expected a model (nn.Module) or an adapter "
            "(lct_core.Backbone)"
        )
    if isinstance(made, nn.Module):
        registry().adapter(made)
    return factory
