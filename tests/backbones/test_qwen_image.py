"""Qwen-Image: what the tests of all families cannot see."""

from dataclasses import replace

import pytest
import torch
from diffusers import QwenImagePipeline

from lct_core import Shot, ShotInput, retrofit
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.qwen_image import qwen_image

T = torch.tensor([[0.3], [0.8]])


def example(scene_model, shot, *, images=True):
    drawn = scene_model.adapter.example(shot, batch=2, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return drawn if images else replace(drawn, extras={})


@torch.no_grad()
def test_one_shot_is_the_models_own_forward_at_real_head_size():
    sizes = {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    own, scene_model = qwen_image(**sizes), retrofit(qwen_image(**sizes))
    shot = example(scene_model, Shot(37, (1, 9, 14)))
    assert torch.equal(scene_model([shot], T)[0], type(scene_model.adapter)(own).single_shot(shot, T[:, 0]))


@pytest.mark.parametrize("grid", [(1, 5, 4), (1, 1, 7), (1, 6, 2)])
@pytest.mark.parametrize("images", [False, True])
def test_coordinates_are_those_of_the_model(grid, images):
    scene_model = retrofit(qwen_image())
    adapter, shot = scene_model.adapter, example(scene_model, Shot(6, grid), images=images)
    counted = adapter.shot(shot)
    assert counted == Shot(6, (6 if images else 1, *grid[1:]))
    shapes = adapter.arguments(shot, T[:, 0])["img_shapes"]
    video, text = adapter.model.pos_embed(shapes, max_txt_seq_len=6, device=torch.device("cpu"))
    angles = adapter.rope(adapter.coordinates(shot, counted))[:, 0]
    torch.testing.assert_close(torch.polar(torch.ones_like(angles), angles), torch.cat([text, video]))


def test_latents_are_packed_as_in_the_pipelines():
    scene_model = retrofit(qwen_image())
    adapter, shot = scene_model.adapter, example(scene_model, Shot(6, (1, 5, 4)))
    packed = adapter.arguments(shot, T[:, 0])["hidden_states"]
    own = QwenImagePipeline._pack_latents(shot.latents, 2, 4, 10, 8)
    images = [QwenImagePipeline._pack_latents(x, 2, 4, 10, 8) for x in shot.extras["image_latents"].unbind(2)]
    assert torch.equal(packed, torch.cat([own, *images], dim=1))
    assert torch.equal(adapter.unpatchify(packed, adapter.shot(shot)), shot.latents)


@torch.no_grad()
def test_padding_cut_off_is_padding_masked():
    own, scene_model = qwen_image(), retrofit(qwen_image())
    shot = example(scene_model, Shot(7, (1, 4, 2)))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]] * 2)
    (out,) = scene_model([replace(shot, extras={**shot.extras, "encoder_hidden_states_mask": mask})], T)
    adapter = type(scene_model.adapter)(own)
    tokens = own(**adapter.arguments(shot, T[:, 0]), encoder_hidden_states_mask=mask, return_dict=False)[0]
    masked = adapter.unpatchify(tokens, adapter.shot(shot))
    assert error(out, masked) <= BOUNDS[torch.float32]["masked"].absolute


@torch.no_grad()
def test_images_modulated_as_clean_differ():
    scene_model, edit = retrofit(qwen_image()), retrofit(qwen_image(zero_cond_t=True))
    shot, without = (example(scene_model, Shot(3, (1, 4, 2)), images=images) for images in (True, False))
    (plain,), (seen,), (clean,) = scene_model([without], T), scene_model([shot], T), edit([shot], T)
    assert plain.shape == seen.shape == shot.latents.shape
    assert error(seen, plain) > 1e-3
    assert error(seen, clean) > 1e-3
    torch.testing.assert_close(edit([without], T)[0], plain)


@torch.no_grad()
def test_a_global_prompt_has_no_images_of_its_own():
    scene_model = retrofit(qwen_image())
    shot = example(scene_model, Shot(3, (1, 4, 2)))
    prompt = ShotInput(text=torch.randn(2, 4, 16), latents=torch.zeros_like(shot.latents), role="global")
    assert scene_model.adapter.prepare(prompt).extras == {}
    none, out = scene_model([replace(prompt, latents=None), shot], torch.cat([torch.zeros(2, 1), T], dim=1))
    assert none is None
    assert error(out, scene_model([shot], T)[0]) > 1e-3


@pytest.mark.parametrize("option", [{"use_layer3d_rope": True}, {"use_additional_t_cond": True}])
def test_layers_are_refused(option):
    with pytest.raises(ValueError, match=r"^model: got Qwen-Image-Layered, whose frames are layers"):
        retrofit(qwen_image(**option))


def test_inputs_that_are_refused():
    scene_model = retrofit(qwen_image())
    shot = example(scene_model, Shot(3, (1, 4, 2)))
    with pytest.raises(ValueError, match="latents: got 2 frames, expected 1"):
        scene_model([replace(shot, latents=torch.zeros(2, 4, 2, 8, 4), extras={})], T)
    with pytest.raises(ValueError, match=r"image_latents is .*expected a tensor"):
        scene_model([replace(shot, extras={"image_latents": torch.zeros(2, 4, 1, 4, 4)})], T)


def test_shots_on_another_device_than_the_weights_are_named():
    scene_model = retrofit(qwen_image())
    wrong = example(scene_model, Shot(6, (1, 5, 4))).to("meta")
    with pytest.raises(ValueError, match=r"^latents: got torch\.float32 on meta in shot 0, expected .* on cpu, as the"):
        scene_model([wrong], T)
