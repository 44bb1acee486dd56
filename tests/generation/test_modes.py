"""Every mode against its definition, and what a mode runs and leaves as it was."""

import copy
import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given as drawn, strategies as st

from lct_backbones.mmdit import tiny
from lct_core import KVCache, Shot, generation, retrofit
from lct_core.cache import arrangement, writing
from lct_core.generation import (
    Sampling,
    autoregressive,
    causal,
    conditional,
    joint,
    recent,
)
from lct_core.testing.definition import definition
from lct_core.testing.strategies import shots
from lct_core.testing.tolerances import BOUNDS, error
from tests.generation.definitions import (
    FOUR,
    MODES,
    SHOT_AFTER_SHOT,
    Watched,
    at_once,
    both_schemes,
    by_hand,
    case,
    clean,
    cross_attending,
    draw,
    earlier,
    every_mode,
    generated,
    guide,
    guided_or_not,
    negatives,
    one_by_one,
    random,
    run,
    same,
    scene_model,
    varied,
    width,
    with_and_without_global,
    within,
    worst,
)

FLOAT32 = BOUNDS[torch.float32]
SCHEMES = ("anchored", "paper")


# The definitions: loops over steps, with all shots in one call. What they keep from step to step is float32.


def windows(scene, window):
    """What :func:`recent` shall choose."""
    return lambda i: [j for j in earlier(scene, i) if i - j < window]


# Every mode against its definition.


conditioned = pytest.mark.parametrize("mode", ["conditional", *SHOT_AFTER_SHOT])


@varied
@pytest.mark.parametrize("pattern", ["bidirectional", "context_causal"])
def test_joint(scheme, with_global, guided, pattern):
    model, scene = scene_model(scheme), draw(*FOUR, with_global=with_global)
    guidance = negatives() if guided else None
    got = joint(model, scene, steps=3, pattern=pattern, guidance=guidance and guide(*guidance))
    assert same(got, at_once(model, scene, {}, steps=3, pattern=pattern, guidance=guidance))


@both_schemes
@with_and_without_global
def test_joint_by_the_scene_models_own_definition(scheme, with_global):
    """Nothing of the engine: dense masks, coordinates written down, attention in float64."""
    model, scene, steps = scene_model(scheme), draw(*FOUR, with_global=with_global), 4
    got = joint(model, scene, steps=steps)
    if with_global:
        scene[0] = replace(scene[0], latents=torch.zeros(2, 4, 1, 4, 6))
    for step in range(steps):
        levels = torch.tensor([0.0 if shot.role == "global" else 1 - step / steps for shot in scene])
        with torch.no_grad():
            change = definition(model.adapter, [scene], levels, scheme=scheme, pattern="bidirectional")
        moved = zip(scene, change, strict=True)
        scene = [s if s.role == "global" else replace(s, latents=s.latents - width(step, steps) * v) for s, v in moved]
    expected = [None if shot.role == "global" else shot.latents for shot in scene]
    assert worst(got, expected) <= steps * FLOAT32["definition"].absolute


@varied
@pytest.mark.parametrize(
    ("places", "t_c", "pattern"),
    [
        ([0], 100, "bidirectional"),
        ([1, 2], 500, "bidirectional"),
        ([3, 0, 1], 1000, "bidirectional"),
        ([1, 0], 0, "context_causal"),
    ],
)
def test_conditional(scheme, with_global, guided, pattern, places, t_c):
    model, scene = scene_model(scheme), draw(*FOUR, with_global=with_global)
    given = clean(scene, *[i + with_global for i in places])
    guidance = negatives() if guided else None
    got = conditional(model, scene, given, t_c=t_c, steps=3, pattern=pattern, guidance=guidance and guide(*guidance))
    assert same(got, at_once(model, scene, given, t_c=t_c, steps=3, pattern=pattern, guidance=guidance))
    assert all(got[i] is latents for i, latents in given.items())  # as they came


@varied
@pytest.mark.parametrize(
    ("places", "window", "pattern"),
    [
        ([], 9, "bidirectional"),
        ([0, 1], 9, "bidirectional"),
        ([0, 1, 2], 3, "bidirectional"),
        ([], 2, "bidirectional"),
        ([0], 1, "bidirectional"),
        ([0], 9, "context_causal"),
    ],
)
def test_autoregressive(scheme, with_global, guided, pattern, places, window):
    model, scene = scene_model(scheme), draw(*FOUR, with_global=with_global)
    given = clean(scene, *[i + with_global for i in places])
    guidance, options = negatives() if guided else None, {"t_c": 300.0, "steps": 2, "pattern": pattern}
    got = autoregressive(model, scene, given, history=recent(window), guidance=guidance and guide(*guidance), **options)
    expected = one_by_one(model, scene, given, seen=windows(scene, window), guidance=guidance, **options)
    assert same(got, expected)
    assert all(got[i] is latents for i, latents in given.items())


@varied
@pytest.mark.parametrize(("places", "t_c"), [([], 100.0), ([0, 1], 500.0), ([0], 0.0), ([2, 0, 1], 100.0)])
def test_causal_equals_running_everything_again(scheme, with_global, guided, places, t_c):
    model, scene, steps = scene_model(scheme), draw(*FOUR, with_global=with_global), 2
    given = clean(scene, *[i + with_global for i in places])
    guidance = negatives() if guided else None
    got = causal(model, scene, given, t_c=t_c, steps=steps, guidance=guidance and guide(*guidance))
    again = partial(one_by_one, model, scene, given, t_c=t_c, steps=steps, guidance=guidance)
    expected = again(seen=partial(earlier, scene), pattern="context_causal")
    passes = steps * (len(FOUR) - len(places))
    assert worst(got, expected) <= within(passes, guidance)
    assert all(got[i] is latents for i, latents in given.items())
    assert worst(got, again(seen=partial(earlier, scene), pattern="bidirectional")) > 1e-3


# Any scene, any mode.


@drawn(data=st.data())
def test_any_scene_by_its_definition(data):
    counts = data.draw(st.lists(shots(max_text=3, max_grid=(2, 2, 2)), min_size=1, max_size=3))
    with_global, scheme = data.draw(st.booleans()), data.draw(st.sampled_from(SCHEMES))
    scene = draw(*counts, with_global=with_global, batch=data.draw(st.integers(1, 2)), seed=len(counts))
    every = list(range(with_global, len(scene)))
    anywhere = clean(scene, *data.draw(st.lists(st.sampled_from(every), unique=True, max_size=len(every) - 1)))
    first = clean(scene, *every[: data.draw(st.integers(0, len(every) - 1))])
    chosen = {i: data.draw(st.permutations(earlier(scene, i))) for i in every}
    chosen = {i: order[: data.draw(st.integers(0, len(order)))] for i, order in chosen.items()}
    guidance = negatives(len(scene[0].text)) if data.draw(st.booleans()) else None
    options = {"steps": data.draw(st.integers(1, 2)), "t_c": data.draw(st.integers(0, 1000))}
    model = scene_model(scheme)

    def by(mode, given, **more):
        return MODES[mode](model, scene, given, guidance=guidance and guide(*guidance), **options, **more)

    plain = {"guidance": guidance, **options}
    assert same(by("conditional", anywhere), at_once(model, scene, anywhere, **plain))
    options["seed"] = plain["seed"] = data.draw(st.integers(0, 2**40))
    history = {"history": lambda shot, before: chosen[shot]}
    assert same(by("autoregressive", first, **history), one_by_one(model, scene, first, seen=chosen.get, **plain))
    assert same(by("causal", first, **history), by_hand(model, scene, first, seen=chosen.get, **plain))
    again = one_by_one(model, scene, first, seen=partial(earlier, scene), pattern="context_causal", **plain)
    assert worst(by("causal", first), again) <= within(options["steps"] * len(every), guidance)


# One shot.


@pytest.mark.parametrize("mode", ["joint", "autoregressive", "causal"])
@torch.no_grad()
def test_a_scene_of_one_shot_is_the_base_models_own_generation(mode):
    dit, (shot,), steps = tiny(), draw(FOUR[0], with_global=False), 5
    expected = shot.latents
    for step in range(steps):
        t = torch.full((2,), 1 - step / steps)
        expected = expected - width(step, steps) * dit(expected, 1000 * t, shot.text)
    (got,) = run(mode, retrofit(dit), [shot], {}, steps=steps)
    assert torch.equal(got, expected)  # no kernel of its own, no rounding of its own


# What is run.


@with_and_without_global
def test_causal_runs_one_shot_at_a_time_and_its_history_once(with_global):
    scene, watched = draw(*FOUR, with_global=with_global), Watched(scene_model())
    causal(watched, scene, clean(scene, int(with_global)), steps=2, t_c=250)
    assert all(len(shots) == 1 for shots, _ in watched.calls)
    steps = [1, 0.5, 0.25]  # then at t_c, for those after it
    assert [t.item() for _, t in watched.calls] == [0] * with_global + [0.25, *steps, *steps, *steps[:2]]


@guided_or_not
@with_and_without_global
def test_causal_makes_room_once(monkeypatch, guided, with_global):
    """For all shots at the first call of each branch, whose texts are longer in the negative one."""
    rooms, make = [], writing.empty
    for module in (writing, arrangement):
        monkeypatch.setattr(module, "empty", lambda size, tokens, at: (rooms.append(tokens), make(size, tokens, at))[1])
    scene, watched = draw(*FOUR, with_global=with_global), Watched(scene_model())
    guidance = negatives() if guided else None
    causal(watched, scene, steps=1, guidance=guidance and guide(*guidance))
    video = sum(shot.video for shot in FOUR) + with_global * 6
    tokens = [video + with_global * 4 + sum(shot.text for shot in FOUR), video + with_global * 7 + 4 * 6]
    assert rooms == [n for n in tokens[: 1 + guided] for _ in watched.adapter.blocks]


@pytest.mark.parametrize(("history", "window"), [(None, 9), (recent(3), 3), (recent(20), 11)])
@pytest.mark.parametrize("text", ["joint", "cross"])
def test_causal_makes_room_for_what_is_seen(text, history, window):
    """From the first call on for as many shots as the window holds, not for the whole scene."""
    held, model = [], scene_model() if text == "joint" else cross_attending("own")
    options = {"batch": 1, "generator": torch.Generator(), "dtype": torch.float32}
    scene = [model.adapter.example(Shot(1, (1, 1, 1)), **options)] * 11

    class Weighed(Watched):
        def __call__(self, *args, cache, **options):
            outputs = super().__call__(*args, cache=cache, **options)
            held.append(cache.nbytes)
            return outputs

    weighed = Weighed(model)
    with torch.no_grad():
        weighed(scene[:1], torch.zeros(1), cache=KVCache())
    causal(weighed, scene, steps=1, history=history)
    one, first, *_ = held
    assert first == window * one
    assert max(held) <= 1.5 * first + (11 - window) * one  # keys of moved shots as they were written; shots unseen


def test_a_dummy_video_of_ones_own():
    """A global shot with latents keeps them, in every mode."""
    for mode in MODES:
        scene, given = case(mode)
        zeros = torch.zeros(2, 4, 1, 4, 6)
        expected = generated(mode, scene, given)
        scene[0] = replace(scene[0], latents=zeros)
        assert same(generated(mode, scene, given), expected)
        scene[0] = replace(scene[0], latents=zeros + 1)
        changed = generated(mode, scene, given)
        assert changed[0] is None
        assert worst(changed, expected) > 1e-3


@conditioned
def test_everything_counts(mode):
    """Each thing that a shot is made from changes it, and nothing that it is not made from does."""
    scene, place, seeded = draw(*FOUR, with_global=True), 3, {"seed": 1} if mode in SHOT_AFTER_SHOT else {}

    def made(scene=scene, shift=0.0, **options):
        given = {1: clean(scene, 1)[1] + shift}
        return run(mode, scene_model(), scene, given, **{"steps": 2, "t_c": 400.0, **options})[place]

    def other(i, **changes):
        return [replace(shot, **changes) if n == i else shot for n, shot in enumerate(scene)]

    base = made()
    for name, changed in {
        "t_c": made(t_c=300.0),
        "steps": made(steps=3),
        "global text": made(other(0, text=random(2, 4, 16, seed=9))),
        "given": made(shift=0.5),
        "noise of the given": made(other(1, latents=random(2, 4, 2, 4, 6, seed=9))),
        "text of the given": made(other(1, text=random(2, 2, 16, seed=9))),
        "text of an earlier": made(other(2, text=random(2, 3, 16, seed=9))),
        "noise of an earlier": made(other(2, latents=random(2, 4, 1, 2, 2, seed=9))),
        "own text": made(other(3, text=random(2, 3, 16, seed=9))),
        "own noise": made(other(3, latents=random(2, 4, 1, 8, 4, seed=9))),
    }.items():
        assert error(changed, base) > 1e-3, name
    assert (error(made(**seeded), base) > 1e-3) == bool(seeded)
    later = made(other(4, text=random(2, 5, 16, seed=9)))
    assert torch.equal(later, base) == (mode != "conditional")
    assert torch.equal(made(scene[:4]), base) == (mode != "conditional")


@every_mode
@pytest.mark.parametrize("entry", [0, 1])
def test_entries_of_a_batch_do_not_mix(mode, entry):
    scene, given = case(mode)

    def beside(x, seed):
        """The entry as it is, beside another."""
        if x is None:
            return None
        other = random(*x.shape, seed=seed)
        other[entry] = x[entry]
        return other

    changed = [replace(s, text=beside(s.text, i), latents=beside(s.latents, -i)) for i, s in enumerate(scene)]
    got = generated(mode, changed, {i: beside(z, 9) for i, z in given.items()})
    together = generated(mode, scene, given)
    assert worst(got[1:], together[1:]) > 1e-3
    bound = 2 * len(FOUR) * FLOAT32["definition"].absolute  # steps of shots
    assert worst([z[entry] for z in got[1:]], [z[entry] for z in together[1:]]) <= bound
    if mode in ("joint", "conditional"):  # elsewhere the batch has a part in the noise of its history
        alone = [
            replace(s, text=s.text[entry, None], latents=None if s.latents is None else s.latents[entry, None])
            for s in scene
        ]
        single = generated(mode, alone, {i: z[entry, None] for i, z in given.items()})
        assert worst([z[0] for z in single[1:]], [z[entry] for z in together[1:]]) <= bound


# What is left as it was.


@every_mode
@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_no_trace(mode, training):
    model = retrofit(tiny(), gradient_checkpointing=True)
    model.backbone.train(training)
    modules = {name: module.training for name, module in model.backbone.named_modules()}
    weights = copy.deepcopy(model.backbone.state_dict())
    scene, given = case(mode)
    scene = [replace(shot, text=shot.text.requires_grad_()) for shot in scene]
    scene = [shot if shot.latents is None else replace(shot, latents=shot.latents.requires_grad_()) for shot in scene]
    before = [None if shot.latents is None else shot.latents.detach().clone() for shot in scene]
    kept = {i: z.clone() for i, z in given.items()}
    told = []
    got = generated(mode, scene, given, model=model, guidance=guide(*negatives()))
    run(mode, model, scene, given, steps=1, callback=lambda step: told.extend(step.latents))
    assert torch.is_grad_enabled()
    assert not any(z.requires_grad for z in [*told, *(z for z in got if z is not None)])
    assert all(p.requires_grad and p.grad is None for p in model.backbone.parameters())
    assert all(torch.equal(x, weights[name]) for name, x in model.backbone.state_dict().items())
    assert {name: module.training for name, module in model.backbone.named_modules()} == modules
    assert same([shot.latents for shot in scene], before)
    assert all(torch.equal(z, kept[i]) for i, z in given.items())


# The surface.


def test_the_public_surface_is_frozen():
    types = ["Director", "Guidance", "History", "Sampling", "Step", "Take"]
    modes = ["autoregressive", "causal", "conditional", "euler", "joint"]
    assert generation.__all__ == [*types, *modes, "negative_texts", "recent", "schedule", "start_scene"]


def test_the_papers_defaults():
    defaults = {
        mode: {name: p.default for name, p in inspect.signature(MODES[mode]).parameters.items()} for mode in MODES
    }
    assert {mode: each["sampling"] for mode, each in defaults.items()} == dict.fromkeys(MODES)
    sampling = Sampling()
    assert (sampling.steps, sampling.guidance, sampling.t_c, sampling.window) == (32, None, 100.0, 9)
    assert {mode: each.get("seed") for mode, each in defaults.items()} == {
        mode: 0 if mode in SHOT_AFTER_SHOT else None for mode in MODES
    }
