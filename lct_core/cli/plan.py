"""``lct plan``: what it takes to generate a scene, before it is generated."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple, get_args

import click
import torch

from lct_core.cache import Budget, KVCache, Storage
from lct_core.cache.budget import STORAGES
from lct_core.checkpoints.factory import own_code
from lct_core.checkpoints.tuned import Tuned
from lct_core.cli import options
from lct_core.cli.asked import adapter_of
from lct_core.cli.kernels import auto_choice, kernel_rows
from lct_core.cli.plan_subject import Subject, Wanted, of_checkpoint, of_model
from lct_core.cli.plan_tables import (
    LEGEND,
    Kept,
    Kernels,
    cache_table,
    heading,
    in_bytes,
    in_time,
    modes_table,
    serving,
    takes_table,
)
from lct_core.cost import Mode, Plan, Throughput, measure, plan, takes_of
from lct_core.generation.director import Director
from lct_core.generation.write import Write
from lct_core.layout import Layout
from lct_core.patterns import PATTERNS, Pattern, context_causal
from lct_core.plan import AttentionPlan
from lct_core.plugins.hooks import KernelRequest
from lct_core.plugins.registry import registry
from lct_core.script import Script, read_script

_MODES: tuple[Mode, ...] = get_args(Mode)
_WIDTH = 120  # columns; a narrower terminal wraps lines rather than lose numbers
_OFF_TIME, _OFF_BYTES = 0.15, 0.02  # how far a run may be from its plan
_LESS_MEMORY = "choose a smaller --size, --window or --shots, or --storage int8"


@click.command("plan", short_help="Say what it takes to generate a scene, before it is generated.")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--backbone", metavar="NAME", help="Instead of CHECKPOINT: a family of lct backbones, at its usual size.")
@click.option(
    "--model", metavar="MODULE:FACTORY", help="Or your own: a function that returns what it does for lct tune, or less."
)
@click.option(
    "--size",
    metavar="FxHxW",
    help="Frames, height and width of every shot: in pixels with CHECKPOINT, else in latents.  "
    "[default: as the first training shot]",
)
@click.option("--text", type=options.COUNT, metavar="TOKENS", help="Text tokens of every prompt, without CHECKPOINT.")
@click.option("--shots", type=options.COUNT, help="So many: the script's are cut or repeated.  [default: the script's]")
@click.option(
    "--mode", "modes", type=click.Choice(_MODES), multiple=True, help="One alone, and take by take; can be repeated."
)
@click.option("--steps", type=options.COUNT, default=32, show_default=True, help="Euler steps.")
@click.option(
    "--window", type=options.COUNT, default=9, show_default=True, help="Most shots seen, with the current one."
)
@click.option("--guidance/--no-guidance", default=True, show_default=True, help="On the texts: every pass twice.")
@click.option("--shared-history", is_flag=True, help="One cache for both branches, where text is cross-attended.")
@click.option(
    "--write",
    type=click.Choice(get_args(Write)),
    default="pass",
    show_default=True,
    help="Keys and values: in a pass of their own, or as the nearest step wrote them.",
)
@options.storage
@options.tiers
@click.option("--dtype", type=click.Choice([*options.DTYPES]), help="Of the weights.  [default: as the model is made]")
@click.option(
    "--kernel", multiple=True, default=("auto",), show_default="auto", help="Attention kernel; can be repeated."
)
@options.device
@click.option(
    "--measure", "measuring", is_flag=True, help="Time a few passes of the model, and expect times from them."
)
@click.option("--every-tier", is_flag=True, help="With --measure: also time the other ways to keep the cache.")
@click.option(
    "--throughput",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON file that --measure writes, and without it is read.",
)
@click.option("--check", is_flag=True, help="Generate with every --mode, and say planned against measured.")
@options.seed
def command(
    script: Path,
    checkpoint: Path | None,
    backbone: str | None,
    model: str | None,
    size: str | None,
    text: int | None,
    shots: int | None,
    modes: tuple[Mode, ...],
    steps: int,
    window: int,
    guidance: bool,
    shared_history: bool,
    write: Write,
    storage: Storage,
    on_device: float | None,
    on_host: float | None,
    cache_folder: Path | None,
    dtype: str | None,
    kernel: tuple[str, ...],
    device: torch.device,
    measuring: bool,
    every_tier: bool,
    throughput: Path | None,
    check: bool,
    seed: int,
) -> None:
    """Say what it takes to generate the scene of SCRIPT: tokens, operations, bytes of the KV cache, memory and time.

    Of the model of CHECKPOINT, which lct tune or lct demo wrote, or of another one. No shot is given, but for the mode
    conditional the first. Operations are exact; memory is what torch allocates with its own attention.

    \b
    Examples:
      lct plan script.txt --backbone wan --size 21x60x104 --text 512 --shots 20 --dtype bfloat16
      lct plan script.txt runs/tune/causal.pt --mode causal --measure --check
    """
    from rich.console import Console

    wanted = Wanted(_repeated(read_script(script), shots), size, text, guidance, shared_history, dtype, device, seed)
    if sum(source is not None for source in (checkpoint, backbone, model)) != 1:
        raise ValueError(
            "SCRIPT: expected CHECKPOINT, --backbone or --model with it, one of the three: it says what makes a token"
        )
    if check and (len(kernel) > 1 or not modes):
        raise ValueError("--check: expected at least one --mode to generate with, and one --kernel")
    if throughput is not None and len(kernel) > 1:
        raise ValueError(f"--throughput: a file is of one kernel, expected one --kernel, got {', '.join(kernel)}")
    if every_tier and not measuring:
        raise ValueError("--every-tier: got it without --measure, which it is about; give that too")
    if shared_history and not guidance:
        raise ValueError(
            "--shared-history: got it with --no-guidance, which has one branch alone; leave one of them out"
        )
    budget = options.budget(on_device, on_host, cache_folder)
    tuned = None if checkpoint is None else Tuned.load(checkpoint)
    with (
        own_code(model if tuned is None else tuned.card.factory),
        options.within_memory(device, fix=_LESS_MEMORY),
        options.seeded(seed),
        torch.no_grad(),
    ):
        if tuned is not None:
            subject = of_checkpoint(tuned, wanted)
        else:
            adapter, codec = adapter_of(backbone, model)
            assert adapter is not None
            subject = of_model(adapter, codec, wanted, asking="--backbone" if model is None else "--model")
        if subject.model is None and (measuring or check):
            raise ValueError(
                f"{'--measure' if measuring else '--check'}: got it with a model that has no weights to run; expected "
                "CHECKPOINT, or a --model that has"
            )
        kernels = {mode: _kernels(mode, kernel, subject, window, device) for mode in modes or _MODES}
        measured = partial(_measured, subject, window)
        known = _throughputs(partial(measured, storage=storage, budget=budget), kernel, throughput, measuring=measuring)

        def planned(mode: Mode, storage: Storage, budget: Budget | None, throughput: Throughput | None) -> Plan:
            return plan(
                subject.meter,
                subject.scene,
                mode=mode,
                given=subject.given(mode),
                pattern=subject.pattern,
                steps=steps,
                window=window,
                negative=subject.negative,
                shared_history=shared_history,
                write=write,
                storage=storage,
                budget=budget,
                device=device.type,
                throughput=throughput,
            )

        plans = {mode: planned(mode, storage, budget, known.get(kernel[0])) for mode in kernels}
        rows = {
            mode: Kernels(
                {
                    name: known[asked].seconds(plans[mode].cost) if asked in known else None
                    for asked, name in zip(kernel, found.chosen, strict=True)
                },
                found.serving,
            )
            for mode, found in kernels.items()
        }
        console = Console(highlight=False, markup=False, emoji=False, width=_WIDTH)
        console.print(heading(subject, device, known[kernel[0]].where if known else None))
        console.print(modes_table(plans, rows), LEGEND, serving(rows), sep="\n")
        if "causal" in plans:
            timed = partial(measured, kernel[0]) if every_tier else None
            console.print(cache_table(_ways(partial(planned, "causal"), plans["causal"], storage, budget, timed)))
        for mode in modes:
            console.print(takes_table(mode, plans[mode]))
        for mode in modes if check else ():
            new_cache = partial(KVCache, storage=storage, budget=budget)
            director = partial(Director, seed=seed, steps=steps, write=write, window=window, new_cache=new_cache)
            for line in _checked(mode, plans[mode], subject, director, window=window, device=device):
                console.print(f"{mode}: {line}")


def _repeated(script: Script, shots: int | None) -> Script:
    return script if shots is None else replace(script, shots=tuple(islice(cycle(script.shots), shots)))


def _throughputs(
    measured: Callable[..., Throughput], kernels: Sequence[str], file: Path | None, *, measuring: bool
) -> dict[str, Throughput]:
    """How fast the model is with every kernel: measured, as the file says, or not known."""
    if not measuring:
        return {} if file is None else {kernels[0]: Throughput.load(file)}
    found = {kernel: measured(kernel) for kernel in kernels}
    if file is not None:
        found[kernels[0]].save(file)
    return found


def _measured(subject: Subject, window: int, kernel: str, storage: Storage, budget: Budget | None) -> Throughput:
    assert subject.model is not None
    subject.model.kernel = kernel
    return measure(
        subject.model, subject.scene, window=window, new_cache=partial(KVCache, storage=storage, budget=budget)
    )


class _Answers(NamedTuple):
    """The kernels that are asked for, by the names of those that run; and those that serve."""

    chosen: list[str]
    serving: list[str]


def _kernels(mode: Mode, asked: Sequence[str], subject: Subject, window: int, device: torch.device) -> _Answers:
    """The kernels for a mode's last take.

    Raises:
        ValueError: for an unknown one, and one that is asked for by name and refuses.
    """
    adapter = subject.meter.adapter
    attending = Layout([subject.scene], adapter.traits.text_first)
    attending = attending if adapter.traits.text == "joint" else attending.video_only
    request = KernelRequest(
        _last_plan(mode, attending, window, PATTERNS[subject.pattern]),
        device,
        subject.meter.dtype,
        adapter.traits.heads,
        adapter.traits.kv_heads,
        adapter.traits.head_dim,
        False,
    )
    rows = kernel_rows(registry(), request)
    for name in asked:
        if registry().check_kernel(name) != "auto":
            registry().kernel(name, request)  # refuses
    auto = auto_choice(rows) or "none: all refuse"
    return _Answers(
        [auto if name == "auto" else name for name in asked], [row.name for row in rows if not row.refusals]
    )


def _last_plan(mode: Mode, layout: Layout, window: int, pattern: Pattern) -> AttentionPlan:
    if mode in ("joint", "conditional"):
        return pattern(layout)
    first = [shot for shot in layout.shots if shot.role == "global"]
    seen = Layout([[*first, *[s for s in layout.shots if s.role == "shot"][-window:]]], layout.text_first)
    return context_causal(seen).rows(seen.spans[-1]) if mode == "causal" else pattern(seen)


def _ways(
    planned: Callable[..., Plan],
    asked: Plan,
    storage: Storage,
    budget: Budget | None,
    timed: Callable[..., Throughput] | None,
) -> list[Kept]:
    """The ways to keep a history: on the device, and where the budget has it, or else in host memory."""
    ways = []
    for each in STORAGES:
        away = budget or Budget(device=asked.least_budget)
        for where, of in (("on the device", None), ("as budgeted" if budget else "in host memory", away)):
            found: Plan | None = asked
            if (each, of) != (storage, budget):
                try:
                    found = planned(each, of, timed and timed(each, of))
                except ValueError:  # it has no room
                    found = None
            ways.append(Kept(each, where, found))
    return ways


def _checked(
    mode: Mode,
    found: Plan,
    subject: Subject,
    new_director: Callable[..., Director],
    *,
    window: int,
    device: torch.device,
) -> list[str]:
    """Generate, and say planned against measured."""
    director = new_director(subject.model, subject.inputs, guidance=subject.guidance, window=window)
    given = subject.given(mode)
    begin = time.perf_counter()
    for i in given:
        director.give(i, director.scene[i].latents)
    for take in takes_of(mode, subject.scene, window=window, given=given, pattern=subject.pattern):
        director.keep(director.shoot(take), take)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - begin
    held = sum(cache.peak_nbytes for cache in director.caches) if mode == "causal" else 0
    words = [f"took {in_time(took)}"]
    if found.seconds is not None:
        words = [f"planned {in_time(found.seconds)}, took {in_time(took)}: {_off(took / found.seconds, _OFF_TIME)}"]
    if held:
        of_cache = _off(held / found.peak_cache, _OFF_BYTES)
        words.append(f"cache planned {in_bytes(found.peak_cache)}, held {in_bytes(held)}: {of_cache}")
    return words


def _off(ratio: float, most: float) -> str:
    return f"{ratio - 1:+.1%}, {'within' if abs(ratio - 1) <= most else 'beyond'} the {most:.0%} that it may be off"
