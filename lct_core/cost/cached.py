"""What a cache holds while a scene is generated: the cache itself, run without values."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import gcd
from typing import NamedTuple

import torch

from lct_core.cache import Budget, KVCache, SiteSize, Stage, Storage, Tier, shot_bytes
from lct_core.cost.meter import Meter
from lct_core.cost.passes import Pass
from lct_core.layout import Shot
from lct_core.rope import Pairing


class Held(NamedTuple):
    """What a cache holds.

    Args:
        peak: :attr:`KVCache.peak_nbytes`.
        tiers: :attr:`KVCache.bytes_by_tier`.
        ids: The shots that it holds, by index.
    """

    peak: int
    tiers: dict[Tier, int]
    ids: tuple[Hashable, ...]


def held(
    meter: Meter,
    scene: Sequence[Shot],
    run: Sequence[Pass],
    *,
    storage: Storage = "native",
    budget: Budget | None = None,
    device: str = "cpu",
) -> Held:
    """What the cache of one branch of guidance holds after some passes, and held meanwhile.

    Args:
        meter: Knows the model's attentions.
        scene: The shots.
        run: The passes.
        storage: As :class:`KVCache` takes it.
        budget: As :class:`KVCache` takes it; nothing is written to its folder.
        device: The kind that it is for: a GPU has a second row where a history is brought.

    Raises:
        ValueError: where the budget has no room.
    """
    sizes = meter.sites(next(shot for shot in scene if shot.role == "shot"))
    parts = gcd(*(size.heads for size in sizes.values()))
    shares = partial(_held, meter, scene, run, sizes, storage=storage, budget=budget, device=device)
    try:
        return shares(parts)
    except ValueError:  # which speaks of a share of the budget
        return shares(1)


def nbytes(meter: Meter, shot: Shot, storage: Storage) -> int:
    """Bytes of a shot's keys and values, as they are stored, in one branch of guidance."""
    sizes = [*meter.sites(shot).values()]
    return shot_bytes(sizes, {space: getattr(shot, space) for space in ("tokens", "video", "text")}, storage)


def _held(
    meter: Meter,
    scene: Sequence[Shot],
    run: Sequence[Pass],
    sizes: Mapping[tuple[int, str], SiteSize],
    parts: int,
    *,
    storage: Storage,
    budget: Budget | None,
    device: str,
) -> Held:
    """By one of so many equal shares of all heads."""
    sizes = {key: size._replace(heads=size.heads // parts) for key, size in sizes.items()}
    pairing, second = meter.adapter.traits.pairing, 0
    cache = _WithoutValues(
        capacity=sum(shot.tokens for shot in scene if shot.video),
        storage=storage,
        budget=budget and _share(budget, parts),
    )
    for step in run:
        if not step.cached:
            continue
        if [entry.id for entry in cache.shots] != [*step.behind]:
            cache.select(step.behind)
        shots = [scene[i] for i in step.row]
        _call(cache, sizes, shots, pairing)
        if step.writes and step.times > 1:
            cache.hold()
            _call(cache, sizes, shots, pairing)
        second = max(second, cache._working.nbytes if device == "cuda" else 0)
        if step.writes:
            cache.append(*step.row)
    tiers = {tier: parts * count for tier, count in cache.bytes_by_tier.items()}
    if budget is not None and budget.folder is not None and budget.host is not None:
        entries = {entry.id: entry for entry in cache.held}
        for i in reversed(budget.policy([entries[i] for step in run if step.writes for i in step.row])):
            if entries[i].tier == "host" and tiers["host"] > budget.host:
                there = nbytes(meter, entries[i].shot, storage)
                tiers |= {"host": tiers["host"] - there, "disk": tiers["disk"] + there}
    return Held(parts * (cache.peak_nbytes + second), tiers, cache.ids)


class _WithoutValues(KVCache):
    """A cache of tensors on the meta device, where nothing need be brought or turned."""

    def _bring(self, key: tuple[int, str], keys: torch.Tensor, values: torch.Tensor) -> None:
        pass

    def _turn(self, steps: int, like: torch.Tensor) -> None:
        pass


def _share(budget: Budget, parts: int) -> Budget:
    """A budget for a share of all bytes; what goes to files is left in host memory, as there is nothing to write."""
    device, host = (None if count is None else count // parts for count in (budget.device, budget.host))
    return replace(budget, device=device, host=None if budget.folder else host, folder=None)


def _call(
    cache: KVCache, sites: Mapping[tuple[int, str], SiteSize], shots: Sequence[Shot], pairing: Pairing | None
) -> None:
    """Write what a call of the model writes."""
    cache.begin("anchored", None if pairing is None else torch.empty(1, 1, device="meta"), pairing)
    for key, size in sites.items():
        tokens = sum(getattr(shot, size.space) for shot in shots)
        k, v = (torch.empty(1, tokens, size.heads, n, dtype=size.dtype, device="meta") for n in size.channels)
        cache.write(key, size.space, k, v)
    extents = [max(1, *shot.grid) for shot in shots]  # whatever they are, the same shots are moved
    origins = [cache.end + sum(extents[:n]) for n in range(len(shots))]
    cache.stage(Stage(tuple(shots), torch.zeros(1, len(shots)), tuple(origins), tuple(extents)))
