"""What every adapter inherits: what a shot may bring along, and how it is prepared for the model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given as drawn, strategies as st

from lct_core import Extra, KVCache, Shot, ShotInput, retrofit
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbone.extras import LATENTS, T, random, scene_model, shot
from tests.toys import CROSS, TOYS, toy

EXTRAS = {
    "strength": Extra(()),
    "mask": Extra(("tokens",)),
    "pooled": Extra((7,), required=True),
    "image": Extra((4, "frames", "height", "width"), required=True, image=True),
    "first": Extra((3, 1, "height", "width"), required=True),
    "clip": Extra(("patches", 6), required=True, image=True),
    "fps": Extra(None),
}
NAN, INF = float("nan"), float("inf")
FITTING = {
    "strength": (2,),
    "mask": (2, 4),
    "pooled": (2, 7),
    "image": (2, 4, 3, 4, 6),
    "first": (2, 3, 1, 4, 6),
    "clip": (2, 9, 6),
}


def demanding(**config):
    """A toy that takes extras of every kind; its forward knows the strength alone."""
    adapter = toy(**config)
    adapter.traits = replace(adapter.traits, extras=EXTRAS, text_mask="mask")
    return adapter


def masked(**config):
    """A toy whose text may come with padding."""
    adapter = toy(**config)
    adapter.traits = replace(
        adapter.traits, extras={**adapter.traits.extras, "mask": Extra(("tokens",))}, text_mask="mask"
    )
    return adapter


def fitting():
    return {**{name: torch.ones(size) for name, size in FITTING.items()}, "fps": 24.0}


def padded(given, padding, *, dtype=torch.bool):
    """The same shot with padding behind its text, of which nothing may be used."""
    batch, length = given.text.shape[:2]
    poison = torch.full((batch, padding, given.text.shape[2]), float("nan"))
    mask = (torch.arange(length + padding) < length).expand(batch, -1).to(dtype)
    return replace(given, text=torch.cat([given.text, poison], dim=1), extras={**given.extras, "mask": mask})


# Extras.


def test_extras_that_fit_are_taken():
    counts = demanding().shot(shot(**fitting()))
    assert counts == Shot(4, (3, 2, 3))


@pytest.mark.parametrize(("name", "size"), FITTING.items())
def test_extras_of_any_other_shape_are_refused(name, size):
    """Every axis one larger, one axis more and one less; an axis of a name of its own may have any size."""
    adapter, axes = demanding(), EXTRAS[name].shape
    free = [i for i, axis in enumerate(axes, start=1) if axis in ("tokens", "patches")]
    for axis in range(len(size)):
        other = [n + (i == axis) for i, n in enumerate(size)]
        given = shot(**{**fitting(), name: torch.ones(other)})
        if axis in free:
            adapter.shot(given)
        else:
            with pytest.raises(ValueError, match=rf"^extras: {name} is \[{', '.join(map(str, other))}\], expected a"):
                adapter.shot(given)
    for other in (torch.ones(*size, 1), torch.ones(size[:-1]), 1.0, "photo", None):
        with pytest.raises(ValueError, match=rf"^extras: {name} is .*, expected a tensor \[2"):
            adapter.shot(shot(**{**fitting(), name: other}))


def test_the_message_says_what_shape_is_expected():
    given = shot(**{**fitting(), "image": torch.ones(2, 4, 1, 4, 6)})
    with pytest.raises(ValueError, match=r"^extras: image is \[2, 4, 1, 4, 6\], expected a tensor \[2, 4, 3, 4, 6\]$"):
        demanding().shot(given)
    given = shot(**{**fitting(), "clip": torch.ones(2, 9)})
    with pytest.raises(ValueError, match=r"^extras: clip is \[2, 9\], expected a tensor \[2, patches, 6\]$"):
        demanding().shot(given)


@pytest.mark.parametrize("fps", [torch.ones(2), torch.tensor(24.0), "24", None, 1j, -1, NAN, INF, 10**400])
def test_a_number_is_a_number(fps):
    with pytest.raises(ValueError, match=r"^extras: fps is .*, expected a number, .* that is not negative$"):
        demanding().shot(shot(**{**fitting(), "fps": fps}))


@pytest.mark.parametrize("rate", [0, 0.0, True, False, -1, NAN, INF, torch.tensor(24.0)])
def test_a_rate_is_a_number_above_0(rate):
    adapter = toy()
    adapter.traits = replace(adapter.traits, extras={"rate": Extra(None, positive=True), "flag": Extra(None)})
    with pytest.raises(ValueError, match=r"^extras: rate is .*, expected a number, .* that is above 0$"):
        adapter.shot(shot(rate=rate))
    adapter.shot(shot(rate=1e-9, flag=True))
    adapter.shot(shot(rate=25, flag=0))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex64])
def test_what_has_channels_is_in_floating_point(dtype):
    for name, size in FITTING.items():
        given = shot(**{**fitting(), name: torch.ones(size, dtype=dtype)})
        if name in ("strength", "mask") and dtype != torch.complex64:
            demanding().shot(given)
        else:
            with pytest.raises(
                ValueError, match=rf"^extras: {name} is {dtype}, expected a (floating-point|real) tensor"
            ):
                demanding().shot(given)


def test_a_shot_is_on_one_device():
    """But for the text mask, whose values are read: on the CPU that is no wait."""
    given = shot(**fitting())
    message = r" is on meta, expected cpu as the latents are; .*ShotInput\.to\(device\)"
    with pytest.raises(ValueError, match="^text" + message):
        demanding().shot(replace(given, text=given.text.to("meta")))
    for name in FITTING:
        with pytest.raises(ValueError, match=f"^extras: {name}" + message):
            demanding().shot(shot(**{**fitting(), name: fitting()[name].to("meta")}))
    demanding().shot(replace(given.to("meta"), extras={**given.to("meta").extras, "mask": fitting()["mask"]}))


@pytest.mark.parametrize("extras", [None, ["fps"], "fps", 24])
def test_extras_are_a_mapping(extras):
    with pytest.raises(ValueError, match=r"^extras: got .*, expected a mapping from names to values"):
        replace(shot(), extras=extras)


@pytest.mark.parametrize("value", [[[0.5] * 1000] * 1000, np.zeros((2, 3, 4)), "photo" * 1000])
def test_messages_are_short(value):
    for given in (replace(shot(), latents=value), shot(**{**fitting(), "pooled": value})):
        with pytest.raises(ValueError, match=r"^(latents|extras: pooled)[^\n]{1,300}$"):
            demanding().shot(given)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (
            torch.ones(0, *LATENTS[1:]),
            r"got \[0, 3, 3, 4, 6\], expected \[batch, 3, frames, height, width\], a batch of 1",
        ),
        (
            torch.ones(2, 7, 3, 4, 6),
            r"got \[2, 7, 3, 4, 6\], expected .*; other channels are extras: \['image', 'first'\]",
        ),
        (
            torch.ones(LATENTS, dtype=torch.uint8),
            "got a tensor of torch.uint8, expected a floating-point tensor of the ",
        ),
    ],
)
def test_latents_that_are_none(latents, message):
    with pytest.raises(ValueError, match=f"^latents: {message}"):
        demanding().shot(replace(shot(**fitting()), latents=latents))


def test_unknown_extras_are_refused():
    with pytest.raises(
        ValueError, match=r"^extras: got \['size'\], which Toy does not take; it takes \['clip', 'first'"
    ):
        demanding().shot(shot(**fitting(), size=1))


@pytest.mark.parametrize("role", ["shot", "global"])
@pytest.mark.parametrize("left_out", EXTRAS)
def test_a_prompt_needs_no_image_extras(role, left_out):
    given = shot(role, **{name: x for name, x in fitting().items() if name != left_out})
    if left_out == "pooled" or (EXTRAS[left_out].required and role == "shot"):
        axes = ", ".join(map(str, ("batch", *EXTRAS[left_out].shape)))
        with pytest.raises(ValueError, match=rf"^extras: got .*, but this Toy also needs {left_out} \[{axes}\]; pass"):
            demanding().shot(given)
    else:
        demanding().shot(given)


def test_everything_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"^extras: got none, .*needs pooled \[.*\], image \[batch, 4, frames, height"):
        demanding().shot(shot())


def test_an_example_has_all_that_a_shot_may_have():
    """But the mask, and numbers, of which the adapter alone knows what they may be."""
    adapter, generator = demanding(), torch.Generator().manual_seed(0)
    for counts in (Shot(3, (2, 1, 4)), Shot(0, (1, 1, 1))):
        given = adapter.example(counts, batch=2, generator=generator, dtype=torch.bfloat16)
        assert set(given.extras) == set(EXTRAS) - {"mask", "fps"}
        assert {x.dtype for x in (given.latents, given.text, *given.extras.values())} == {torch.bfloat16}
        assert adapter.shot(given) == counts


@pytest.mark.parametrize("text", ["joint", "cross"])
def test_a_prompt_without_video_where_text_is_cross_attended(text):
    adapter = toy(**CROSS) if text == "cross" else toy()
    assert adapter.shot(shot("global")).grid == ((0, 0, 0) if text == "cross" else (3, 2, 3))
    assert adapter.shot(shot()).grid == (3, 2, 3)


# Prepared for the model.


def test_a_prompts_image_conditions_are_zero():
    adapter = demanding()
    pooled = torch.ones(2, 7)
    prepared = adapter.prepare(shot("global", fps=24.0, pooled=pooled)).extras
    follow = {name: torch.zeros(FITTING[name]) for name in ("image", "first")}
    assert set(prepared) == {*follow, "fps", "pooled"}
    assert all(torch.equal(prepared[name], x) for name, x in follow.items())
    adapter.shot(replace(shot("global"), extras=prepared))
    given = torch.ones(FITTING["image"])
    assert adapter.prepare(shot("global", image=given)).extras["image"] is given  # those it has are its own
    assert adapter.prepare(shot(**fitting())).extras.keys() == fitting().keys() - {"mask"}
    assert not adapter.prepare(shot()).extras  # a shot gets none


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@drawn(length=st.integers(0, 5), padding=st.integers(0, 5), batch=st.integers(1, 3))
def test_padding_is_cut_off(dtype, length, padding, batch):
    given = ShotInput(latents=random(batch, 3, 1, 2, 2), text=random(batch, length, 5))
    whole = padded(given, padding, dtype=dtype)
    before = dict(whole.extras)
    prepared = masked().prepare(whole)
    assert torch.equal(prepared.text, given.text)
    assert prepared.latents is whole.latents
    assert not prepared.extras  # the mask has had its effect
    assert whole.text.shape[1] == length + padding
    assert dict(whole.extras) == before  # what the caller gave stays as it was


def test_without_a_mask_nothing_is_cut_off():
    given = shot()
    for adapter in (toy(), masked()):
        prepared = adapter.prepare(given)
        assert prepared.text is given.text


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0, 0], [1, 1, 1, 0]], r"^extras: mask has \[2, 3\] tokens of text, expected the same number in every"),
        ([[1, 0, 1, 0], [1, 0, 1, 0]], r"^extras: mask has \[2, 2\] tokens of text, .*padding behind"),
        ([[0, 0, 1, 1], [0, 0, 1, 1]], r"^extras: mask has \[2, 2\] tokens of text, .*padding behind"),
        ([[1, 1, 0, 0], [1, 0, 1, 0]], r"^extras: mask has \[2, 2\] tokens of text, .*padding behind"),
        ([[1, 1, 1], [1, 1, 1]], r"^extras: mask is \[2, 3\], expected \[2, 4\], 1 for every text token"),
        ([[1.0, 1.0, 0.5, 0.0]] * 2, r"^extras: mask has other values than 0 and 1, expected 1 for every text token"),
        ([[0.0, 0.0, 0.0, -1e4]] * 2, r"^extras: mask has other values .*not what is added to attention scores"),
        ([[NAN, 1.0, 0.0, 0.0]] * 2, r"^extras: mask has other values than 0 and 1"),
    ],
)
def test_masks_that_cannot_be_cut_along_are_refused(mask, message):
    adapter, given = masked(), shot(mask=torch.tensor(mask))
    with pytest.raises(ValueError, match=message):
        adapter.prepare(given)
    with pytest.raises(ValueError, match=message):
        retrofit(adapter.model, backbone=adapter)([given], torch.tensor([0.5]))


@pytest.mark.parametrize("config", TOYS.values(), ids=TOYS)
@torch.no_grad()
def test_padding_changes_no_bit_of_a_scene(config):
    """Poisoned padding, of another length in every shot, in one call and shot after shot with a cache."""
    adapter = masked(**config)
    model = retrofit(adapter.model, backbone=adapter, text=adapter.scope)
    generator, counts = torch.Generator().manual_seed(0), [Shot(2, (2, 1, 2)), Shot(4, (1, 2, 2)), Shot(1, (1, 1, 1))]
    scene = [adapter.example(s, batch=2, generator=generator, dtype=torch.float32) for s in counts]
    if config.get("text") != "cross":
        scene.insert(0, ShotInput(latents=torch.zeros(2, 3, 1, 2, 2), text=random(2, 3, 5), role="global"))
    elif adapter.scope != "own":
        scene.insert(0, ShotInput(text=random(2, 3, 5), role="global"))
    long = [padded(s, 3 * i) for i, s in enumerate(scene)]
    t = torch.tensor([0.0 if s.role == "global" else 0.3 for s in scene])
    expected, got = (model(x, t, pattern="context_causal") for x in (scene, long))
    behind, caches = [], [KVCache(), KVCache()]
    for i in range(len(scene)):
        for x, cache in zip((scene, long), caches, strict=True):
            behind += model([x[i]], t[[i]], pattern="context_causal", cache=cache)
            cache.append(i)
    for pairs in (zip(got, expected, strict=True), zip(behind[::2], behind[1::2], strict=True)):
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    assert caches[0].nbytes == caches[1].nbytes
    assert [entry.shot for entry in caches[0].shots] == [entry.shot for entry in caches[1].shots]
    (alone,) = model(long[-1:], t[-1:])
    base = adapter.single_shot(scene[-1], adapter.traits.timestep(t[-1:]).expand(2))
    assert error(alone, base) <= BOUNDS[torch.float32]["one shot"].absolute


# Where torch would fail, or go on with nonsense.


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_extras_are_finite(value):
    given = shot(strength=torch.tensor([1.0, value]))
    with pytest.raises(
        ValueError, match=r"^extras: strength \[2\] has values that are not finite, expected finite ones"
    ):
        scene_model()([given], T)


def test_places_are_finite():
    model = scene_model()
    model.adapter.traits = replace(model.adapter.traits, extras={"fps": Extra(None, positive=True)})
    places = model.adapter.coordinates
    model.adapter.coordinates = lambda inputs, counts: places(inputs, counts) / inputs.extras["fps"]
    with pytest.raises(ValueError, match=r"^extras: with {'fps': 1e-320}, tokens lie at places that are not finite"):
        model([shot(fps=1e-320)], T)
