"""What is special about Cosmos: frames of any rate, clean frames, text without padding, and what it refuses."""

from dataclasses import replace
from itertools import accumulate
from math import ceil

import pytest
import torch

from lct_core import Shot, retrofit
from lct_core.testing.oracle import Join, lockstep
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.cosmos import IMAGE, PROJECTED, VIDEO, cosmos, diagonal

FLOAT32 = BOUNDS[torch.float32]


def shot_of(model, *, frames=3, text=4, seed=0, **extras):
    generator = torch.Generator().manual_seed(seed)
    shot = model.adapter.example(Shot(text, (frames, 2, 3)), batch=2, generator=generator, dtype=torch.float32)
    return replace(shot, extras={**shot.extras, **extras})


@torch.no_grad()
def test_a_clean_frame_is_given_as_the_pipelines_give_it():
    model, own, t = retrofit(cosmos(**VIDEO)), cosmos(**VIDEO), torch.tensor([0.3, 0.8])
    clean = torch.tensor([1.0, 0.0, 0.0]).expand(2, -1)
    condition = clean[:, None, :, None, None].expand(-1, -1, -1, 4, 6)
    shot = shot_of(model, timestep_mask=1 - clean, condition_mask=condition)
    expected = own(
        shot.latents,
        timestep=((1 - clean) * t[:, None])[:, None, :, None, None],
        encoder_hidden_states=shot.text,
        condition_mask=condition,
        padding_mask=torch.zeros(1, 1, 32, 48),
        return_dict=False,
    )[0]
    (out,) = model([shot], t[:, None])
    assert torch.equal(out, expected)


@torch.no_grad()
def test_one_shot_has_the_models_own_frame_rate():
    model, own, t = retrofit(cosmos(**VIDEO)), cosmos(**VIDEO), torch.tensor([0.3, 0.8])
    outs = []
    for fps in (None, 16, 7):
        shot = shot_of(model, **({} if fps is None else {"fps": fps}))
        (out,) = model([shot], t[:, None])
        assert torch.equal(out, type(model.adapter)(own).single_shot(shot, t))
        outs.append(out)
    assert min(error(outs[1], outs[0]), error(outs[2], outs[1])) > 1e-3


@torch.no_grad()
def test_shots_of_different_frame_rates_are_the_joined_forwards():
    model, own, t = retrofit(cosmos(**VIDEO)), cosmos(**VIDEO), torch.tensor([[0.3, 0.8, 0.1], [0.5, 0.2, 0.9]])
    rates, frames = (16, 30, 7), (3, 2, 4)
    shots = [shot_of(model, frames=n, seed=n, fps=fps) for n, fps in zip(frames, rates, strict=True)]
    steps = [1 + ceil(max((n - 1) * 24 / fps, 2) - 1e-3) for n, fps in zip(frames, rates, strict=True)]
    assert steps == [4, 3, 12]
    adapter = type(model.adapter)(own)
    expected = lockstep(
        [lambda i=i: adapter.single_shot(shots[i], t[:, i]) for i in range(3)],
        {block.attn1: Join(torch.ones(3, 3, dtype=torch.bool)) for block in own.transformer_blocks},
        offsets=[*accumulate(steps[:-1], initial=0)],
        diagonal=diagonal(2, 3, 4),
        pairing="half",
    )
    assert max(map(error, model(shots, t), expected)) <= FLOAT32["definition"].absolute


@torch.no_grad()
def test_padding_of_the_text_is_cut_off_as_the_model_masks_it():
    model, own, t = retrofit(cosmos()), cosmos(), torch.tensor([0.3, 0.8])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]).expand(2, -1)
    shot = shot_of(model, text=5)
    (out,) = model([replace(shot, extras={**shot.extras, "attention_mask": mask})], t[:, None])
    given = model.adapter.arguments(shot, t)
    expected = own(**{**given, "attention_mask": mask.bool()}, return_dict=False)[0]
    assert error(out, expected) <= FLOAT32["masked"].absolute
    assert error(out, own(**given, return_dict=False)[0]) > 1e-3


@torch.no_grad()
def test_tokens_of_an_image_are_seen():
    model = retrofit(cosmos(**VIDEO, **PROJECTED, **IMAGE))
    shot, t = shot_of(model), torch.tensor([0.5])
    other = replace(shot, extras={**shot.extras, "img_context": shot.extras["img_context"] + 1})
    assert error(model([other], t)[0], model([shot], t)[0]) > 1e-3


def test_predict_1_and_control_are_refused():
    with pytest.raises(ValueError, match=r"extra_pos_embed_type='learnable'.*EDM.*use 2 or 2\.5"):
        retrofit(cosmos(extra_pos_embed_type="learnable"))
    model = retrofit(cosmos(**VIDEO, controlnet_block_every_n=2))
    with pytest.raises(ValueError, match=r"extras: got \['block_controlnet_hidden_states'\].*does not take"):
        model([shot_of(model, block_controlnet_hidden_states=torch.zeros(2, 18, 28))], torch.tensor([0.5]))
