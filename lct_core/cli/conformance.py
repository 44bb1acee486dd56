"""``lct conformance``: measure what must hold on one's own model or adapter."""

from collections.abc import Callable
from typing import get_args

import click
import torch
from torch import nn

from lct_core.backbone import Backbone
from lct_core.checkpoints.factory import call, load
from lct_core.cli.options import CHECKED_DTYPES
from lct_core.cli.user_code import current_folder_on_path
from lct_core.coordinates import Scheme
from lct_core.plugins import registry
from lct_core.testing.conformance import conformance


def run(*, factory: str, schemes: tuple[Scheme, ...], dtypes: tuple[str, ...]) -> int:
    """Check the models of a factory, and print every finding; returns the exit code."""
    with current_folder_on_path():
        make = load_factory(factory)
        findings = []
        for finding in conformance(
            make,
            schemes=schemes or get_args(Scheme),
            dtypes=[getattr(torch, name) for name in dtypes or CHECKED_DTYPES],
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
        return 1
    click.echo(f"{len(findings)} checks, all hold")
    return 0


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
