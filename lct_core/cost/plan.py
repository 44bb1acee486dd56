"""What a generation takes before it is run: operations, bytes of the cache, memory, time."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Unpack, get_args

from lct_core.backbone import Backbone
from lct_core.cache import Tier
from lct_core.cost.cached import held, least_budget
from lct_core.cost.meter import Cost, Meter
from lct_core.cost.passes import Pass, passes
from lct_core.cost.throughput import Throughput
from lct_core.engine.visibility import TextScope
from lct_core.generation import Sampling, Take
from lct_core.generation.sampling import PlanOptions
from lct_core.generation.takes import Mode, takes_of
from lct_core.generation.write import check_shared_history
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
        peak_cache: Most bytes that the caches hold on the device, temporary copies included.
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
    given: Collection[int] = (),
    pattern: str | Pattern = "bidirectional",
    negative: Sequence[Shot] | None = None,
    device: str = "cpu",
    throughput: Throughput | None = None,
    sampling: Sampling | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Plan a generation from token counts alone, for one entry of a batch.

    Operations are exact. Bytes of the cache are those of :attr:`KVCache.peak_nbytes`. Activations are those of torch's
    own attention, without what a kernel or the allocator needs besides. Time is as good as the throughput is.

    Args:
        model: A scene model; an adapter, whose model may be without weights; or what has measured one.
        scene: The shots' token counts (:meth:`Backbone.shot`), a global shot first where there is one.
        mode: One of :mod:`lct_core.generation`, or takes of one's own.
        given: Shots that are not to be generated, by index.
        pattern: Who sees whom in a row; the mode ``causal`` is context-causal.
        negative: The scene with the negative prompts of guidance, which runs every pass a second time and keeps a
            second cache, unless its scale is 1 (default: no guidance).
        device: The kind of device that it is run on, ``"cpu"`` or ``"cuda"``.
        throughput: How fast the model is (default: no time is given).
        sampling: How it generates, see :func:`lct_core.cost.passes` (default: ``Sampling()``). Where a history is
            brought and the nearest step is the last, ``write="nearest"`` takes one call's keys and values less than is
            said.
        options: Fields of the sampling.

    Raises:
        ValueError: for guidance without negative prompts, what no model or cache would take, and a model that cannot be
            run without values.
    """
    sampling = Sampling.of(sampling, options)
    adapter = model if isinstance(model, Backbone) else model.adapter
    prompted = adapter.traits.text == "cross" and any(shot.role == "global" for shot in scene)
    text: TextScope = "own_and_global" if prompted else "own"
    meter = model if isinstance(model, Meter) else Meter(model, text=text)
    if negative is not None and [(s.grid, s.role) for s in negative] != [(s.grid, s.role) for s in scene]:
        raise ValueError(f"negative: got {list(negative)}, expected the scene's shots with texts of other lengths")
    spared = sampling.guidance is not None and not sampling.guided
    scenes = [scene] if negative is None or spared else [scene, negative]
    if negative is None and sampling.guided:
        raise ValueError(
            "negative: got None, but the sampling has guidance, which runs every pass a second time; expected the "
            "scene with the negative prompts' tokens"
        )
    named = partial(takes_of, scene=scene, window=sampling.window, given=given, pattern=pattern)
    takes = named(mode) if isinstance(mode, str) else [*mode]
    if sampling.shares_history:
        if negative is None:
            raise ValueError("shared_history: got True without negative, whose branch is to share the history")
        check_shared_history(meter.adapter, meter.text)
    run = passes(scene, takes, sampling=sampling)
    hold = partial(held, meter, run=run, sampling=sampling, device=device)
    seeing = [tuple(map(tuple, scenes))] if sampling.shares_history else [(tuple(branch),) for branch in scenes]
    alike = {branches: hold(branches) for branches in seeing}
    caches = [alike[branches] for branches in seeing]

    def taken(shots: tuple[int, ...], group: Sequence[Pass]) -> PlannedTake:
        step = max(group, key=lambda step: step.times)
        by_branch = group, [step for step in group if not step.text_free]
        cost = sum((meter.cost(*branch) for branch in zip(scenes, by_branch, strict=False)), Cost())
        return PlannedTake(
            shots=shots,
            tokens=sum(scene[i].tokens for i in step.row),
            seen=sum(scene[i].tokens for i in step.behind),
            cost=cost,
            cache=sum(cache.shots.get(i, 0) for cache in caches for i in shots),
            seconds=None if throughput is None else throughput.seconds(cost),
        )

    rows = tuple(taken(shots, group) for shots, group in _grouped(run, takes).items())
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


def _grouped(run: Sequence[Pass], takes: Sequence[Take]) -> dict[tuple[int, ...], list[Pass]]:
    """The passes by the take that they are run for; of a shot that none makes, by the shot."""
    made_with = {i: take.shots for take in takes for i in take.shots}
    groups: dict[tuple[int, ...], list[Pass]] = {}
    for step in run:
        groups.setdefault(made_with.get(step.made[0], step.made), []).append(step)
    return groups
