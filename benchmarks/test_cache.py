"""The KV cache: what a step pays to see it, what its tiers cost, and what is done to it between shots."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.generation_cost import cached, scene_of
from benchmarks.report import goal
from benchmarks.test_generation import SMALL, model_of, scene_for
from lct_backbones.mmdit import PAPER_3B
from lct_core import AttentionPlan, KVCache, Layout, SceneModel, Shot, ShotInput, attend, context_causal
from lct_core.cache import Budget, Stage
from lct_core.cache.working import rows_at_once
from lct_core.generation import Director, Take
from lct_core.masks import first_frames
from lct_core.routing import TopK, attend_routed
from lct_core.testing.tolerances import BOUNDS, error

Publish = Callable[[dict[str, Any]], None]
Pair = tuple[Tensor, Tensor]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SITE = "self"
FIRST_FRAMES = partial(first_frames, causal=True)


class Size(NamedTuple):
    """A cache without a model: so many layers of so many heads, and shots of so many tokens."""

    depth: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    shot: Shot
    rounds: int

    def pair(self, tokens: int, device: str, generator: torch.Generator) -> Pair:
        """Keys and values, or whatever has their shape, from the normal distribution."""
        shape = 2, 1, tokens, self.heads, self.head_dim
        keys, values = torch.randn(shape, dtype=self.dtype, device=device, generator=generator)
        return keys, values

    @property
    def diagonal(self) -> Tensor:
        """Angles of one diagonal step."""
        return torch.linspace(0, 1, self.head_dim // 2, dtype=torch.float64)[None]

    def told(self) -> dict[str, Any]:
        """As it is recorded."""
        return {
            **{name: getattr(self, name) for name in ("depth", "heads", "head_dim")},
            "tokens": self.shot.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


STEPS = {
    "cpu": Size(4, 4, 64, torch.float32, Shot(32, (12, 8, 8)), 20),
    "cuda": Size(4, 24, 128, torch.bfloat16, Shot(576, (1, 30, 30)), 20),
}
QUICK = Size(2, 2, 32, torch.float32, Shot(8, (2, 4, 4)), 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shot", [9, 20])
@torch.no_grad()
def test_a_step_behind_the_cache(
    shot: int, device: str, quick: bool, benchmark: BenchmarkFixture, publish: Publish
) -> None:
    """Writing the current shot in place and attending on the view, beside what attention costs at least."""
    size = QUICK if quick else STEPS[device]
    generator = torch.Generator(device).manual_seed(0)
    scene = scene_of(size.shot, shot)
    layout = Layout([scene])
    plan = context_causal(layout).rows(layout.spans[-1])
    cache = KVCache(capacity=layout.tokens)
    _fill(cache, scene[:-1], size, device, generator)
    queries = [size.pair(size.shot.tokens, device, generator)[0] for _ in range(size.depth)]
    current = [size.pair(size.shot.tokens, device, generator) for _ in range(size.depth)]

    def step() -> list[Tensor]:
        cache.begin("anchored", size.diagonal, "interleaved")
        outs = []
        for layer, (q, pair) in enumerate(zip(queries, current, strict=True)):
            outs.append(attend(q, *cache.write((layer, SITE), "tokens", *pair), plan))
        return outs

    cache.begin("anchored", size.diagonal, "interleaved")
    seen = [[x.clone() for x in cache.write((i, SITE), "tokens", *pair)] for i, pair in enumerate(current)]
    history = [[x[:, : -size.shot.tokens].clone() for x in pair] for pair in seen]

    def joined() -> list[Tensor]:
        pairs = zip(history, current, strict=True)
        both = [[torch.cat(parts, dim=1) for parts in zip(*pair, strict=True)] for pair in pairs]
        return [attend(q, *pair, plan) for q, pair in zip(queries, both, strict=True)]

    flops = size.depth * plan.flops(heads=size.heads, head_dim=size.head_dim)
    contenders = {
        "cached step": harness.Contender(lambda: step, flops),
        "dense": harness.Contender(lambda: lambda: [_sdpa(q, *p) for q, p in zip(queries, seen, strict=True)], flops),
        "joined": harness.Contender(lambda: joined, flops),
    }
    gate = _check(step()[0], (queries[0], *seen[0]), plan)
    warmup = 2
    seconds = harness.interleave(contenders, warmup=warmup, rounds=size.rounds, device=device)
    benchmark.pedantic(step, rounds=1)
    times = harness.measured(seconds, contenders)
    dense = harness.Comparison("time / dense", harness.ratio(seconds["cached step"], seconds["dense"]), most=1.05)
    publish(
        harness.record(
            f"cache-step-{shot}-{device}",
            device=device,
            warmup=warmup,
            rounds=size.rounds,
            shape={**size.told(), "shot": shot, "keys": plan.keys},
            times=times,
            comparisons=[
                dense,
                harness.Comparison(
                    "time / history joined in every step", harness.ratio(seconds["cached step"], seconds["joined"])
                ),
            ],
            gate=gate,
            tables=[
                {
                    "title": f"The attention of a cached step, {_kind(device)}",
                    "about": "Writing the current shot and attending to the view, beside attention alone.",
                    "rows": [
                        {
                            "Shot": shot,
                            "Keys": plan.keys,
                            "Milliseconds": 1e3 * times["cached step"]["seconds"],
                            "GFLOP/s": times["cached step"]["gflops_per_second"],
                            "Time / dense": dense.value.median,
                            "Goal": goal(dense.as_dict()),
                            "Met": dense.met,
                        }
                    ],
                }
            ],
        )
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shot", [9, 20])
@torch.no_grad()
def test_a_step_that_sees_some_of_the_history(
    shot: int, device: str, quick: bool, benchmark: BenchmarkFixture, publish: Publish
) -> None:
    """Sparse attention, the choice included, beside attention to all of the history."""
    size = QUICK if quick else STEPS[device]
    generator = torch.Generator(device).manual_seed(0)
    layout = Layout([scene_of(size.shot, shot)])
    full, frames = (pattern(layout).rows(layout.spans[-1]) for pattern in (context_causal, FIRST_FRAMES))
    q, _ = size.pair(size.shot.tokens, device, generator)
    k, v = size.pair(layout.tokens, device, generator)
    routers = {f"top {n}": TopK(n) for n in (1, 3)}
    plans = {name: router.route(q, k, layout) for name, router in routers.items()} | {"first frames": [[frames]]}
    runs: dict[str, Callable[[], Tensor]] = {
        "all": lambda: attend(q, k, v, full),
        "first frames": lambda: attend(q, k, v, frames),
        **{
            name: lambda router=router: attend_routed(q, k, v, router.route(q, k, layout))
            for name, router in routers.items()
        },
    }
    pairs = {"all": full.pairs} | {name: of[0][0].pairs for name, of in plans.items()}
    per_pair = 4 * size.heads * size.head_dim
    contenders = {name: harness.Contender(lambda run=run: run, per_pair * pairs[name]) for name, run in runs.items()}
    gate = {name: _check(runs[name](), (q, k, v), of[0][0]) for name, of in plans.items()}
    warmup = 2
    seconds = harness.interleave(contenders, warmup=warmup, rounds=size.rounds, device=device)
    benchmark.pedantic(runs["top 1"], rounds=1)
    times = harness.measured(seconds, contenders)
    shares = {name: pairs[name] / full.pairs for name in plans}
    publish(
        harness.record(
            f"sparse-step-{shot}-{device}",
            device=device,
            warmup=warmup,
            rounds=size.rounds,
            shape={**size.told(), "depth": 1, "shot": shot, "keys": full.keys, "pairs": pairs},
            times=times,
            comparisons=[
                harness.Comparison(f"{name}, {1 - share:.0%} of pairs pruned: {what}", harness.ratio(*of))
                for name, share in shares.items()
                for what, of in (
                    ("times as fast as all", (seconds["all"], seconds[name])),
                    ("of what its pairs promise", (seconds["all"], seconds[name], share)),
                )
            ],
            gate=gate,
            tables=[
                {
                    "title": f"A step that sees some of the history, {_kind(device)}",
                    "about": "The choice included, for every latent frame of queries, on random queries and keys.",
                    "rows": [
                        {
                            "Shot": shot,
                            "History": name,
                            "Pairs pruned": f"{1 - pairs[name] / full.pairs:.0%}",
                            "Milliseconds": 1e3 * times[name]["seconds"],
                            "Times as fast": harness.ratio(seconds["all"], seconds[name]).median,
                        }
                        for name in contenders
                    ],
                }
            ],
        )
    )


class Tiered(NamedTuple):
    """A scene whose history is kept elsewhere than on the model's device."""

    config: dict[str, Any]
    dtype: torch.dtype
    shot: Shot
    shots: int
    rounds: int

    @property
    def layer_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.config["width"] * self.dtype.itemsize


TIERED = {
    "cpu": Tiered({**SMALL, "depth": 6}, torch.float32, Shot(32, (12, 8, 8)), 9, 3),
    "cuda": Tiered({**PAPER_3B, "depth": 8}, torch.bfloat16, Shot(576, (1, 30, 30)), 9, 3),
}
QUICK_TIERED = Tiered({**SMALL, "depth": 3}, torch.float32, Shot(8, (2, 4, 4)), 3, 2)
STEPS_OF_A_SHOT = 4
SLOWER = 1.15  # what generation may take, for a history that comes from elsewhere as fast as it has to


@pytest.mark.parametrize("device", DEVICES)
def test_where_the_history_is_kept(
    device: str, quick: bool, tmp_path: Path, benchmark: BenchmarkFixture, publish: Publish
) -> None:
    """A scene from a history on the device, and from one that is brought to every layer of every pass."""
    size = QUICK_TIERED if quick else TIERED[device]
    model = model_of(size.config, size.dtype, device)
    shots = scene_of(size.shot, size.shots)
    scene = scene_for(model, shots, size.dtype, device)
    near = _least(size, shots, device)
    caches: dict[str, Callable[..., KVCache]] = {
        "resident": KVCache,
        "host": partial(KVCache, budget=Budget(device=near)),
        "disk": partial(KVCache, budget=Budget(device=near, host=0, folder=tmp_path)),
        "int8": partial(KVCache, storage="int8"),
        "fp8": partial(KVCache, storage="fp8"),
    }
    made: dict[str, Director] = {}

    def contender(name: str) -> harness.Contender:
        def run() -> None:
            made[name] = _directed(model, scene, caches[name])

        return harness.Contender(lambda: run)

    layers, tokens = size.config["depth"], sum(shot.tokens for shot in shots[:-1])
    history = torch.zeros(layers, tokens * size.layer_bytes, dtype=torch.uint8)
    history = history.pin_memory() if device == "cuda" else history
    row = torch.empty_like(history[0], device=device)

    def copy() -> None:
        for layer in history:
            row.copy_(layer, non_blocking=True)

    contenders = {name: contender(name) for name in caches} | {"copy": harness.Contender(lambda: copy)}
    warmup = 1
    seconds = harness.interleave(contenders, warmup=warmup, rounds=size.rounds, device=device)
    gate = _check_tiers(made)
    benchmark.pedantic(contenders["host"].prepare(), rounds=1)
    times = harness.measured(seconds, contenders)
    bandwidth = Bandwidth(
        brought=_brought(shots) * size.layer_bytes * layers,
        seconds=times["resident"]["seconds"] * (1 if device == "cuda" else SLOWER - 1),
        had=history.nbytes / times["copy"]["seconds"],
    )
    comparisons = {
        name: harness.Comparison(
            f"{name}: time / resident",
            harness.ratio(seconds[name], seconds["resident"]),
            most=SLOWER if name in ("host", "disk") and bandwidth.enough else None,
        )
        for name in caches
        if name != "resident"
    }
    publish(
        harness.record(
            f"cache-tiers-{device}",
            device=device,
            warmup=warmup,
            rounds=size.rounds,
            shape={
                **{name: size.config[name] for name in ("width", "depth", "heads")},
                "shots": size.shots,
                "tokens": size.shot.tokens,
                "steps": STEPS_OF_A_SHOT,
                "dtype": str(size.dtype).removeprefix("torch."),
            },
            times=times,
            comparisons=[*comparisons.values()],
            gate=gate,
            bandwidth=bandwidth._asdict(),
            tables=[
                {
                    "title": f"Where the history is kept, {_kind(device)}",
                    "about": bandwidth.in_words(device),
                    "rows": [
                        _tier_row(name, times[name]["seconds"], comparisons.get(name), made[name].caches[0])
                        for name in caches
                    ],
                }
            ],
        )
    )


class Bandwidth(NamedTuple):
    """What a history that is kept elsewhere asks for.

    Args:
        brought: Bytes that come to the layers in all.
        seconds: In which they may come: on a GPU while the model works, on a CPU, whose threads bring them themselves,
            in what may be added to that time.
        had: Bytes a second of a plain copy of all layers' histories, one after the other into one row.
    """

    brought: float
    seconds: float
    had: float

    @property
    def needed(self) -> float:
        """Bytes a second."""
        return self.brought / self.seconds

    @property
    def enough(self) -> bool:
        """Whether there are as many."""
        return self.had >= self.needed

    def in_words(self, device: str) -> str:
        """What there is, and what is asked for."""
        how = "while the model works" if device == "cuda" else f"in {SLOWER - 1:.0%} of the resident time"
        verdict = "enough" if self.enough else "too little, so that no goal is set"
        return (
            f"{self.brought / 1e9:.3g} GB are brought to the layers in all; to come {how}, they need "
            f"{self.needed / 1e9:.3g} GB/s. A plain copy of all layers' histories has {self.had / 1e9:.3g} GB/s: "
            f"{verdict}. Files are in the page cache."
        )


def _tier_row(name: str, seconds: float, against: harness.Comparison | None, cache: KVCache) -> dict[str, Any]:
    keys, values = map(max, zip((0.0, 0.0), *cache.errors.values(), strict=True))
    return {
        "History": name,
        "Seconds": seconds,
        "/ resident": against.value.median if against else 1.0,
        "Goal": goal(against.as_dict()) if against else "",
        "Met": against.met if against else None,
        "Most bytes on the device": cache.peak_nbytes,
        "Largest error of keys": keys,
        "Of values": values,
    }


def _directed(model: SceneModel, scene: Sequence[ShotInput], new_cache: Callable[..., KVCache]) -> Director:
    """A scene, shot after shot, each from all before it."""
    director = Director(model, scene, steps=STEPS_OF_A_SHOT, new_cache=new_cache)
    for i in range(1, len(scene)):
        take = Take((i,), history=tuple(range(1, i)))
        director.keep(director.shoot(take), take)
    return director


def _brought(shots: Sequence[Shot]) -> int:
    """Tokens of history that are seen in all passes of a scene, in every layer."""
    ((scene, run),) = cached(shots, STEPS_OF_A_SHOT)
    return sum(one.times * sum(scene[i].tokens for i in one.behind) for one in run)


def _least(size: Tiered, shots: Sequence[Shot], device: str) -> int:
    """Bytes on the device for nothing to stay there: working rows, and one shot in every layer and once in passing."""
    rows = rows_at_once(torch.device(device)) * sum(shot.tokens for shot in shots)
    return (rows + (size.config["depth"] + 1) * size.shot.tokens) * size.layer_bytes


def _check_tiers(made: Mapping[str, Director]) -> dict[str, Any]:
    """The gate: shots are where they should be, and where a history comes from changes no bit."""
    for name in ("host", "disk"):
        tiers = {entry.tier for entry in made[name].caches[0].shots}
        assert name in tiers, f"{name}: the shots are in {tiers}: not published"
        for i, latents in made["resident"].done.items():
            assert torch.equal(latents, made[name].done[i]), f"{name}: shot {i} is another: not published"
    return {"difference": 0.0}


OPERATED = {
    "cpu": Size(6, 4, 64, torch.float32, Shot(32, (12, 8, 8)), 10),
    "cuda": Size(8, 24, 128, torch.bfloat16, Shot(576, (1, 30, 30)), 10),
}


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_what_is_done_between_shots(
    device: str, quick: bool, tmp_path: Path, benchmark: BenchmarkFixture, publish: Publish
) -> None:
    """Selecting, forking, saving and loading nine shots, beside a plain copy, or file, of as many bytes."""
    size = QUICK if quick else OPERATED[device]
    generator = torch.Generator(device).manual_seed(0)
    scene = scene_of(size.shot, 9)
    model = model_of(SMALL, size.dtype, device)  # which only signs what is saved
    cache = KVCache(capacity=Layout([[*scene, size.shot]]).tokens)
    _fill(cache, scene, size, device, generator)
    current = [size.pair(size.shot.tokens, device, generator) for _ in range(size.depth)]
    ids = list(cache.ids)
    others = [ids[0], *reversed(ids[1:])]

    def call(of: KVCache) -> list[Pair]:
        """Write the current shot behind a history, and see both."""
        of.begin("anchored", size.diagonal, "interleaved")
        return [of.write((layer, SITE), "tokens", *pair) for layer, pair in enumerate(current)]

    def selecting(*, reposition: bool) -> harness.Run:
        cache.select(ids)
        return lambda: cache.select(others, reposition=reposition)

    def forked() -> harness.Run:
        fork = cache.fork()
        call(cache)  # goes on in the rows that are shared
        return lambda: call(fork)

    original = [[x.clone() for x in views] for views in call(cache)]
    history = [x[:, : -size.shot.tokens].flatten() for pair in original for x in pair]
    everything = torch.cat([x.view(torch.uint8) for x in history])
    copy, content, saved = torch.empty_like(everything), everything.cpu().numpy(), tmp_path / "saved"
    cache.save(saved, model)

    def writing() -> None:
        with (tmp_path / "plain").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def saving() -> harness.Run:
        shutil.rmtree(folder := tmp_path / "again", ignore_errors=True)
        return lambda: cache.save(folder, model)

    def loading() -> list[Pair]:
        return call(KVCache.load(saved, model, device=device))

    def reading() -> None:
        for path in saved.iterdir():
            torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).to(device)

    def same(of: KVCache) -> None:
        pairs = zip(call(of), original, strict=True)
        assert all(torch.equal(*each) for pair in pairs for each in zip(*pair, strict=True)), "not the same: not timed"

    cache.select(others)
    cache.select(ids)
    forked()
    for each in (cache, cache.fork(), KVCache.load(saved, model, device=device)):
        same(each)

    contenders = {
        "copy": harness.Contender(lambda: lambda: copy.copy_(everything)),
        "select": harness.Contender(partial(selecting, reposition=False)),
        "select and move": harness.Contender(partial(selecting, reposition=True)),
        "fork": harness.Contender(lambda: cache.fork),
        "first write of a fork": harness.Contender(forked),
        "plain file": harness.Contender(lambda: writing),
        "save": harness.Contender(saving),
        "plain read": harness.Contender(lambda: reading),
        "load": harness.Contender(lambda: loading),
    }
    warmup = 1
    seconds = harness.interleave(contenders, warmup=warmup, rounds=size.rounds, device=device)
    benchmark.pedantic(contenders["select"].prepare(), rounds=1)
    times, nbytes = harness.measured(seconds, contenders), everything.nbytes
    beside = {"save": "plain file", "load": "plain read"}
    against = {
        name: harness.ratio(seconds[name], seconds[beside.get(name, "copy")])
        for name in contenders
        if name not in ("copy", *beside.values())
    }
    publish(
        harness.record(
            f"cache-operations-{device}",
            device=device,
            warmup=warmup,
            rounds=size.rounds,
            shape={**size.told(), "shots": 9, "bytes": nbytes},
            times=times,
            comparisons=[
                harness.Comparison(f"{name}: time / {beside.get(name, 'copy')}", value)
                for name, value in against.items()
            ],
            tables=[
                {
                    "title": f"What is done between shots, {_kind(device)}",
                    "about": f"With nine shots, {nbytes / 1e6:.0f} MB. Files are in the page cache when they are read.",
                    "rows": [
                        {
                            "What": name,
                            "Milliseconds": 1e3 * times[name]["seconds"],
                            "GB/s": nbytes / times[name]["seconds"] / 1e9,
                            "Times as long": value.median,
                            "as a": {"copy": "plain copy"}.get(peer := beside.get(name, "copy"), peer),
                        }
                        for name, value in against.items()
                    ],
                }
            ],
        )
    )


def _kind(device: str) -> str:
    return f"on a {'GPU' if device == 'cuda' else 'CPU'}"


def _check(got: Tensor, given: tuple[Tensor, Tensor, Tensor], plan: AttentionPlan) -> dict[str, float]:
    """The gate: what a step gives is as near the definition as dense attention is, twice its error at most."""
    exact = attend(*given, plan, kernel="reference")
    worst = error(got, exact)
    mask = None if plan.form == "dense" else plan.dense(device=got.device)
    bound = BOUNDS[got.dtype]["kernel"].given(error(_sdpa(*given, mask), exact))
    assert worst <= bound, f"the error of a step is {worst:.2e}, more than {bound:.2e}: not timed"
    return {"error": worst, "bound": bound}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def _fill(cache: KVCache, shots: Sequence[Shot], size: Size, device: str, generator: torch.Generator) -> None:
    """Append shots of random keys and values, end to end, under their numbers."""
    for i, shot in enumerate(shots):
        cache.begin("anchored", size.diagonal, "interleaved")
        for layer in range(size.depth):
            cache.write((layer, SITE), "tokens", *size.pair(shot.tokens, device, generator))
        cache.stage(Stage((shot,), torch.zeros(1, 1), (cache.end,), (max(shot.grid),)))
        cache.append(i)
