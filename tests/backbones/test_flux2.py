from dataclasses import replace

import pytest
import torch
from diffusers import Flux2Pipeline
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor

from lct_core import Shot, retrofit
from lct_core.coordinates import measured_extent
from tests.backbones.families.flux2 import flux2, klein


def shot_of(model, text=3, grid=(1, 3, 4)):
    generator = torch.Generator().manual_seed(0)
    return model.adapter.example(Shot(text, grid), batch=2, generator=generator, dtype=torch.float32)


def test_tokens_and_coordinates_are_those_of_the_pipeline():
    model = retrofit(flux2())
    shot = shot_of(model)
    given = model.adapter.arguments(shot, torch.ones(2))
    assert torch.equal(given["hidden_states"], Flux2Pipeline._pack_latents(shot.latents[:, :, 0]))
    assert torch.equal(given["img_ids"], Flux2Pipeline._prepare_latent_ids(shot.latents[:, :, 0])[0])
    assert torch.equal(given["txt_ids"], Flux2Pipeline._prepare_text_ids(shot.text)[0])


def test_texts_move_nothing_and_are_read_from_0():
    model = retrofit(flux2())
    unit = model.adapter.traits.unit
    for text in (1, 9):
        shot = shot_of(model, text)
        coords = model.adapter.coordinates(shot, model.adapter.shot(shot))
        assert measured_extent(coords, unit) == 4
    step = torch.tensor([unit], dtype=torch.float64)
    assert model.adapter.rope(step)[0, 0].tolist() == [1.0, 2000**-0.5] * 3 + [0.0, 0.0]


@torch.no_grad()
def test_the_places_in_a_text_matter():
    model = retrofit(klein())
    shot = shot_of(model)
    turned = replace(shot, text=shot.text.flip(1))
    assert not torch.allclose(*(model([s], torch.zeros(1))[0] for s in (shot, turned)))


@torch.no_grad()
def test_guidance_matters():
    model = retrofit(flux2())
    shot = shot_of(model)
    other = replace(shot, extras={"guidance": shot.extras["guidance"] + 1})
    assert not torch.allclose(*(model([s], torch.zeros(1))[0] for s in (shot, other)))


def test_guidance_is_given_exactly_where_the_model_has_it():
    with pytest.raises(ValueError, match=r"extras: got \['guidance'\], which Flux2Transformer2DModel does not take"):
        retrofit(klein())([shot_of(retrofit(flux2()))], torch.zeros(1))
    with pytest.raises(ValueError, match=r"also needs guidance \[batch\]"):
        retrofit(flux2())([shot_of(retrofit(klein()))], torch.zeros(1))


def test_the_cache_of_reference_images_is_refused():
    model = klein()
    model.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor())
    with pytest.raises(ValueError, match="Flux2KVAttnProcessor"):
        retrofit(model)
