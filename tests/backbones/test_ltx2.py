"""LTX-2: positions as its pipeline has them, audio that is not heard, padded text, other frame rates."""

from dataclasses import replace

import pytest
import torch
from diffusers import LTX2Pipeline

from lct_core import Shot, ShotInput, retrofit
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.ltx2 import CASES
from tests.backbones.test_families import Scene, worst

PLAIN, PATCHES, SPLIT, _, CONSTANT = CASES
FLOAT32 = BOUNDS[torch.float32]
SHOT = Shot(0, (3, 2, 4))
T = torch.tensor([[0.3], [0.7]])


def given(case, **extras):
    adapter = retrofit(case.model()).adapter
    size = [n * p for n, p in zip(SHOT.grid, adapter.traits.patch, strict=True)]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, adapter.traits.latent_channels, *size, generator=generator)
    text = torch.randn(2, 5, adapter.traits.text_width, generator=generator)
    return adapter, ShotInput(latents=latents, text=text, extras=extras)


@pytest.mark.parametrize("fps", [24, 25.0, 12])
@pytest.mark.parametrize("case", [PLAIN, PATCHES, SPLIT], ids=str)
def test_latents_and_angles_are_those_of_the_pipeline(case, fps):
    adapter, shot = given(case, fps=fps)
    rope, (t, p, _) = adapter.model.rope, adapter.traits.patch
    arguments = adapter.arguments(shot, torch.ones(2))
    assert torch.equal(arguments["hidden_states"], LTX2Pipeline._pack_latents(shot.latents, p, t))
    bounds = rope.prepare_video_coords(2, *shot.latents.shape[2:], "cpu", fps=fps)
    got, expected = rope(arguments["video_coords"]), rope(bounds)
    assert all(torch.equal(g, x) for g, x in zip(got, expected, strict=True))


@pytest.mark.parametrize("case", [PLAIN, SPLIT, CONSTANT], ids=str)
@torch.no_grad()
def test_a_shot_equals_the_pipelines_with_isolated_streams(case):
    """Whatever the audio says, which the video then does not hear."""
    adapter, shot = given(case)
    config, generator = adapter.model.config, torch.Generator().manual_seed(1)
    t, audio_text = 1000 * T[:, 0], 16 if config.use_prompt_embeddings else config.audio_cross_attention_dim
    expected, _ = adapter.model(
        hidden_states=LTX2Pipeline._pack_latents(shot.latents),
        audio_hidden_states=torch.randn(2, 4, config.audio_in_channels, generator=generator),
        encoder_hidden_states=shot.text,
        audio_encoder_hidden_states=torch.randn(2, 5, audio_text, generator=generator),
        encoder_attention_mask=torch.ones(2, 5),
        timestep=t,
        sigma=t,
        num_frames=3,
        height=2,
        width=4,
        fps=24.0,
        audio_num_frames=4,
        isolate_modalities=True,
        use_cross_timestep=True,
        return_dict=False,
    )
    (got,) = retrofit(case.model())([shot], T)
    assert torch.equal(got, LTX2Pipeline._unpack_latents(expected, *SHOT.grid))


def test_audio_is_refused():
    _, shot = given(SPLIT)
    with pytest.raises(
        ValueError, match=r"extras: got \['audio_hidden_states'\], which LTX2VideoTransformer3DModel does"
    ):
        retrofit(SPLIT.model())([replace(shot, extras={"audio_hidden_states": torch.zeros(2, 4, 6)})], T)


@pytest.mark.parametrize("extras", [{"fps": 10}, {"fps": 48}])
@pytest.mark.parametrize("case", [PATCHES, SPLIT], ids=str)
@torch.no_grad()
def test_scenes_with_plain_numbers_are_the_joined_forwards(case, extras):
    scene, plain = Scene(case), Scene(case)
    scene.shots = [replace(shot, extras={**shot.extras, **extras}) for shot in scene.shots]
    model = retrofit(case.model())
    for i, shot in enumerate(scene.shots):
        assert torch.equal(model([shot], scene.t[:, i : i + 1])[0], scene.alone(case.model(), i))
    assert worst(model(scene.shots, scene.t), scene.oracle()) <= FLOAT32["definition"].absolute
    assert worst(model(scene.shots, scene.t), model(plain.shots, plain.t)) > 1e-3


@torch.no_grad()
def test_padding_is_cut_off_as_the_model_masks_it():
    adapter, shot = given(SPLIT)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]] * 2)
    text = torch.cat([shot.text, torch.randn(2, 3, shot.text.shape[2])], dim=1)
    padded = replace(shot, text=text, extras={"encoder_attention_mask": mask})
    expected = adapter.single_shot(padded, 1000 * T[:, 0])
    (got,) = retrofit(SPLIT.model())([padded], T)
    assert error(got, expected) <= FLOAT32["masked"].absolute
    assert error(adapter.single_shot(replace(padded, extras={}), 1000 * T[:, 0]), expected) > 1e-3
