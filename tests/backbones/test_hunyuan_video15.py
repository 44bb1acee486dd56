"""What is special about HunyuanVideo-1.5: a text of three parts, each with padding, and images that are none."""

from dataclasses import replace

import pytest
import torch

from lct_core import Shot, retrofit
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.hunyuan_video15 import hunyuan_video15

MASKED = BOUNDS[torch.float32]["masked"].absolute
LEVEL = torch.tensor([[0.3], [0.8]])


def example(model, *, text=4, without=(), **extras):
    generator = torch.Generator().manual_seed(0)
    shot = Shot(text, (2, 3, 2))
    made = retrofit(model).adapter.example(shot, batch=2, generator=generator, dtype=torch.float32)
    without = {*without, "encoder_attention_mask_2"}
    return replace(made, extras={**{name: x for name, x in made.extras.items() if name not in without}, **extras})


MASKS = {
    "encoder_attention_mask": torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2),
    "encoder_attention_mask_2": torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0, 0.0]]),
}


@pytest.mark.parametrize("second", [True, False], ids=["a second text", "none"])
@pytest.mark.parametrize("image", [True, False], ids=["an image", "none"])
@torch.no_grad()
def test_what_is_cut_off_is_what_the_model_masks(image, second):
    """As its pipelines call it: no image is zeros, no second text is padding alone."""
    model = hunyuan_video15(task_type="i2v" if image else "t2v")
    given = dict(MASKS)
    if not second:
        given["encoder_attention_mask_2"] = torch.zeros(2, 5)
    if not image:
        given |= {"image_embeds": torch.zeros(2, 5, 14), "condition": torch.zeros(2, 5, 2, 3, 2)}
    shot, scene = example(model, **given), retrofit(model)
    own = scene.adapter.single_shot(shot, 1000 * LEVEL[:, 0])  # padding and the image that is none included
    assert error(scene([shot], LEVEL)[0], own) <= MASKED
    if not image:  # as well left out
        bare = {name: x for name, x in shot.extras.items() if name not in ("image_embeds", "condition")}
        assert torch.equal(scene([replace(shot, extras=bare)], LEVEL)[0], scene([shot], LEVEL)[0])


@torch.no_grad()
def test_the_order_of_text_is_image_second_text_prompt():
    model = hunyuan_video15()
    shot, adapter = example(model), retrofit(model).adapter
    time = 1000 * LEVEL[:, 0]
    text = adapter.encode(shot, time).streams["text"]
    kinds = model.cond_type_embed.weight
    assert adapter.shot(shot).text == text.shape[1] == 5 + 5 + 4
    assert torch.equal(text[:, :5], model.image_embedder(shot.extras["image_embeds"]) + kinds[2])
    assert torch.equal(text[:, 5:10], model.context_embedder_2(shot.extras["encoder_hidden_states_2"]) + kinds[1])
    assert torch.equal(text[:, 10:], model.context_embedder(shot.text, time, torch.ones(2, 4)) + kinds[0])


@pytest.mark.parametrize("name", ["encoder_hidden_states_2", "image_embeds", "condition"])
@torch.no_grad()
def test_every_extra_is_heard(name):
    model = hunyuan_video15()
    shot, scene = example(model), retrofit(model)
    other = replace(shot, extras={**shot.extras, name: shot.extras[name].flip(-1) + 10})
    assert error(scene([other], LEVEL)[0], scene([shot], LEVEL)[0]) > 1e-3


def test_a_batch_where_some_have_an_image_is_refused():
    model = hunyuan_video15()
    shot, scene = example(model), retrofit(model)
    shot.extras["image_embeds"][1] = 0
    with pytest.raises(ValueError, match=r"image_embeds is .* keeps \[5, 0\] tokens \(an image of zeros has none\)"):
        scene([shot], LEVEL)


@pytest.mark.parametrize(
    ("mask", "keeps"),
    [(torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]), [5, 2]), (torch.ones(2, 4), [4, 4])],
    ids=["of unequal numbers", "of another length"],
)
def test_a_second_mask_that_does_not_fit_is_refused(mask, keeps):
    model = hunyuan_video15()
    shot = example(model, encoder_attention_mask_2=mask)
    with pytest.raises(ValueError, match=f"encoder_hidden_states_2 is .* keeps {keeps} tokens".replace("[", r"\[")):
        retrofit(model)([shot], LEVEL)


def test_a_mask_without_a_second_text_is_refused():
    model = hunyuan_video15()
    shot = example(model, without=("encoder_hidden_states_2",), encoder_attention_mask_2=torch.ones(2, 5))
    with pytest.raises(ValueError, match="encoder_hidden_states_2 is None"):
        retrofit(model)([shot], LEVEL)


@pytest.mark.parametrize("name", ["image_embeds", "condition"])
def test_what_image_to_video_needs_is_asked_for(name):
    model = hunyuan_video15()
    with pytest.raises(ValueError, match=f"also needs {name}"):
        retrofit(model)([example(model, without=(name,))], LEVEL)


def test_a_shot_without_a_prompt_is_refused():
    model = hunyuan_video15()
    shot = example(model)
    with pytest.raises(ValueError, match="text: got 0 tokens, expected 1 or more"):
        retrofit(model)([replace(shot, text=shot.text[:, :0])], LEVEL)


def test_meanflow_is_refused():
    with pytest.raises(ValueError, match=r"^model: got use_meanflow=True, expected False: .*each step leads to"):
        retrofit(hunyuan_video15(use_meanflow=True))
