"""What ``lct plan`` prints."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import torch
from rich.table import Table

from lct_core.cache import Tier
from lct_core.cli.plan_kernels import Kernels
from lct_core.cli.plan_subject import Subject
from lct_core.cli.tables import short, table
from lct_core.cost import Mode, Plan, Throughput


class CacheChoice(NamedTuple):
    """One way to keep the history.

    Args:
        storage: ``native``, ``int8`` or ``fp8``.
        where: In words.
        plan: What is then needed; None where there is no room.
    """

    storage: str
    where: str
    plan: Plan | None


def heading(subject: Subject, device: torch.device, measured_with: str | None) -> str:
    """What was asked about."""
    shots = [shot for shot in subject.scene if shot.role == "shot"]
    tokens = sorted({shot.tokens for shot in shots})
    each = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    adapter = subject.meter.adapter
    dtype = str(subject.meter.dtype).removeprefix("torch.")
    words = f"{len(shots)} shots of {each} tokens" + ", after a global prompt" * (len(shots) < len(subject.scene))
    weights = in_bytes(subject.meter.weights)
    times = "not measured; --measure does it" if measured_with is None else f"as measured with {measured_with}"
    return f"{words}\n{type(adapter.model).__name__} of {weights}, {dtype}, on {device}\ntimes: {times}"


def modes_table(plans: Mapping[Mode, Plan], kernels: Mapping[Mode, Kernels], known: Mapping[str, Throughput]) -> Table:
    """A row for every mode and kernel; times where the throughput with the kernel is known."""
    columns = "tokens", "operations", "in attention", "cache", "activations", "memory", "time"
    made = table("mode", *columns, numbers=True)
    made.add_column("kernel")
    for mode, found in plans.items():
        for name, asked in kernels[mode].chosen.items():
            made.add_row(
                mode,
                f"{short(found.tokens).strip()}",
                in_flops(found.cost.total),
                f"{found.cost.attention / found.cost.total:.0%}",
                in_bytes(found.peak_cache),
                in_bytes(found.activations),
                in_bytes(found.peak),
                in_time(known[asked].seconds(found.cost) if asked in known else None),
                name,
            )
    return made


LEGEND = (
    "tokens: through the layers, in all steps and branches; cache: most on the device at once, in all branches;\n"
    "memory: weights, cache and activations"
)


def serving(kernels: Mapping[Mode, Kernels]) -> str:
    """Which kernels serve which modes."""
    modes: dict[str, list[str]] = {}
    for mode, found in kernels.items():
        modes.setdefault(", ".join(found.serving) or "none", []).append(mode)
    return "\n".join(f"kernels that serve {', '.join(of)}: {names}" for names, of in modes.items())


def cache_table(ways: Sequence[CacheChoice]) -> Table:
    """How the history may be kept, and what that takes."""
    plans = [way.plan for way in ways if way.plan is not None]
    tiers = [tier for tier in get_args(Tier) if any(plan.cache[tier] for plan in plans)]
    numbers = ("a shot", "in all", *(f"on {tier}" for tier in tiers), "most on device", "memory", "time")
    made = table("cache of causal", "where", *numbers, numbers=True)
    made.columns[1].justify, made.columns[1].no_wrap = "left", True
    for way in ways:
        if way.plan is None:
            made.add_row(way.storage, way.where, *["-"] * (len(numbers) - 1), "over budget")
            continue
        made.add_row(
            way.storage,
            way.where,
            in_bytes(max(take.cache for take in way.plan.takes)),
            in_bytes(sum(way.plan.cache.values())),
            *(in_bytes(way.plan.cache[tier]) for tier in tiers),
            in_bytes(way.plan.peak_cache),
            in_bytes(way.plan.peak),
            in_time(way.plan.seconds),
        )
    return made


def takes_table(mode: Mode, found: Plan) -> Table:
    """A mode, take by take."""
    made = table(mode, "tokens", "seen in cache", "operations", "in attention", "its cache", "time", numbers=True)
    for take in found.takes:
        made.add_row(
            f"shot{'s' * (len(take.shots) > 1)} {', '.join(map(str, take.shots))}",
            f"{take.tokens:,}",
            f"{take.seen:,}",
            in_flops(take.cost.total),
            f"{take.cost.attention / take.cost.total:.0%}",
            in_bytes(take.cache),
            in_time(take.seconds),
        )
    return made


def in_bytes(count: int) -> str:
    """Bytes, as people write them."""
    return f"{short(count, binary=True)}B"


def in_flops(count: int) -> str:
    """Floating point operations, as people write them."""
    return f"{short(count)}FLOP"


def in_time(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return "not known"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
