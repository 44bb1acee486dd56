"""The stand-in codec against its definitions: principal components by SVD, phrases by a regular expression."""

import re

import pytest
import torch
from hypothesis import given, strategies as st

from lct_core.codec import Codec, LinearCodec, words
from lct_core.testing.tolerances import BOUNDS, error

FLOAT32 = BOUNDS[torch.float32]["definition"].absolute
PHRASES = ("A", "a b", "a b c", "c", "[SHOT CUT]", "Character 1", "don't", "close-up")


def clip(frames=2, height=12, width=6, *, seed=0):
    """Random pictures whose patches vary more in some directions than in others."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(3, frames, 1, 1, generator=generator)
    return (0.7 * colours + 0.3 * torch.rand(3, frames, height, width, generator=generator)).contiguous()


def fit(*clips, patch=3, channels=5, vocabulary=PHRASES, length=1):
    return LinearCodec.fit(clips or [clip()], patch=patch, channels=channels, vocabulary=vocabulary, length=length)


def patches(frames, patch):
    """By definition: one row for every square, in any order that :func:`unpatched` undoes."""
    _, count, height, width = frames.shape
    return torch.stack(
        [
            frames[:, t, y : y + patch, x : x + patch].reshape(-1)
            for t in range(count)
            for y in range(0, height, patch)
            for x in range(0, width, patch)
        ]
    )


def unpatched(rows, like, patch):
    frames, rows = torch.empty_like(like), iter(rows)
    for t in range(like.shape[1]):
        for y in range(0, like.shape[2], patch):
            for x in range(0, like.shape[3], patch):
                frames[:, t, y : y + patch, x : x + patch] = next(rows).view(3, patch, patch)
    return frames


# Pictures.


@given(patch=st.integers(1, 3), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_encoding_projects_on_the_principal_components(patch, share, seed):
    seen = [clip(4, 6, 12, seed=seed), clip(3, 12, 6, seed=seed + 1)]  # more patches than a patch has numbers
    channels = 1 + round(share * (3 * patch * patch - 1))
    codec = fit(*seen, patch=patch, channels=channels)
    rows = torch.cat([patches(frames, patch) for frames in seen]).double()
    mean = rows.mean(0)
    directions = torch.linalg.svd(rows - mean, full_matrices=False)[2][:channels]
    for frames in (*seen, clip(3, 6, 6, seed=seed + 2)):
        of = patches(frames, patch).double() - mean
        expected = unpatched(of @ directions.T @ directions + mean, frames.double(), patch).clamp(0, 1)
        assert error(codec.decode(codec.encode(frames)), expected) <= 2 * FLOAT32  # a product there and one back


def test_with_all_channels_nothing_is_lost():
    codec = fit(clip(6, seed=1), patch=2, channels=12)
    assert error(codec.decode(codec.encode(clip(seed=2))), clip(seed=2)) <= FLOAT32


@given(channels=st.integers(1, 27), seed=st.integers(0, 99))
def test_latents_of_the_fitted_pictures_have_unit_variance(channels, seed):
    seen = [clip(3, seed=seed), clip(2, 6, 9, seed=seed + 1)]
    codec = fit(*seen, channels=channels)
    latents = torch.cat([codec.encode(frames).double().flatten(1) for frames in seen], dim=1)
    assert error(latents.square().mean(), torch.tensor(1.0)) <= 10 * FLOAT32  # of rounded means and components
    variances = latents.var(1, correction=0)
    assert bool((variances[:-1] >= variances[1:] - 1e-5).all())  # the principal ones first


def test_an_image_is_a_clip_of_one_frame():
    codec, frames = fit(), clip(4)
    latents = codec.encode(frames)
    for i in range(4):
        assert error(codec.encode(frames[:, i : i + 1]), latents[:, i : i + 1]) <= FLOAT32
        assert error(codec.decode(latents[:, i : i + 1]), codec.decode(latents)[:, i : i + 1]) <= FLOAT32


def test_a_patch_reaches_its_own_latent_alone():
    codec, frames = fit(), clip(2, 6, 9)
    changed = frames.clone()
    changed[:, 1, 4, 8] += 0.5  # in the second row of patches, the third column
    different = (codec.encode(changed) != codec.encode(frames)).any(0).nonzero()
    assert different.tolist() == [[1, 1, 2]]


@given(weight=st.floats(0, 1), seed=st.integers(0, 99))
def test_encoding_is_linear_up_to_the_mean(weight, seed):
    codec, a, b = fit(), clip(seed=seed), clip(seed=seed + 1)
    expected = torch.lerp(codec.encode(a), codec.encode(b), weight)
    assert error(codec.encode(torch.lerp(a, b, weight)), expected) <= 10 * FLOAT32  # of the rounded pictures


def test_pictures_are_in_range_whatever_the_latents_are():
    codec = fit()
    frames = codec.decode(1e3 * torch.randn(5, 2, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert (frames.min(), frames.max()) == (0, 1)


def test_pictures_that_never_change_can_be_coded():
    grey = torch.full((3, 2, 6, 6), 0.25)
    codec = fit(grey)
    assert bool(codec.encode(grey).isfinite().all())
    assert error(codec.decode(codec.encode(grey)), grey) <= FLOAT32


def test_low_precision_comes_in_and_float32_goes_out():
    codec, frames = fit(), clip().bfloat16()
    assert torch.equal(codec.encode(frames), codec.encode(frames.float()))
    latents = codec.encode(frames).bfloat16()
    assert torch.equal(codec.decode(latents), codec.decode(latents.float()))
    assert codec.encode(frames).dtype == codec.decode(latents).dtype == torch.float32


@given(frames=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_latent_shape_is_the_shape_of_the_latents(frames, rows, columns):
    codec = fit()
    latents = codec.encode(clip(frames, 3 * rows, 3 * columns))
    assert latents.shape == codec.latent_shape(frames, 3 * rows, 3 * columns) == (codec.channels, frames, rows, columns)


@pytest.mark.parametrize("size", [(0, 6, 6), (1, 0, 6), (1, 6, 0), (1, 7, 6), (1, 6, 4), (-1, 6, 6), (1, -3, 6)])
def test_latent_shape_refuses(size):
    got = re.escape("frames: got {} of {} x {} pixels, expected at least one, ".format(*size))
    with pytest.raises(ValueError, match=f"^{got}.*multiples of 3; read the video with multiple=3$"):
        fit().latent_shape(*size)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 6, 6), r"^frames: got \[3, 6, 6\], expected \[3, frames, height, width\]$"),
        ((1, 3, 2, 6, 6), r"^frames: got \[1, 3, 2, 6, 6\], expected \[3, frames, height, width\]$"),
        ((1, 2, 6, 6), r"^frames: got \[1, 2, 6, 6\], expected \[3, frames, height, width\]$"),
        ((3, 2, 6, 7), "^frames: got 2 of 6 x 7 pixels, "),
    ],
)
def test_encode_refuses(shape, message):
    with pytest.raises(ValueError, match=message):
        fit().encode(torch.zeros(shape))


@pytest.mark.parametrize("channels", [0, 28, -1])
def test_fit_refuses_channels(channels):
    with pytest.raises(ValueError, match=f"^channels: got {channels}, expected 1 to 27, three times the pixels"):
        fit(channels=channels)


def test_fit_refuses_no_pictures():
    with pytest.raises(ValueError, match=r"^clips: got none, expected at least one to learn patches from$"):
        LinearCodec.fit(iter([]), patch=3, channels=5, vocabulary=PHRASES)


# Text.


def phrases(codec, prompt):
    """What every row of an encoded prompt stands for; None for a row of zeros."""
    rows = codec.text(prompt)
    assert rows.shape[1] == codec.text_width == len(codec.vocabulary)
    assert bool(((rows == 0) | (rows == 1)).all())
    assert bool((rows.sum(1) <= 1).all())
    return [codec.vocabulary[row.argmax()] if row.any() else None for row in rows]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["A"]),
        ("a b c", ["a b c"]),
        ("a b a b c c", ["a b", "a b c", "c"]),
        ("a c a b", ["A", "c", "a b"]),
        ("A, B; c! (C.)", ["a b c", "c"]),
        ("  a\n\tb ", ["a b"]),
        ("[SHOT CUT] Character 1: a.", ["[SHOT CUT]", "Character 1", "A"]),
        ("[shot cut] CHARACTER 1 a b", ["[SHOT CUT]", "Character 1", "a b"]),
        ("don't Don\u2019t 'a' \u2018a\u2019", ["don't", "don't", "A", "A"]),
        ("close-up - a \u2014 a -- c-", ["close-up", "A", "A", "c"]),
    ],
)
def test_the_longest_phrase_is_read_first(prompt, expected):
    assert phrases(fit(), prompt) == expected


@given(st.lists(st.sampled_from(["a", "a b", "c", "don't"]), min_size=1, max_size=8))
def test_phrases_are_read_as_a_regular_expression_reads_them(parts):
    """An alternation of the phrases, the longest first, is the definition."""
    prompt = " ".join(parts)
    longest_first = sorted((phrase.lower() for phrase in PHRASES), key=len, reverse=True)
    expected = re.findall("|".join(map(re.escape, longest_first)), prompt)
    assert [phrase.lower() for phrase in phrases(fit(), prompt)] == expected


def test_short_prompts_are_filled_up_and_long_ones_kept():
    codec = fit(length=3)
    assert phrases(codec, "c") == ["c", None, None]
    assert phrases(codec, "c c c") == ["c", "c", "c"]
    assert phrases(codec, "c c c c") == ["c"] * 4


@pytest.mark.parametrize("prompt", ["", " \n", "... - !"])
@pytest.mark.parametrize("length", [1, 4])
def test_an_empty_prompt_is_zeros(prompt, length):
    assert torch.equal(fit(length=length).text(prompt), torch.zeros(length, len(PHRASES)))


@pytest.mark.parametrize(
    ("prompt", "word"), [("a house", "house"), ("b", "b"), ("character 2", "character"), ("SHOT CUT", "shot")]
)
def test_an_unknown_word_is_named(prompt, word):
    message = f"prompt: {word!r} in {prompt!r} is not among the words that this codec knows: {', '.join(PHRASES)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fit().text(prompt)


def test_a_long_vocabulary_is_not_listed_whole():
    with pytest.raises(ValueError, match=r"knows: w0, w1, .*w11, \.\.\.$"):
        fit(vocabulary=[f"w{i}" for i in range(13)]).text("other")


def test_words_are_a_vocabulary_of_their_prompts():
    prompts = ["[SHOT CUT] Wide shot, a dog.", "", "A close-up: the dog's EYES - wide!"]
    vocabulary = words(prompts)
    assert vocabulary == ["[shot", "cut]", "wide", "shot", "a", "dog", "close-up", "the", "dog's", "eyes"]
    codec = fit(vocabulary=vocabulary)
    assert [phrases(codec, prompt) for prompt in prompts] == [
        ["[shot", "cut]", "wide", "shot", "a", "dog"],
        [None],
        ["a", "close-up", "the", "dog's", "eyes", "wide"],
    ]
    assert words([]) == words([""]) == []


# The whole.


def test_a_codec_is_one():
    assert isinstance(fit(), Codec)


def test_the_state_makes_the_same_codec(tmp_path):
    codec = fit(length=3)
    torch.save(codec.state(), tmp_path / "codec.pt")
    other = LinearCodec(**torch.load(tmp_path / "codec.pt", weights_only=True))
    latents = codec.encode(clip())
    assert torch.equal(other.encode(clip()), latents)
    assert torch.equal(other.decode(latents), codec.decode(latents))
    assert torch.equal(other.text("a b c, c"), codec.text("a b c, c"))
    assert (other.patch, other.channels, other.vocabulary) == (codec.patch, codec.channels, codec.vocabulary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": torch.zeros(11)}, r"^components: got \[2, 12\] with a mean of \[11\], expected .*n = 3 x patch x"),
        ({"mean": torch.zeros(24), "components": torch.ones(2, 24)}, r"^components: .* with a mean of \[24\], "),
        ({"mean": torch.zeros(3, 4)}, r"^components: got \[2, 12\] with a mean of \[3, 4\], expected"),
        ({"components": torch.ones(2, 11)}, r"^components: got \[2, 11\] with a mean of \[12\], expected"),
        ({"components": torch.ones(12)}, r"^components: got \[12\] with a mean of \[12\], expected"),
        ({"components": torch.ones(0, 12)}, r"^components: got \[0, 12\] with a mean of \[12\], expected"),
        ({"components": torch.eye(12)[[0, 0]]}, "^components: expected them orthogonal and equally long, as"),
        ({"components": torch.tensor([[1.0], [1.1]]) * torch.eye(12)[:2]}, "^components: expected them orthogonal"),
        ({"components": torch.eye(12)[:2] + 0.01}, "^components: expected them orthogonal and equally long"),
        ({"components": torch.zeros(2, 12)}, "^components: expected them orthogonal and equally long"),
        ({"components": torch.full((2, 12), float("nan"))}, "^components: expected them orthogonal"),
        ({"vocabulary": []}, "^vocabulary: got an empty or repeated phrase, or none, expected each phrase once$"),
        ({"vocabulary": ["a", "!"]}, "^vocabulary: got an empty or repeated phrase"),
        ({"vocabulary": ["a b", "A, b"]}, "^vocabulary: got an empty or repeated phrase"),
        ({"length": 0}, "^length: got 0, expected at least 1$"),
    ],
)
def test_a_codec_refuses(changes, message):
    good = {"mean": torch.zeros(12), "components": torch.eye(12)[:2], "vocabulary": ["a", "b"]}
    LinearCodec(**good)
    with pytest.raises(ValueError, match=message):
        LinearCodec(**good | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1e-4, 1.0, 1e4])
def test_components_may_have_any_length_and_any_direction(length, dtype):
    directions = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0][:5]
    codec = LinearCodec(mean=torch.full((12,), 0.5), components=(length * directions).to(dtype), vocabulary=["a"])
    assert codec.channels == 5
