"""MiniMax-H3: what the tests of all families cannot see."""

from dataclasses import replace

import pytest
import torch
from diffusers import MiniMaxH3Scheduler
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep, patchify_video_latents

from lct_core import Shot, retrofit
from lct_core.testing.tolerances import error
from tests.backbones.families.minimax_h3 import minimax_h3

SHOT = Shot(4, (7, 3, 6))


def example(adapter, shot=SHOT):
    return adapter.example(shot, batch=2, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def test_time_starts_behind_the_text_and_pictures_are_centred():
    adapter = retrofit(minimax_h3()).adapter
    coords = adapter.coordinates(example(adapter), SHOT)
    text, video = coords[:4], coords[4:].view(7, 3, 6, 3)
    assert text.tolist() == [[i, 0, 0] for i in range(4)]
    spans = torch.tensor([0, 1, 4, 4, 4, 4, 1], dtype=torch.float64)  # frames of the video in those before
    torch.testing.assert_close(video[:, 0, 0, 0], 4 + spans.cumsum(0) * 5 / 3)
    step = 32 / (3 * 6) ** 0.5
    torch.testing.assert_close(video[0, :, 0, 1], 16 + step * (torch.arange(3).double() - 1.5))
    torch.testing.assert_close(video[0, 0, :, 2], 16 + step * (torch.arange(6).double() - 3))


def test_rows_are_those_of_the_pipeline():
    adapter = retrofit(minimax_h3()).adapter
    shot, t = example(adapter), torch.rand(2)
    given = adapter.arguments(shot, t)
    assert torch.equal(given["hidden_states"].flatten(0, 1), patchify_video_latents(shot.latents, (1, 2, 2)))
    assert torch.equal(adapter.unpatchify(given["hidden_states"], SHOT), shot.latents)
    layout = MiniMaxH3PrepareLayoutStep.build_packed_sequence(torch.ones(4), 7, 6, 12, 0, (1, 2, 2), 2, 2, 0)
    names = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
    assert all(torch.equal(given[name], rows) for name, rows in zip(names, layout, strict=False))


def test_time_and_prediction_are_the_schedulers():
    traits = retrofit(minimax_h3()).adapter.traits
    z0, noise, level = torch.randn(2, 4, 1, 2, 2), torch.randn(2, 4, 1, 2, 2), torch.tensor([0.25, 0.25])
    scheduler = MiniMaxH3Scheduler()
    scheduler.set_timesteps(sigmas=[0.25, 0.0])
    noisy = traits.path.add_noise(z0, noise, level)
    torch.testing.assert_close(noisy, scheduler.scale_noise(z0, traits.timestep(level), noise))
    clean = scheduler.step(traits.path.target(z0, noise, level), scheduler.timesteps[0], noisy).prev_sample
    torch.testing.assert_close(clean, z0)


@torch.no_grad()
def test_entries_of_a_batch_have_noise_levels_of_their_own():
    scene_model, t = retrofit(minimax_h3()), torch.tensor([[0.2], [0.9]])
    shot = example(scene_model.adapter)
    (both,) = scene_model([shot], t)
    for i in range(2):
        entry = replace(shot, latents=shot.latents[i : i + 1], text=shot.text[i : i + 1])
        assert error(both[i : i + 1], scene_model([entry], t[i : i + 1])[0]) <= 1e-6
        assert error(both[i : i + 1], scene_model([entry], t[1 - i : 2 - i])[0]) > 1e-3


def test_weights_that_its_loader_keeps_in_float32_stay():
    model = minimax_h3()
    retrofit(model).adapter.cast(torch.bfloat16)
    exact = {name.split(".")[0] for name, x in model.state_dict().items() if x.dtype == torch.float32}
    assert exact == {"proj_in", "audio_proj_in", "time_embedder", "proj_out", "audio_proj_out"}
    assert model.rope.inv_freq.dtype == torch.float32


def test_sound_is_refused():
    scene_model = retrofit(minimax_h3())
    shot = replace(example(scene_model.adapter), extras={"audio_hidden_states": torch.zeros(2, 4, 6)})
    with pytest.raises(ValueError, match=r"audio_hidden_states.*does not take"):
        scene_model([shot], torch.rand(2, 1))
