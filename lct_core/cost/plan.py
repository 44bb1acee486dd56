"""What a generation takes before it is run: operations, bytes of the cache, memory, time."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

from lct_core.backbone.adapter import Backbone
from lct_core.cache import Budget, Storage, Tier
from lct_core.cost.cached import held, least_budget
from lct_core.cost.meter import Cost, Meter
from lct_core.cost.passes import Pass, passes
from lct_core.cost.throughput import Throughput
from lct_core.engine.visibility import TextScope
from lct_core.generation.takes import Mode, Take, takes_of
from lct_core.generation.write import Write, check_shared_history
from lct_core.layout import Shot
from lct_core.patterns import Pattern
from lct_core.scene_model import SceneModel


@dataclass(frozen=True, kw_only=True)
class PlannedTake:
    """One take of a plan; or a shot that is given, or global, and written to the cache.

    Args:
        shots: What is made, by index in the scene.
        tokens: How many go through the layers in each step.
        seen: How many are seen besides, from the cache.
        cost: Operations of all steps and branches, and of writing its keys and values where they are needed.
        cache: Bytes that its keys and values take, as they are stored, in all branches.
        seconds: Expected time; None where no throughput is known.
    """

    shots: tuple[int, ...]
    tokens: int
    seen: int
    cost: Cost
    cache: int
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a generation takes.

    Args:
        takes: One by one, in order.
        tokens: How many go through the layers, in all passes and branches.
        cost: Operations in all.
        cache: Bytes of keys and values that are held in the end, by tier, in all branches.
        least_budget: Least :attr:`Budget.device` of each branch with which no shot need stay on the device.
        peak_cache: Most bytes that the caches hold on the device, copies in passing included.
        weights: Bytes of the model's weights and buffers.
        activations: Most bytes that are alive in a pass beside them, for the shots of a row.
        seconds: Expected time; None where no throughput is known.
    """

    takes: tuple[PlannedTake, ...]
    tokens: int
    cost: Cost
    cache: dict[Tier, int]
    least_budget: int
    peak_cache: int
    weights: int
    activations: int
    seconds: float | None

    @property
    def peak(self) -> int:
        """Bytes of the device's memory that are needed: weights, cache and activations."""
        return self.weights + self.peak_cache + self.activations


def plan(
    model: SceneModel | Backbone | Meter,
    scene: Sequence[Shot],
    *,
    mode: Mode | Sequence[Take] = "causal",
    steps: int = 32,
    window: int = 9,
    given: Collection[int] = (),
    pattern: str | Pattern = "bidirectional",
    negative: Sequence[Shot] | None = None,
    shared_history: bool = False,
    write: Write = "pass",
    storage: Storage = "native",
    budget: Budget | None = None,
    device: str = "cpu",
    throughput: Throughput | None = None,
) -> Plan:
    """Plan a generation from token counts alone, for one entry of a batch.

    Operations are exact. Bytes of the cache are those of :attr:`KVCache.peak_nbytes`. Activations are those of torch's
    own attention, without what a kernel or the allocator needs besides. Time is as good as the throughput is.

    Args:
        model: A scene model; an adapter, whose model may be without weights; or what has measured one.
        scene: The shots' token counts (:meth:`Backbone.shot`), a global shot first where there is one.
        mode: One of :mod:`lct_core.generation`, or takes of one's own.
        steps: Calls of the model for every take (paper, A.2: 32).
        window: Most shots that a shot sees, itself counted (paper, 4: nine).
        given: Shots that are not to be generated, by index.
        pattern: Who sees whom in a row; the mode ``causal`` is context-causal.
        negative: The scene with the negative prompts of guidance, which runs every pass a second time and keeps a
            second cache (default: no guidance).
        shared_history: Whether one cache serves both branches of guidance, as :class:`Guidance` has it.
        write: When keys and values are written, see :func:`lct_core.cost.passes`. Where a history is brought and the
            nearest step is the last, ``"nearest"`` takes one call's keys and values less than is said.
        storage: How they are kept.
        budget: What may be held where (default: all on the device).
        device: The kind of device that it is run on, ``"cpu"`` or ``"cuda"``.
        throughput: How fast the model is (default: no time is given).

    Raises:
        ValueError: for what no model or cache would take, and a model that cannot be run without values.
    """
    first, cross = [shot for shot in scene if shot.role == "global"], _adapter(model).traits.text == "cross"
    text: TextScope = "own_and_global" if first and cross else "own"
    meter = model if isinstance(model, Meter) else Meter(model, text=text)
    scenes = [scene] if negative is None else [scene, negative]
    if any([(s.grid, s.role) for s in branch] != [(s.grid, s.role) for s in scene] for branch in scenes):
        raise ValueError(f"negative: got {list(scenes[-1])}, expected the scene's shots with texts of other lengths")
    takes = takes_of(mode, scene, window=window, given=given, pattern=pattern) if isinstance(mode, str) else [*mode]
    if shared_history:
        if negative is None:
            raise ValueError("shared_history: got True without negative, whose branch is to share the history")
        check_shared_history(meter.adapter, meter.text)
    run = passes(scene, takes, steps=steps, window=window, write=write, shared_history=shared_history)
    hold = partial(held, meter, run=run, window=window, storage=storage, budget=budget, device=device)
    seeing = [tuple(map(tuple, scenes))] if shared_history else [(tuple(branch),) for branch in scenes]
    alike = {branches: hold(branches) for branches in seeing}
    caches = [alike[branches] for branches in seeing]
    rows = tuple(
        _take(shots, group, meter, scenes, sum(cache.shots.get(i, 0) for cache in caches for i in shots), throughput)
        for shots, group in _grouped(run, takes).items()
    )
    cost = sum((row.cost for row in rows), Cost())
    largest = max(run, key=lambda step: sum(scene[i].tokens for i in step.row))
    return Plan(
        takes=rows,
        tokens=sum(
            step.times * sum(branch[i].tokens for i in step.row)
            for n, branch in enumerate(scenes)
            for step in run
            if not (n and step.text_free)
        ),
        cost=cost,
        cache={tier: sum(cache.tiers[tier] for cache in caches) for tier in get_args(Tier)},
        least_budget=max(least_budget(meter, branches, run, device=device) for branches in alike),
        peak_cache=sum(cache.peak for cache in caches),
        weights=meter.weights,
        activations=max(meter.activations(branch, largest, device=device) for branch in scenes),
        seconds=None if throughput is None else throughput.seconds(cost),
    )


def _adapter(model: SceneModel | Backbone | Meter) -> Backbone:
    return model if isinstance(model, Backbone) else model.adapter


def _grouped(run: Sequence[Pass], takes: Sequence[Take]) -> dict[tuple[int, ...], list[Pass]]:
    """The passes by the take that they are run for; of a shot that none makes, by the shot."""
    made_with = {i: take.shots for take in takes for i in take.shots}
    groups: dict[tuple[int, ...], list[Pass]] = {}
    for step in run:
        groups.setdefault(made_with.get(step.made[0], step.made), []).append(step)
    return groups


def _take(
    shots: tuple[int, ...],
    group: Sequence[Pass],
    meter: Meter,
    scenes: Sequence[Sequence[Shot]],
    cache: int,
    throughput: Throughput | None,
) -> PlannedTake:
    step = max(group, key=lambda step: step.times)
    by_branch = group, [step for step in group if not step.text_free]
    cost = sum((meter.cost(*branch) for branch in zip(scenes, by_branch, strict=False)), Cost())
    return PlannedTake(
        shots=shots,
        tokens=sum(scenes[0][i].tokens for i in step.row),
        seen=sum(scenes[0][i].tokens for i in step.behind),
        cost=cost,
        cache=cache,
        seconds=None if throughput is None else throughput.seconds(cost),
    )
