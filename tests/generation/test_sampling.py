"""How a generation is set: one value, or its fields, for everything that generates or plans."""

import inspect
import json
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from lct_core import Budget, KVCache, Sampling, Shot
from lct_core.cost import passes, plan, takes_of
from lct_core.generation import Director, Take, recent, schedule
from lct_core.generation.history import choose, last_before
from lct_core.generation.sampling import PlanOptions, SamplingOptions
from lct_core.script import Script, ScriptShot
from lct_core.session import Book, Session
from tests.generation.definitions import MODES, case, draw, guide, negatives, run, same, scene_model
from tests.session.films import CODEC, MODEL, SCRIPT, SIZE, create, kept

GUIDANCE = guide(*negatives())
OTHER = {  # another value of every field, as all that generates takes it
    "steps": 2,
    "shift": 3.0,
    "guidance": GUIDANCE,
    "negative": "a",
    "negative_global": "wall",
    "shared_history": True,
    "t_c": 400.0,
    "window": 2,
    "write": "nearest",
    "storage": "int8",
    "budget": Budget(device=10**8),
}
OF_GUIDANCE = ("negative", "negative_global", "shared_history")  # without effect where its scale is 1
FEW = Sampling(steps=2)
COUNTS = [Shot(2, (1, 2, 2)) for _ in range(4)]


def test_the_keywords_are_the_fields():
    names = {field.name for field in fields(Sampling)}
    assert {*SamplingOptions.__annotations__} == names == {*OTHER}
    assert {*PlanOptions.__annotations__} == names - {"negative", "negative_global"}
    for field in fields(Sampling):
        assert SamplingOptions.__annotations__[field.name] == field.type
        assert OTHER[field.name] != field.default


@pytest.mark.parametrize("function", [*MODES.values(), Director, Session.create, passes, plan])
def test_whatever_generates_takes_a_sampling_and_its_fields(function):
    """And has no default of its own."""
    parameters = inspect.signature(function).parameters
    assert parameters["sampling"].default is None
    assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
    assert {*parameters} & {*OTHER} == ({"negative"} if function is plan else set())  # there, its shots


def test_a_name_that_is_no_field_is_refused():
    scene = draw(*COUNTS, with_global=False)
    takes = takes_of("joint", COUNTS)
    for refuse in (
        partial(Sampling.of, None, {"step_count": 3}),
        partial(MODES["joint"], scene_model(), scene, step_count=3),
        partial(Director, scene_model(), scene, step_count=3),
        partial(passes, COUNTS, takes, step_count=3),
        partial(plan, scene_model(), COUNTS, step_count=3),
    ):
        with pytest.raises(TypeError, match="step_count"):
            refuse()


# A keyword is its field.


def other(name):
    return {name: OTHER[name]} | ({"guidance": 1.0} if name in OF_GUIDANCE else {})


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("mode", MODES)
def test_a_keyword_of_a_mode_is_its_field(mode, name):
    (scene, given), option = case(mode), other(name)
    sampling = replace(FEW, **option)
    generate = partial(run, mode, scene_model(), scene, given)
    expected = generate(sampling=sampling)
    assert same(generate(**{"steps": 2, **option}), expected)
    assert same(generate(sampling=FEW, **option), expected)
    assert same(generate(sampling=replace(sampling, steps=7), **{"steps": 2, **option}), expected)
    told = {"steps", "guidance", "shift"} | {
        "joint": set(),
        "conditional": {"t_c"},
        "autoregressive": {"t_c", "window"},
        "causal": {"t_c", "window", "write", "storage"},
    }[mode]
    plain = generate(sampling=FEW)
    assert same(plain, expected) == (name not in told or name == "steps")


@pytest.mark.parametrize("name", [name for name in OTHER if name != "shared_history"])
def test_a_keyword_of_a_director_is_its_field(name):
    option, scene = other(name), draw(*COUNTS, with_global=False)
    by_keyword, by_field = (
        Director(scene_model(), scene, **options)
        for options in ({"steps": 2, **option}, {"sampling": replace(FEW, **option)})
    )
    assert by_keyword.sampling == by_field.sampling
    for director in (by_keyword, by_field):
        for i in range(3):
            take = Take((i,))
            director.keep(director.shoot(take), take)
    assert same(list(by_keyword.done.values()), list(by_field.done.values()))
    assert [cache.ids for cache in by_keyword.caches] == [cache.ids for cache in by_field.caches]


def test_the_caches_are_as_the_sampling_says():
    scene, sampling = draw(*COUNTS, with_global=False), replace(FEW, storage="int8", budget=Budget(device=60_000))
    ours = Director(scene_model(), scene, sampling=sampling)
    made = partial(KVCache, storage="int8", budget=Budget(device=60_000))
    theirs = Director(scene_model(), scene, sampling=FEW, new_cache=made)
    wins = Director(scene_model(), scene, sampling=sampling, new_cache=KVCache)
    for director in (ours, theirs, wins):
        for i in range(4):
            director.keep(director.shoot(Take((i,))), Take((i,)))
    assert same(list(ours.done.values()), list(theirs.done.values()))
    assert [c.bytes_by_tier for c in ours.caches] == [c.bytes_by_tier for c in theirs.caches]
    assert all(cache.errors for cache in ours.caches)
    assert not any(cache.errors for cache in wins.caches)


@pytest.mark.parametrize("mode", ["autoregressive", "causal"])
def test_a_history_of_the_last_shots_is_a_window(mode):
    (scene, given), model = case(mode), scene_model()
    expected = run(mode, model, scene, given, steps=1, history=recent(2))
    assert same(run(mode, model, scene, given, steps=1, window=2), expected)
    assert same(run(mode, model, scene, given, steps=1, window=5, history=recent(2)), expected)
    assert not same(run(mode, model, scene, given, steps=1), expected)


@pytest.mark.parametrize("name", [name for name in PlanOptions.__annotations__ if name != "shared_history"])
def test_a_keyword_of_a_plan_is_its_field(name):
    option, adapter = {name: OTHER[name]}, scene_model().adapter
    negative = COUNTS if name == "guidance" else None
    planned = partial(plan, adapter, COUNTS, negative=negative)
    expected = planned(sampling=Sampling(**option))
    assert planned(**option) == expected
    assert (planned(sampling=Sampling()) == expected) == (name in ("shift", "guidance", "t_c"))
    takes = takes_of("causal", COUNTS)
    assert passes(COUNTS, takes, **option) == passes(COUNTS, takes, sampling=Sampling(**option))


def test_a_plan_is_not_without_the_negative_prompts_that_it_is_to_have():
    for guidance in (7.5, GUIDANCE):
        with pytest.raises(ValueError, match="negative: got None, but the sampling has guidance"):
            plan(scene_model(), COUNTS, guidance=guidance)


def test_a_scale_of_one_is_planned_as_none():
    planned = partial(plan, scene_model(), COUNTS, steps=2)
    assert planned(guidance=1.0, negative=COUNTS) == planned(guidance=1.0) == planned()
    assert planned(guidance=2.0, negative=COUNTS) == planned(negative=COUNTS) != planned()


@pytest.mark.parametrize("name", [*OTHER])
def test_a_keyword_of_a_session_is_its_field(tmp_path, name):
    option = {**OTHER, "guidance": 3.0}
    option, both = {name: option[name]}, []
    few = replace(FEW, guidance=2.0)
    if name in ("write", "shared_history"):
        for options in (option, {"sampling": replace(few, **option)}):
            with pytest.raises(ValueError, match=f"^{name}: got "):
                Session.create(tmp_path / "s", MODEL, CODEC, SCRIPT, size=SIZE, **options)
        return
    for folder, options in (
        ("a", {"steps": 2, "guidance": 2.0, **option}),
        ("b", {"sampling": replace(few, **option)}),
    ):
        both.append(Session.create(tmp_path / folder, MODEL, CODEC, SCRIPT, size=SIZE, **options))
        for _ in range(2):
            kept(both[-1])
    one, two = both
    assert one.settings == two.settings
    assert one.settings.sampling.budget is None  # it is the machine's
    assert same([*one.latents.values()], [*two.latents.values()])
    assert Session.open(one.folder, MODEL, CODEC).settings == one.settings


# What is refused.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"t_c": -1}, "t_c: got -1, expected a level from 0"),
        ({"t_c": {2: 1001}}, "t_c: got 1001 for shot 2"),
        ({"window": 0}, "window: got 0, expected at least 1"),
        ({"write": "step"}, r"write: got 'step', expected one of \('pass', 'nearest'\)"),
        ({"storage": "int4"}, "storage: got 'int4'"),
        ({"guidance": "high"}, "guidance: got .*, expected a scale, a Guidance or None"),
        ({"guidance": float("nan")}, "guidance: got nan, expected a finite scale; 1 is no guidance"),
        ({"guidance": GUIDANCE, "negative_global": "a wall"}, "negative_global: got .a wall. beside a Guidance"),
        ({"guidance": GUIDANCE, "shared_history": True}, "shared_history: got True beside a Guidance"),
        ({"shift": 3.0, "steps": [1.0, 0.0]}, "shift: got 3.0 beside steps that are .*, expected 1"),
        ({"steps": 0}, "steps: got 0, expected an int of at least 1"),
        ({"steps": 2.5}, "steps: got 2.5, expected an int of at least 1"),
        ({"steps": []}, "steps: got the levels .*, expected numbers that go down from 1 to 0"),
        ({"steps": [1.0, 0.5]}, "steps: got the levels .*, expected numbers that go down from 1 to 0"),
    ],
)
def test_no_kind_of_generation_has_such_a_value(options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        Sampling(**options)
    for refuse in (
        partial(Director, scene_model(), draw(*COUNTS, with_global=False)),
        partial(MODES["joint"], scene_model(), draw(*COUNTS, with_global=False)),
        partial(plan, scene_model(), COUNTS),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            refuse(**options)


def test_what_passes_cannot_count_is_refused():
    counted = partial(passes, COUNTS, takes_of("causal", COUNTS))
    with pytest.raises(ValueError, match=r'^write: got "nearest", .* a shared history is written without any; '):
        counted(write="nearest", guidance=2.0, shared_history=True)
    with pytest.raises(ValueError, match=r"^steps: got \[1.0, 0.0\], expected an int of at least 1: calls of"):
        counted(steps=[1.0, 0.0])
    assert counted(steps=np.int64(3)) == counted(steps=3)


def test_a_scale_needs_its_prompts_encoded():
    with pytest.raises(ValueError, match=r"^guidance: got the scale 2.0, .* sampling.encoded\(codec\) first"):
        Director(scene_model(), draw(*COUNTS, with_global=False), guidance=2.0)
    sampling = Sampling(guidance=2.0, negative="a wall", negative_global="plain", shared_history=True)
    encoded = sampling.encoded(CODEC)
    assert torch.equal(encoded.on_texts.text, CODEC.text("a wall")[None])
    assert torch.equal(encoded.on_texts.global_text, CODEC.text("plain")[None])
    assert (encoded.on_texts.scale, encoded.on_texts.shared_history) == (2.0, True)
    assert (encoded.negative, encoded.negative_global, encoded.shared_history) == ("", "", False)
    assert encoded.encoded(CODEC) is encoded
    assert Sampling().encoded(CODEC) == Sampling()


def test_steps_are_a_schedule():
    assert Sampling(steps=4, shift=3.0).schedule == schedule(4, shift=3.0)
    assert Sampling(steps=np.int64(4), shift=3.0).schedule == schedule(4, shift=3.0)
    assert Sampling(steps=[1.0, 0.3, 0.0]).schedule == [1.0, 0.3, 0.0]


@pytest.mark.parametrize("name", OF_GUIDANCE)
def test_what_belongs_to_guidance_is_not_without_any(name):
    for generate in (partial(MODES["joint"], scene_model()), partial(Director, scene_model())):
        with pytest.raises(ValueError, match=f"^{name}: got .* without guidance, where it has no effect; give a scale"):
            generate(draw(*COUNTS, with_global=False), **{name: OTHER[name]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": [1.0, 0.0]}, "steps: got .*, expected a number: a session keeps it on disk"),
        ({"guidance": GUIDANCE}, "guidance: got .*, expected a scale"),
        ({"t_c": {1: 100.0}}, "t_c: got .*, expected one level"),
        ({"write": "nearest"}, 'write: got "nearest", but a session writes keys and values again .* expected "pass"'),
    ],
)
def test_a_session_refuses_what_it_cannot_keep(tmp_path, options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        create(tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_guidance_of_a_session(tmp_path):
    """By default the paper's; none is a scale of 1, as the file has it."""
    settings = [
        Session.create(tmp_path / name, MODEL, CODEC, SCRIPT, size=SIZE, **options).settings
        for name, options in (("a", {}), ("b", {"steps": 2}), ("c", {"sampling": FEW}), ("d", {"guidance": None}))
    ]
    assert [each.sampling.guidance for each in settings] == [7.5, 7.5, 1.0, 1.0]


# A session's file, as it was written before there was a Sampling.

OF_OLD = {
    "sha256": "310255bc5a53ebb61a6ee7b7efb6e7031c08783b61547dd7e78362f5ae262494",
    "content": {
        "format": "lct session 1",
        "script": "Global Prompt: A plain wall.\n\nShot 1. A red square.\n\nShot 2 (continues). It moves.\n",
        "settings": {
            **{"size": [2, 32, 32], "seed": 3, "steps": 4, "shift": 3.0, "guidance": 2.0, "negative": "blurry"},
            **{"negative_global": "a blurry wall", "shared_history": False, "t_c": 300.0, "window": 5},
            **{"pattern": "context_causal", "fps": 8.0, "reading": {"area": 1024}, "storage": "int8"},
        },
        "model": {"class": "MMDiT"},
        "about": {"bf16": False},
        "takes": [
            {
                **{"number": 1, "shots": [1], "texts": ["A red square."], "cuts": [True], "seen": [], "seed": 3},
                **{"draw": 0, "t_c": 300.0, "cached": True, "file": None, "digest": "ab"},
            },
            {
                **{"number": 2, "shots": [2], "texts": ["It moves."], "cuts": [False], "seen": [[1, 1]], "seed": 3},
                **{"draw": 1, "t_c": 500.0, "cached": True, "file": None, "digest": "cd"},
            },
        ],
        "branches": {
            "main": [
                {"kept": [], "present": None, "history": None},
                {"kept": [], "present": 1, "history": None},
                {"kept": [[1, 1]], "present": 1, "history": None},
                {"kept": [[1, 1]], "present": 2, "history": [1]},
            ]
        },
        "branch": "main",
    },
}


def test_a_session_of_old_is_read_and_written_as_it_was(tmp_path):
    old = json.dumps(OF_OLD, indent=1) + "\n"
    (tmp_path / "session.json").write_text(old)
    book = Book.read(tmp_path)
    assert book.settings.sampling == Sampling(
        steps=4,
        shift=3.0,
        guidance=2.0,
        negative="blurry",
        negative_global="a blurry wall",
        t_c=300.0,
        window=5,
        storage="int8",
    )
    assert (book.settings.size, book.settings.seed, book.settings.fps) == ((2, 32, 32), 3, 8.0)
    assert (book.settings.pattern, book.settings.reading) == ("context_causal", {"area": 1024})
    shots = ScriptShot(text="A red square."), ScriptShot(text="It moves.", cut=False)
    assert book.script == Script(shots=shots, description="A plain wall.")
    assert (book.kept(1).number, book.take(2).seen, book.state.history) == (1, {1: 1}, (1,))
    book.write(tmp_path)
    assert (tmp_path / "session.json").read_text() == old


# The last shots of a window.


@given(
    shots=st.sets(st.integers(0, 12)),
    made=st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True),
    window=st.integers(1, 6),
)
def test_the_last_shots_before_a_take_are_those_that_fit_the_window_with_it(shots, made, window):
    chosen = last_before(made, shots, window=window)
    earlier = [i for i in sorted(shots) if all(i < n for n in made)]
    assert list(chosen) == [i for n, i in enumerate(earlier) if len(earlier) - n + len(made) <= window]
    if len(made) == 1:
        assert choose(recent(window), sorted(shots), made[0]) == list(chosen)
