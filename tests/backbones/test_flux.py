import re
from dataclasses import replace

import pytest
import torch
from diffusers import FluxControlPipeline, FluxPipeline

from lct_core import Shot, retrofit
from tests.backbones.families.flux import flux, guided


def shot_of(model, grid=(1, 3, 4), **changes):
    generator = torch.Generator().manual_seed(0)
    shot = model.adapter.example(Shot(3, grid), batch=2, generator=generator, dtype=torch.float32)
    return replace(shot, **changes)


def test_tokens_and_coordinates_are_those_of_the_pipeline():
    adapter = retrofit(flux()).adapter
    shot = shot_of(retrofit(flux()))
    given = adapter.arguments(shot, torch.ones(2))
    batch, channels, _, height, width = shot.latents.shape
    packed = FluxPipeline._pack_latents(shot.latents[:, :, 0], batch, channels, height, width)
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
    assert torch.equal(given["hidden_states"], packed)
    assert torch.equal(given["img_ids"].float(), ids)
    assert torch.equal(given["txt_ids"], torch.zeros(3, 3))
    unpacked = FluxPipeline._unpack_latents(packed, 8 * height, 8 * width, 8)
    assert torch.equal(adapter.unpatchify(packed, Shot(3, (1, 3, 4))), unpacked[:, :, None])


def test_a_condition_is_packed_by_itself_as_in_the_pipeline():
    model = retrofit(guided())
    shot = shot_of(model)
    parts = [x[:, :, 0] for x in (shot.latents, shot.extras["condition"])]
    packed = [FluxControlPipeline._pack_latents(x, 2, x.shape[1], *x.shape[2:]) for x in parts]
    assert torch.equal(model.adapter.arguments(shot, torch.ones(2))["hidden_states"], torch.cat(packed, dim=2))


@pytest.mark.parametrize("name", ["pooled_projections", "guidance", "condition"])
@torch.no_grad()
def test_extras_matter(name):
    model = retrofit(guided())
    shot = shot_of(model)
    other = replace(shot, extras={**shot.extras, name: shot.extras[name] + 1})
    assert not torch.allclose(*(model([s], torch.zeros(1))[0] for s in (shot, other)))


def test_missing_guidance_is_refused():
    model = retrofit(guided())
    shot = shot_of(model)
    bare = replace(shot, extras={name: x for name, x in shot.extras.items() if name != "guidance"})
    with pytest.raises(ValueError, match=r"but this FluxTransformer2DModel also needs guidance \[batch\]"):
        model([bare], torch.zeros(1))


def test_odd_sizes_are_refused():
    model = retrofit(flux())
    shot = shot_of(model)
    message = "latents: got frames, height, width (1, 5, 8), expected positive multiples of the patch (1, 2, 2)"
    with pytest.raises(ValueError, match=re.escape(message)):
        model([replace(shot, latents=shot.latents[:, :, :, :5])], torch.zeros(1))
