"""From a script to a scene of noise, and from latents to pictures."""

from functools import partial

import pytest
import torch
from hypothesis import given as drawn, strategies as st

from lct_core import shot_noise
from lct_core.codec import Codec, LinearCodec
from lct_core.generation import (
    Guidance,
    causal,
    negative_texts,
    start_scene,
)
from lct_core.script import Script, ScriptShot
from tests.generation.definitions import every_mode, generated, guide, same, scene_model


class Counted:
    """Prompts become as many tokens as they have words, all of them their number of characters."""

    def __init__(self):
        self.prompts = []

    def text(self, prompt):
        self.prompts.append(prompt)
        return torch.full((len(prompt.split()), 16), float(len(prompt)))

    def latent_shape(self, frames, height, width):
        return 4, frames, height // 8, width // 8

    def encode(self, frames):
        raise NotImplementedError

    def decode(self, latents):
        raise NotImplementedError


def script(*texts, description="", cut=True):
    first, *others = texts
    return Script(
        shots=(ScriptShot(text=first), *(ScriptShot(text=text, cut=cut) for text in others)), description=description
    )


def test_a_scene_starts_from_its_script():
    codec = Counted()
    assert isinstance(codec, Codec)
    told = script("A man reads.", "He looks up", description="All is quiet.", cut=False)
    overall, first, second = start_scene(told, codec, [(2, 16, 32), (1, 8, 8)], seed=3)
    assert codec.prompts == ["All is quiet.", "[SHOT CUT] A man reads.", "He looks up"]
    assert (overall.role, overall.latents, overall.text.shape) == ("global", None, (1, 3, 16))
    for shot, prompt, size in ((first, codec.prompts[1], (2, 2, 4)), (second, codec.prompts[2], (1, 1, 1))):
        assert shot.role == "shot"
        assert torch.equal(shot.text, torch.full((1, len(prompt.split()), 16), float(len(prompt))))
        assert shot.latents.shape == (1, 4, *size)


@drawn(data=st.data(), seed=st.integers(0, 2**40), scene=st.integers(0, 99))
def test_a_shots_noise_depends_on_its_place_alone(data, seed, scene):
    size = st.tuples(st.integers(1, 3), st.sampled_from([8, 16]), st.sampled_from([8, 24]))
    sizes = data.draw(st.lists(size, min_size=1, max_size=4))
    description = data.draw(st.sampled_from(["", "a place"]))
    told = script(*["words"] * len(sizes), description=description)
    started = start_scene(told, Counted(), sizes, seed=seed, scene=scene)
    assert [shot.role for shot in started] == ["global"] * bool(description) + ["shot"] * len(sizes)
    for i, (frames, height, width) in enumerate(sizes):
        shape = (1, 4, frames, height // 8, width // 8)
        expected = shot_noise(shape, seed=seed, step=0, scene=scene, shot=i)
        assert torch.equal(started[bool(description) + i].latents, expected)


def test_scenes_shots_and_seeds_have_noise_of_their_own():
    told, start = script("one", "two"), partial(start_scene, codec=Counted(), size=(1, 8, 8))
    started = [*start(told, seed=0), *start(told, seed=1), *start(told, seed=0, scene=1)]
    assert len({shot.latents.flatten()[0].item() for shot in started}) == 6


def test_one_size_is_that_of_all_shots():
    told = script("one", "two", "three")
    one = start_scene(told, Counted(), (3, 8, 16), seed=0)
    each = start_scene(told, Counted(), [(3, 8, 16)] * 3, seed=0)
    assert same([shot.latents for shot in one], [shot.latents for shot in each])


@pytest.mark.parametrize("sizes", [[], [(1, 8, 8)], [(1, 8, 8)] * 3])
def test_refuses_another_number_of_sizes(sizes):
    message = rf"^size: got {len(sizes)}, expected one, or one for each of the 2 shots"
    with pytest.raises(ValueError, match=message):
        start_scene(script("one", "two"), Counted(), sizes, seed=0)


def test_a_codec_refuses_sizes_of_its_own():
    with pytest.raises(ValueError, match=r"^frames: got 1 of 9 x 8 pixels"):
        start_scene(script("one"), linear_codec(), (1, 9, 8), seed=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_scene_in_the_dtype_of_its_model(dtype):
    told, start = script("one", "two", description="one two"), partial(start_scene, size=(2, 8, 4), seed=1)
    plain, cast = start(told, linear_codec()), start(told, linear_codec(), dtype=dtype)
    for shot, other in zip(plain, cast, strict=True):
        assert shot.text.dtype == torch.float32
        assert torch.equal(other.text, shot.text.to(dtype))
        assert other.text.dtype == dtype
    for shot, other in zip(plain[1:], cast[1:], strict=True):
        assert shot.latents.dtype == torch.float32
        assert torch.equal(other.latents, shot.latents.to(dtype))
        assert other.latents.dtype == dtype
    assert plain[0].latents is cast[0].latents is None


class Learned(Counted):
    """A codec with weights that a training would change."""

    def __init__(self):
        super().__init__()
        self.row = torch.nn.Parameter(torch.linspace(-1, 1, 16, dtype=torch.float64))

    def text(self, prompt):
        return self.row * super().text(prompt).double()


def test_codecs_record_no_gradients():
    codec = Learned()
    assert codec.text("one").requires_grad
    scene = start_scene(script("one", "two", description="three"), codec, (1, 16, 16), seed=0)
    texts = negative_texts(codec, shot="ugly", overall="bad")
    assert not any(x.requires_grad for x in [*texts.values(), *(shot.text for shot in scene)])
    assert {shot.text.dtype for shot in scene} == {torch.float32}  # whatever the codec's
    assert torch.is_grad_enabled()
    got = causal(scene_model(), scene, steps=1, guidance=Guidance(**texts))
    assert not any(z.requires_grad for z in got[1:])


def linear_codec():
    vocabulary = ["[SHOT CUT]", "one", "two", "ugly", *(f"word{i}" for i in range(12))]
    components = torch.eye(12)[:4]
    return LinearCodec(mean=torch.full((12,), 0.5), components=components, vocabulary=vocabulary, length=3)


@every_mode
def test_from_a_script_to_a_scene(mode):
    codec = linear_codec()
    scene = start_scene(script("one", "two", description="one two"), codec, (2, 8, 4), seed=0)
    given = {} if mode == "joint" else {1: codec.encode(torch.rand(3, 2, 8, 4))[None]}
    texts = negative_texts(codec, shot="ugly")
    assert torch.equal(texts["text"], codec.text("ugly")[None])
    assert torch.equal(texts["global_text"], torch.zeros(1, 3, 16))  # an empty prompt is the unconditional one
    got = generated(mode, scene, given, guidance=Guidance(scale=2, **texts))
    again = generated(mode, scene, given, guidance=guide(2, *texts.values()))
    assert same(got, again)
    assert [codec.decode(z[0]).shape for z in got if z is not None] == [(3, 2, 8, 4)] * 2
