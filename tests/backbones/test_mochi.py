"""What is special about Mochi: learned frequencies, centred coordinates, everything upside down, no padding."""

from dataclasses import replace

import pytest
import torch
from diffusers import AllegroTransformer3DModel, FlowMatchEulerDiscreteScheduler

from lct_core import Shot, retrofit, rotation
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.mochi import ROW, mochi

GRID = (3, 4, 6)


def shot_of(model, *, text=4):
    generator = torch.Generator().manual_seed(0)
    return model.adapter.example(Shot(text, GRID), batch=2, generator=generator, dtype=torch.float32)


def test_coordinates_and_angles_are_the_models_own():
    model = retrofit(mochi())
    coords = model.adapter.coordinates(shot_of(model), Shot(4, GRID))
    video, text = coords.split([72, 4])
    assert not text.any()
    apart = 192 / 24**0.5
    assert video.view(*GRID, 3)[2, 0, 5].tolist() == pytest.approx([2, -1.5 * apart, 2.5 * apart])
    expected = model.backbone.rope(model.backbone.pos_frequencies, *GRID, dtype=torch.float32)
    by = rotation(model.adapter.rope(coords), pairing="interleaved")
    assert torch.equal(torch.stack([by.cos, by.sin])[:, :72], torch.stack(expected))


def test_one_diagonal_step_is_a_row_at_480_x_848():
    model = retrofit(mochi())
    video = model.adapter.coordinates(shot_of(model), Shot(0, (28, 30, 53))).view(28, 30, 53, 3)
    step = (video[1, 1, 1] - video[0, 0, 0]).tolist()
    assert step == pytest.approx([1, ROW, ROW], rel=1e-4)
    assert model.adapter.traits.unit == pytest.approx((1, ROW, ROW))


def test_time_and_prediction_are_the_pipelines():
    traits, scheduler = retrofit(mochi()).adapter.traits, FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    levels = [1.0, 0.7, 0.2]
    scheduler.set_timesteps(sigmas=levels)
    assert traits.timestep(torch.tensor(levels)).tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)
    data, noise = torch.randn(2, 1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    z = noise
    for t, level in zip(scheduler.timesteps, levels, strict=True):
        assert error(z, traits.path.add_noise(data, noise, torch.tensor([level]))) < 1e-6
        out = traits.path.target(data, noise, torch.tensor([level]))
        z = scheduler.step(out, t, z, return_dict=False)[0]
    assert error(z, data) < 1e-6


@torch.no_grad()
def test_padding_of_the_text_is_cut_off_as_the_model_masks_it():
    model, own, t = retrofit(mochi()), mochi(), torch.tensor([0.3, 0.8])
    mask = torch.tensor([True, True, True, False]).expand(2, -1)
    shot = shot_of(model)
    (out,) = model([replace(shot, extras={"encoder_attention_mask": mask})], t[:, None])
    given = (shot.latents, shot.text, 1000 - 1000 * t)
    expected = own(*given, encoder_attention_mask=mask, return_dict=False)[0]
    assert error(out, expected) <= BOUNDS[torch.float32]["masked"].absolute
    assert error(out, own(*given, encoder_attention_mask=torch.ones_like(mask), return_dict=False)[0]) > 1e-3


def test_frequencies_learn_from_scenes():
    model = retrofit(mochi())
    shot = shot_of(model)
    sum(out.square().sum() for out in model([shot, shot], torch.tensor([0.3, 0.8]))).backward()
    assert model.backbone.pos_frequencies.grad.abs().min() > 0


def test_allegro_is_refused_by_name():
    tiny = {"num_attention_heads": 2, "attention_head_dim": 6, "cross_attention_dim": 12, "num_layers": 1}
    with pytest.raises(ValueError, match="AllegroTransformer3DModel cannot be served: Allegro predicts the noise"):
        retrofit(AllegroTransformer3DModel(**tiny, caption_channels=8))
