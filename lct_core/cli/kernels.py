"""``lct kernels``: which attention kernels serve a scene on this machine, and which of them ``kernel="auto"`` takes."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from lct_core.backbone import Backbone
from lct_core.cli import options
from lct_core.cli.asked import adapter_of, as_taken, refuse, script_layout
from lct_core.cli.kernel_rows import KernelRow, auto_choice, kernel_rows
from lct_core.cli.machine import usable
from lct_core.cli.shots import EXAMPLE, parse_shots
from lct_core.cli.tables import short, table
from lct_core.cli.user_code import own_code
from lct_core.layout import Layout
from lct_core.patterns import bidirectional, context_causal, own_and_global_text
from lct_core.plan import AttentionPlan
from lct_core.plugins import KernelRequest, registry
from lct_core.script import read_script

USES = {
    "bidirectional": "all shots at once",
    "context_causal": "tuning such that no shot sees a later one",
    "cached": "generating the last shot behind the KV cache of those before",
    "text": "cross-attention to a shot's own prompt and the global one",
}
_WITH_GRADIENTS = ("context_causal", "text")  # unless asked otherwise


def scene_plans(layout: Layout, *, cross: bool) -> dict[str, AttentionPlan]:
    """Who sees whom in every attention that LCT runs on some scenes, by the pattern's name.

    Args:
        layout: The scenes, with their texts.
        cross: Whether text is cross-attended, and not part of self-attention.

    Raises:
        ValueError: where text is cross-attended and a scene has no video, or a shot no text.
    """
    attending = layout.video_only if cross else layout
    if cross and any(scene[-1].role == "global" for scene in layout.scenes):
        raise ValueError("SHOT: got a scene of a global prompt alone, expected a shot after it; add one")
    longest = max(attending.scenes, key=len)
    alone = Layout([longest], attending.text_first)  # a cache is of one scene
    plans = {
        "bidirectional": bidirectional(attending),
        "context_causal": context_causal(attending),
        "cached": context_causal(alone).rows(alone.spans[-1]),
    }
    try:
        return {**plans, "text": own_and_global_text(layout)} if cross else plans
    except ValueError as error:
        raise ValueError(f"SHOT: {error}") from error


def run(
    ctx: click.Context,
    *,
    shots: tuple[str, ...],
    script: Path | None,
    size: str | None,
    text: int | None,
    backbone: str | None,
    model: str | None,
    pattern: str | None,
    grad: bool | None,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    dtype: str,
    device: str | None,
) -> None:
    """Print which kernels serve a scene; the arguments are the command's."""
    with own_code(model):
        adapter, _ = adapter_of(backbone, model)
        cross = adapter is not None and adapter.traits.text == "cross"
        if script is None:
            refuse({"--size": size, "--text": text}, "without --script", "give SHOTs, in tokens")
            layout = parse_shots(shots or EXAMPLE, text_first=adapter is None or adapter.traits.text_first)
        else:
            refuse({"SHOT": " ".join(shots) or None}, "beside --script", "leave one of the two out")
            if adapter is None:
                raise ValueError("--script: got no model, expected --backbone or --model: it says what makes a token")
            layout = script_layout(partial(read_script, script), size, text, adapter, asking="--script")
        if adapter is not None:
            layout = as_taken(
                adapter, layout, given="SHOT" if shots else "SHOT (the example)" if script is None else None
            )
            heads, kv_heads, head_dim = _heads(ctx, adapter)
    plans = scene_plans(layout, cross=cross)
    patterns = [pattern] if pattern else [*plans]
    if pattern == "text" and not cross:
        raise ValueError("--pattern: got text, but text is part of self-attention here; expected another, or none")
    if pattern == "cached" and grad:
        raise ValueError("--grad: got it with --pattern cached, but a KV cache has no gradients; leave it out")
    requests = {
        name: KernelRequest(
            plan=plans[name],
            device=usable(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            dtype=getattr(torch, dtype),
            heads=heads,
            kv_heads=options.check_kv_heads(heads, kv_heads),
            head_dim=head_dim,
            grad=name != "cached" and (name in _WITH_GRADIENTS if grad is None else grad),
        )
        for name in patterns
    }
    answers = {name: kernel_rows(registry(), request) for name, request in requests.items()}
    console = Console(highlight=False, markup=False, emoji=False)  # a reason may name an extra: lct-core[xformers]
    console.print(_scene(layout, requests[patterns[0]], adapter), _plan_table(requests, answers), sep="\n")
    kernel_table, reasons = _kernel_table(answers)
    console.print(_lines({f"{name}:": USES[name] for name in patterns}), kernel_table, sep="\n")
    if reasons:
        console.print(_lines({str(number): reason for reason, number in reasons.items()}), "", sep="\n")
    console.print(_lines({row.name: registry().kernels[row.name].summary for row in answers[patterns[0]]}))


def _heads(ctx: click.Context, adapter: Backbone) -> tuple[int, int, int]:
    """Query heads, key and value heads, channels of a head: as on the command line, else the model's."""
    traits, given = adapter.traits, ctx.params
    told = {x for x in ("heads", "kv_heads", "head_dim") if ctx.get_parameter_source(x) is not ParameterSource.DEFAULT}
    heads = given["heads"] if "heads" in told else traits.heads
    kv_heads = given["kv_heads"] if "kv_heads" in told else heads if "heads" in told else traits.kv_heads
    return heads, kv_heads, given["head_dim"] if "head_dim" in told else traits.head_dim


def _scene(layout: Layout, request: KernelRequest, adapter: Backbone | None) -> str:
    """What was asked about."""
    shots = sum(shot.role == "shot" for shot in layout.shots)
    counts = {
        "scene": len(layout.scenes),
        "shot": shots,
        "global prompt": layout.num_shots - shots,
        "video token": sum(shot.video for shot in layout.shots),
        "text token": sum(shot.text for shot in layout.shots),
    }
    words = ", ".join(f"{count:,} {word}{'s' if count > 1 else ''}" for word, count in counts.items() if count)
    where = str(request.device) + (f" ({request.hardware})" if request.hardware != request.device.type else "")
    dtype = str(request.dtype).removeprefix("torch.")
    heads = f"{request.heads} query heads and {request.kv_heads} key-value heads of {request.head_dim}"
    if adapter is not None:
        words += f"\n{type(adapter.model).__name__}, text in {adapter.traits.text} attention"
    return f"{words}\n{dtype} on {where}, {heads}"


def _plan_table(requests: Mapping[str, KernelRequest], answers: Mapping[str, Sequence[KernelRow]]) -> Table:
    made = table("pattern", "grad", "queries", "keys", "pairs", "form", "auto")
    for column in made.columns[2:5]:
        column.justify = "right"
    for name, request in requests.items():
        plan = request.plan
        numbers = f"{plan.queries:,}", f"{plan.keys:,}", short(plan.pairs)
        grad = "yes" if request.grad else "no"
        made.add_row(name, grad, *numbers, plan.form, auto_choice(answers[name]) or "none: all refuse")
    return made


def _kernel_table(answers: Mapping[str, Sequence[KernelRow]]) -> tuple[Table, dict[str, int]]:
    """The kernels in the order of the first pattern; and every reason once, numbered from 1 down the table."""
    reasons: dict[str, int] = {}
    made = table("kernel", *answers)
    for first in next(iter(answers.values())):
        cells = []
        for rows in answers.values():
            row = next(row for row in rows if row.name == first.name)
            if row.refusals:
                numbers = [reasons.setdefault(reason, len(reasons) + 1) for reason in row.refusals]
                cells.append("refused: " + ", ".join(map(str, numbers)))
            elif row.rank is None:
                cells.append("by name")
            else:
                cells.append("auto" if row.name == auto_choice(rows) else "available")
        made.add_row(first.name, *cells)
    return made, reasons


def _lines(words: Mapping[str, str]) -> Table:
    """Words behind their names, side by side and without a heading."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for name, said in words.items():
        table.add_row(name, said)
    return table
