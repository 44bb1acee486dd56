"""Wan: timesteps of tokens as its pipeline has them, CLIP tokens that stay inside their shot, what is refused."""

from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from lct_backbones.plugin import lct_backbones
from lct_core import Shot, ShotInput, retrofit
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.wan import CLIP, wan

FLOAT32 = BOUNDS[torch.float32]
SPEC = next(spec for spec in lct_backbones() if spec.name == "wan")
T = torch.tensor([0.5, 0.25])


def scene(model, *grids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shots = [Shot(3, grid) for grid in grids]
    return [model.adapter.example(s, batch=1, generator=generator, dtype=torch.float32) for s in shots]


def changed(shot, **extras):
    return replace(shot, extras={**shot.extras, **extras})


@torch.no_grad()
def test_timesteps_of_tokens_are_the_pipelines():
    model, t = retrofit(wan()), 500.0
    (shot,) = scene(model, (3, 2, 4))
    mask = torch.ones(1, 1, *shot.latents.shape[2:])
    mask[:, :, 0] = 0
    expected = (mask[0][0][:, ::2, ::2] * t).flatten()[None]  # as WanImageToVideoPipeline has it
    given = model.adapter.arguments(changed(shot, timestep_mask=mask[:, 0]), torch.tensor([t]))
    assert torch.equal(given["timestep"], expected)
    given = model.adapter.arguments(changed(shot, timestep_mask=mask[:, 0].bool()), torch.tensor([t]))
    assert torch.equal(given["timestep"], expected)
    (got,) = model([changed(shot, timestep_mask=mask[:, 0])], T[:1])
    own = wan()(shot.latents, expected, shot.text, return_dict=False)[0]
    assert torch.equal(got, own)
    (plain,) = model([replace(shot, extras={})], T[:1])
    assert error(got, plain) > 1e-3


@torch.no_grad()
def test_an_image_is_seen_by_its_own_shot_alone():
    """One block: what a later shot sees of an earlier one was computed before that one saw its image."""
    model = retrofit(wan(num_layers=1, **CLIP), text="all")
    first, second = scene(model, (2, 2, 2), (1, 2, 3))
    outs = model([first, second], T, pattern="context_causal")
    other = changed(first, encoder_hidden_states_image=torch.randn(1, 7, 20))
    moved = model([other, second], T, pattern="context_causal")
    assert error(moved[0], outs[0]) > 1e-3
    assert torch.equal(moved[1], outs[1])
    told = model([replace(first, text=torch.randn_like(first.text)), second], T, pattern="context_causal")
    assert error(told[1], outs[1]) > 1e-3  # its prompt is


@torch.no_grad()
def test_a_global_prompt_beside_an_image_needs_no_image():
    model = retrofit(wan(**CLIP), text="own_and_global")
    (shot,) = scene(model, (2, 2, 3))
    (alone,) = model([shot], T[:1])
    t = torch.cat([torch.zeros(1), T[:1]])
    _, twice = model([ShotInput(text=shot.text, role="global"), shot], t)
    assert error(twice, alone) <= FLOAT32["definition"].absolute  # keys that come twice weigh the same
    _, other = model([ShotInput(text=torch.randn(1, 512, 16), role="global"), shot], t)
    assert error(other, alone) > 1e-3


@torch.no_grad()
def test_the_order_of_two_images_matters():
    model = retrofit(wan(pos_embed_seq_len=6, **CLIP))
    (shot,) = scene(model, (2, 2, 3))
    first, last = shot.extras["encoder_hidden_states_image"].chunk(2, dim=1)
    (out,) = model([shot], T[:1])
    (other,) = model([changed(shot, encoder_hidden_states_image=torch.cat([last, first], dim=1))], T[:1])
    assert error(other, out) > 1e-3


def test_channels_out_default_to_those_in():
    assert retrofit(wan(out_channels=None)).adapter.traits.latent_channels == 4


@pytest.mark.parametrize(
    ("config", "extras", "message"),
    [
        (
            {},
            {"timestep_mask": torch.full((1, 2, 4, 6), 1.5)},
            r"timestep_mask goes from 1.5 to 1.5, expected \[0, 1\]",
        ),
        ({}, {"timestep_mask": torch.ones(1, 2, 2, 3)}, r"timestep_mask is \[1, 2, 2, 3\], expected .* \[1, 2, 4, 6\]"),
        (
            {},
            {"condition": torch.ones(1, 5, 2, 4, 6)},
            r"got \['condition'\], which WanTransformer3DModel does not take",
        ),
        (
            CLIP,
            {"condition": torch.ones(1, 4, 2, 4, 6)},
            r"condition is \[1, 4, 2, 4, 6\], expected .* \[1, 5, 2, 4, 6\]",
        ),
        ({**CLIP, "pos_embed_seq_len": 6}, {"encoder_hidden_states_image": torch.ones(1, 3, 20)}, r"\[1, 6, 20\]"),
    ],
)
def test_refuses_extras(config, extras, message):
    model = retrofit(wan(**config))
    (shot,) = scene(model, (2, 2, 3))
    with pytest.raises(ValueError, match=message):
        model([changed(shot, **extras)], T[:1])


def test_refuses_a_shot_without_its_image():
    model = retrofit(wan(**CLIP))
    (shot,) = scene(model, (2, 2, 3))
    with pytest.raises(ValueError, match=r"also needs condition .*, encoder_hidden_states_image"):
        model([replace(shot, extras={})], T[:1])


@pytest.mark.parametrize("tokens", [4, 513])
def test_refuses_text_of_another_length_beside_an_image(tokens):
    model = retrofit(wan(**CLIP))
    (shot,) = scene(model, (2, 2, 3))
    with pytest.raises(
        ValueError, match=rf"text: got {tokens} tokens, expected 512; encode and pad the prompt as the model's own"
    ):
        model([replace(shot, text=torch.randn(1, tokens, 16))], T[:1])


@pytest.mark.parametrize("name", SPEC.refuses, ids=lambda name: name.rsplit(".")[-1])
def test_refuses_siblings(name):
    module, cls = name.rsplit(".", 1)
    found = getattr(import_module(module), cls)
    with pytest.raises(ValueError, match=rf"model: {name} cannot be served: .*; use WanTransformer3DModel"):
        retrofit(found.__new__(found))


def test_refuses_another_attention():
    model = wan()
    model.blocks[1].attn2.processor = SimpleNamespace()
    with pytest.raises(
        ValueError, match=r"its attention runs \['SimpleNamespace'\], .* expected \['WanAttnProcessor'\]"
    ):
        retrofit(model)
