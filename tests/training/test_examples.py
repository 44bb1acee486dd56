"""What a step sees: shots, prompts, single frames, noise and levels, as they are drawn."""

from dataclasses import replace
from functools import cache
from itertools import chain
from math import sqrt

import pytest
import torch
from hypothesis import given, strategies as st

from lct_core import ShotInput
from lct_core.data import VideoScene
from lct_core.noise import shot_noise
from lct_core.script import SHOT_CUT, Script, ScriptShot
from lct_core.training import (
    Stage,
    sample_row,
    scene_examples,
    single_shots,
)
from tests.training.scenes import Learned, prompt, same


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Plain:
    """A codec that leaves pictures and prompts readable: pixels are latents, characters are tokens."""

    def encode(self, frames):
        return frames

    def decode(self, latents):
        return latents

    def text(self, prompt):
        return torch.tensor([float(ord(c)) for c in prompt]).view(-1, 1)

    def latent_shape(self, frames, height, width):
        return 3, frames, height, width


def numbered(name, script, *, frames=3, size=(1, 1)):
    """A scene whose pixels say shot and frame: 10 x shot + frame, in hundredths."""
    clips = [
        torch.stack([torch.full((3, *size), (10 * shot + frame) / 100) for frame in range(frames)], dim=1)
        for shot in range(len(script.shots))
    ]
    return VideoScene(script=script, shots=tuple(clips), name=name)


def script(count, *, word, **about):
    """Every other shot but the first goes on without a cut."""
    shots = tuple(ScriptShot(text=f"{word} {i}", cut=i % 2 == 0) for i in range(count))
    return Script(shots=shots, **about)


TOLD = script(4, word="told", characters={1: "Tall."}, environment="Rain.", storyline="It ends.")
BARE = script(3, word="bare")
DATA = [numbered("told", TOLD), numbered("bare", BARE, frames=2)]
MANY = Stage(
    name="any", steps=1, scene_batch=3000, max_shots=3, text_dropout=0.3, storyline_dropout=0.4, single_frame=0.25
)


@cache
def drawn():
    """Many scenes from ``DATA``, and which script each is of."""
    examples = scene_examples(MANY, DATA, Plain(), generator=generator())
    return [(TOLD if e.shots[0].role == "global" else BARE, e) for e in examples]


def shots_of(example):
    return [shot for shot in example.shots if shot.role == "shot"]


def places(example):
    """Which shots of their scene an example's are, by their pixels."""
    return [round(100 * shot.latents.flatten()[0].item()) // 10 for shot in shots_of(example)]


def bound(p, n):
    """Five standard deviations of a frequency among n draws of probability p."""
    return 5 * sqrt(p * (1 - p) / n)


def close(outcomes, p):
    outcomes = list(outcomes)
    return abs(sum(outcomes) / len(outcomes) - p) <= bound(p, len(outcomes))


def test_a_single_shot_has_its_own_plain_prompt():
    seen = set()
    for example in single_shots(DATA, Plain(), count=300, dropout=0.0, generator=generator()):
        (shot,), (eps,) = example
        ((place),) = places(example)
        text = prompt(shot)
        assert shot.role == "shot"
        assert text in (f"told {place}", f"bare {place}")
        source = DATA[text.startswith("bare")].shots[place]
        assert torch.equal(shot.latents, source[None])
        assert eps.shape == shot.latents.shape
        seen.add(text)
    assert seen == {shot.text for scene in DATA for shot in scene.script.shots}


@cache
def prompts_of_single_shots():
    """Those of 3000 single shots, the empty string where one was dropped."""
    examples = single_shots(DATA, Plain(), count=3000, dropout=0.3, generator=generator())
    return [prompt(example.shots[0]) for example in examples]


def test_single_shot_sampling_is_uniform():
    """Over scenes, and then over the shots of a scene."""
    kept = [text for text in prompts_of_single_shots() if text]
    for scene in DATA:
        for shot in scene.script.shots:
            assert close((text == shot.text for text in kept), 1 / 2 / len(scene.shots))


def test_prompt_dropout_is_independent():
    texts = prompts_of_single_shots()
    assert close((not text for text in texts), 0.3)
    assert close((not a and not b for a, b in zip(texts[::2], texts[1::2], strict=True)), 0.3**2)


def test_a_scene_is_a_run_of_shots_after_its_global_shot():
    found = set()
    for source, example in drawn():
        roles = [shot.role for shot in example.shots]
        told = source is TOLD
        assert roles == ["global"] * told + ["shot"] * (len(roles) - told)
        run = places(example)
        assert run == list(range(run[0], run[0] + len(run)))
        assert example.shots[0].latents is None or not told
        texts = [prompt(shot) for shot in shots_of(example)]
        assert texts in ([source.shot_prompts()[i] for i in run], [""] * len(run))  # with the mark, or all left empty
        found.add((told, *run))
    assert found == {
        (told, *range(a, b))
        for told, n in ((True, 4), (False, 3))
        for a in range(n)
        for b in range(a + 1, min(a + 3, n) + 1)
    }
    assert TOLD.shot_prompts()[:2] == (f"{SHOT_CUT} told 0", "told 1")


def test_more_shots_are_likelier_and_never_more_than_asked_for():
    for source in (TOLD, BARE):
        counts = [len(shots_of(example)) for script, example in drawn() if script is source]
        assert set(counts) == {1, 2, 3}
        for n in (1, 2, 3):
            assert close((count == n for count in counts), n / 6)


def test_scenes_are_uniform():
    assert close((source is TOLD for source, _ in drawn()), 1 / 2)


def test_a_shot_becomes_one_frame_of_itself():
    single, frames = [], []
    for source, example in drawn():
        for place, shot in zip(places(example), shots_of(example), strict=True):
            clip = DATA[source is BARE].shots[place]
            single.append(shot.latents.shape[2] == 1)
            assert any(
                torch.equal(shot.latents[0], part)
                for part in ([clip[:, i : i + 1] for i in range(clip.shape[1])] if single[-1] else [clip])
            )
            if single[-1] and source is TOLD:
                frames.append(round(100 * shot.latents[0, 0, 0].item()) % 10)
    assert close(single, MANY.single_frame)
    for frame in range(3):
        assert close((f == frame for f in frames), 1 / 3)


def test_the_storyline_is_left_out_at_its_rate():
    texts = [prompt(example.shots[0]) for source, example in drawn() if source is TOLD]
    assert set(texts) == {"Character 1: Tall. Rain. It ends.", "Character 1: Tall. Rain.", ""}
    assert close((not text.endswith("It ends.") for text in texts if text), MANY.storyline_dropout)


def test_global_and_shot_prompts_are_dropped_independently():
    p = MANY.text_dropout
    pairs = [
        (not prompt(example.shots[0]), not prompt(example.shots[1])) for source, example in drawn() if source is TOLD
    ]
    for of_global in (True, False):
        for of_shots in (True, False):
            expected = (p if of_global else 1 - p) * (p if of_shots else 1 - p)
            assert close((pair == (of_global, of_shots) for pair in pairs), expected)
    bare = [not prompt(example.shots[0]) for source, example in drawn() if source is BARE]
    assert close(bare, p)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_certain_probabilities(probability):
    stage = replace(
        MANY, scene_batch=50, single_frame=probability, text_dropout=probability, storyline_dropout=probability
    )
    for example in scene_examples(stage, DATA, Plain(), generator=generator()):
        for shot in example.shots:
            assert (prompt(shot) == "") == bool(probability)
        assert all((shot.latents.shape[2] == 1) == bool(probability) for shot in shots_of(example))
    story = scene_examples(replace(stage, text_dropout=0.0), DATA[:1], Plain(), generator=generator())
    assert all(("It ends." in prompt(example.shots[0])) == (not probability) for example in story)


def test_every_shot_has_fresh_noise():
    values = []
    for _, example in drawn()[:500]:
        assert len(example.noise) == len(example.shots)
        for shot, eps in zip(example.shots, example.noise, strict=True):
            if shot.role == "global":
                assert eps is None
            else:
                assert eps.shape == shot.latents.shape
                values.append(eps.flatten())
    values = torch.cat(values)
    assert len(values.unique()) > 0.99 * len(values)
    assert abs(values.mean().item()) <= 5 / sqrt(len(values))
    assert abs(values.square().mean().item() - 1) <= 5 * sqrt(2 / len(values))


FIXED = replace(MANY, scene_batch=40, single_frame=0.0)  # no shot loses its size


def both_kinds(data, codec, *, seed=0):
    """Scenes and single shots, each from a generator of its own."""
    return [
        *scene_examples(FIXED, data, codec, generator=generator(seed)),
        *single_shots(data, codec, count=40, generator=generator(seed + 1)),
    ]


def test_noise_is_keyed_by_example_and_shot(monkeypatch):
    """One key an example, drawn from the generator; the global shot has a place too."""
    keys = []

    def watched(shape, *, seed, **key):
        keys.append(seed)
        return shot_noise(shape, seed=seed, **key)

    monkeypatch.setattr("lct_core.training.examples.shot_noise", watched)
    examples = both_kinds(DATA, Plain())
    monkeypatch.undo()
    assert same([e.noise for e in examples], [e.noise for e in both_kinds(DATA, Plain())])
    left, of = iter(keys), []
    for example in examples:
        mine = {next(left) for _ in shots_of(example)}
        assert len(mine) == 1
        of.extend(mine)
        expected = [
            None if shot.role == "global" else shot_noise(shot.latents.shape, seed=of[-1], step=0, scene=0, shot=i)
            for i, shot in enumerate(example.shots)
        ]
        assert same(example.noise, expected)
    assert next(left, None) is None
    assert len(set(of)) == len(examples)
    assert {eps is None for example in examples for eps in example.noise} == {True, False}


def test_noise_does_not_depend_on_other_shots_sizes():
    def resized(scene, changed):
        shots = tuple(torch.cat([clip, clip], dim=1) if i in changed else clip for i, clip in enumerate(scene.shots))
        return replace(scene, shots=shots)

    first = both_kinds(DATA, Plain())
    other = both_kinds([resized(scene, {0, 2}) for scene in DATA], Plain())
    compared = 0
    for a, b in zip(first, other, strict=True):
        assert places(a) == places(b)
        for place, x, y in zip(places(a), noise_of(a), noise_of(b), strict=True):
            if place in (0, 2):
                assert y.shape[2] == 2 * x.shape[2]
            else:
                assert torch.equal(x, y)
                compared += len(places(a)) > 1
    assert compared > 20


def noise_of(example):
    return [eps for eps in example.noise if eps is not None]


class Rounding(Plain):
    """A codec in another precision."""

    def __init__(self, dtype):
        self.dtype = dtype

    def encode(self, frames):
        return frames.to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_latents_and_noise_are_float32(dtype):
    examples, plain = both_kinds(DATA, Rounding(dtype)), both_kinds(DATA, Plain())
    for example, exact in zip(examples, plain, strict=True):
        assert {eps.dtype for eps in noise_of(example)} == {torch.float32}
        assert same(example.noise, exact.noise)  # and no draw is another
        for shot, other in zip(shots_of(example), shots_of(exact), strict=True):
            assert shot.latents.dtype == torch.float32
            assert torch.equal(shot.latents, other.latents.to(dtype).float())
    for step in (0, 1):
        row = sample_row(FIXED, step, DATA, Rounding(dtype), seed=0)
        assert {shot.latents.dtype for scene in row.scenes for shot in scene if shot.role == "shot"} == {torch.float32}


def test_no_gradient_is_recorded_in_the_codec():
    codec = Learned(Plain())
    examples = both_kinds(DATA, codec)
    rows = [sample_row(FIXED, step, DATA, codec, seed=0) for step in (0, 1)]
    shots = [*chain(*(e.shots for e in examples)), *chain(*(scene for row in rows for scene in row.scenes))]
    assert not any(shot.text.requires_grad for shot in shots)
    assert not any(shot.latents.requires_grad for shot in shots if shot.latents is not None)
    assert codec.grad_modes == {False}
    assert torch.is_grad_enabled()  # outside


@given(seed=st.integers(-(2**40), 2**40), step=st.integers(0, 10**6))
def test_a_row_depends_on_seed_stage_and_step_alone(seed, step):
    stage = Stage(name="any", steps=10, scene_batch=2)
    row = sample_row(stage, step, DATA, Plain(), seed=seed)
    torch.rand(3)  # the global generator has no part in it
    for earlier in (0, step + 1):
        sample_row(stage, earlier, DATA, Plain(), seed=seed)
    assert same(row, sample_row(replace(stage, learning_rate=1.0), step, list(DATA), Plain(), seed=seed))
    for other in (
        sample_row(stage, step + 2, DATA, Plain(), seed=seed),
        sample_row(stage, step, DATA, Plain(), seed=seed + 1),
        sample_row(replace(stage, name="other"), step, DATA, Plain(), seed=seed),
    ):
        assert not same(row.levels, other.levels)
        assert not same(row.noise, other.noise)


def test_a_row_is_of_the_kind_that_its_step_is():
    stage = Stage(
        name="any", steps=10, single_shot_batch=3, scene_batch=2, max_shots=1, text_dropout=0.0, single_frame=0.0
    )
    other = [numbered("other", script(1, word="other"))]
    single = sample_row(stage, 0, DATA, Plain(), seed=0, single_shot_data=other)
    assert same([prompt(shot) for shot in batch_of(single)], ["other 0"] * 3)
    scenes = sample_row(stage, 1, DATA, Plain(), seed=0, single_shot_data=other)
    assert len(scenes.scenes) == 2  # of different scripts
    assert not any("other" in prompt(shot) for scene in scenes.scenes for shot in scene)
    own = sample_row(stage, 0, DATA[:1], Plain(), seed=0)
    assert all(prompt(shot).startswith("told") for shot in batch_of(own))


def batch_of(row):
    """The entries of a row of one-shot scenes, batched or side by side, one by one."""
    return [
        ShotInput(latents=shot.latents[i : i + 1], text=shot.text[i : i + 1])
        for (shot,) in row.scenes
        for i in range(len(shot.text))
    ]


def test_levels_are_drawn_as_the_stage_says():
    stage = Stage(name="any", steps=1, scene_share=1.0, level_mean=20.0, level_std=0.5)
    for step in range(5):
        row = sample_row(stage, step, DATA[:1], Plain(), seed=0)
        assert bool((row.levels[:, 0] == 0).all())  # of the global shot
        assert bool((row.levels[:, 1:] > 0.999).all())


def test_no_data_is_said():
    for stage in (Stage(name="any", steps=1, scene_share=share) for share in (0.0, 1.0)):
        with pytest.raises(ValueError, match=r"^data: got no scene, expected at least one"):
            sample_row(stage, 0, [], Plain(), seed=0)
