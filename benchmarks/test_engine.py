"""The engine against the models it runs: what joining shots costs beyond the attention that joins them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import provenance, timing
from lct_core import Layout, SceneModel, Shot, ShotInput, attend, bidirectional, own_shot, registry, retrofit

Publish = Callable[[dict[str, Any]], None]

TEXT = 64


class Model(NamedTuple):
    """A model at a realistic width and, for ``--quick``, at a small one."""

    make: Callable[..., torch.nn.Module]
    config: dict[str, Any]
    quick: dict[str, Any]
    layers: dict[str, int]


def _mmdit(**config: Any) -> torch.nn.Module:
    return registry().build("mmdit", **config)


WIDTH_1536 = {"num_attention_heads": 12, "attention_head_dim": 128}
MODELS = {
    "mmdit": Model(_mmdit, {"width": 1024, "heads": 16}, {"width": 128, "heads": 2}, {"depth": 4}),
    "wan": Model(
        diffusers.WanTransformer3DModel,
        {**WIDTH_1536, "ffn_dim": 8960},
        {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256},
        {"num_layers": 3},
    ),
    "hunyuan-video": Model(
        diffusers.HunyuanVideoTransformer3DModel,
        WIDTH_1536,
        {"num_attention_heads": 2, "attention_head_dim": 128},
        {"num_layers": 1, "num_single_layers": 2},
    ),
}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    """Of the model."""
    return request.param


@pytest.fixture
def depth(name: str) -> int:
    """Blocks."""
    return sum(MODELS[name].layers.values())


@pytest.fixture
def scene_model(name: str, quick: bool) -> SceneModel:
    """With weights of no meaning, but none that are zero: an untrained model would predict nothing."""
    torch.manual_seed(0)
    make, config, small, layers = MODELS[name]
    model = make(**{**(small if quick else config), **layers}).requires_grad_(False).eval()
    for weight in model.parameters():
        weight.normal_(std=0.02)
    return retrofit(model)


@torch.no_grad()
def test_one_shot(
    name: str, scene_model: SceneModel, depth: int, quick: bool, benchmark: BenchmarkFixture, publish: Publish
) -> None:
    shot = Shot(TEXT, (3, 8, 8) if quick else (3, 20, 20))
    given, level = _input(scene_model, shot), torch.tensor([0.5])
    timestep = scene_model.adapter.traits.timestep(level)
    contenders = {
        "scene model": timing.Contender(lambda: lambda: scene_model([given], level)),
        "base model": timing.Contender(lambda: lambda: scene_model.adapter.single_shot(given, timestep)),
    }
    one, base = (contender.prepare()() for contender in contenders.values())
    error = (one[0] - base).abs().max() / base.abs().max()
    assert error <= (2e-6 if scene_model.adapter.traits.text_mask else 0), "one shot is not the base model: not timed"

    warmup, rounds = 2, 20
    seconds = timing.interleave(contenders, warmup=warmup, rounds=rounds)
    benchmark.pedantic(contenders["scene model"].prepare(), rounds=3)
    overhead = timing.ratio(seconds["scene model"], seconds["base model"])
    publish(
        provenance.record(
            f"engine-one-shot-{name}",
            device="cpu",
            warmup=warmup,
            rounds=rounds,
            shape={**_width(scene_model), "depth": depth, "tokens": shot.tokens, "dtype": "float32"},
            times=timing.measured(seconds, contenders),
            comparisons=[timing.Comparison("time / base model", overhead, most=1.02)],
        )
    )


@torch.no_grad()
def test_many_shots(
    name: str, scene_model: SceneModel, depth: int, quick: bool, benchmark: BenchmarkFixture, publish: Publish
) -> None:
    count, traits = 4, scene_model.adapter.traits
    shot = Shot(TEXT, (3, 4, 4) if quick else (3, 12, 12))
    shots, levels = [_input(scene_model, shot) for _ in range(count)], torch.linspace(0.2, 0.8, count)
    layout = Layout([[shot] * count], traits.text_first)
    layout = layout if traits.text == "joint" else layout.video_only
    whole, own = bidirectional(layout), own_shot(layout)
    q, k, v = (torch.randn(1, layout.tokens, traits.heads, traits.head_dim) for _ in range(3))

    def singly() -> list[torch.Tensor]:
        timesteps = traits.timestep(levels)
        return [scene_model.adapter.single_shot(x, t[None]) for x, t in zip(shots, timesteps, strict=True)]

    for one, alone in zip(scene_model(shots, levels, pattern="own_shot"), singly(), strict=True):
        error = (one - alone).abs().max() / alone.abs().max()  # not 0: a shot stands elsewhere on the diagonal
        assert error <= 1e-5, "shots that see only themselves differ from the base model: not timed"

    def attention(plan: Any) -> timing.Contender:
        flops = depth * plan.flops(heads=traits.heads, head_dim=traits.head_dim)
        return timing.Contender(lambda: lambda: [attend(q, k, v, plan) for _ in range(depth)], flops)

    contenders = {
        "scene": timing.Contender(lambda: lambda: scene_model(shots, levels)),
        "single shots": timing.Contender(lambda: singly),
        "attention of the scene": attention(whole),
        "attention of single shots": attention(own),
    }
    warmup, rounds = 1, 10
    seconds = timing.interleave(contenders, warmup=warmup, rounds=rounds)
    benchmark.pedantic(contenders["scene"].prepare(), rounds=3)
    expected = [
        single + joined - apart
        for single, joined, apart in zip(*(seconds[name] for name in list(contenders)[1:]), strict=True)
    ]
    extra = contenders["attention of the scene"].flops - contenders["attention of single shots"].flops
    joint, alone = seconds["scene"], seconds["single shots"]
    what = "time / single shots and the joint attention"
    publish(
        provenance.record(
            f"engine-many-shots-{name}",
            device="cpu",
            warmup=warmup,
            rounds=rounds,
            shape={
                **_width(scene_model),
                "depth": depth,
                "shots": count,
                "tokens": layout.tokens,
                "dtype": "float32",
            },
            times=timing.measured(seconds, contenders),
            comparisons=[
                timing.Comparison("time / single shots", timing.ratio(joint, alone)),
                timing.Comparison(what, timing.ratio(joint, expected), most=1.05),
            ],
            extra_attention_flops=extra,
        )
    )


def _input(scene_model: SceneModel, shot: Shot) -> ShotInput:
    given = scene_model.adapter.example(shot, batch=1, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    optional = {n for n, extra in scene_model.adapter.traits.extras.items() if not extra.required}
    return ShotInput(
        latents=given.latents, text=given.text, extras={n: x for n, x in given.extras.items() if n not in optional}
    )


def _width(scene_model: SceneModel) -> dict[str, int]:
    traits = scene_model.adapter.traits
    return {"width": traits.heads * traits.head_dim, "heads": traits.heads}
