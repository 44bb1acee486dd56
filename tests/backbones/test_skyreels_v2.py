"""SkyReels-V2: timesteps of frames, frames per second, the mask between frames that is refused."""

from dataclasses import replace

import pytest
import torch

from lct_core import Shot, retrofit
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.skyreels_v2 import skyreels

FLOAT32 = BOUNDS[torch.float32]
T = torch.tensor([0.5])


def shot_of(model, **extras):
    generator = torch.Generator().manual_seed(0)
    shot = model.adapter.example(Shot(3, (3, 2, 4)), batch=1, generator=generator, dtype=torch.float32)
    return replace(shot, extras=extras)


@torch.no_grad()
def test_timesteps_of_frames_are_those_of_diffusion_forcing():
    model = retrofit(skyreels(inject_sample_info=True))
    shot = shot_of(model, timestep_mask=torch.tensor([[0.0, 0.5, 1.0]]), fps=0)
    frames = torch.tensor([[0.0, 250.0, 500.0]])
    own = skyreels(inject_sample_info=True)
    expected = own(shot.latents, frames, shot.text, enable_diffusion_forcing=True, fps=[0], return_dict=False)[0]
    assert torch.equal(model([shot], T)[0], expected)


@torch.no_grad()
def test_one_timestep_is_the_same_for_every_frame():
    model = retrofit(skyreels())
    ones, none = shot_of(model, timestep_mask=torch.ones(1, 3)), shot_of(model)
    assert error(model([ones], T)[0], model([none], T)[0]) <= FLOAT32["definition"].absolute


@torch.no_grad()
def test_frames_per_second_matter():
    model = retrofit(skyreels(inject_sample_info=True))
    slow, fast, default = (model([shot_of(model, **extras)], T)[0] for extras in ({"fps": 0}, {"fps": 1}, {}))
    assert error(slow, fast) > 1e-3
    assert torch.equal(default, fast)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"fps": 24}, "extras: fps is 24, expected 0 for 16 frames per second or 1 for any other number"),
        ({"fps": torch.ones(1)}, "extras: fps is .*, expected a number"),
        ({"fps": 1, "timestep_mask": torch.full((1, 3), 2.0)}, r"timestep_mask goes from 2 to 2, expected \[0, 1\]"),
        ({"fps": 1, "timestep_mask": torch.ones(1, 4)}, r"timestep_mask is \[1, 4\], expected .* \[1, 3\]"),
    ],
)
def test_refuses_extras(extras, message):
    model = retrofit(skyreels(inject_sample_info=True))
    with pytest.raises(ValueError, match=message):
        model([shot_of(model, **extras)], T)


@torch.no_grad()
def test_refuses_a_mask_between_blocks_of_frames():
    message = r"sees? only blocks of 3 frames .* call model\._set_ar_attention\(1\)"
    with pytest.raises(ValueError, match=message):
        retrofit(skyreels(num_frame_per_block=3))
    model = retrofit(skyreels())
    shot = shot_of(model)
    (expected,) = model([shot], T)
    model.backbone._set_ar_attention(3)
    with pytest.raises(ValueError, match=message):
        model([shot], T)
    model.backbone._set_ar_attention(1)
    assert torch.equal(model([shot], T)[0], expected)
