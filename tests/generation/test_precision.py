"""Half precision, and states that are kept finer than the model."""

from dataclasses import replace
from functools import cache as once, partial

import pytest
import torch

from lct_backbones.mmdit import tiny
from lct_core import retrofit
from tests.generation.definitions import (
    SHOT_AFTER_SHOT,
    Watched,
    at_once,
    by_hand,
    case,
    earlier,
    every_mode,
    generated,
    guide,
    guided_or_not,
    negatives,
    one_by_one,
    run,
    same,
    scene_model,
    with_and_without_global,
    worst,
)

# Every mode against its definition.


conditioned = pytest.mark.parametrize("mode", ["conditional", *SHOT_AFTER_SHOT])


# Half precision.


def halved(scene):
    return [
        replace(s, text=s.text.bfloat16(), latents=None if s.latents is None else s.latents.bfloat16()) for s in scene
    ]


@once
def half_model():
    return retrofit(tiny().bfloat16())


def expected_in(mode, model, scene, given, **options):
    """Any mode's definition."""
    if mode in ("joint", "conditional"):
        return at_once(model, scene, given, **options)
    return (by_hand if mode == "causal" else one_by_one)(model, scene, given, seen=partial(earlier, scene), **options)


@every_mode
@with_and_without_global
@guided_or_not
def test_a_half_precision_model_and_a_float32_state(mode, with_global, guided):
    """The model gets its own dtype; what becomes of the shots is kept, stepped and guided in float32."""
    scene, given = case(mode, with_global)
    scene, watched, told = halved(scene), Watched(half_model()), []
    options = {"steps": 3} if mode == "joint" else {"steps": 3, "t_c": 300.0}
    guidance = negatives() if guided else None
    got = run(mode, watched, scene, given, guidance=guidance and guide(*guidance), callback=told.append, **options)
    taken = [x for shots, _ in watched.calls for shot in shots for x in (shot.text, shot.latents) if x is not None]
    assert {x.dtype for x in taken} == {torch.bfloat16}
    assert {z.dtype for z in [*got, *(z for step in told for z in step.latents)] if z is not None} == {torch.float32}
    assert same(got, expected_in(mode, half_model(), scene, given, guidance=guidance, **options))
    made = [z for i, z in enumerate(got) if z is not None and i not in given]
    assert not any(torch.equal(z, z.bfloat16().float()) for z in made)


@conditioned
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_given_shots_of_any_dtype(mode, half, dtype):
    scene, given = case(mode)
    scene, model = (halved(scene), half_model()) if half else (scene, scene_model())
    given, watched = {i: z.to(dtype) for i, z in given.items()}, Watched(model)
    got = run(mode, watched, scene, given, steps=2, t_c=300.0)
    called = {shot.latents.dtype for shots, _ in watched.calls for shot in shots if shot.latents is not None}
    assert called == {scene[1].latents.dtype}
    assert all(got[i] is z for i, z in given.items())
    assert all(z.dtype == torch.float32 for i, z in enumerate(got) if z is not None and i not in given)
    assert same(got, expected_in(mode, model, scene, given, steps=2, t_c=300.0))


@every_mode
def test_a_finer_scene_is_kept_as_fine(mode):
    scene, given = case(mode)
    fine = [replace(s, text=s.text.double(), latents=None if s.latents is None else s.latents.double()) for s in scene]
    got = run(mode, retrofit(tiny().double()), fine, given, steps=2)
    assert all(z.dtype == torch.float64 for i, z in enumerate(got) if z is not None and i not in given)
    assert worst(got, run(mode, scene_model(), scene, given, steps=2)) < 1e-4


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_levels_are_float32_whatever_the_default_dtype(mode, dtype):
    scene, given = case(mode)
    expected, watched, before = generated(mode, scene, given), Watched(scene_model()), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = generated(mode, scene, given, model=watched)
    finally:
        torch.set_default_dtype(before)
    assert {t.dtype for _, t in watched.calls} == {torch.float32}
    assert same(got, expected)
