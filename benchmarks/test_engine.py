"""The engine against the model it runs: what joining shots costs beyond the attention that joins them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import harness
from lct_core import Layout, SceneModel, Shot, ShotInput, attend, bidirectional, own_shot, registry, retrofit

Publish = Callable[[dict[str, Any]], None]

TEXT, FRAMES = 64, 3


@pytest.fixture
def config(quick: bool) -> dict[str, int]:
    """A realistic width; quick, a small one."""
    return {"width": 128, "depth": 2, "heads": 2} if quick else {"width": 1024, "depth": 4, "heads": 16}


@pytest.fixture
def scene_model(config: dict[str, int]) -> SceneModel:
    """With weights of no meaning, but none that are zero: an untrained model would predict nothing."""
    torch.manual_seed(0)
    model = registry().build("mmdit", **config).requires_grad_(False).eval()
    for weight in model.parameters():
        weight.normal_(std=0.02)
    return retrofit(model)


@torch.no_grad()
def test_one_shot(
    config: dict[str, int], scene_model: SceneModel, quick: bool, benchmark: BenchmarkFixture, publish: Publish
) -> None:
    side = 16 if quick else 40
    shot = _shot(side)
    level, timestep = torch.tensor([0.5]), torch.tensor([500.0])
    contenders = {
        "scene model": harness.Contender(lambda: lambda: scene_model([shot], level)),
        "base model": harness.Contender(lambda: lambda: scene_model.adapter.single_shot(shot, timestep)),
    }
    one, base = (contender.prepare()() for contender in contenders.values())
    assert torch.equal(one[0], base), "a one-shot scene differs from the base model: not timed"
    assert base.abs().max() > 0

    warmup, rounds = 2, 20
    seconds = harness.interleave(contenders, warmup=warmup, rounds=rounds)
    benchmark.pedantic(contenders["scene model"].prepare(), rounds=3)
    overhead = harness.ratio(seconds["scene model"], seconds["base model"])
    publish(
        harness.record(
            "engine-one-shot",
            device="cpu",
            warmup=warmup,
            rounds=rounds,
            shape={**config, "tokens": TEXT + FRAMES * (side // 2) ** 2, "dtype": "float32"},
            times=harness.measured(seconds, contenders),
            comparisons=[harness.Comparison("time / base model", overhead, most=1.02)],
        )
    )


@torch.no_grad()
def test_many_shots(
    config: dict[str, int], scene_model: SceneModel, quick: bool, benchmark: BenchmarkFixture, publish: Publish
) -> None:
    side, count = (8 if quick else 24), 4
    shots = [_shot(side) for _ in range(count)]
    levels, timestep = torch.linspace(0.2, 0.8, count), 1000 * torch.linspace(0.2, 0.8, count)
    tokens = TEXT + FRAMES * (side // 2) ** 2
    layout = Layout([[Shot(text=TEXT, grid=(FRAMES, side // 2, side // 2))] * count])
    whole, own = bidirectional(layout), own_shot(layout)
    heads, head_dim = config["heads"], config["width"] // config["heads"]
    q, k, v = (torch.randn(1, layout.tokens, heads, head_dim) for _ in range(3))

    def singly() -> list[torch.Tensor]:
        return [scene_model.adapter.single_shot(shot, t[None]) for shot, t in zip(shots, timestep, strict=True)]

    for one, alone in zip(scene_model(shots, levels, pattern="own_shot"), singly(), strict=True):
        error = (one - alone).abs().max() / alone.abs().max()  # not 0: a shot stands elsewhere on the diagonal
        assert error <= 1e-5, "shots that see only themselves differ from the base model: not timed"

    def attention(plan: Any) -> harness.Contender:
        flops = config["depth"] * plan.flops(heads=heads, head_dim=head_dim)
        return harness.Contender(lambda: lambda: [attend(q, k, v, plan) for _ in range(config["depth"])], flops)

    contenders = {
        "scene": harness.Contender(lambda: lambda: scene_model(shots, levels)),
        "single shots": harness.Contender(lambda: singly),
        "attention of the scene": attention(whole),
        "attention of single shots": attention(own),
    }
    warmup, rounds = 1, 6
    seconds = harness.interleave(contenders, warmup=warmup, rounds=rounds)
    benchmark.pedantic(contenders["scene"].prepare(), rounds=3)
    expected = [
        single + joined - apart
        for single, joined, apart in zip(*(seconds[name] for name in list(contenders)[1:]), strict=True)
    ]
    extra = contenders["attention of the scene"].flops - contenders["attention of single shots"].flops
    joint, alone = seconds["scene"], seconds["single shots"]
    publish(
        harness.record(
            "engine-many-shots",
            device="cpu",
            warmup=warmup,
            rounds=rounds,
            shape={**config, "shots": count, "tokens": count * tokens, "dtype": "float32"},
            times=harness.measured(seconds, contenders),
            comparisons=[
                harness.Comparison("time / single shots", harness.ratio(joint, alone)),
                harness.Comparison("time / single shots and the joint attention", harness.ratio(joint, expected)),
            ],
            extra_attention_flops=extra,
        )
    )


def _shot(side: int) -> ShotInput:
    return ShotInput(latents=torch.randn(1, 16, FRAMES, side, side), text=torch.randn(1, TEXT, 64))
