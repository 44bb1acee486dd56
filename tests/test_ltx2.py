"""LTX-2: positions as its pipeline has them, what audio does to the video, padded text, other frame rates."""

from dataclasses import replace

import pytest
import torch
from diffusers import LTX2Pipeline
from families.ltx2 import AUDIO, CASES, TINY
from test_families import Scene, worst

from lct_core import Shot, ShotInput, retrofit
from lct_core.testing.tolerances import BOUNDS, error

ALONE, PATCHES, _, SPLIT, SPLIT_AUDIO, _ = CASES
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


def heard(adapter):
    """Some audio of a shot."""
    generator, width = torch.Generator().manual_seed(1), adapter.audio_text
    return {
        "audio_hidden_states": torch.randn(2, 4, TINY["audio_in_channels"], generator=generator),
        "audio_encoder_hidden_states": torch.randn(2, 3, width, generator=generator),
    }


@pytest.mark.parametrize("fps", [24, 25.0, 12])
@pytest.mark.parametrize("case", [ALONE, PATCHES, SPLIT], ids=str)
def test_latents_and_angles_are_those_of_the_pipeline(case, fps):
    adapter, shot = given(case, fps=fps)
    rope, (t, p, _) = adapter.model.rope, adapter.traits.patch
    arguments = adapter.arguments(shot, torch.ones(2))
    assert torch.equal(arguments["hidden_states"], LTX2Pipeline._pack_latents(shot.latents, p, t))
    bounds = rope.prepare_video_coords(2, *shot.latents.shape[2:], "cpu", fps=fps)
    got, expected = rope(arguments["video_coords"]), rope(bounds)
    assert all(torch.equal(g, x) for g, x in zip(got, expected, strict=True))


@torch.no_grad()
def test_audio_is_as_the_pipeline_passes_it():
    adapter, shot = given(SPLIT_AUDIO)
    shot = replace(shot, extras=heard(adapter))
    latents = LTX2Pipeline._pack_latents(shot.latents)
    t, model = 1000 * T[:, 0], SPLIT_AUDIO.model()
    expected, _ = model(
        hidden_states=latents,
        encoder_hidden_states=shot.text,
        **shot.extras,
        timestep=t,
        sigma=t,
        num_frames=3,
        height=2,
        width=4,
        fps=24.0,
        audio_num_frames=4,
        use_cross_timestep=True,
        return_dict=False,
    )
    (got,) = retrofit(model)([shot], T)
    assert torch.equal(got, LTX2Pipeline._unpack_latents(expected, *SHOT.grid))


@pytest.mark.parametrize("case", [PATCHES, SPLIT_AUDIO], ids=str)
@torch.no_grad()
def test_audio_is_heard_and_none_is_silence(case):
    adapter, shot = given(case)
    model, audio = retrofit(case.model()), heard(adapter)
    with_audio = replace(shot, extras=audio)
    (alone,), (got,) = model([shot], T), model([with_audio], T)
    assert error(got, alone) > 1e-3
    (clean,) = model([replace(shot, extras={**audio, "audio_timestep": torch.zeros(2)})], T)
    assert error(clean, got) > 1e-4
    isolated = adapter.model(**{**adapter.arguments(with_audio, 1000 * T[:, 0]), "isolate_modalities": True})
    assert torch.equal(adapter.unpatchify(isolated.sample, SHOT), alone)


@torch.no_grad()
def test_audio_of_one_shot_reaches_the_others_through_the_video_alone():
    adapter, shot = given(SPLIT_AUDIO)
    model, audio = retrofit(SPLIT_AUDIO.model()), heard(adapter)
    t, loud = torch.tensor([0.3, 0.7]), replace(shot, extras=audio)
    silent, other = model([shot, shot], t)[0], model([shot, loud], t)[0]
    assert error(other, silent) > 1e-6
    (before, _), (after, _) = (model(shots, t, pattern="context_causal") for shots in ([shot, shot], [shot, loud]))
    assert torch.equal(before, after)


@pytest.mark.parametrize("extras", [{"fps": 10}, {"fps": 48, "use_cross_timestep": False}])
@pytest.mark.parametrize("case", [PATCHES, SPLIT_AUDIO], ids=str)
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


@pytest.mark.parametrize("missing", AUDIO[:2])
def test_audio_needs_its_text(missing):
    adapter, shot = given(SPLIT_AUDIO)
    audio = {**heard(adapter), "audio_timestep": torch.zeros(2)}
    audio.pop(missing)
    with pytest.raises(ValueError, match="expected audio_hidden_states together with audio_encoder_hidden_states"):
        retrofit(SPLIT_AUDIO.model())([replace(shot, extras=audio)], T)
