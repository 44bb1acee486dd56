"""What is special about EasyAnimate: positions in one grid, two names of a condition, two texts; what is refused."""

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lct_core import Shot, ShotInput, registry, retrofit, rotation
from lct_core.testing.tolerances import error
from tests.backbones.families.easyanimate import TWO, easyanimate

T5 = "encoder_hidden_states_t5"


def shot_of(model, *, text=4, grid=(2, 2, 3)):
    generator = torch.Generator().manual_seed(0)
    return model.adapter.example(Shot(text, grid), batch=2, generator=generator, dtype=torch.float32)


@pytest.mark.parametrize("patch", [1, 2])
def test_positions_are_the_models_own(patch):
    model = easyanimate(patch_size=patch)
    adapter = retrofit(model).adapter
    for rows, columns in [(1, 1), (2, 3), (3, 2), (1, 6), (4, 1), (5, 5), (30, 45), (24, 42), (45, 30), (60, 90)]:
        for frames in (1, 2, 13):
            latents = torch.zeros(1, 4, frames, patch * rows, patch * columns)
            shot = ShotInput(latents=latents, text=torch.zeros(1, 3, 12))
            coords = adapter.coordinates(shot, adapter.shot(shot))
            assert not coords[:3].any()
            by = rotation(adapter.rope(coords[3:]), pairing="interleaved")
            for mine, theirs in zip((by.cos, by.sin), model.rope_embedding(latents), strict=True):
                assert torch.equal(mine[:, 0].repeat_interleave(2, dim=1), theirs), (frames, rows, columns)


def test_a_shot_of_480_x_720_pixels_stands_in_whole_steps():
    adapter = retrofit(easyanimate()).adapter
    shot = ShotInput(latents=torch.zeros(1, 4, 2, 60, 90), text=torch.zeros(1, 0, 12))
    grid = adapter.coordinates(shot, adapter.shot(shot)).view(2, 30, 45, 3)
    assert torch.equal(grid[1, 1, 1] - grid[0, 0, 0], torch.ones(3, dtype=torch.float64))
    assert grid[1, 29, 44].tolist() == [1, 29, 44]


def test_time_and_prediction_are_the_pipelines():
    traits, scheduler = retrofit(easyanimate()).adapter.traits, FlowMatchEulerDiscreteScheduler()
    levels = [1.0, 0.7, 0.2]
    scheduler.set_timesteps(sigmas=levels)
    assert traits.timestep(torch.tensor(levels)).tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)
    data, noise = torch.randn(2, 1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    z = noise
    for t, level in zip(scheduler.timesteps, levels, strict=True):
        assert error(z, traits.path.add_noise(data, noise, torch.tensor([level]))) < 1e-6
        z = scheduler.step(traits.path.target(data, noise, torch.tensor([level])), t, z, return_dict=False)[0]
    assert error(z, data) < 1e-6


@torch.no_grad()
def test_the_condition_is_that_of_inpainting_and_of_control():
    model, own, t = retrofit(easyanimate(in_channels=12)), easyanimate(in_channels=12), torch.tensor([0.3, 0.8])
    shot = shot_of(model)
    (out,), condition = model([shot], t[:, None]), shot.extras["condition"]
    given = {"encoder_hidden_states": shot.text, "return_dict": False}
    for name in ("inpaint_latents", "control_latents"):
        assert torch.equal(out, own(shot.latents, 1000 * t, **given, **{name: condition})[0])
    parts = {"inpaint_latents": condition[:, :4], "control_latents": condition[:, 4:]}
    assert torch.equal(out, own(shot.latents, 1000 * t, **given, **parts)[0])
    none = replace(shot, extras={"condition": torch.zeros_like(condition)})
    assert error(model([none], t[:, None])[0], out) > 1e-3


@torch.no_grad()
def test_text_of_both_encoders_is_seen():
    model, t = retrofit(easyanimate(**TWO)), torch.full((2, 1), 0.5)
    shot = shot_of(model)
    assert model.adapter.shot(shot).text == 4 + shot.extras[T5].shape[1]
    (out,) = model([shot], t)
    for changed in (
        replace(shot, text=shot.text.flip(0)),
        replace(shot, extras={T5: shot.extras[T5].flip(0)}),
        replace(shot, extras={}),
    ):
        assert error(model([changed], t)[0], out) > 1e-3


def test_refuses_inpainting_without_its_condition():
    model = retrofit(easyanimate(in_channels=9))
    with pytest.raises(ValueError, match=r"got none, but this EasyAnimate.* also needs condition \[batch, 5, frames"):
        model([replace(shot_of(model), extras={})], torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"^extras: got \['condition'\], which EasyAnimate.* does not take"):
        retrofit(easyanimate())([shot_of(model)], torch.ones(2, 1))


def test_motif_is_refused_by_name():
    model = diffusers.MotifVideoTransformer3DModel.__new__(diffusers.MotifVideoTransformer3DModel)
    with pytest.raises(ValueError, match=r"cannot be served: .*attends to the tokens of a video twice"):
        registry().adapter(model)
