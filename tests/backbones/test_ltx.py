"""LTX-Video: packing and positions as its pipelines have them, padded text, other frame rates."""

from dataclasses import replace

import pytest
import torch
from diffusers import LTXConditionPipeline, LTXPipeline

from lct_core import KVCache, Shot, ShotInput, retrofit
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.ltx import CASES
from tests.backbones.test_families import Scene, worst

TEXT, IMAGE, PATCHES = CASES
FLOAT32 = BOUNDS[torch.float32]
SHOT = Shot(0, (3, 2, 4))


def given(case, **extras):
    adapter = retrofit(case.model()).adapter
    size = [n * p for n, p in zip(SHOT.grid, adapter.traits.patch, strict=True)]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, adapter.traits.latent_channels, *size, generator=generator)
    return adapter, ShotInput(latents=latents, text=torch.randn(2, 5, 16, generator=generator), extras=extras)


@pytest.mark.parametrize("case", [TEXT, PATCHES], ids=str)
def test_latents_are_packed_as_the_pipeline_packs_them(case):
    adapter, shot = given(case)
    t, p, _ = adapter.traits.patch
    packed = adapter.arguments(shot, torch.ones(2))["hidden_states"]
    assert torch.equal(packed, LTXPipeline._pack_latents(shot.latents, p, t))
    unpacked = adapter.unpatchify(packed, SHOT)
    assert torch.equal(unpacked, LTXPipeline._unpack_latents(packed, *SHOT.grid, p, t))


@pytest.mark.parametrize("rate", [25, 24, 30.0])
@pytest.mark.parametrize("case", [TEXT, PATCHES], ids=str)
def test_angles_are_those_of_the_text_and_image_pipelines(case, rate):
    adapter, shot = given(case, frame_rate=rate)
    hidden, rope = torch.zeros(2, 1), adapter.model.rope
    expected = rope(hidden, *SHOT.grid, rope_interpolation_scale=(8 / rate, 32, 32))
    got = rope(hidden, video_coords=adapter.arguments(shot, torch.ones(2))["video_coords"])
    assert all(torch.equal(g, x) for g, x in zip(got, expected, strict=True))


@pytest.mark.parametrize("rate", [25, 24])
def test_causal_positions_are_those_of_the_condition_pipeline(rate):
    adapter, shot = given(TEXT, frame_rate=rate, causal_temporal_positioning=True)
    ids = LTXConditionPipeline._prepare_video_ids(2, *SHOT.grid)
    expected = LTXConditionPipeline._scale_video_ids(ids, scale_factor=32, scale_factor_t=8).float()
    expected[:, 0] = expected[:, 0] * (1.0 / rate)
    assert torch.equal(adapter.arguments(shot, torch.ones(2))["video_coords"], expected)
    assert adapter.coordinates(shot, SHOT)[:, 0].unique().mul(rate).round().tolist() == [0, 1, 9]


@pytest.mark.parametrize("extras", [{"frame_rate": 12}, {"frame_rate": 30, "causal_temporal_positioning": True}])
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_scenes_at_other_positions_are_the_joined_forwards(case, extras):
    scene, plain = Scene(case), Scene(case)
    scene.shots = [replace(shot, extras={**shot.extras, **extras}) for shot in scene.shots]
    model = retrofit(case.model())
    for i, shot in enumerate(scene.shots):
        assert torch.equal(model([shot], scene.t[:, i : i + 1])[0], scene.alone(case.model(), i))
    assert worst(model(scene.shots, scene.t), scene.oracle()) <= FLOAT32["definition"].absolute
    assert worst(model(scene.shots, scene.t), model(plain.shots, plain.t)) > 1e-3


@torch.no_grad()
def test_shots_take_more_steps_where_frames_lie_further_apart():
    adapter, shot = given(TEXT, frame_rate=5)
    assert adapter.coordinates(shot, SHOT)[:, 0].max() == pytest.approx(2 * 8 / 5)  # 10 of the 0.32 s of a step
    model, cache = retrofit(TEXT.model()), KVCache()
    model([shot], torch.full((1,), 0.5), cache=cache)
    cache.append(0)
    assert cache.end == 11


@torch.no_grad()
def test_padding_is_cut_off_as_the_model_masks_it():
    adapter, shot = given(TEXT)
    padded = replace(shot, text=torch.cat([shot.text, torch.randn(2, 3, 16)], dim=1))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]] * 2)
    padded = replace(padded, extras={"encoder_attention_mask": mask})
    t = torch.tensor([300.0, 700.0])
    expected = adapter.single_shot(padded, t)
    (got,) = retrofit(TEXT.model())([padded], t[:, None] / 1000)
    assert error(got, expected) <= FLOAT32["masked"].absolute
    assert error(adapter.single_shot(replace(padded, extras={}), t), expected) > 1e-3


@torch.no_grad()
def test_a_clean_first_frame_has_timestep_zero():
    mask = torch.ones(2, 3, 2, 4)
    mask[:, 0] = 0
    adapter, shot = given(IMAGE, timestep_mask=mask)
    timestep = adapter.arguments(shot, torch.tensor([500.0, 900.0]))["timestep"]
    assert timestep[:, :8].abs().max() == 0
    assert timestep[:, 8:].unique().tolist() == [500, 900]
    model = retrofit(IMAGE.model())
    (out,) = model([shot], torch.tensor([[0.5], [0.9]]))
    (plain,) = model([replace(shot, extras={})], torch.tensor([[0.5], [0.9]]))
    assert error(out, plain) > 1e-3


def test_refusals():
    model, (_, shot) = retrofit(TEXT.model()), given(TEXT)
    t = torch.full((1,), 0.5)
    with pytest.raises(ValueError, match=r"extras: timestep_mask goes from 2 to 2, expected \[0, 1\]"):
        model([replace(shot, extras={"timestep_mask": torch.full((2, 3, 2, 4), 2.0)})], t)
    with pytest.raises(ValueError, match="extras: frame_rate is '25', expected a number"):
        model([replace(shot, extras={"frame_rate": "25"})], t)
    with pytest.raises(ValueError, match=r"latents: got \[2, 8, 2, 4\], expected \[batch, 8, frames, height, width\]"):
        model([replace(shot, latents=shot.latents[:, :, 0])], t)
