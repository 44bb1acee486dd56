"""What is special about Kandinsky 6: an image as one more frame, prompts with pooled text; and what it refuses."""

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from families.case import random_model
from families.kandinsky6 import IMAGE, TINY, diagonal, kandinsky6

from lct_core import Shot, registry, retrofit
from lct_core.testing.oracle import Join, lockstep
from lct_core.testing.tolerances import BOUNDS, error

FLOAT32 = BOUNDS[torch.float32]
LEVELS = torch.tensor([0.3, 0.8])
MASK = "encoder_attention_mask"


def shot_of(model, *, text=4, frames=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shot = model.adapter.example(Shot(text, (frames, 2, 3)), batch=2, generator=generator, dtype=torch.float32)
    return replace(shot, extras={name: x for name, x in shot.extras.items() if name != MASK})


@torch.no_grad()
def test_an_image_is_given_as_the_pipeline_gives_it():
    model, own = retrofit(kandinsky6(**IMAGE)), kandinsky6(**IMAGE)
    shot = shot_of(model)
    image, pooled = shot.extras["image"], shot.extras["pooled_projections"]
    frames = torch.cat([shot.latents, image[:, :, None]], dim=2)
    mask = torch.zeros(2, 1, 3, 4, 6)
    mask[:, :, 2] = 1
    expected = own(
        torch.cat([frames, torch.zeros_like(frames), mask], dim=1).permute(0, 2, 3, 4, 1),
        shot.text,
        pooled,
        1000 * LEVELS,
        visual_rope_pos=(torch.tensor([0, 1, 0]), torch.arange(2), torch.arange(3)),
        visual_token_type_ids=torch.tensor([[0, 0, 1]] * 2),
        return_dict=False,
    )[0]
    (out,) = model([shot], LEVELS[:, None])
    assert torch.equal(out, expected.permute(0, 4, 1, 2, 3)[:, :, :2])
    for changed in ({"image": image + 1, "pooled_projections": pooled}, {"pooled_projections": pooled}):
        assert error(model([replace(shot, extras=changed)], LEVELS[:, None])[0], out) > 1e-3


@torch.no_grad()
def test_padding_of_the_text_is_cut_off_as_the_model_masks_it():
    model, own = retrofit(kandinsky6()), kandinsky6()
    shot = shot_of(model)
    mask = torch.tensor([True, True, True, False]).expand(2, -1)
    (out,) = model([replace(shot, extras={**shot.extras, MASK: mask})], LEVELS[:, None])
    given = model.adapter.arguments(shot, 1000 * LEVELS)
    expected = own(**given, encoder_attention_mask=mask, return_dict=False)[0].permute(0, 4, 1, 2, 3)
    assert error(out, expected) <= FLOAT32["masked"].absolute
    assert error(out, own(**given, return_dict=False)[0].permute(0, 4, 1, 2, 3)) > 1e-3


@pytest.mark.parametrize("text", ["own_and_global", "all"])
@torch.no_grad()
def test_prompts_of_other_shots_are_heard(text):
    model, own = retrofit(kandinsky6(), text=text), kandinsky6()
    shots = [shot_of(model, frames=n, seed=n) for n in (1, 3, 2)]
    prompt = replace(shots[0], latents=None, role="global")
    t = torch.tensor([[0.0, 0.8, 0.1], [0.0, 0.2, 0.9]])
    adapter = type(model.adapter)(own)
    heard = torch.tensor([[1, 0, 0], [1, 1, text == "all"], [1, text == "all", 1]], dtype=torch.bool)
    video = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1]], dtype=torch.bool)
    parts = [block.video_dec_block for block in own.visual_transformer_blocks]
    expected = lockstep(
        [lambda i=i: adapter.single_shot(shots[i], 1000 * t[:, i]) for i in range(3)],
        {part.self_attention: Join(video) for part in parts}
        | {part.cross_attention: Join(heard, turned=False) for part in parts},
        offsets=[0, 0, 3],
        diagonal=diagonal(),
    )
    _, *got = model([prompt, *shots[1:]], t)
    assert max(map(error, got, expected[1:])) <= FLOAT32["definition"].absolute


def test_a_global_prompt_needs_its_pooled_text():
    model = retrofit(kandinsky6(), text="all")
    shot = shot_of(model)
    prompt = replace(shot, latents=None, extras={}, role="global")
    with pytest.raises(ValueError, match=r"^extras: got none, .* also needs pooled_projections \[batch, 10\]"):
        model([prompt, shot], torch.tensor([0.0, 0.5]))


def test_tables_of_angles_stay_in_float32():
    model = retrofit(kandinsky6())
    model.adapter.cast(torch.bfloat16)
    assert {buffer.dtype for buffer in model.backbone.buffers()} == {torch.float32}
    assert model.backbone.visual_embeddings.in_layer.weight.dtype == torch.bfloat16


def test_refuses_several_velocities_and_audio():
    with pytest.raises(ValueError, match=r"^model: got out_visual_dim=8 beside in_visual_dim=4.*PiflowScheduler"):
        retrofit(kandinsky6(out_visual_dim=8))
    model = retrofit(kandinsky6())
    shot = shot_of(model)
    with pytest.raises(ValueError, match=r"^extras: got \['audio_hidden_states'\].*does not take"):
        model([replace(shot, extras={**shot.extras, "audio_hidden_states": torch.zeros(2, 3, 6)})], LEVELS[:1])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Kandinsky5Transformer3DModel", "to bfloat16 in every dtype"), ("Kandinsky6SRTransformer3DModel", "no text")],
)
def test_siblings_are_refused_by_name(name, reason):
    model = getattr(diffusers, name).__new__(getattr(diffusers, name))
    with pytest.raises(ValueError, match=rf"^model: .*\.{name} cannot be served: .*{reason}"):
        registry().adapter(model)


@torch.no_grad()
def test_kandinsky_5_is_not_the_same_elsewhere():
    """The reason for its refusal: RoPE is relative, but moved along the diagonal, rounding to bfloat16 shows."""
    model = random_model(
        Kandinsky5Transformer3DModel,
        **{name: size for name, size in TINY.items() if "audio" not in name},
    )
    generator = torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(1, *s, generator=generator) for s in ((2, 4, 6, 4), (3, 16), (10,)))
    here, there = (
        model(
            latents,
            text,
            torch.tensor([500.0]),
            pooled,
            visual_rope_pos=[torch.arange(n) + steps for n in (2, 2, 3)],
            text_rope_pos=torch.arange(3),
            return_dict=False,
        )
        for steps in (0, 7)
    )
    assert error(there, here) > 1e-5
