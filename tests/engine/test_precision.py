"""Autocast, and the precision of rotations."""

import pytest
import torch

import lct_core.backbone.adapter as adapter_module
from lct_backbones.mmdit import MMDiTBackbone, tiny
from lct_core import KVCache, Layout, Shot
from lct_core.testing.definition import definition
from lct_core.testing.tolerances import BOUNDS, error
from tests.engine.scenes import ADAPTERS, draw, random_levels, retrofitted, shot_by_shot, worst
from tests.toys import toy

FLOAT32 = BOUNDS[torch.float32]
SCHEMES = ("anchored", "paper")


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@ADAPTERS
@torch.no_grad()
def test_one_shot_equals_the_base_model_under_autocast(make):
    adapter, base = make(), make()
    model = retrofitted(adapter)
    layout = Layout([[Shot(3, (2, 2, 2))]])
    (scene,), t = draw(adapter, layout, batch=2), random_levels(layout, batch=2)
    clean, noise = adapter.traits.timesteps
    with autocast():
        (out,) = model(scene, t)
        expected = base.single_shot(scene[0], clean + (noise - clean) * t[:, 0])
    assert out.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@torch.no_grad()
def test_autocast_leaves_float64_alone():
    adapter, base = toy(pairing=None), toy(pairing=None)
    for a in (adapter, base):
        a.model.double()
    generator = torch.Generator().manual_seed(0)
    shot = adapter.example(Shot(3, (2, 2, 2)), batch=1, generator=generator, dtype=torch.float64)
    with autocast():
        (out,) = retrofitted(adapter)([shot], torch.tensor([0.5], dtype=torch.float64))
        expected = base.single_shot(shot, torch.tensor([0.5], dtype=torch.float64))
    assert out.dtype == torch.float64
    assert error(out, expected) <= FLOAT32["definition"].absolute  # in bfloat16 it would be a thousand times that


@ADAPTERS
@torch.no_grad()
def test_autocast_with_a_cache(make):
    adapter = make()
    model = retrofitted(adapter)
    layout = Layout([[Shot(3, (2, 2, 2)), Shot(1, (1, 1, 2)), Shot(2, (1, 2, 1))]])
    (scene,), t = draw(adapter, layout), random_levels(layout)
    truth = model(scene, t, pattern="context_causal")
    cache, exact = KVCache(), KVCache()
    shot_by_shot(model, scene, t, cache=exact)
    with autocast():
        full = model(scene, t, pattern="context_causal")
        cached = shot_by_shot(model, scene, t, cache=cache)
    own = worst(full, truth)
    assert 0 < own < 0.1
    assert worst(cached, full) <= BOUNDS[torch.bfloat16]["cached"].given(own)
    assert 2 * cache.nbytes == exact.nbytes  # the cache holds what attention takes: two bytes, not four


@torch.no_grad()
def test_angles_stay_exact_under_autocast():
    """Angles in float32, as HunyuanVideo has them, would be rounded to bfloat16 by an autocast matmul."""
    adapter = toy(angle_dtype=torch.float32)
    seen, rope = [], adapter.rope

    def watched(coords):
        angles = rope(coords)
        seen.append((coords, angles))
        return angles

    adapter.rope = watched
    model = retrofitted(adapter)
    layout = Layout([[Shot(3, (2, 2, 2)), Shot(1, (1, 1, 2))]])
    (scene,), t = draw(adapter, layout), random_levels(layout)
    with autocast():
        shot_by_shot(model, scene, t)
    assert any(coords.shape == (1, 3) for coords, _ in seen)  # one step along the diagonal, for the cache
    for coords, angles in seen:
        assert angles.dtype == torch.float32
        assert torch.equal(angles, rope(coords))


@torch.no_grad()
def test_a_float64_model_rotates_in_float64():
    adapter = MMDiTBackbone(tiny().double())
    generator, counts = torch.Generator().manual_seed(0), [Shot(2, (1, 2, 2)), Shot(1, (2, 1, 1))]
    scene = [adapter.example(shot, batch=1, generator=generator, dtype=torch.float64) for shot in counts]
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)
    truth = definition(adapter, [scene], t, scheme="anchored", pattern="bidirectional")
    assert worst(retrofitted(adapter)(scene, t), truth) <= FLOAT32["definition"].absolute ** 2  # twice as many digits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rotation_is_in_float32_whatever_the_models_dtype(monkeypatch, dtype):
    seen, rotate = [], adapter_module.rotate
    monkeypatch.setattr("lct_core.backbone.adapter.rotate", lambda x, by: (seen.append(by), rotate(x, by))[1])
    adapter = MMDiTBackbone(tiny().to(dtype))
    shot = adapter.example(Shot(1, (1, 1, 2)), batch=1, generator=torch.Generator(), dtype=dtype)
    (out,) = retrofitted(adapter)([shot], torch.tensor([0.5]))
    assert out.dtype == dtype
    assert {by.cos.dtype for by in seen} == {by.sin.dtype for by in seen} == {torch.float32}
