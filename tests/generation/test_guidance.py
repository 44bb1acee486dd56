"""Classifier-free guidance and negative prompts."""

from dataclasses import replace

import pytest
import torch

from lct_backbones.mmdit import tiny
from lct_core import Extra, retrofit
from lct_core.generation import (
    Guidance,
)
from tests.generation.definitions import (
    FOUR,
    Watched,
    case,
    draw,
    every_mode,
    generated,
    guide,
    negatives,
    random,
    same,
    scene_model,
    with_and_without_global,
    worst,
)


@every_mode
def test_a_scale_of_1_is_no_guidance_and_costs_none(mode):
    scene, given = case(mode)
    plain, spared, paid = (Watched(scene_model()) for _ in range(3))
    expected = generated(mode, scene, given, model=plain)
    scale, text, overall = negatives()
    assert same(generated(mode, scene, given, model=spared, guidance=guide(1, text, overall)), expected)
    generated(mode, scene, given, model=paid, guidance=guide(scale, text, overall))
    assert len(spared.calls) == len(plain.calls)
    assert len(paid.calls) == 2 * len(plain.calls)


@every_mode
@with_and_without_global
def test_a_scale_of_0_is_the_negative_prompts(mode, with_global):
    scene, given = case(mode, with_global)
    _, text, overall = negatives()
    negative = [replace(shot, text=overall if shot.role == "global" else text) for shot in scene]
    assert same(generated(mode, scene, given, guidance=guide(0, text, overall)), generated(mode, negative, given))
    assert worst(generated(mode, scene, given), generated(mode, negative, given)) > 1e-3


@every_mode
def test_the_negative_branch_replaces_only_texts(mode):
    scene, given = case(mode)
    _, text, overall = negatives()
    watched = Watched(scene_model())
    generated(mode, scene, given, model=watched, guidance=guide(2, text, overall))
    texts = {scene[i].text.data_ptr() for i in range(len(scene))}
    for (positive, t), (negative, level) in zip(watched.calls[::2], watched.calls[1::2], strict=True):
        assert torch.equal(t, level)
        for shot, other in zip(positive, negative, strict=True):
            assert shot.text.data_ptr() in texts
            assert torch.equal(other.text, overall if shot.role == "global" else text)
            assert other.latents is shot.latents
            assert (other.role, other.extras) == (shot.role, shot.extras)


def same_extras(got, expected):
    """The same objects, by the same names."""
    return got.keys() == expected.keys() and all(got[name] is x for name, x in expected.items())


@every_mode
@pytest.mark.parametrize("overall", [None, {}, {"pooled": random(2, 16, seed=4)}])
def test_a_negative_prompt_replaces_extras_by_name(mode, overall):
    scene, given = case(mode)
    scene = [replace(shot, extras={"pooled": random(2, 16, seed=i), "fps": 24}) for i, shot in enumerate(scene)]
    model, extras = retrofit(tiny()), {"pooled": random(2, 16, seed=5)}
    model.adapter.traits = replace(model.adapter.traits, extras={"pooled": Extra(("channels",)), "fps": Extra(None)})
    watched = Watched(model)
    generated(
        mode,
        scene,
        given,
        model=watched,
        guidance=Guidance(text=negatives()[1], extras=extras, global_extras=overall),
    )
    for (positive, _), (negative, _) in zip(watched.calls[::2], watched.calls[1::2], strict=True):
        for shot, other in zip(positive, negative, strict=True):
            assert any(same_extras(shot.extras, own.extras) for own in scene)
            put = extras if shot.role == "shot" or overall is None else overall
            assert same_extras(other.extras, {**shot.extras, **put})


def taking(**extras):
    """The traits of a model that takes these extras."""
    return replace(retrofit(tiny()).adapter.traits, extras=extras)


def test_extras_that_are_not_the_prompts_are_left():
    scene = [replace(shot, extras={"fps": 1}) for shot in draw(*FOUR, with_global=True)]
    negative = Guidance(text=negatives()[1]).negative(scene, taking(fps=Extra(None)))
    assert [shot.extras for shot in negative] == [{"fps": 1}] * 5


def test_a_negative_prompt_has_all_that_belongs_to_a_prompt():
    scene = [replace(shot, extras={"pooled": torch.ones(2, 3), "more": 1}) for shot in draw(*FOUR, with_global=False)]
    traits = taking(pooled=Extra((3,), required=True, prompt=True), more=Extra(None, prompt=True))
    pooled = Guidance(text=negatives()[1], extras={"pooled": torch.zeros(2, 3)})
    for shot in pooled.negative(scene, traits):
        assert same_extras(shot.extras, pooled.extras)  # and nothing of the positive one
    with pytest.raises(
        ValueError, match=r"^extras: the negative prompt has none, but the model also takes \['pooled'\]"
    ):
        Guidance(text=negatives()[1]).negative(scene, traits)


def test_a_negative_prompts_extras_follow_the_prompts():
    scene = [
        replace(shot, extras={"pooled": torch.ones(2, 3, dtype=torch.bfloat16)})
        for shot in draw(*FOUR, with_global=False)
    ]
    extras = {"pooled": torch.full((1, 3), 0.1), "mask": torch.ones(1, 4, dtype=torch.bool)}
    for shot in Guidance(text=negatives()[1], extras=extras).negative(scene, taking()):
        assert torch.equal(shot.extras["pooled"], torch.full((2, 3), 0.1, dtype=torch.bfloat16))
        assert torch.equal(shot.extras["mask"], torch.ones(2, 4, dtype=torch.bool))


@every_mode
def test_a_global_shot_defaults_to_the_shots_negative_prompt(mode):
    scene, given = case(mode)
    scale, text, overall = negatives()
    alone = generated(mode, scene, given, guidance=Guidance(text=text, scale=scale))
    assert same(alone, generated(mode, scene, given, guidance=guide(scale, text, text)))
    assert worst(alone, generated(mode, scene, given, guidance=guide(scale, text, overall))) > 1e-3


@every_mode
def test_one_negative_prompt_serves_a_batch(mode):
    scene, given = case(mode)
    scale, text, overall = negatives(batch=1)
    got = generated(mode, scene, given, guidance=guide(scale, text, overall))
    both = guide(scale, text.repeat(2, 1, 1), overall.repeat(2, 1, 1))
    assert same(got, generated(mode, scene, given, guidance=both))


def test_guidance_is_the_papers_by_default():
    guidance = Guidance(text=torch.zeros(1, 2, 16))
    assert guidance.scale == 7.5
    p, n = torch.tensor([[3.0, -1.0], [1.0, 2.0]])
    (got,) = guidance.combine([p], [n])
    assert torch.equal(got, torch.tensor([16.0, -20.5]))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_refuses_a_scale_that_is_not_finite(scale):
    with pytest.raises(ValueError, match=rf"^scale: got {scale}, expected a finite number; 1 is no guidance"):
        Guidance(text=torch.zeros(1, 2, 16), scale=scale)


@every_mode
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("text", torch.zeros(3, 2, 16), r"^text: got \[3, 2, 16\], expected \[1 or 2, tokens, width\]"),
        ("text", torch.zeros(2, 16), r"^text: got \[2, 16\], expected \[1 or 2, tokens, width\]"),
        ("text", "ugly", r"^text: got 'ugly', expected \[1 or 2, tokens, width\]"),
        ("global_text", torch.zeros(3, 2, 16), r"^global_text: got \[3, 2, 16\], expected \[1 or 2, tokens, width\]"),
        ("text", torch.zeros(1, 2, 15), r"^text: got \[2, 2, 15\], expected \[2, tokens, 16\]"),
    ],
)
def test_refuses_negative_prompts_that_do_not_fit(mode, name, text, message):
    scene, given = case(mode)
    with pytest.raises(ValueError, match=message):
        generated(mode, scene, given, guidance=Guidance(**{"text": torch.zeros(1, 2, 16), name: text}))


@pytest.mark.parametrize("name", ["extras", "global_extras"])
def test_extras_that_are_no_mapping(name):
    with pytest.raises(ValueError, match=rf"^{name}: got .*, expected a mapping from names to values"):
        Guidance(text=torch.zeros(1, 1, 2), **{name: ["pooled"]})
