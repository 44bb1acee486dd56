"""What is special about HunyuanVideo: padding, pooled prompts, guidance, images, and its sibling that is refused."""

from dataclasses import replace

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel

from lct_core import Shot, ShotInput, retrofit
from lct_core.losses import tuning_loss
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.hunyuan_video import CASES, TINY, hunyuan_video

MASKED = BOUNDS[torch.float32]["masked"].absolute
LEVEL = torch.tensor([[0.3], [0.8]])


def example(model, *, text=4):
    generator = torch.Generator().manual_seed(0)
    shot = Shot(text, (2, 3, 2))
    return retrofit(model).adapter.example(shot, batch=2, generator=generator, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_padding_is_cut_off_where_the_model_masks_it(case):
    shot = example(case.model(), text=5)
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]] * 2)
    shot = replace(shot, extras={**shot.extras, "encoder_attention_mask": mask})
    scene = retrofit(case.model())
    own = scene.adapter.single_shot(shot, 1000 * LEVEL[:, 0])  # padding included
    assert error(scene([shot], LEVEL)[0], own) <= MASKED


@torch.no_grad()
def test_coordinates_are_the_models_own():
    model = hunyuan_video()
    shot, adapter = example(model), retrofit(model).adapter
    angles = adapter.rope(adapter.coordinates(shot, adapter.shot(shot)))[:, 0]
    cos, sin = model.rope(shot.latents)
    assert error(angles[: len(cos)].cos().repeat_interleave(2, dim=1), cos) <= 1e-7
    assert error(angles[: len(sin)].sin().repeat_interleave(2, dim=1), sin) <= 1e-7
    assert not angles[len(cos) :].any()  # text is not turned


@pytest.mark.parametrize("name", ["pooled_projections", "guidance", "condition"])
@torch.no_grad()
def test_every_extra_is_heard(name):
    model = hunyuan_video(guidance_embeds=True, in_channels=8)
    shot, scene = example(model), retrofit(model)
    other = replace(shot, extras={**shot.extras, name: shot.extras[name] + 1})
    assert error(scene([other], LEVEL)[0], scene([shot], LEVEL)[0]) > 1e-3


@torch.no_grad()
def test_the_first_frame_of_token_replace_is_always_clean():
    model = hunyuan_video(image_condition_type="token_replace")
    adapter, shot = retrofit(model).adapter, example(model)
    low, high = (adapter.encode(shot, torch.full((2,), t)) for t in (100.0, 900.0))
    assert torch.equal(low.conditioning["clean"], high.conditioning["clean"])
    assert low.conditioning["clean"].shape[1] == 3 * 2  # the tokens of a frame
    block = model.transformer_blocks[0]
    (q, *_), (p, *_) = (adapter.qkv(block, adapter.sites(block)[0], state) for state in (low, high))
    assert torch.equal(q[:, :6], p[:, :6])
    assert error(q[:, 6:12], p[:, 6:12]) > 1e-3


def test_the_first_frame_of_token_replace_stays_as_it_is():
    model = hunyuan_video(image_condition_type="token_replace")
    shot, scene = example(model), retrofit(model)
    assert scene.adapter.noisy(shot).flatten(1).tolist() == [[0, 1]] * 2
    losses = []
    for value in (0, 100):  # of the noise at the first frame, which nothing is done with
        noise = torch.ones_like(shot.latents)
        noise[:, :, 0] = value
        losses.append(tuning_loss(scene, [shot], LEVEL, [noise]).mean)
    assert torch.equal(*losses)
    image = replace(shot, latents=shot.latents[:, :, :1])
    both = tuning_loss(scene, [image, shot], LEVEL.expand(2, 2), [image.latents, shot.latents])
    assert both.shots.shape == (1,)  # of the shot alone: of the image there is nothing to predict
    assert both.mean.isfinite()
    plain = hunyuan_video()
    assert retrofit(plain).adapter.noisy(example(plain)) is None


def test_a_shot_without_text_is_refused():
    model = hunyuan_video()
    shot, scene = example(model), retrofit(model)
    with pytest.raises(ValueError, match="text: got 0 tokens, expected 1 or more"):
        scene([replace(shot, text=shot.text[:, :0])], LEVEL)
    padding = {**shot.extras, "encoder_attention_mask": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match="text: got 0 tokens, expected 1 or more"):
        scene([replace(shot, extras=padding)], LEVEL)


def test_a_global_prompt_without_its_pooled_embedding_is_refused():
    model = hunyuan_video(guidance_embeds=True)
    shot, scene = example(model), retrofit(model)
    prompt = ShotInput(text=shot.text, extras={"guidance": shot.extras["guidance"]}, role="global")
    with pytest.raises(ValueError, match=r"got \['guidance'\], but .* also needs pooled_projections \[batch, 8\]"):
        scene([prompt, shot], torch.cat([0 * LEVEL, LEVEL], dim=1))


def test_framepack_is_refused_with_the_reason():
    model = HunyuanVideoFramepackTransformer3DModel(**TINY, has_image_proj=False, has_clean_x_embedder=False)
    with pytest.raises(ValueError, match="packs a history of its own"):
        retrofit(model)
