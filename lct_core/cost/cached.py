"""What a cache holds while a scene is generated: the cache itself, run without values."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import gcd
from typing import NamedTuple, get_args

import torch

from lct_core.cache import Budget, KVCache, SiteSize, Space, StagedShots, Tier, shot_bytes
from lct_core.cache.budget import divided
from lct_core.cache.working import WorkingRows, rows_at_once
from lct_core.cost.meter import Meter
from lct_core.cost.passes import Pass
from lct_core.generation import Sampling
from lct_core.generation.history import room
from lct_core.layout import Shot
from lct_core.rope import Pairing


class Held(NamedTuple):
    """What a cache holds.

    Args:
        peak: :attr:`KVCache.peak_nbytes`.
        tiers: :attr:`KVCache.bytes_by_tier`.
        shots: What every shot that it holds takes as it is stored, by index in the scene.
    """

    peak: int
    tiers: dict[Tier, int]
    shots: Mapping[int, int]


def held(
    meter: Meter,
    scenes: Sequence[Sequence[Shot]],
    run: Sequence[Pass],
    *,
    sampling: Sampling,
    device: str = "cpu",
) -> Held:
    """What a cache holds after some passes, and held meanwhile.

    Args:
        meter: Knows the model's attentions.
        scenes: The shots of the branch of guidance that it is the cache of; of both, where they share it.
        run: The passes; of those that are text-free, both branches run one.
        sampling: How it generates; nothing is written to the folder of its budget.
        device: The kind that it is for: a GPU has a second row where a history is brought.

    Raises:
        ValueError: where the budget has no room.
    """
    sizes = meter.sites(next(shot for shot in scenes[0] if shot.role == "shot"))
    parts = gcd(*(size.heads for size in sizes.values()))
    shares = partial(_held, meter, scenes, run, sizes, sampling=sampling, device=device)
    try:
        return shares(parts)
    except ValueError:  # which speaks of a share of the budget
        return shares(1)


def least_budget(meter: Meter, scenes: Sequence[Sequence[Shot]], run: Sequence[Pass], *, device: str = "cpu") -> int:
    """Bytes on the device with which some passes can be run while no shot stays there.

    Room for the history at one attention, for what a call writes at all of them, and for a temporary copy at
    one of them.

    Args:
        meter: Knows the model's attentions.
        scenes: As :func:`held` takes them.
        run: The passes.
        device: The kind that it is for.
    """
    sizes = meter.sites(next(shot for shot in scenes[0] if shot.role == "shot")).values()

    def nbytes(size: SiteSize, shots: Callable[[Pass], Sequence[int]]) -> int:
        tokens = [sum(getattr(s[i], size.space) for i in shots(step)) for s in scenes for step in run if step.cached]
        return sum(size.nbytes(max(tokens, default=0)))

    rows = rows_at_once(torch.device(device)) * max(nbytes(size, lambda step: step.behind + step.row) for size in sizes)
    calls = [nbytes(size, lambda step: step.row) for size in sizes]
    holding = any(step.writes and step.times > 1 for step in run)
    return rows + (1 + holding) * sum(calls) + max(calls)


def _held(
    meter: Meter,
    scenes: Sequence[Sequence[Shot]],
    run: Sequence[Pass],
    sizes: Mapping[tuple[int, str], SiteSize],
    parts: int,
    *,
    sampling: Sampling,
    device: str,
) -> Held:
    """By one of so many equal shares of all heads."""
    shares = {key: size._replace(heads=size.heads // parts) for key, size in sizes.items()}
    pairing, storage, budget = meter.adapter.traits.pairing, sampling.storage, sampling.budget
    cache = KVCache(
        capacity=room(scenes[0], sampling.window, text=meter.adapter.traits.text == "joint"),
        storage=storage,
        budget=budget and _share(budget, parts),
    )
    cache._holdings[0].working = WorkingRows(kind=device)
    indices: dict[Hashable, int] = {}  # of what it holds, as it was appended
    for step, (branch, scene) in product(run, enumerate(scenes)):
        if not step.cached or (step.text_free and branch):
            continue
        ids = {i: (i, branch) if scene[i].role == "global" else i for i in (*step.behind, *step.row)}
        behind = [ids[i] for i in step.behind]
        if [entry.id for entry in cache.shots] != behind:
            cache.select(behind)
        shots = [replace(scene[i], text=0) if step.text_free else scene[i] for i in step.row]
        _call(cache, shares, shots, pairing, step)
        if step.writes and step.times > 1:
            cache.hold()
            _call(cache, shares, shots, pairing, step)
        if step.writes:
            cache.append(*(ids[i] for i in step.row))
            indices |= {ids[i]: i for i in step.row}
    entries = {entry.id: entry for entry in cache.held}
    spaces = get_args(Space)
    each = {
        i: shot_bytes([*sizes.values()], {space: entry.tokens(space) for space in spaces}, storage)
        for i, entry in entries.items()
    }
    tiers = {tier: parts * count for tier, count in cache.bytes_by_tier.items()}
    if budget is not None and budget.folder is not None and budget.host is not None:
        for i in reversed(budget.policy([entries[i] for i in indices])):
            if entries[i].tier == "host" and tiers["host"] > budget.host:
                tiers |= {"host": tiers["host"] - each[i], "disk": tiers["disk"] + each[i]}
    shots_bytes: Counter[int] = Counter()
    for i, index in indices.items():
        shots_bytes[index] += each[i]
    return Held(parts * cache.peak_nbytes, tiers, shots_bytes)


def _share(budget: Budget, parts: int) -> Budget:
    """A budget for a share of all bytes; what goes to files is left in host memory, as there is nothing to write."""
    share = divided(budget, parts)
    return replace(share, host=None if budget.folder else share.host, folder=None)


def _call(
    cache: KVCache,
    sites: Mapping[tuple[int, str], SiteSize],
    shots: Sequence[Shot],
    pairing: Pairing | None,
    step: Pass,
) -> None:
    """Write what a call of the model writes."""
    extents = [max(1, *shot.grid) for shot in shots]  # whatever they are, the same shots are moved
    origins = [cache.end + sum(extents[:n]) for n in range(len(shots))]
    staged = StagedShots(tuple(shots), torch.zeros(1, len(shots)), tuple(origins), tuple(extents))
    diagonal = None if pairing is None else torch.zeros(1, 1)
    with cache.writing(staged, scheme="anchored", diagonal=diagonal, pairing=pairing) as write:
        for key, size in sites.items():
            if step.text_free and size.space == "text":
                continue
            tokens = sum(getattr(shot, size.space) for shot in shots)
            k, v = (torch.empty(1, tokens, size.heads, n, dtype=size.dtype, device="meta") for n in size.channels)
            write(key, size.space, k, v)
