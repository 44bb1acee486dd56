from dataclasses import replace

import pytest
import torch

from lct_core import Shot, ShotInput, retrofit
from tests.backbones.families.sd3 import sd3, sd35


def scene(model, *grids):
    generator = torch.Generator().manual_seed(0)
    shots = [Shot(3, grid) for grid in grids]
    return [model.adapter.example(s, batch=1, generator=generator, dtype=torch.float32) for s in shots]


def test_more_frames_than_one_are_refused():
    model = retrofit(sd3())
    (shot,) = scene(model, (1, 2, 3))
    with pytest.raises(ValueError, match=r"latents: got 2 frames, expected 1: SD3Transformer2DModel makes images"):
        model([replace(shot, latents=shot.latents.repeat(1, 1, 2, 1, 1))], torch.zeros(1))


def test_images_larger_than_the_grid_are_refused():
    model = retrofit(sd3())
    (shot,) = scene(model, (1, 9, 2))
    with pytest.raises(ValueError, match=r"^latents: got \(1, 9, 2\) patches, expected at most 8 rows and columns"):
        model([shot], torch.zeros(1))


def test_a_global_shot_needs_its_pooled_prompt():
    model = retrofit(sd3())
    (shot,) = scene(model, (1, 2, 3))
    prompt = ShotInput(text=shot.text, role="global")
    with pytest.raises(ValueError, match=r"also needs pooled_projections \[batch, 6\]"):
        model([prompt, shot], torch.zeros(2))
    prompt = replace(prompt, extras=shot.extras)
    assert [out is None for out in model([prompt, shot], torch.zeros(2))] == [True, False]


@torch.no_grad()
def test_a_global_shot_without_an_image_condition_has_zeros():
    model = retrofit(sd35())
    (shot,) = scene(model, (1, 2, 3))
    prompt = ShotInput(text=shot.text, role="global", extras={"pooled_projections": shot.extras["pooled_projections"]})
    zeros = {**shot.extras, "condition": torch.zeros_like(shot.extras["condition"])}
    got, expected = (model([x, shot], torch.zeros(2))[1] for x in (prompt, replace(prompt, extras=zeros)))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["pooled_projections", "condition"])
@torch.no_grad()
def test_extras_matter(name):
    model = retrofit(sd35())
    (shot,) = scene(model, (1, 2, 3))
    other = replace(shot, extras={**shot.extras, name: shot.extras[name] + 1})
    assert not torch.allclose(*(model([s], torch.zeros(1))[0] for s in (shot, other)))


def test_a_second_attention_joins_the_shots_images():
    model = retrofit(sd35())
    sites = [[(site.name, site.tokens) for site in model.adapter.sites(block)] for block in model.adapter.blocks]
    assert sites == [[("attn2", "video"), ("attn", "all")]] * 2 + [[("attn", "all")]]
