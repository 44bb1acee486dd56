"""Errors that explain which input was wrong."""

from dataclasses import replace

import pytest
import torch

from lct_core import Extra
from tests.backbone.extras import T, random, scene_model, shot


@pytest.mark.parametrize("name", ["latents", "text", "extras: pooled"])
def test_an_input_unlike_the_weights_is_named(name):
    model, given = scene_model(), shot(pooled=random(2, 5))
    model.adapter.traits = replace(model.adapter.traits, extras={"pooled": Extra((5,))})
    encode = model.adapter.encode
    model.adapter.encode = lambda inputs, timestep: encode(
        replace(inputs, text=inputs.text + inputs.extras["pooled"][:, None], extras={}), timestep
    )
    model([given], T)
    if name == "extras: pooled":
        wrong = replace(given, extras={"pooled": given.extras["pooled"].double()})
    else:
        wrong = replace(given, **{name: getattr(given, name).double()})
    message = (
        rf"^{name}: got torch\.float64 on cpu in shot 1, expected torch\.float32 on cpu, as the model's weights are; "
        ".*; torch says: .*"
    )
    with pytest.raises(ValueError, match=message) as caught, torch.no_grad():
        model([given, wrong], T.repeat(2))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("name", ["latents", "text"])
def test_what_autocast_does_not_cast_is_named_under_it_too(name):
    wrong = replace(shot(), **{name: getattr(shot(), name).double()})
    message = rf"^{name}: got torch\.float64 on cpu in shot 0, .* are; convert one or the other; torch says: "
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=message), torch.no_grad():
        scene_model()([wrong], T)


def test_errors_of_the_adapter_stay_what_they_are():
    model = scene_model()

    def head(state):
        raise NotImplementedError("this head is to be written")

    model.adapter.head = head
    with pytest.raises(NotImplementedError, match="this head is to be written"):
        model([shot()], T)


def test_a_scene_on_another_device_than_the_weights_is_named():
    with pytest.raises(ValueError, match=r"^latents: got torch\.float32 on meta in shot 0, expected .* on cpu, as the"):
        scene_model()([shot().to("meta")], T)


def test_autocast_brings_dtypes_together():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (out,) = scene_model()([shot()], T)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_other_failures_are_what_they_were(error):
    model = scene_model()

    def fail(*_):
        raise error("of the device")

    model.adapter.head = fail
    with pytest.raises(error, match=r"^of the device$"):
        model([shot()], T)


@pytest.mark.parametrize("t", [torch.tensor([1]), torch.tensor([True]), torch.tensor([0.5], device="meta")])
def test_noise_levels_are_numbers_that_can_be_read(t):
    with pytest.raises(ValueError, match=rf"^t: got \[1\], expected floating-point .*; it is {t.dtype} on {t.device}$"):
        scene_model()([shot()], t)
