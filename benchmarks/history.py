"""What a history is worth on a trained model: ``python -m benchmarks.history CHECKPOINT [--out FILE]``.

Selection against recomputing, keys and values in 8 bits, when they are written, sparse attention, and long scenes: each
on held-out scenes of the demo's world, of which no text tells a colour, so that a shot has its colours from its history
alone. Appearance errors and adherence are those of ``lct_core.demo.metrics``.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, provenance, timing
from benchmarks.report import table
from lct_core import KVCache, Layout, SceneModel, ShotInput, context_causal
from lct_core.backbone.inputs import collate_shots
from lct_core.checkpoints.tuned import Tuned
from lct_core.codec import Codec
from lct_core.demo.metrics import adherence, appearance_error, drift
from lct_core.demo.world import WorldScene, sample_scene
from lct_core.generation import Director, Guidance, Step, Take, negative_texts, start_scene
from lct_core.noise import keyed_generator
from lct_core.patterns import Pattern, first_frames
from lct_core.plan import AttentionPlan
from lct_core.routing import Tally, TopK

Measure = tuple[dict[str, Any], list[timing.Comparison]]
"""A table, as :func:`benchmarks.report.tables` takes it, and what it holds against what."""

RESAMPLED = 1000  # times that scenes are drawn again, to tell how far a ratio hangs on which they were


@dataclass(frozen=True, eq=False, kw_only=True)
class Lab:
    """A trained model and what is common to all measures.

    Args:
        model: Context-causal.
        codec: Its codec.
        size: Frames, height and width of a shot.
        window: Most shots of a scene that it was trained on.
        count: How many scenes, never seen in training, are generated at once.
        steps: Euler steps.
        guidance: Scale (default: the demo's).
        seed: Of scenes and noise.
    """

    model: SceneModel
    codec: Codec
    size: tuple[int, int, int]
    window: int
    count: int
    steps: int
    guidance: float = 2.0
    seed: int = 0

    def scenes(self, shots: int) -> "Scenes":
        """Scenes of so many shots, the same each time."""
        random = keyed_generator(self.seed, "history", shots)
        worlds = [sample_scene(shots, generator=random) for _ in range(self.count)]
        inputs = [
            start_scene(world.script, self.codec, self.size, seed=self.seed, scene=i) for i, world in enumerate(worlds)
        ]
        return Scenes(self, worlds, [collate_shots(parts) for parts in zip(*inputs, strict=True)])


@dataclass(frozen=True, eq=False)
class Scenes:
    """Scenes that can be generated, all at once; their shots count from 1, behind the global one."""

    lab: Lab
    worlds: Sequence[WorldScene]
    inputs: Sequence[ShotInput]

    def direct(self, **changes: Any) -> Director:
        """A director of them."""
        lab, guidance = self.lab, Guidance(scale=self.lab.guidance, **negative_texts(self.lab.codec))
        return Director(lab.model, self.inputs, guidance=guidance, seed=lab.seed, steps=lab.steps, **changes)

    def recent(self, shot: int, window: int | None = None) -> tuple[int, ...]:
        """The last earlier shots that fit the window (default: that of the model)."""
        return tuple(range(max(1, shot + 1 - (window or self.lab.window)), shot))

    def make(
        self,
        director: Director,
        shots: Sequence[int],
        *,
        window: int | None = None,
        pattern: str | Pattern = "context_causal",
    ) -> float:
        """Make shots one after the other, each from the last that fit the window; returns the seconds."""
        begin = perf_counter()
        for shot in shots:
            take = Take((shot,), history=self.recent(shot, window), pattern=pattern)
            director.keep(director.shoot(take), take)
        return perf_counter() - begin

    def frames(self, latents: Tensor) -> Tensor:
        """The frames of one shot in all scenes."""
        return torch.stack([self.lab.codec.decode(z) for z in latents])

    def errors(self, shots: Mapping[int, Tensor]) -> list[float]:
        """Every scene's appearance error over some shots, by their latents."""
        frames = {shot: self.frames(latents) for shot, latents in shots.items()}
        return [
            appearance_error([frames[n][i] for n in frames], [world.texts[n - 1] for n in frames]).total
            for i, world in enumerate(self.worlds)
        ]

    def adherence(self, shots: Mapping[int, Tensor]) -> float:
        """How well some shots show what their texts tell, on average."""
        return mean(
            adherence(frame, world.texts[shot - 1])
            for shot, latents in shots.items()
            for frame, world in zip(self.frames(latents), self.worlds, strict=True)
        )


def selection(lab: Lab) -> Measure:
    """The sixth shot from two of five: their keys selected from the cache, or the two run again by themselves."""
    scene = lab.scenes(6)
    director = scene.direct()
    scene.make(director, range(1, 6))
    chosen = (1, 4)
    takes = {
        "1 and 4, run again": Take((6,), history=chosen, cached=False),
        "1 and 4, selected from the cache": Take((6,), history=chosen),
        "the last three, from the cache": Take((6,), history=scene.recent(6)),
    }
    noise = scene.inputs[6].latents
    firsts, frames, errors, rows = {}, {}, {}, []
    for name, take in takes.items():
        steps: list[Step] = []
        made = director.shoot(take, callback=steps.append)[6]
        firsts[name], frames[name] = steps[0].latents[0] - noise, scene.frames(made)
        seen = {shot: director.done[shot] for shot in chosen}
        errors[name] = scene.errors({**seen, 6: made})
        rows.append(
            {
                "History of the sixth shot": name,
                "Its first prediction differs by": _difference(firsts[name], firsts["1 and 4, run again"]),
                "Its frames differ by": _difference(frames[name], frames["1 and 4, run again"]),
                "Appearance error of 1, 4 and 6": mean(errors[name]),
                "Adherence": scene.adherence({6: made}),
            }
        )
    about = (
        "Keys in the cache were written behind the shots that theirs saw; those of a history that is run again see the "
        "chosen shots alone. Differences are those from running again, root mean square, relative."
    )
    ratio = _ratio(errors["1 and 4, selected from the cache"], errors["1 and 4, run again"])
    return (
        {"title": "Selecting shots, and recomputing without the others", "about": about, "rows": rows},
        [timing.Comparison("selected: appearance error / run again", ratio)],
    )


def storage(lab: Lab) -> Measure:
    """Keys and values in 8 bits, beside those in the dtype that the model computes them in."""
    scene = lab.scenes(lab.window)
    shots = range(1, lab.window + 1)
    rows, comparisons = [], []
    for dtype in (torch.float32, torch.bfloat16):
        native: list[float] = []
        for kind in ("native", "int8", "fp8"):
            director = scene.direct(new_cache=partial(KVCache, storage=kind))
            with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
                scene.make(director, shots)
            errors = scene.errors(director.done)
            native = native or errors
            of_shots = [of for cache in director.caches for of in cache.errors.values()]
            keys, values = map(max, zip((0.0, 0.0), *of_shots, strict=True))
            name = f"{kind}, model in {str(dtype).removeprefix('torch.')}"
            ratio = _ratio(errors, native)
            rows.append(
                {
                    "Storage": name,
                    "Largest error of keys": keys,
                    "Of values": values,
                    "Bytes": sum(_bytes_kept(cache) for cache in director.caches),
                    "Appearance error": mean(errors),
                    "/ native": ratio.median,
                    "Adherence": scene.adherence(director.done),
                }
            )
            if kind != "native":
                comparisons.append(timing.Comparison(f"{name}: appearance error / native", ratio, most=1.1))
    about = (
        f"{lab.window} shots in a row. Errors of keys and values are relative to a shot's largest, in its worst layer."
    )
    return {"title": "Keys and values in 8 bits", "about": about, "rows": rows}, comparisons


def writing(lab: Lab) -> Measure:
    """Keys and values written in a pass of their own at t_c, and kept from the denoising step nearest to it."""
    scene = lab.scenes(lab.window)
    shots = range(1, lab.window + 1)
    rows, comparisons = [], []
    for t_c in (100.0, 300.0):
        of_pass: dict[int, Tensor] = {}
        errors: dict[str, list[float]] = {}
        for write in ("pass", "nearest"):
            director = scene.direct(t_c=t_c, write=write)
            with _Calls(lab.model) as calls:
                seconds = scene.make(director, shots)
            (level,) = {entry.level[0] for entry in director.caches[0].shots if entry.shot.role == "shot"}
            of_pass = of_pass or director.done
            errors[write] = scene.errors(director.done)
            rows.append(
                {
                    "t_c": t_c,
                    "Keys written": {"pass": "in a pass", "nearest": "in the nearest step"}[write],
                    "At": 1000 * level,
                    "Passes": calls.count,
                    "Seconds": seconds,
                    "The second shot differs by": _difference(scene.frames(director.done[2]), scene.frames(of_pass[2])),
                    "Appearance error": mean(errors[write]),
                    "Adherence": scene.adherence(director.done),
                }
            )
        what = f"t_c {t_c:g}, nearest step: appearance error / pass"
        comparisons.append(timing.Comparison(what, _ratio(errors["nearest"], errors["pass"])))
    about = (
        f"{lab.window} shots in a row, both branches of guidance counted. The second shot's first history is shot 1."
    )
    return {"title": "When keys are written", "about": about, "rows": rows}, comparisons


def sparse(lab: Lab, shots: int) -> Measure:
    """Sparse attention to the history, in every pass and layer, beside all of it."""
    scene = lab.scenes(shots)
    heads = lab.model.adapter.traits.heads
    patterns: dict[str, Counted | Tally] = {"all of it": Counted(context_causal)}
    recent = f"the last {lab.window - 1} shots"
    if shots > lab.window:
        patterns[recent] = Counted(context_causal)
    for groups in (1, heads):
        for k in (1, 2, 3):
            who = "every head" if groups == heads else "all heads"
            patterns[f"top {k} for {who}"] = Tally(TopK(k, head_groups=groups))
    patterns["top 4 frames for all heads"] = Tally(TopK(4, chunk=1))
    patterns["first frames"] = Counted(partial(first_frames, causal=True))
    rows, comparisons = [], []
    full: list[float] = []
    base = (0.0, 0.0)
    for name, pattern in patterns.items():
        director = scene.direct()
        window = lab.window if name == recent else shots
        seconds = scene.make(director, range(1, shots + 1), window=window, pattern=pattern)
        errors = scene.errors(director.done)
        if not full:
            full, base = errors, (seconds, pattern.pairs)
        kept = pattern.kept if isinstance(pattern, Tally) else pattern.pairs / base[1]
        ratio = _ratio(errors, full)
        rows.append(
            {
                "History": name,
                "Pairs pruned": f"{1 - kept:.0%}",
                "Appearance error": mean(errors),
                "/ all": ratio.median,
                "Adherence": scene.adherence(director.done),
                "Seconds": seconds,
                "Time / all": seconds / base[0],
            }
        )
        if name != "all of it":
            comparisons.append(timing.Comparison(f"{shots} shots, {name}: appearance error / all", ratio))
    about = (
        f"Scenes of {shots} shots; the model was trained on {lab.window} that see all. Pairs are those of queries and "
        "keys, text and the global shot counted; a choice is made for every latent frame of queries, among whole shots "
        "where nothing else is said. Entries of the batch are attended to one by one where they choose."
    )
    return {"title": f"Sparse attention, {shots} shots", "about": about, "rows": rows}, comparisons


def windows(lab: Lab, shots: int = 20) -> Measure:
    """Many shots in a row, each from the last that fit the window."""
    scene = lab.scenes(shots)
    director = scene.direct()
    seconds = [scene.make(director, [shot]) for shot in range(1, shots + 1)]
    frames = {shot: scene.frames(latents) for shot, latents in director.done.items()}
    drifts = [drift([frames[n][i] for n in frames], world.texts) for i, world in enumerate(scene.worlds)]
    rows = [
        {
            "Shot": shot,
            "Drift from the first": mean(of[shot - 1] for of in drifts),
            "Adherence": scene.adherence({shot: director.done[shot]}),
            "Seconds": seconds[shot - 1],
        }
        for shot in (1, *range(lab.window, shots + 1, lab.window))
    ]
    about = f"Each from the last {lab.window - 1}, at t_c 100. Drift is the distance of colours from those of shot 1."
    return {"title": f"{shots} shots in a row", "about": about, "rows": rows}, []


class Counted:
    """A pattern, and the count of the pairs that last shots of rows attended; as :class:`Tally`, for what is static."""

    def __init__(self, pattern: Callable[[Layout], AttentionPlan]) -> None:
        self.pattern, self.pairs = pattern, 0.0

    def __call__(self, layout: Layout) -> AttentionPlan:
        plan = self.pattern(layout)
        self.pairs += plan.rows(layout.spans[-1]).pairs
        return plan


class _Calls:
    """How often a model is called, while this is entered."""

    def __init__(self, model: SceneModel) -> None:
        self._model, self.count = model.backbone, 0

    def __enter__(self) -> "_Calls":
        self._hook = self._model.register_forward_hook(self._add)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def _add(self, *_: object) -> None:
        self.count += 1


def _bytes_kept(cache: KVCache) -> int:
    """Those of its shots, without any room to work in."""
    cache.move(*cache.ids, tier="host")
    return cache.bytes_by_tier["host"]


def _difference(got: Tensor, want: Tensor) -> float:
    """Root mean square, relative."""
    return float((got - want).double().norm() / want.double().norm())


def _ratio(errors: Sequence[float], to: Sequence[float]) -> timing.Estimate:
    """The ratio of means over scenes; the spread is that over scenes drawn again, with replacement."""
    a, b = torch.tensor([errors, to], dtype=torch.float64)
    drawn = torch.randint(len(a), (RESAMPLED, len(a)), generator=torch.Generator().manual_seed(0))
    spread = timing.estimate((a[drawn].mean(1) / b[drawn].mean(1)).tolist())
    return spread._replace(median=float(a.mean() / b.mean()))


def load(checkpoint: Path, *, scenes: int, steps: int) -> Lab:
    """The lab of a checkpoint that ``lct demo`` wrote.

    Raises:
        ValueError: for one that is not context-causal.
    """
    tuned = Tuned.load(checkpoint)
    if tuned.pattern != "context_causal":
        raise ValueError(f"{checkpoint}: tuned with {tuned.pattern} attention, expected the causal.pt of lct demo")
    model, codec = tuned.build(torch.device("cpu"))
    frames, height, width = tuned.card.size
    size = (frames, height, width)
    return Lab(model=model, codec=codec, size=size, window=tuned.window, count=scenes, steps=steps)


MEASURES: tuple[Callable[[Lab], Measure], ...] = (
    selection,
    storage,
    writing,
    partial(sparse, shots=4),
    partial(sparse, shots=8),
    windows,
)


def run(lab: Lab, measures: Sequence[Callable[[Lab], Measure]] = MEASURES) -> dict[str, Any]:
    """Measure, and show every table when it is there; returns the record."""
    tables, comparisons = [], []
    for measure in measures:
        found, goals = measure(lab)
        print("\n".join([found["title"], found["about"], *table(found["rows"])]), end="\n\n", flush=True)
        tables.append(found)
        comparisons += goals
    return provenance.record(
        "history",
        device="cpu",
        warmup=0,
        rounds=1,
        shape={
            "parameters": sum(p.numel() for p in lab.model.backbone.parameters()),
            "scenes": lab.count,
            "steps": lab.steps,
            "guidance": lab.guidance,
            "seed": lab.seed,
            "trained shots": lab.window,
        },
        times={},
        comparisons=comparisons,
        tables=tables,
    )


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="causal.pt of lct demo")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "history.json")
    parser.add_argument("--scenes", type=int, default=32, help="held-out scenes (default: as many as the demo's)")
    parser.add_argument("--steps", type=int, default=32, help="Euler steps")
    given = parser.parse_args(arguments)
    lab = load(given.checkpoint, scenes=given.scenes, steps=given.steps)
    provenance.write(run(lab) | {"name": given.out.stem}, given.out.parent)


if __name__ == "__main__":
    main()
