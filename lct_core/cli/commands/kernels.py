"""``lct kernels``: which attention kernels serve a scene on this machine, and which of them ``kernel="auto"`` takes."""

from typing import Any

import click

from lct_core.cli import options


@click.command("kernels", short_help="List the attention kernels, and why any of them refuses.")
@click.argument("shots", metavar="[SHOT ...]", nargs=-1)
@click.option("--script", type=options.FILE, help="A script file, instead of SHOTs; with --size, --text and a model.")
@click.option("--size", metavar="FxHxW", help="Latent frames, height and width of every shot of the script.")
@click.option("--text", type=options.COUNT, metavar="TOKENS", help="Text tokens of every prompt of the script.")
@click.option("--backbone", metavar="NAME", help="A family of lct backbones, at its usual size.")
@click.option(
    "--model",
    metavar="MODULE:FACTORY",
    help="Your own model: a function that returns (model, codec), as for lct tune, or the model alone.",
)
@click.option("--pattern", type=click.Choice(options.USES), help="One pattern alone.  [default: all there are]")
@click.option(
    "--grad/--no-grad",
    default=None,
    help="Whether gradients are needed.  [default: in context_causal and text; never in cached]",
)
@options.heads
@click.option("--device", help="Where attention runs, e.g. cpu or cuda.  [default: cuda where there is one, else cpu]")
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """List the attention kernels: which one kernel="auto" takes for a scene, which others serve it, why any refuses.

    A SHOT is written as for lct inspect, in tokens; without one, that command's example is taken. A backbone or model
    says how many heads there are, unless --heads, --kv-heads or --head-dim do, and where its text goes.

    \b
    Examples:
      lct kernels --dtype float32
      lct kernels global:20:1x6x6 12:4x6x6 8:2x6x6 --backbone hunyuan_video
      lct kernels --script script.txt --size 21x60x104 --text 512 --backbone wan
    """
    from lct_core.cli.kernels import run

    run(ctx, **given)
