"""The tuning recipe: what is drawn, what a step does, and that a run that stopped goes on as if it had not."""

import json
import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from fractions import Fraction
from functools import cache
from itertools import chain
from math import cos, isclose, pi, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lct_core import Layout, Shot, ShotInput, retrofit, sample_levels, tuning_loss
from lct_core.backbone.inputs import collate_shots
from lct_core.codec import LinearCodec
from lct_core.data import VideoScene
from lct_core.demo.world import PROMPT_LENGTH, VOCABULARY, render, sample_scene
from lct_core.noise import shot_noise
from lct_core.plugins.registry import registry
from lct_core.script import SHOT_CUT, Script, ScriptShot
from lct_core.testing.tolerances import BOUNDS, error
from lct_core.training import (
    CHECKPOINT,
    EMA,
    METRICS,
    Example,
    Report,
    Row,
    Stage,
    Training,
    adamw,
    cosine,
    load_checkpoint,
    paper_stages,
    sample_row,
    save_checkpoint,
    scene_examples,
    single_shots,
    to_row,
    train,
    tune,
)
from lct_core.training.run import check_folder

FLOAT32 = BOUNDS[torch.float32]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Stages.


def test_the_defaults_are_the_papers():
    stage = Stage(name="any", steps=1)
    assert (stage.scene_share, stage.max_shots, stage.single_frame) == (0.5, 9, 0.1)
    assert (stage.learning_rate, stage.ema) == (1e-4, 0.996)
    assert (stage.level_mean, stage.level_std) == (0, 1)


def test_the_papers_stages():
    single, bidirectional, causal = paper_stages("paper")
    assert paper_stages("anchored") == (bidirectional, causal)
    assert [s.name for s in (single, bidirectional, causal)] == ["single_shot", "bidirectional", "causal"]
    assert [s.scene_share for s in (single, bidirectional, causal)] == [0, 0.5, 0.5]
    assert (bidirectional.steps, causal.steps) == (135_000, 9_000)
    assert [s.pattern for s in (single, bidirectional, causal)] == ["own_shot", "bidirectional", "context_causal"]
    with pytest.raises(ValueError, match="scheme"):
        paper_stages("other")


NAN, INF = float("nan"), float("inf")
BAD = {
    "name": ["", "a/b", "a.pt", "..", "a b", None],
    "steps": [-1, 1.5, True, "1"],
    "pattern": ["causal", "", None],
    "scene_share": [-0.1, 1.1, NAN, "1"],
    "single_shot_batch": [0, -1, 1.0, True],
    "scene_batch": [0, -1, 1.0],
    "max_shots": [0, -1, 9.0],
    "learning_rate": [0, -1e-4, NAN, INF, "1e-4"],
    "warm_up": [-0.1, 1.1, NAN],
    "clip": [0, -1.0, NAN, INF],
    "ema": [-0.1, 1.1, NAN],
    "single_frame": [-0.1, 1.1, NAN],
    "text_dropout": [-0.1, 1.1, NAN],
    "storyline_dropout": [-0.1, 1.1, NAN],
    "level_mean": [NAN, INF, -INF, None],
    "level_std": [0, -1.0, NAN, INF],
    "precision": ["fp16", "", None],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_stage_refuses_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: got .*expected"):
        Stage(**{"name": "any", "steps": 1, field: value})


def test_every_field_of_a_stage_has_a_bad_value():
    assert BAD.keys() == asdict(Stage(name="any", steps=0)).keys()


@given(n=st.integers(1, 64), k=st.integers(0, 64), rounds=st.integers(1, 5))
def test_scene_steps_have_exactly_their_share(n, k, rounds):
    """As many as whole numbers allow after any step, and spread evenly: floor or ceiling in every window."""
    share = Fraction(min(n, k), n)
    stage = Stage(name="any", steps=1, scene_share=float(share))
    steps = [stage.is_scene_step(step) for step in range(n * rounds)]
    for done in range(1, len(steps) + 1):
        assert abs(sum(steps[:done]) - done * share) <= 1
    if n & (n - 1) == 0:  # a share that floating point has exactly
        assert sum(steps) == rounds * min(n, k)


def test_scenes_and_single_shots_alternate_by_default():
    stage = Stage(name="any", steps=1)
    assert [stage.is_scene_step(step) for step in range(100)] == [False, True] * 50
    assert not any(replace(stage, scene_share=0.0).is_scene_step(step) for step in range(100))
    assert all(replace(stage, scene_share=1.0).is_scene_step(step) for step in range(100))


# What a step sees.


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


def prompt(shot):
    """The inverse of ``Plain.text``."""
    return "".join(chr(int(c)) for c in shot.text.flatten())


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


def test_a_single_shot_has_its_own_prompt_without_mark_and_no_global_shot():
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


def test_single_shots_are_uniform_over_scenes_and_then_over_shots_and_lose_their_prompts_apart():
    examples = single_shots(DATA, Plain(), count=3000, dropout=0.3, generator=generator())
    texts = [prompt(example.shots[0]) for example in examples]
    assert close((not text for text in texts), 0.3)
    kept = [text for text in texts if text]
    for scene in DATA:
        for shot in scene.script.shots:
            assert close((text == shot.text for text in kept), 1 / 2 / len(scene.shots))
    assert close((not a and not b for a, b in zip(texts[::2], texts[1::2], strict=True)), 0.3**2)


def test_a_scene_is_a_run_of_consecutive_shots_after_a_global_one_where_its_script_has_a_description():
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


def test_the_global_prompt_and_those_of_shots_are_dropped_independently():
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


def test_noise_is_fresh_for_every_shot_and_none_for_a_global_one():
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


def test_noise_is_keyed_by_the_example_and_the_shots_place_in_it(monkeypatch):
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


def test_the_noise_of_a_shot_does_not_depend_on_the_sizes_of_others():
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
def test_latents_and_noise_are_float32_whatever_the_codec_returns(dtype):
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


class Learned(torch.nn.Module):
    """A codec with weights of its own, that take gradients."""

    def __init__(self, codec):
        super().__init__()
        self.codec = codec
        self.of_pictures, self.of_text = (torch.nn.Parameter(torch.tensor(1.0)) for _ in range(2))
        self.grad_modes = set()

    def encode(self, frames):
        self.grad_modes.add(torch.is_grad_enabled())
        return self.of_pictures * self.codec.encode(frames)

    def text(self, prompt):
        self.grad_modes.add(torch.is_grad_enabled())
        return self.of_text * self.codec.text(prompt)


def test_no_gradient_is_recorded_in_the_codec():
    codec = Learned(Plain())
    examples = both_kinds(DATA, codec)
    rows = [sample_row(FIXED, step, DATA, codec, seed=0) for step in (0, 1)]
    shots = [*chain(*(e.shots for e in examples)), *chain(*(scene for row in rows for scene in row.scenes))]
    assert not any(shot.text.requires_grad for shot in shots)
    assert not any(shot.latents.requires_grad for shot in shots if shot.latents is not None)
    assert codec.grad_modes == {False}
    assert torch.is_grad_enabled()  # outside


def tensors(row):
    """All that a row holds, in order, with its nesting."""
    return [
        [len(scene) for scene in row.scenes],
        row.levels,
        *(value for scene in row.scenes for shot in scene for value in (shot.role, shot.latents, shot.text)),
        *(eps for scene in row.noise for eps in scene),
    ]


def same(a, b):
    if isinstance(a, Row):
        a, b = tensors(a), tensors(b)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


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


# Rows.

WIDTH, CHANNELS = len(VOCABULARY), 6
SHORT, LONG = (1, 2, 2), (3, 2, 4)


def example(*sizes, text=2, seed=0):
    """A global shot where a size is None, else a shot of so many frames, rows and columns."""
    draws = generator(seed)
    shots, noise = [], []
    for size in sizes:
        words = torch.randn(1, text, WIDTH, generator=draws)
        if size is None:
            shots.append(ShotInput(text=words, role="global"))
            noise.append(None)
        else:
            latents, eps = torch.randn(2, 1, CHANNELS, *size, generator=draws)
            shots.append(ShotInput(latents=latents, text=words))
            noise.append(eps)
    return Example(shots, noise)


@cache
def initial(seed):
    """Weights none of which is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dit = registry().build("mmdit", channels=CHANNELS, text_width=WIDTH, width=16, depth=2, heads=2, mlp_ratio=2)
        for parameter in dit.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return dit


def make(seed=0, **options):
    return retrofit(deepcopy(initial(seed)), **options)


def weights(model):
    return {name: value.clone() for name, value in model.backbone.state_dict().items()}


@pytest.mark.parametrize(
    "sizes",
    [[(SHORT,)], [(SHORT,)] * 3, [(None, SHORT, LONG)] * 2, [(SHORT, LONG, SHORT)] * 2, [(None, LONG)]],
)
def test_examples_of_one_layout_are_a_batch(sizes):
    examples = [example(*each, seed=i) for i, each in enumerate(sizes)]
    row = to_row(examples, generator=generator())
    (scene,), (noise,) = row.scenes, row.noise
    assert row.levels.shape == (len(examples), len(sizes[0]))
    for j, (shot, eps) in enumerate(zip(scene, noise, strict=True)):
        assert shot.role == examples[0].shots[j].role
        assert torch.equal(shot.text, torch.cat([e.shots[j].text for e in examples]))
        if shot.role == "global":
            assert shot.latents is None
            assert eps is None
        else:
            assert torch.equal(shot.latents, torch.cat([e.shots[j].latents for e in examples]))
            assert torch.equal(eps, torch.cat([e.noise[j] for e in examples]))


@pytest.mark.parametrize(
    "examples",
    [
        [example(SHORT), example(LONG)],
        [example(SHORT), example(SHORT, SHORT)],
        [example(SHORT), example(None, SHORT)],
        [example(SHORT), example(SHORT), example(SHORT, text=1)],
        [example(SHORT, LONG), example(LONG, SHORT)],
    ],
)
def test_examples_of_other_layouts_stand_side_by_side(examples):
    row = to_row(examples, generator=generator())
    assert row.levels.shape == (1, sum(len(e.shots) for e in examples))
    assert all(a is b for a, b in zip(chain(*row.scenes), chain(*(e.shots for e in examples)), strict=True))
    assert all(a is b for a, b in zip(chain(*row.noise), chain(*(e.noise for e in examples)), strict=True))
    assert [len(scene) for scene in row.scenes] == [len(e.shots) for e in examples]


@pytest.mark.parametrize("sizes", [[(None, SHORT, LONG)] * 3, [(None, SHORT), (SHORT, SHORT, LONG)]])
def test_every_shot_has_a_level_of_its_own_and_a_global_one_none(sizes):
    examples = [example(*each) for each in sizes]
    levels = to_row(examples, generator=generator(5), mean=1.0, std=2.0).levels.flatten()
    again = generator(5)
    expected = [
        sample_levels(
            Layout([[Shot(0, (1, 1, 1), role="shot" if s else "global") for s in each]]),
            generator=again,
            mean=1.0,
            std=2.0,
        )
        for each in sizes
    ]
    assert torch.equal(levels, torch.cat(expected))
    is_global = torch.tensor([size is None for each in sizes for size in each])
    assert bool((levels[is_global] == 0).all())
    assert len(levels[~is_global].unique()) == int((~is_global).sum())


def test_no_example_is_said():
    with pytest.raises(ValueError, match=r"^examples: got none, expected at least one"):
        to_row([], generator=generator())


def one_by_one(model, examples, levels):
    return [tuning_loss(model, e.shots, t, e.noise).shots for e, t in zip(examples, levels, strict=True)]


@torch.no_grad()
def test_both_forms_of_a_row_have_the_loss_of_their_examples():
    """Every shot weighs the same, in whichever scene and however long it is."""
    model = make()
    examples = [example(None, SHORT, LONG, seed=i) for i in range(3)]
    row = to_row(examples, generator=generator())
    shots = torch.stack(one_by_one(model, examples, row.levels))
    batched = tuning_loss(model, row.scenes, row.levels, row.noise)
    assert error(batched.shots, shots.mean(0)) <= FLOAT32["definition"].absolute
    assert error(batched.mean, shots.mean()) <= FLOAT32["definition"].absolute
    beside = tuning_loss(model, [e.shots for e in examples], row.levels.reshape(1, -1), [e.noise for e in examples])
    assert error(beside.shots, shots.flatten()) <= FLOAT32["definition"].absolute
    assert error(beside.mean, batched.mean) <= FLOAT32["definition"].absolute

    examples = [example(None, SHORT, LONG), example(LONG), example(SHORT, SHORT, text=1)]
    row = to_row(examples, generator=generator())
    shots = torch.cat(one_by_one(model, examples, row.levels[0].split([3, 1, 2])))
    beside = tuning_loss(model, row.scenes, row.levels, row.noise)
    assert error(beside.shots, shots) <= FLOAT32["definition"].absolute
    assert error(beside.mean, shots.mean()) <= FLOAT32["definition"].absolute


def test_a_row_moves_to_a_device():
    row = to_row([example(None, SHORT), example(LONG)], generator=generator())
    moved = row.to(torch.device("meta"))
    assert torch.equal(moved.levels, row.levels)  # where noise is drawn
    for before, after in zip(chain(*row.scenes), chain(*moved.scenes), strict=True):
        assert (after.role, after.text.device.type, after.text.shape) == (before.role, "meta", before.text.shape)
        assert (after.latents is None) == (before.latents is None)
        assert after.latents is None or after.latents.device.type == "meta"
    assert [eps if eps is None else eps.device.type for eps in chain(*moved.noise)] == [None, "meta", "meta"]


# Shots on a device and in a batch.


def test_a_shot_moves_with_all_that_it_holds():
    shot = ShotInput(text=torch.zeros(1, 2, 3), extras={"mask": torch.ones(1), "rate": 3}, role="global")
    moved = shot.to("meta")
    assert (moved.role, moved.latents, moved.text.device.type) == ("global", None, "meta")
    assert moved.extras["mask"].device.type == "meta"
    assert moved.extras["rate"] == 3
    assert replace(shot, latents=torch.zeros(1, 4, 1, 2, 2)).to("meta").latents.device.type == "meta"
    assert (shot.text.device.type, shot.extras["mask"].device.type) == ("cpu", "cpu")


def test_shots_are_batched_with_their_extras():
    shots = [
        ShotInput(
            latents=torch.full((n, 1, 1, 2, 2), float(n)),
            text=torch.full((n, 2, 3), float(n)),
            extras={"rate": 3, "mask": torch.full((n, 4), n)} if n % 2 else {"mask": torch.full((n, 4), n), "rate": 3},
        )
        for n in (1, 2, 3)
    ]
    batch = collate_shots(shots)
    of = torch.tensor([1.0, 2, 2, 3, 3, 3])
    assert torch.equal(batch.latents, of.view(-1, 1, 1, 1, 1).expand(6, 1, 1, 2, 2))
    assert torch.equal(batch.text, of.view(-1, 1, 1).expand(6, 2, 3))
    assert torch.equal(batch.extras["mask"], of.long().view(-1, 1).expand(6, 4))
    assert batch.extras["rate"] == 3
    alone = collate_shots(shots[:1])
    assert same([alone.latents, alone.text, dict(alone.extras)], [shots[0].latents, shots[0].text, shots[0].extras])


GIVEN = {"text": torch.zeros(1, 2, 3), "latents": torch.zeros(1, 1, 1, 2, 2), "extras": {"rate": 3}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "global"}, "^shots: got roles, texts and latents of .*expected all alike"),
        ({"text": torch.zeros(1, 1, 3)}, "^shots: got roles, texts and latents of .*expected all alike"),
        ({"latents": torch.zeros(1, 1, 2, 2, 2)}, "^shots: got roles, texts and latents of .*side by side in a row"),
        ({"latents": None}, "^shots: got roles, texts and latents of .*expected all alike"),
        ({"extras": {}}, "^shots: got roles, texts and latents of .*expected all alike"),
        ({"extras": {"rate": 4}}, r"^extras: rate is \['3', '4'\], expected one value for all entries of a batch"),
        ({"extras": {"rate": torch.ones(1)}}, r"^extras: rate is \['3', '\[1\]'\], expected one value for all"),
    ],
)
def test_shots_that_do_not_fit_in_a_batch(changes, message):
    shots = ShotInput(**GIVEN), ShotInput(**GIVEN | changes)
    with pytest.raises(ValueError, match=message):
        collate_shots(shots)


def test_no_shot_makes_no_batch():
    with pytest.raises(ValueError, match=r"^shots: got none, expected at least one$"):
        collate_shots([])


def test_extras_that_do_not_fit_in_a_batch():
    for other in (torch.ones(1, 5), 3):
        shots = [ShotInput(**GIVEN | {"extras": {"mask": mask}}) for mask in (torch.ones(1, 4), other)]
        with pytest.raises(ValueError, match=r"^extras: mask is \['\[1, 4\]', .*expected one value"):
            collate_shots(shots)


# AdamW, cosine, the moving average.


def test_adamw_is_the_papers_for_what_is_trained():
    """Against the definition (Loshchilov and Hutter, Algorithm 2, decoupled) with betas 0.9 and 0.95, decay 0.1."""
    trained = torch.nn.Parameter(torch.randn(5, generator=generator(), dtype=torch.float64))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = adamw(iter([frozen, trained]), learning_rate=0.03)
    assert [p is trained for group in optimizer.param_groups for p in group["params"]] == [True]
    expected, m, v = trained.detach().clone(), torch.zeros(5).double(), torch.zeros(5).double()
    for step in range(1, 6):
        trained.grad = torch.randn(5, generator=generator(step), dtype=torch.float64)
        m = 0.9 * m + 0.1 * trained.grad
        v = 0.95 * v + 0.05 * trained.grad**2
        expected -= 0.03 * 0.1 * expected
        expected -= 0.03 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()
        assert error(trained, expected) <= 1e-14
    assert adamw([trained]).defaults["lr"] == 1e-4


@given(steps=st.integers(1, 1000), share=st.floats(0, 1), data=st.data())
def test_cosine_is_half_a_cosine_after_a_linear_rise(steps, share, data):
    step = data.draw(st.integers(0, steps - 1))
    half = (1 + cos(pi * step / steps)) / 2
    assert isclose(cosine(step, steps), half)
    rising = max(1, int(share * steps))
    assert isclose(cosine(step, steps, warm_up=share), min((step + 1) / rising, half))


def test_cosine_begins_and_ends():
    assert (cosine(0, 100), cosine(50, 100), cosine(100, 100)) == (1, 0.5, 0)
    assert [cosine(step, 1000, warm_up=0.01) for step in range(3)] == [0.1, 0.2, 0.3]
    assert cosine(0, 1, warm_up=0.5) == 1


def little(dtype=torch.float32, seed=0):
    """Two parameters, one of them frozen, and a buffer."""
    module = torch.nn.Linear(3, 2, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed)))
    module.bias.requires_grad_(False)
    return module


def walk(module, ema, steps, *, seed=1):
    """Random steps, each taken into the average; what the weights were."""
    draws, seen = generator(seed), []
    for _ in range(steps):
        with torch.no_grad():
            module.weight.add_(torch.randn(module.weight.shape, generator=draws).to(module.weight.dtype))
        seen.append(module.weight.detach().double().clone())
        ema.update()
    return seen


def averaged(first, seen, decay):
    """The plain definition in float64, with the warm-up."""
    average = first.double()
    for n, weight in enumerate(seen, 1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight
    return average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 5, 60])
def test_the_average_is_the_definition(dtype, decay, steps):
    module = little(dtype)
    first = module.weight.detach().clone()
    ema = EMA(module, decay=decay)
    expected = averaged(first, walk(module, ema, steps), decay)
    (average,) = ema.state_dict()["average"]  # of what is trained alone
    assert average.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(average, expected) <= FLOAT32["definition"].absolute
    ema.copy_to_model()
    assert torch.equal(module.weight, average.to(dtype))


def test_small_steps_are_not_lost_in_the_average_of_low_precision_weights():
    """In bfloat16 the average could not move: a step of it is less than half a step of the format."""
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(module.weight)
    ema = EMA(module, decay=0.999)
    ema.updates = 10**6
    torch.nn.init.constant_(module.weight, 1.0078125)
    for _ in range(1000):
        ema.update()
    ema.copy_to_model()
    assert module.weight.item() == 1.0078125


def test_the_average_is_lent_to_the_model_and_taken_back_also_after_an_error():
    module = little()
    ema = EMA(module)
    walk(module, ema, 5)
    own, bias = module.weight.detach().clone(), module.bias.clone()
    with ema.applied():
        assert torch.equal(module.weight, ema.state_dict()["average"][0])
        assert not torch.equal(module.weight, own)
    assert torch.equal(module.weight, own)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert torch.equal(module.weight, own)
    assert torch.equal(module.bias, bias)
    assert module.weight.requires_grad


def test_the_average_goes_on_from_its_state():
    module = little()
    ema = EMA(module)
    walk(module, ema, 5)
    state, start = deepcopy(ema.state_dict()), deepcopy(module)
    walk(module, ema, 5, seed=2)
    other = EMA(start)
    other.load_state_dict(state)
    walk(start, other, 5, seed=2)
    assert same(other.state_dict(), ema.state_dict())
    assert other.updates == 10
    assert not same(state, ema.state_dict())


def test_another_models_average_is_refused():
    for module in (torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)):  # other shapes; one parameter more
        with pytest.raises(ValueError, match=r"^state: its average has other shapes than this model's parameters"):
            EMA(little()).load_state_dict(EMA(module).state_dict())


# Training.


@cache
def world(scenes=4, shots=3, seed=0):
    """Scenes of the demo's world, very small, and a codec for them."""
    draws = generator(seed)
    data = []
    for i in range(scenes):
        scene = sample_scene(shots, generator=draws)
        clips = tuple(render(scene, size=8, frames=2))
        data.append(VideoScene(script=scene.script, shots=clips, name=f"scene_{i}"))
    clips = [clip for scene in data for clip in scene.shots]
    codec = LinearCodec.fit(clips, patch=4, channels=CHANNELS, vocabulary=VOCABULARY, length=PROMPT_LENGTH)
    return data, codec


STAGE = Stage(name="first", steps=6, single_shot_batch=2, learning_rate=1e-2, warm_up=0.4, clip=0.05, ema=0.5)


def trained(stage=STAGE, *, model=None, seed=0, **options):
    """A stage run to its end, and what it said."""
    model = make() if model is None else model
    reports = []
    training = Training(model, stage)
    train(training, *world(), seed=seed, on_step=reports.append, **options)
    return training, reports


@pytest.mark.parametrize("pattern", ["bidirectional", "context_causal"])
def test_training_is_its_steps_written_by_hand(pattern):
    stage, model = replace(STAGE, pattern=pattern), make()
    parameters = list(model.backbone.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    expected = []
    for step in range(stage.steps):
        row = sample_row(stage, step, *world(), seed=3)
        loss = tuning_loss(model, row.scenes, row.levels, row.noise, pattern=pattern)
        model.backbone.zero_grad()
        loss.mean.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters]))
        assert norm > stage.clip  # so that it is clipped
        for parameter in parameters:
            parameter.grad *= torch.clamp(stage.clip / (norm + 1e-6), max=1)
        rate = 1e-2 * min((step + 1) / 2, (1 + cos(pi * step / 6)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        decay = min(0.5, (2 + step) / (11 + step))
        average = [a.lerp(p.detach(), 1 - decay) for a, p in zip(average, parameters, strict=True)]
        kind, shots = ("scene", len(loss.shots)) if step % 2 else ("single_shot", 2)
        expected.append(Report("first", step + 1, kind, shots, loss.mean.item(), rate, norm.item()))
    training, reports = trained(stage, seed=3)
    assert reports == expected
    assert same(training.ema.state_dict()["average"], average)
    assert same([*training.model.backbone.parameters()], average)  # at the end
    assert same(training.optimizer.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_stage_may_be_taken_in_parts_and_only_its_end_has_the_average():
    whole, reports = trained()
    training = Training(make(), STAGE)
    parts = []
    train(training, *world(), seed=0, steps=4, on_step=parts.append)
    assert training.step == 4
    assert not same([*training.model.backbone.parameters()], training.ema.state_dict()["average"])
    train(training, *world(), seed=0, steps=0, on_step=parts.append)
    train(training, *world(), seed=0, steps=9, on_step=parts.append)
    assert training.step == 6
    assert parts == reports
    assert same(weights(training.model), weights(whole.model))
    before = weights(training.model)
    train(training, *world(), seed=0, on_step=parts.append)  # there is nothing left
    assert len(parts) == 6
    assert same(weights(training.model), before)


def test_a_state_goes_on_in_another_model():
    whole, _ = trained()
    training = Training(make(), STAGE)
    train(training, *world(), seed=0, steps=3)
    other = Training(make(seed=1), STAGE)
    other.load_state_dict(deepcopy(training.state_dict()))
    train(other, *world(), seed=0)
    assert same(other.state_dict(), whole.state_dict())


def test_a_state_of_another_model_is_refused():
    state = Training(make(), STAGE).state_dict()
    wide = registry().build("mmdit", channels=CHANNELS, text_width=WIDTH, width=32, depth=2, heads=2, mlp_ratio=2)
    with pytest.raises(ValueError, match=r"(?s)^state: it is not this model's: .*size mismatch"):
        Training(retrofit(wide), STAGE).load_state_dict(state)
    partly = make()
    next(partly.backbone.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="doesn't match the size"):
        Training(partly, STAGE).load_state_dict(state)


def test_every_seed_trains_on_something_else():
    assert trained()[1] == trained()[1]
    assert {r.loss for r in trained()[1]}.isdisjoint(r.loss for r in trained(seed=1)[1])


def test_single_shots_may_come_from_elsewhere():
    data, _ = world(seed=1)
    there, here = trained(single_shot_data=data)[1], trained()[1]
    assert there[0].loss != here[0].loss
    assert [r.kind for r in there] == [r.kind for r in here] == ["single_shot", "scene"] * 3


def test_frozen_parameters_stay_and_all_others_move():
    model = make()
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_("blocks" in name)
    before = weights(model)
    trained(model=model)
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]) == ("blocks" not in name)


@pytest.mark.internals
def test_recomputing_activations_changes_no_loss():
    (plain, expected), (again, reports) = trained(), trained(model=make(gradient_checkpointing=True))
    assert [r.loss for r in reports] == pytest.approx([r.loss for r in expected], rel=1e-6)
    for a, b in zip(weights(again.model).values(), weights(plain.model).values(), strict=True):
        assert error(a, b) <= 10 * FLOAT32["checkpointed"].absolute  # over six steps


def test_bf16_runs_the_model_in_bfloat16_and_keeps_everything_in_float32():
    stage, model = replace(STAGE, precision="bf16"), make()
    seen = set()
    block = model.backbone.blocks[0].video.to_qkv
    block.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    training, reports = trained(stage, model=model)
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in weights(model).values()} == {torch.float32}
    assert {value.dtype for value in training.ema.state_dict()["average"]} == {torch.float32}
    assert {p.grad.dtype for p in model.backbone.parameters()} == {torch.float32}
    expected = [r.loss for r in trained()[1]]
    losses = [r.loss for r in reports]
    assert losses != expected
    assert losses[0] == pytest.approx(expected[0], rel=2**-6)


NOT_FINITE = r"^first, step 3: the loss is (nan|inf), the norm of its gradient nan; lower learning_rate=0.0075, or look"


def test_a_loss_that_is_not_finite_is_said_before_it_spoils_anything():
    training = Training(make(), STAGE)
    train(training, *world(), seed=0, steps=2)
    with torch.no_grad():
        training.model.backbone.video_out.bias[0] = INF
    state = deepcopy(training.state_dict())
    state["optimizer"].pop("param_groups")  # the rate is that of the step that failed
    with pytest.raises(ValueError, match=NOT_FINITE):
        train(training, *world(), seed=0)
    after = training.state_dict()
    after["optimizer"].pop("param_groups")
    assert same(after, state)


def spoil_gradients(model, *, after, factor):
    """From some step on, the gradient of one weight is not finite; the loss is."""
    steps = []

    def spoilt(gradient):
        steps.append(1)
        return gradient * factor if len(steps) > after else gradient

    return model.backbone.video_out.bias.register_hook(spoilt)


@pytest.mark.parametrize("factor", [INF, NAN])
def test_a_gradient_that_is_not_finite_is_said_before_it_spoils_anything(factor):
    training, states = Training(make(), STAGE), []
    spoil_gradients(training.model, after=2, factor=factor)

    def state():
        found = deepcopy(training.state_dict())
        found["optimizer"].pop("param_groups")
        return found

    message = r"^first, step 3: the loss is [\d.]+, the norm of its gradient (nan|inf); lower learning_rate=0.0075, or"
    with pytest.raises(ValueError, match=message):
        train(training, *world(), seed=0, on_step=lambda report: states.append(state()))
    assert len(states) == 2
    assert same(state(), states[-1])


class StoppedError(Exception):
    pass


# The mode of the model, and what draws from the global generators.


def test_a_model_trains_in_train_mode_and_has_its_own_again_afterwards():
    for mode in (True, False):
        model, seen = make(), set()
        backbone = model.backbone.train(mode)
        part = backbone.blocks[0].eval()  # one that is in another mode than the rest

        def on_step(report, backbone=backbone, seen=seen):
            seen.update(module.training for module in backbone.modules())

        trained(model=model, steps=1)
        train(Training(model, STAGE), *world(), seed=0, steps=2, on_step=on_step)
        assert seen == {True}
        assert not any(module.training for module in part.modules())
        assert {m.training for m in backbone.modules() if m not in set(part.modules())} == {mode}


@pytest.mark.parametrize("fails", ["in the codec", "in the loss", "in on_step"])
def test_a_model_has_its_mode_again_after_an_error(fails):
    model = make()
    model.backbone.eval()
    data, on_step, error = world()[0], None, ValueError
    if fails == "in the codec":
        data = []
    elif fails == "in the loss":
        spoil_gradients(model, after=0, factor=NAN)
    else:
        error = StoppedError

        def on_step(report):
            raise StoppedError

    before = torch.get_rng_state()
    with pytest.raises(error):
        train(Training(model, STAGE), data, world()[1], seed=0, on_step=on_step)
    assert not any(module.training for module in model.backbone.modules())
    assert torch.equal(torch.get_rng_state(), before)


class Sampling:
    """A codec that draws its latents, as a VAE does, from torch's global generator."""

    def __init__(self, codec):
        self.codec, self.text, self.draws = codec, codec.text, []

    def encode(self, frames):
        mean = self.codec.encode(frames)
        self.draws.append(torch.randn_like(mean))
        return mean + 0.1 * self.draws[-1]


def random_training(*, stage=STAGE, seed=0, **options):
    """A model with dropout in every block; what it drops is kept."""
    model = make(seed, **options)
    dropouts = [m for block in model.backbone.blocks for m in block.modules() if isinstance(m, torch.nn.Dropout)]
    for module in dropouts:
        module.p = 0.25
    model.dropped = []
    dropouts[0].register_forward_hook(lambda module, args, out: model.dropped.append(out.detach() == 0))
    return Training(model, stage)


def test_dropout_and_a_codec_that_samples_go_on_bit_for_bit():
    data, codec = world()[0], Sampling(world()[1])
    whole, reports = random_training(), []
    train(whole, data, codec, seed=0, on_step=reports.append)
    assert whole.model.dropped
    assert all(mask.any() and not mask.all() for mask in whole.model.dropped)
    assert [r.loss for r in reports] != [r.loss for r in trained()[1]]

    first, parts = random_training(), []
    train(first, data, codec, seed=0, steps=3, on_step=parts.append)
    state = deepcopy(first.state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(99)  # another process
        second = random_training(seed=1)
        second.load_state_dict(state)
        for _ in range(3):
            train(second, data, codec, seed=0, steps=1, on_step=parts.append)
            torch.rand(5)
    assert parts == reports
    assert same(second.state_dict(), whole.state_dict())
    assert same(first.model.dropped + second.model.dropped, whole.model.dropped)
    half = len(codec.draws) // 2
    assert same(codec.draws[:half], codec.draws[half:])


def test_the_callers_generator_is_left_alone():
    data, codec = world()[0], Sampling(world()[1])
    before, seen = torch.get_rng_state(), []
    train(random_training(), data, codec, seed=0, on_step=lambda report: seen.append(torch.get_rng_state()))
    assert len(seen) == 6
    assert all(torch.equal(state, before) for state in [*seen, torch.get_rng_state()])


def test_every_step_stage_and_seed_draws_something_else():
    data, codec = world()[0], Sampling(world()[1])
    for stage, seed in ((STAGE, 0), (STAGE, 1), (replace(STAGE, name="other"), 0)):
        train(random_training(stage=stage), data, codec, seed=seed)
    values = torch.cat([eps.flatten() for eps in codec.draws])
    assert len(values.unique()) > 0.99 * len(values)


@pytest.mark.internals
def test_recomputed_activations_drop_the_same():
    data, codec = world()
    losses = []
    for checkpointing in (False, True):
        training = random_training(gradient_checkpointing=checkpointing)
        train(training, data, codec, seed=0, on_step=lambda report: losses.append(report.loss))
    assert losses[6:] == pytest.approx(losses[:6], rel=1e-6)


def test_training_leaves_the_codec_alone():
    data, codec = world()[0], Learned(world()[1])
    reports = []
    train(Training(make(), STAGE), data, codec, seed=0, on_step=reports.append)
    assert [p.grad for p in codec.parameters()] == [None, None]
    assert reports == trained()[1]


# The precision of the weights.


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_not_trained(dtype, precision):
    model = make()
    model.backbone.blocks[0].to(dtype)  # a part is enough
    with pytest.raises(ValueError, match=rf"^model: got trained weights in {dtype}, expected float32: .* call .float"):
        Training(model, replace(STAGE, precision=precision))


def test_frozen_weights_may_be_in_half_precision():
    model = make()
    model.backbone.blocks[0].bfloat16().requires_grad_(False)
    before = weights(model)
    _, reports = trained(replace(STAGE, precision="bf16"), model=model)
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any(name.startswith("blocks.0.") for name in moved)
    assert reports[0].loss == pytest.approx(trained()[1][0].loss, rel=2**-5)


def test_it_learns():
    """Seen on other draws from the same scenes; noise can't be known, so not all of the loss can go."""
    stage = Stage(name="learn", steps=100, single_shot_batch=4, learning_rate=2e-2, text_dropout=0.0)
    model = make()

    @torch.no_grad()
    def loss():
        rows = [sample_row(stage, step, *world(), seed=1) for step in range(20)]
        return sum(tuning_loss(model, r.scenes, r.levels, r.noise).mean.item() for r in rows) / len(rows)

    before = loss()
    trained(stage, model=model)
    assert loss() < 0.7 * before


def test_nothing_to_train_is_said():
    model = make()
    model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="empty parameter list"):
        Training(model, STAGE)


# A whole run.

STAGES = (
    replace(STAGE, steps=5, scene_batch=2),
    replace(STAGE, name="second", steps=4, pattern="context_causal", ema=0.9),
)
ABOUT = {"size": [2, 8, 8], "source": {"mean": torch.arange(3.0)}, "scheme": "anchored"}


def run(out, *, model=None, stages=STAGES, seed=0, about=ABOUT, save_every=2, **options):
    model = make() if model is None else model
    tune(out, model, stages, *world(), seed=seed, about=about, save_every=save_every, **options)
    return model


def metrics(out):
    """The lines of the log, without the time that they took."""
    lines = (out / METRICS).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert all(entry.pop("seconds") >= 0 for entry in entries)
    return entries


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, and what a machine that fails after each of its steps leaves behind."""
    root = tmp_path_factory.mktemp("whole")
    steps, stages, reports = [], [], []

    def on_step(report):
        reports.append(report)
        steps.append(shutil.copytree(root / "run", root / f"after_{len(reports)}"))

    model = make()
    run(root / "run", model=model, on_step=on_step, on_stage=lambda stage: stages.append((stage, weights(model))))
    return root / "run", steps, stages, reports


def equal_runs(a, b):
    files = [CHECKPOINT, *(f"{stage.name}.pt" for stage in STAGES)]
    assert sorted(path.name for path in a.iterdir()) == sorted([METRICS, *files])
    assert metrics(a) == metrics(b)
    for name in files:
        assert same(load_checkpoint(a / name), load_checkpoint(b / name))
    return True


def test_a_run_is_its_stages_each_from_the_average_of_the_one_before(whole):
    out, _, stages, reports = whole
    model, expected = make(), []
    for stage, (called, at_its_end) in zip(STAGES, stages, strict=True):
        training = Training(model, stage)
        train(training, *world(), seed=0, on_step=expected.append)
        assert called == stage
        assert same(at_its_end, weights(model))
        assert same([*at_its_end.values()], training.ema.state_dict()["average"])
        saved = load_checkpoint(out / f"{stage.name}.pt")
        assert (saved["stage"], saved["pattern"]) == (stage.name, stage.pattern)
        assert same(saved["model"], weights(model))
        assert same(saved["about"], ABOUT)
        assert saved["stages"] == [asdict(stage) for stage in STAGES]
        other = make(seed=1)
        other.backbone.load_state_dict(saved["model"])
        assert same(weights(other), weights(model))
    assert reports == expected
    assert metrics(out) == [report._asdict() for report in reports]
    assert same(load_checkpoint(out / CHECKPOINT)["training"], training.state_dict())


@pytest.mark.parametrize("after", range(1, 10))
def test_a_run_goes_on_after_any_step(whole, after, tmp_path):
    """From what is on disk at that step, between checkpoints and at them, in a model of other weights."""
    expected, snapshots, _, reports = whole
    out = shutil.copytree(snapshots[after - 1], tmp_path / "run")
    assert metrics(out) == [report._asdict() for report in reports[:after]]  # every step is on disk at once
    done, left, ends = load_checkpoint(out / CHECKPOINT)["training"]["step"], [], []
    run(out, model=make(seed=1), resume=True, on_step=left.append, on_stage=lambda stage: ends.append(stage.name))
    assert equal_runs(out, expected)
    assert left == reports[-len(left) :]
    assert done in (0, 2, 4, 5)
    assert len(left) - len(reports[after - 1 :]) in (0, 1)  # at most a step is done again, with save_every=2
    assert ends[-1] == "second"


def test_a_run_may_be_stopped_again_and_again(whole, tmp_path):
    """By an error after the third step of each try; whatever is done again, the log is whole at every step."""
    expected, _, _, reports = whole
    out, tries = tmp_path / "run", []

    def on_step(report):
        assert metrics(out) == [r._asdict() for r in reports[: reports.index(report) + 1]]
        tries[-1] += 1
        if tries[-1] == 3:
            raise StoppedError

    while len(tries) < 5:
        tries.append(0)
        try:
            run(out, model=make(seed=len(tries)) if tries[1:] else make(), resume=len(tries) > 1, on_step=on_step)
        except StoppedError:
            assert len(tries) < 5
    assert tries == [3, 3, 3, 3, 2]
    assert equal_runs(out, expected)


def test_a_run_that_fails_at_its_first_step_can_be_resumed(whole, tmp_path):
    out = tmp_path / "deep" / "run"
    with pytest.raises(ValueError, match=r"^data: got no scene"):
        tune(out, make(), STAGES, [], world()[1], seed=0, about=ABOUT)
    assert metrics(out) == []
    run(out, model=make(seed=1), resume=True)
    assert equal_runs(out, whole[0])


@pytest.mark.parametrize("name", [stage.name for stage in STAGES])
def test_what_is_done_at_a_stages_end_is_done_again_where_it_failed(whole, name, tmp_path):
    def fail(stage):
        if stage.name == name:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(tmp_path / "run", on_stage=fail)
    ends, model = [], make(seed=1)
    run(tmp_path / "run", model=model, resume=True, on_stage=lambda stage: ends.append((stage, weights(model))))
    assert ends[0][0].name == name
    assert same(ends, whole[2][-len(ends) :])
    assert equal_runs(tmp_path / "run", whole[0])


def test_a_finished_run_stays_as_it_is(whole, tmp_path):
    out, steps, model = shutil.copytree(whole[0], tmp_path / "run"), [], make(seed=1)
    run(out, model=model, resume=True, on_step=steps.append)
    assert steps == []
    assert equal_runs(out, whole[0])
    assert same(weights(model), whole[2][-1][1])


def test_a_line_that_was_cut_off_is_written_again(whole, tmp_path):
    expected, snapshots, *_ = whole
    out = shutil.copytree(snapshots[6], tmp_path / "run")
    text = (out / METRICS).read_text()
    (out / METRICS).write_text(text[:-20])
    run(out, model=make(seed=1), resume=True)
    assert equal_runs(out, expected)


def test_a_lost_log_does_not_keep_a_run_from_going_on(whole, tmp_path):
    out = shutil.copytree(whole[1][6], tmp_path / "run")
    (out / METRICS).unlink()
    run(out, model=make(seed=1), resume=True)
    assert metrics(out) == metrics(whole[0])[5:]  # from the last checkpoint


def test_how_often_a_run_is_saved_changes_nothing(whole, tmp_path):
    run(tmp_path / "run", save_every=100)
    assert equal_runs(tmp_path / "run", whole[0])
    out = shutil.copytree(whole[1][2], tmp_path / "other")
    run(out, model=make(seed=1), resume=True, save_every=3)
    assert equal_runs(out, whole[0])


CHANGED = [
    ({"seed": 1}, "seed = 0, not 1"),
    ({"stages": (STAGES[0], replace(STAGES[1], clip=0.5))}, r"stages\[1\].clip = 0.05, not 0.5"),
    ({"stages": STAGES[:1]}, "2 entries in stages, not 1"),
    (
        {"stages": STAGES[::-1]},
        r"stages\[0\].name = 'first', not 'second', .* and [0-9]+ more",
    ),
    ({"about": {**ABOUT, "scheme": "paper"}}, "about.scheme = 'anchored', not 'paper'"),
    ({"about": {**ABOUT, "size": [2, 8, 16]}}, r"about.size\[2\] = 8, not 16"),
    ({"about": {**ABOUT, "size": [2, 8]}}, "3 entries in about.size, not 2"),
    ({"about": {**ABOUT, "size": None}}, "another about.size"),
    ({"about": {**ABOUT, "source": {"mean": torch.zeros(3)}}}, "another about.source.mean"),
    ({"about": {**ABOUT, "source": {"mean": torch.zeros(4)}}}, "another about.source.mean"),
    ({"about": {**ABOUT, "source": {"mean": 3}}}, "another about.source.mean"),
    ({"about": {**ABOUT, "source": {}}}, "another about.source.mean"),
    ({"about": {**ABOUT, "more": 1}}, "about.more = None, not 1"),
    ({"about": None}, "another about.size, another about.source, about.scheme = 'anchored', not None"),
    ({"seed": 1, "about": {**ABOUT, "scheme": "paper"}}, "seed = 0, not 1, about.scheme = 'anchored', not 'paper'"),
]


@pytest.mark.parametrize(("changes", "difference"), CHANGED)
def test_a_run_does_not_go_on_with_other_settings(whole, changes, difference, tmp_path):
    out, model = shutil.copytree(whole[1][6], tmp_path / "run"), make(seed=1)
    before = weights(model)
    with pytest.raises(ValueError, match=rf"{CHECKPOINT}: its run has {difference}; resume with the same settings, or"):
        run(out, model=model, resume=True, **changes)
    assert (out / METRICS).read_bytes() == (whole[1][6] / METRICS).read_bytes()
    assert (out / CHECKPOINT).read_bytes() == (whole[1][6] / CHECKPOINT).read_bytes()
    assert same(weights(model), before)


@pytest.mark.parametrize("left", [METRICS, CHECKPOINT])
def test_a_run_is_not_overwritten(whole, left, tmp_path):
    shutil.copy(whole[0] / left, tmp_path / left)
    with pytest.raises(
        FileExistsError, match=r"holds a run already, so it is left alone; resume it, or choose another"
    ):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [left]
    assert (tmp_path / left).read_bytes() == (whole[0] / left).read_bytes()


@pytest.mark.parametrize("left", [[], [METRICS]])
def test_there_is_nothing_to_resume(left, tmp_path):
    out = tmp_path / "run"
    for name in left:
        out.mkdir()
        (out / name).touch()
    message = rf"{CHECKPOINT}: no such file, expected the checkpoint of a run to resume$"
    with pytest.raises(FileNotFoundError, match=message):
        run(out, resume=True)
    with pytest.raises(FileNotFoundError, match=message):
        check_folder(out, resume=True)
    assert out.exists() == bool(left)


def test_a_folder_is_checked_before_anything_is_read(whole, tmp_path):
    check_folder(tmp_path / "new", resume=False)
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").touch()
    check_folder(tmp_path, resume=False)  # it holds no run
    check_folder(whole[0], resume=True)
    for left in (METRICS, CHECKPOINT):
        shutil.copy(whole[0] / left, tmp_path / left)
        with pytest.raises(FileExistsError, match=rf"^{tmp_path}: holds a run already, so it is left alone; resume it"):
            check_folder(tmp_path, resume=False)
        (tmp_path / left).unlink()


def test_a_step_whose_gradient_is_not_finite_is_neither_saved_nor_logged(whole, tmp_path):
    """And a model that is whole again goes on before it."""
    out, model = tmp_path / "run", make()
    spoil_gradients(model, after=3, factor=NAN)
    with pytest.raises(ValueError, match=r"^first, step 4: .*the norm of its gradient nan"):
        run(out, model=model, save_every=1)
    assert load_checkpoint(out / CHECKPOINT)["training"]["step"] == 3
    assert metrics(out) == metrics(whole[0])[:3]
    assert sorted(path.name for path in out.iterdir()) == sorted([CHECKPOINT, METRICS])
    run(out, model=make(seed=1), resume=True)
    assert equal_runs(out, whole[0])


def test_a_finished_stage_is_no_checkpoint(whole, tmp_path):
    shutil.copy(whole[0] / "first.pt", tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=f"{CHECKPOINT}: holds a finished stage, expected a checkpoint to go on from"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": []}, r"^stages: got \[\], expected at least one"),
        ({"stages": [STAGE, STAGE]}, r"^stages: got \['first', 'first'\], expected .* each with a name of its own"),
        ({"stages": [replace(STAGE, name="checkpoint")]}, r"^stages: got \['checkpoint'\], expected none whose file"),
        ({"save_every": 0}, "^save_every: got 0, expected at least 1"),
    ],
)
def test_a_run_refuses(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_stage_of_no_steps_leaves_the_weights(tmp_path):
    model, ends = make(), []
    before = weights(model)
    nothing = replace(STAGE, name="nothing", steps=0)
    run(
        tmp_path, model=model, stages=[nothing, replace(STAGE, steps=1)], on_stage=lambda s: ends.append(weights(model))
    )
    assert same(ends[0], before)
    assert same(load_checkpoint(tmp_path / "nothing.pt")["model"], before)
    assert not same(ends[1], before)
    assert [entry["stage"] for entry in metrics(tmp_path)] == ["first"]


# Files.

CONTENT = {
    "a": torch.arange(6.0).view(3, 2),
    "b": [1, 2.5, None, "x", (True,)],
    "c": {"d": torch.zeros(2, dtype=torch.bfloat16)},
}


def test_a_checkpoint_comes_back(tmp_path):
    save_checkpoint(tmp_path / "a.pt", CONTENT)
    saved = load_checkpoint(str(tmp_path / "a.pt"))
    assert saved.pop("format")
    assert same(saved, CONTENT)
    save_checkpoint(str(tmp_path / "a.pt"), {"a": 1})
    assert load_checkpoint(tmp_path / "a.pt")["a"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, CONTENT)
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_checkpoint(path, {"a": lambda: None})
    assert path.read_bytes() == before

    def full(content, file):
        file.write_bytes(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"a": 1})
    assert path.read_bytes() == before


def refused(path, message):
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    return True


def test_a_broken_file_is_refused_with_its_path(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, CONTENT)
    whole, draws = path.read_bytes(), generator()
    inside = whole.index(b"data.pkl") + 80
    broken = [
        b"",
        b"no checkpoint\n",
        bytes(torch.randint(256, (500,), generator=draws).tolist()),
        *(whole[:length] for length in range(1, len(whole), 97)),
        *(whole[:at] + b"\xb1\x00\xff" + whole[at + 3 :] for at in range(inside, inside + 40)),
    ]
    for content in broken:
        path.write_bytes(content)
        assert refused(path, "can't be read as a checkpoint; is the file complete?")


@pytest.mark.parametrize("content", [{"a": 1}, [1], torch.zeros(2), {"format": "lct checkpoint 0"}])
def test_a_foreign_file_is_refused_with_its_path(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    assert refused(
        tmp_path / "a.pt", "not a checkpoint that lct tune wrote, expected one in the format 'lct checkpoint 1'"
    )


class Code:
    """What would run at loading."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return type(self.mark).touch, (self.mark,)


def test_code_in_a_file_is_not_run(tmp_path):
    mark = tmp_path / "mark"
    save_checkpoint(tmp_path / "a.pt", {"a": Code(mark)})
    assert refused(tmp_path / "a.pt", "can't be read as a checkpoint")
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists()  # it would have


def test_no_file_and_a_folder_are_no_checkpoint(tmp_path):
    for path in (tmp_path / "a.pt", tmp_path):
        with pytest.raises(
            FileNotFoundError, match=rf"^{path}: no such file, expected a checkpoint that lct tune wrote"
        ):
            load_checkpoint(path)
