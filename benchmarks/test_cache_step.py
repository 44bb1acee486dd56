"""A step behind the KV cache: what it pays to see the history, all of it or some."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from benchmarks import provenance, timing
from benchmarks.filled_cache import DEVICES, QUICK, SITE, Publish, Size, fill, kind, writing
from benchmarks.generation_cost import scene_of
from benchmarks.report import goal
from lct_core import AttentionPlan, KVCache, Layout, Shot, attend, context_causal
from lct_core.patterns import first_frames
from lct_core.routing import TopK, attend_routed
from lct_core.testing.tolerances import BOUNDS, error

FIRST_FRAMES = partial(first_frames, causal=True)


STEPS = {
    "cpu": Size(4, 4, 64, torch.float32, Shot(32, (12, 8, 8)), 20),
    "cuda": Size(4, 24, 128, torch.bfloat16, Shot(576, (1, 30, 30)), 20),
}


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
    fill(cache, scene[:-1], size, device, generator)
    queries = [size.pair(size.shot.tokens, device, generator)[0] for _ in range(size.depth)]
    current = [size.pair(size.shot.tokens, device, generator) for _ in range(size.depth)]

    def step() -> list[Tensor]:
        outs = []
        with writing(cache, size.shot, size) as write:
            for layer, (q, pair) in enumerate(zip(queries, current, strict=True)):
                outs.append(attend(q, *write((layer, SITE), "tokens", *pair), plan))
        return outs

    with writing(cache, size.shot, size) as write:
        seen = [[x.clone() for x in write((i, SITE), "tokens", *pair)] for i, pair in enumerate(current)]
    history = [[x[:, : -size.shot.tokens].clone() for x in pair] for pair in seen]

    def joined() -> list[Tensor]:
        pairs = zip(history, current, strict=True)
        both = [[torch.cat(parts, dim=1) for parts in zip(*pair, strict=True)] for pair in pairs]
        return [attend(q, *pair, plan) for q, pair in zip(queries, both, strict=True)]

    flops = size.depth * plan.flops(heads=size.heads, head_dim=size.head_dim)
    contenders = {
        "cached step": timing.Contender(lambda: step, flops),
        "dense": timing.Contender(lambda: lambda: [_sdpa(q, *p) for q, p in zip(queries, seen, strict=True)], flops),
        "joined": timing.Contender(lambda: joined, flops),
    }
    gate = _check(step()[0], (queries[0], *seen[0]), plan)
    warmup = 2
    seconds = timing.interleave(contenders, warmup=warmup, rounds=size.rounds, device=device)
    benchmark.pedantic(step, rounds=1)
    times = timing.measured(seconds, contenders)
    dense = timing.Comparison("time / dense", timing.ratio(seconds["cached step"], seconds["dense"]), most=1.05)
    publish(
        provenance.record(
            f"cache-step-{shot}-{device}",
            device=device,
            warmup=warmup,
            rounds=size.rounds,
            shape={**size.told(), "shot": shot, "keys": plan.keys},
            times=times,
            comparisons=[
                dense,
                timing.Comparison(
                    "time / history joined in every step", timing.ratio(seconds["cached step"], seconds["joined"])
                ),
            ],
            gate=gate,
            tables=[
                {
                    "title": f"The attention of a cached step, {kind(device)}",
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
    contenders = {name: timing.Contender(lambda run=run: run, per_pair * pairs[name]) for name, run in runs.items()}
    gate = {name: _check(runs[name](), (q, k, v), of[0][0]) for name, of in plans.items()}
    warmup = 2
    seconds = timing.interleave(contenders, warmup=warmup, rounds=size.rounds, device=device)
    benchmark.pedantic(runs["top 1"], rounds=1)
    times = timing.measured(seconds, contenders)
    shares = {name: pairs[name] / full.pairs for name in plans}
    publish(
        provenance.record(
            f"sparse-step-{shot}-{device}",
            device=device,
            warmup=warmup,
            rounds=size.rounds,
            shape={**size.told(), "depth": 1, "shot": shot, "keys": full.keys, "pairs": pairs},
            times=times,
            comparisons=[
                timing.Comparison(f"{name}, {1 - share:.0%} of pairs pruned: {what}", timing.ratio(*of))
                for name, share in shares.items()
                for what, of in (
                    ("times as fast as all", (seconds["all"], seconds[name])),
                    ("of what its pairs promise", (seconds["all"], seconds[name], share)),
                )
            ],
            gate=gate,
            tables=[
                {
                    "title": f"A step that sees some of the history, {kind(device)}",
                    "about": "The choice included, for every latent frame of queries, on random queries and keys.",
                    "rows": [
                        {
                            "Shot": shot,
                            "History": name,
                            "Pairs pruned": f"{1 - pairs[name] / full.pairs:.0%}",
                            "Milliseconds": 1e3 * times[name]["seconds"],
                            "Times as fast": timing.ratio(seconds["all"], seconds[name]).median,
                        }
                        for name in contenders
                    ],
                }
            ],
        )
    )


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
