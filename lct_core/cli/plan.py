"""``lct plan``: what it takes to generate a scene, before it is generated."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import click
import torch

from lct_core import generation
from lct_core.backbone import Backbone, KernelRequest, ShotInput
from lct_core.cache import Budget, KVCache, Storage, Tier
from lct_core.cli import kernels, options
from lct_core.cli.factory import own_code
from lct_core.cli.inspect import short
from lct_core.cli.tuned import Tuned, check_size, parse_size
from lct_core.cost import Meter, Mode, Plan, Throughput, example, measure, plan, takes_of
from lct_core.generation import Guidance
from lct_core.generation.director import Director, Write
from lct_core.layout import Layout, Shot
from lct_core.masks import PATTERNS, AttentionPlan, Pattern, context_causal
from lct_core.noise import shot_noise
from lct_core.plugins import registry
from lct_core.scene_model import SceneModel, retrofit, with_dummy_video
from lct_core.script import Script, read_script

if TYPE_CHECKING:
    from rich.table import Table

_MODES: tuple[Mode, ...] = get_args(Mode)
_WIDTH = 120  # columns; a narrower terminal wraps lines rather than lose numbers
_LESS_MEMORY = "choose a smaller --size, --window or --shots, or --storage int8"

BYTES = options.Number(click.FloatRange(min=0))


class _Subject(NamedTuple):
    """A model and a scene for it.

    Args:
        meter: Counts what the model takes.
        model: The model itself, where it has weights.
        scene: The shots' token counts.
        negative: The same with the negative prompts; None without guidance.
        inputs: The shots, where the model has weights.
        guidance: The negative prompts; None without guidance.
        pattern: Who sees whom where the history is run again.
    """

    meter: Meter
    model: SceneModel | None
    scene: list[Shot]
    negative: list[Shot] | None
    inputs: list[ShotInput]
    guidance: Guidance | None
    pattern: str = "bidirectional"


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
@click.option(
    "--write",
    type=click.Choice(get_args(Write)),
    default="pass",
    show_default=True,
    help="Keys and values: in a pass of their own, or as the nearest step wrote them.",
)
@click.option(
    "--storage",
    type=click.Choice(["native", "int8", "fp8"]),
    default="native",
    show_default=True,
    help="How the cache keeps its shots.",
)
@click.option(
    "--on-device", type=BYTES, metavar="GIB", help="Most of the cache on the device, in each branch.  [default: all]"
)
@click.option("--on-host", type=BYTES, metavar="GIB", help="Most of the rest in host memory.  [default: all]")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Where what remains is put in files.")
@click.option("--dtype", type=click.Choice([*options.DTYPES]), help="Of the weights.  [default: as the model is made]")
@click.option("--kernel", default="auto", show_default=True, help="Attention kernel.")
@options.device
@click.option(
    "--measure", "measuring", is_flag=True, help="Time a few passes of the model, and expect times from them."
)
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
    write: Write,
    storage: Storage,
    on_device: float | None,
    on_host: float | None,
    folder: Path | None,
    dtype: str | None,
    kernel: str,
    device: torch.device,
    measuring: bool,
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

    read = _repeated(read_script(script), shots)
    if sum(source is not None for source in (checkpoint, backbone, model)) != 1:
        raise ValueError(
            "SCRIPT: expected CHECKPOINT, --backbone or --model with it, one of the three: it says what makes a token"
        )
    if backbone is not None and (measuring or check):
        raise ValueError(
            f"{'--measure' if measuring else '--check'}: got it with --backbone, which has no weights to run; "
            "expected CHECKPOINT or --model"
        )
    if check and not modes:
        raise ValueError("--check: got it without --mode, expected at least one to generate with")
    budget = _budget(on_device, on_host, folder)
    tuned = None if checkpoint is None else Tuned.load(checkpoint)
    with (
        own_code(model if tuned is None else tuned.card.factory),
        options.within_memory(device, fix=_LESS_MEMORY),
        options.seeded(seed),
        torch.no_grad(),
    ):
        if tuned is not None:
            subject = _of_checkpoint(tuned, read, size, text, guidance=guidance, dtype=dtype, device=device, seed=seed)
        else:
            adapter = kernels._adapter(backbone, model)
            assert adapter is not None
            subject = _of_model(adapter, read, size, text, guidance=guidance, dtype=dtype, device=device, seed=seed)
        if subject.model is not None:
            subject.model.kernel = registry().check_kernel(kernel)
        known = _throughput(subject, measuring, throughput, window=window, storage=storage, budget=budget)
        plans = {
            mode: plan(
                subject.meter,
                subject.scene,
                mode=mode,
                given=_given(mode, subject.scene),
                pattern=subject.pattern,
                steps=steps,
                window=window,
                negative=subject.negative,
                write=write,
                storage=storage,
                budget=budget,
                device=device.type,
                throughput=known,
            )
            for mode in modes or _MODES
        }
        console = Console(highlight=False, markup=False, emoji=False, width=_WIDTH)
        console.print(_scene(subject, device, known))
        console.print(_summary(plans, {mode: _kernel(mode, kernel, subject, window, device) for mode in plans}))
        for mode in modes:
            console.print(_shots(mode, plans[mode]))
        for mode in modes if check else ():
            new_cache = partial(KVCache, storage=storage, budget=budget)
            director = partial(Director, seed=seed, steps=steps, write=write, new_cache=new_cache)
            console.print(f"{mode}: {_checked(mode, plans[mode], subject, director, window=window, device=device)}")


def _repeated(script: Script, shots: int | None) -> Script:
    return script if shots is None else replace(script, shots=tuple(islice(cycle(script.shots), shots)))


def _budget(device: float | None, host: float | None, folder: Path | None) -> Budget | None:
    if device is None and host is None and folder is None:
        return None
    on_device, on_host = (None if gib is None else int(gib * 2**30) for gib in (device, host))
    return Budget(device=on_device, host=on_host, folder=folder)


def _of_checkpoint(
    tuned: Tuned,
    script: Script,
    size: str | None,
    text: int | None,
    *,
    guidance: bool,
    dtype: str | None,
    device: torch.device,
    seed: int,
) -> _Subject:
    if text is not None:
        raise ValueError(f"--text: got {text} with CHECKPOINT, whose codec encodes the prompts; leave it out")
    model, codec = tuned.build(device)
    if dtype is not None:
        model.adapter.cast(options.DTYPES[dtype])
    pixels = parse_size(size, tuned.card.size)
    check_size(pixels, tuned.card, codec, option="--size", fix="choose another size, for example")
    weights = next(model.backbone.parameters())
    scene = generation.start_scene(script, codec, pixels, seed=seed, device=device, dtype=weights.dtype)
    negative = Guidance(**generation.negative_texts(codec)) if guidance else None
    pattern = "context_causal" if tuned.pattern == "context_causal" else "bidirectional"
    return _subject(Meter(model), model, scene, negative)._replace(pattern=pattern)


def _of_model(
    adapter: Backbone,
    script: Script,
    size: str | None,
    text: int | None,
    *,
    guidance: bool,
    dtype: str | None,
    device: torch.device,
    seed: int,
) -> _Subject:
    """Shots of noise and random prompts."""
    if size is None or text is None:
        missing = " and ".join(name for name, value in (("--size", size), ("--text", text)) if value is None)
        raise ValueError(f"{missing}: expected it without CHECKPOINT: in latents and tokens, like --size 21x60x104")
    if dtype is not None:
        adapter.cast(options.DTYPES[dtype])
    patch, latents = adapter.traits.patch, parse_size(size, (0, 0, 0))
    if any(n < 1 or n % p for n, p in zip(latents, patch, strict=True)):
        raise ValueError(
            f"--size: got {size}, expected latents that are multiples of the patch {patch}, like 21x60x104"
        )
    frames, height, width = (n // p for n, p in zip(latents, patch, strict=True))
    overall = [Shot(text, (1, height, width), "global")] if script.global_prompt() else []
    layout = Layout([[*overall, *(Shot(text, (frames, height, width)) for _ in script.shots)]])
    counts = [*kernels._as_of(adapter, layout, given=None).shots]
    cross = adapter.traits.text == "cross"
    if next(adapter.model.parameters()).is_meta:
        meter = Meter(adapter, text="own_and_global" if cross and overall else "own")
        return _Subject(meter, None, counts, counts if guidance else None, [], None)
    adapter.model.to(device).eval()
    model = retrofit(adapter.model, backbone=adapter, text="own_and_global" if cross and overall else "own")
    scene = [_noise(adapter, shot, i, seed).to(device) for i, shot in enumerate(counts)]
    negative = Guidance(text=scene[-1].text, extras=_of_prompt(adapter, scene[-1])) if guidance else None
    return _subject(Meter(model), model, scene, negative)


def _noise(adapter: Backbone, shot: Shot, i: int, seed: int) -> ShotInput:
    """A random prompt and the noise that a shot starts from; a global shot is left to the director."""
    given = example(adapter, shot, dtype=next(adapter.model.parameters()).dtype)
    if shot.role == "global":
        return ShotInput(text=given.text, extras=given.extras, role="global")
    noise = shot_noise(tuple(given.latents.shape), seed=seed, step=0, scene=0, shot=i)
    return replace(given, latents=noise.to(given.latents.dtype))


def _of_prompt(adapter: Backbone, shot: ShotInput) -> dict[str, object]:
    return {name: x for name, x in shot.extras.items() if adapter.traits.extras[name].prompt}


def _subject(meter: Meter, model: SceneModel, scene: list[ShotInput], negative: Guidance | None) -> _Subject:
    adapter = model.adapter

    def counts(shots: Sequence[ShotInput]) -> list[Shot]:
        return [
            Shot(shot.text.shape[1], (0, 0, 0), shot.role)
            if shot.latents is None
            else adapter.shot(adapter.prepare(shot))
            for shot in with_dummy_video(shots, adapter)
        ]

    other = None if negative is None else counts(negative.negative(scene, adapter.traits))
    return _Subject(meter, model, counts(scene), other, scene, negative)


def _given(mode: Mode, scene: Sequence[Shot]) -> tuple[int, ...]:
    """Conditional generation begins with a shot that is there."""
    first = next(i for i, shot in enumerate(scene) if shot.role == "shot")
    return (first,) if mode == "conditional" else ()


def _throughput(
    subject: _Subject, measuring: bool, file: Path | None, *, window: int, storage: Storage, budget: Budget | None
) -> Throughput | None:
    if not measuring:
        return None if file is None else Throughput.load(file)
    assert subject.model is not None
    new_cache = partial(KVCache, storage=storage, budget=budget)
    found = measure(subject.model, subject.scene, window=window, new_cache=new_cache)
    if file is not None:
        found.save(file)
    return found


def _kernel(mode: Mode, name: str, subject: _Subject, window: int, device: torch.device) -> str:
    """The kernel that runs a mode's last take."""
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
    if name == "auto":
        return kernels.auto_choice(kernels.kernel_rows(registry(), request)) or "none: all refuse"
    registry().kernel(name, request)  # refuses
    return name


def _last_plan(mode: Mode, layout: Layout, window: int, pattern: Pattern) -> AttentionPlan:
    if mode in ("joint", "conditional"):
        return pattern(layout)
    first = [shot for shot in layout.shots if shot.role == "global"]
    seen = Layout([[*first, *[s for s in layout.shots if s.role == "shot"][-window:]]], layout.text_first)
    return context_causal(seen).rows(seen.spans[-1]) if mode == "causal" else pattern(seen)


def _scene(subject: _Subject, device: torch.device, known: Throughput | None) -> str:
    """What was asked about."""
    shots = [shot for shot in subject.scene if shot.role == "shot"]
    tokens = sorted({shot.tokens for shot in shots})
    each = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    adapter = subject.meter.adapter
    dtype = str(subject.meter.dtype).removeprefix("torch.")
    words = f"{len(shots)} shots of {each} tokens" + ", after a global prompt" * (len(shots) < len(subject.scene))
    weights = _bytes(subject.meter.weights)
    times = f"times: of a throughput measured with {known.where}" if known else "times: not measured; --measure does it"
    return f"{words}\n{type(adapter.model).__name__} of {weights}, {dtype}, on {device}\n{times}"


def _summary(plans: Mapping[Mode, Plan], kernels: Mapping[Mode, str]) -> "Table":
    tiers = [tier for tier in get_args(Tier) if any(found.cache[tier] for found in plans.values())]
    columns = ("FLOPs", "in attention", *(f"cache, {tier}" for tier in tiers), "most", "activations", "memory", "time")
    table = _table("mode", *columns, "kernel")
    for mode, found in plans.items():
        table.add_row(
            mode,
            short(found.cost.total).strip(),
            f"{found.cost.attention / found.cost.total:.0%}",
            *(_bytes(found.cache[tier]) for tier in tiers),
            _bytes(found.peak_cache),
            _bytes(found.activations),
            _bytes(found.peak),
            _time(found.seconds),
            kernels[mode],
        )
    return table


def _shots(mode: Mode, found: Plan) -> "Table":
    table = _table(mode, "tokens", "seen in cache", "FLOPs", "in attention", "cache", "time")
    for take in found.takes:
        table.add_row(
            f"shot{'s' * (len(take.shots) > 1)} {', '.join(map(str, take.shots))}",
            f"{take.tokens:,}",
            f"{take.seen:,}",
            short(take.cost.total),
            f"{take.cost.attention / take.cost.total:.0%}",
            _bytes(take.cache),
            _time(take.seconds),
        )
    return table


def _checked(
    mode: Mode,
    found: Plan,
    subject: _Subject,
    new_director: Callable[..., Director],
    *,
    window: int,
    device: torch.device,
) -> str:
    """Generate, and say planned against measured."""
    director = new_director(subject.model, subject.inputs, guidance=subject.guidance)
    given = _given(mode, subject.scene)
    begin = time.perf_counter()
    for i in given:
        director.give(i, director.scene[i].latents)
    for take in takes_of(mode, subject.scene, window=window, given=given, pattern=subject.pattern):
        director.keep(director.shoot(take), take)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - begin
    held = sum(cache.peak_nbytes for cache in director.caches) if mode == "causal" else 0
    words = [f"took {_time(took)}"]
    if found.seconds is not None:
        words = [f"planned {_time(found.seconds)}, took {_time(took)}: {took / found.seconds - 1:+.0%}"]
    if held:
        off = held / found.peak_cache - 1
        words.append(f"cache planned {_bytes(found.peak_cache)}, held {_bytes(held)}: {off:+.1%}")
    return "; ".join(words)


def _table(first: str, *others: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="left" if name == "kernel" else "right")
    return table


def _bytes(count: int) -> str:
    return f"{short(count, binary=True)}B"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
