"""``lct plan``: what it takes to generate a scene, before it is generated."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from lct_core.cache import Budget
from lct_core.cache.budget import STORAGES
from lct_core.checkpoints import Tuned
from lct_core.cli import plan_tables
from lct_core.cli.asked import adapter_of
from lct_core.cli.machine import seeded, usable, within_memory
from lct_core.cli.plan_kernels import kernels_of
from lct_core.cli.plan_subject import Subject, Wanted, of_checkpoint, of_model
from lct_core.cli.plan_tables import in_bytes, in_time
from lct_core.cli.sampling import sampling_of
from lct_core.cli.user_code import current_folder_on_path, own_code
from lct_core.cost import Mode, Plan, Throughput, measure, plan, takes_of
from lct_core.generation import Director, Guidance, Sampling
from lct_core.script import read_script

_MODES: tuple[Mode, ...] = get_args(Mode)
_WIDTH = 120  # columns; a narrower terminal wraps lines rather than lose numbers
_OFF_TIME, _OFF_BYTES = 0.15, 0.02  # how far a run may be from its plan
_LESS_MEMORY = "choose a smaller --size, --window or --shots, or --storage int8"


def run(
    *,
    script: Path,
    checkpoint: Path | None,
    backbone: str | None,
    model: str | None,
    size: str | None,
    text: int | None,
    shots: int | None,
    modes: tuple[Mode, ...],
    guidance: bool,
    shared_history: bool,
    dtype: str | None,
    kernel: tuple[str, ...],
    device: str,
    measuring: bool,
    every_tier: bool,
    throughput: Path | None,
    check: bool,
    seed: int,
    **fields: Any,
) -> None:
    """Plan the generation of a scene and print the plan; the arguments are the command's."""
    where = usable(device)
    read = read_script(script)
    if shots is not None:
        read = replace(read, shots=tuple(islice(cycle(read.shots), shots)))
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
    sampling = sampling_of(guidance=Guidance.scale if guidance else None, shared_history=shared_history, **fields)
    wanted = Wanted(read, size, text, sampling, dtype, where, seed)
    tuned = None if checkpoint is None else Tuned.load(checkpoint)
    with (
        current_folder_on_path(),
        own_code(model if tuned is None else tuned.card.factory),
        within_memory(where, fix=_LESS_MEMORY),
        seeded(seed),
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
        kernels = {mode: kernels_of(mode, kernel, subject, sampling.window, where) for mode in modes or _MODES}
        known: dict[str, Throughput] = {}  # of every kernel; empty where there is nothing to expect times from
        if measuring:
            known = {name: _measured(subject, sampling, name) for name in kernel}
            if throughput is not None:
                known[kernel[0]].save(throughput)
        elif throughput is not None:
            known = {kernel[0]: Throughput.load(throughput)}

        def planned(mode: Mode, sampling: Sampling, throughput: Throughput | None) -> Plan:
            return plan(
                subject.meter,
                subject.scene,
                mode=mode,
                given=subject.given(mode),
                pattern=subject.pattern,
                device=where.type,
                throughput=throughput,
                negative=subject.negative,
                sampling=sampling,
            )

        plans = {mode: planned(mode, sampling, known.get(kernel[0])) for mode in kernels}
        console = Console(highlight=False, markup=False, emoji=False, width=_WIDTH)
        console.print(plan_tables.heading(subject, where, known[kernel[0]].where if known else None))
        console.print(
            plan_tables.modes_table(plans, kernels, known), plan_tables.LEGEND, plan_tables.serving(kernels), sep="\n"
        )
        if "causal" in plans:
            timed = partial(_measured, subject, kernel=kernel[0]) if every_tier else None
            console.print(plan_tables.cache_table(_ways(partial(planned, "causal"), plans["causal"], sampling, timed)))
        for mode in modes:
            console.print(plan_tables.takes_table(mode, plans[mode]))
        for mode in modes if check else ():
            for line in _checked(mode, plans[mode], subject, seed=seed, device=where):
                console.print(f"{mode}: {line}")


def _measured(subject: Subject, sampling: Sampling, kernel: str) -> Throughput:
    assert subject.model is not None
    subject.model.kernel = kernel
    make = partial(subject.model.new_cache, storage=sampling.storage, budget=sampling.budget)
    return measure(subject.model, subject.scene, window=sampling.window, new_cache=make)


def _ways(
    planned: Callable[..., Plan],
    asked: Plan,
    sampling: Sampling,
    timed: Callable[..., Throughput] | None,
) -> list[plan_tables.CacheChoice]:
    """The ways to keep a history: on the device, and where the budget has it, or else in host memory."""
    ways = []
    away = sampling.budget or Budget(device=asked.least_budget)
    for storage in STORAGES:
        for where, budget in (("on the device", None), ("as budgeted" if sampling.budget else "in host memory", away)):
            found: Plan | None = asked
            if (storage, budget) != (sampling.storage, sampling.budget):
                other = replace(sampling, storage=storage, budget=budget)
                try:
                    found = planned(other, timed and timed(other))
                except ValueError:  # it has no room
                    found = None
            ways.append(plan_tables.CacheChoice(storage, where, found))
    return ways


def _checked(mode: Mode, found: Plan, subject: Subject, *, seed: int, device: torch.device) -> list[str]:
    """Generate, and say planned against measured."""
    assert subject.model is not None
    director = Director(subject.model, subject.inputs, seed=seed, sampling=subject.sampling)
    given = subject.given(mode)
    begin = time.perf_counter()
    for i in given:
        director.give(i, director.scene[i].latents)
    for take in takes_of(mode, subject.scene, window=subject.sampling.window, given=given, pattern=subject.pattern):
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
