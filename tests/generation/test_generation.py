import copy
import inspect
import re
from dataclasses import replace
from functools import cache as once
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

from lct_backbones.mmdit import tiny
from lct_core import Extra, KVCache, Shot, ShotInput, generation, retrofit, selected_history, shot_noise
from lct_core.cache import arrangement, kv_cache
from lct_core.codec import Codec, LinearCodec
from lct_core.generation import (
    Guidance,
    Step,
    autoregressive,
    causal,
    conditional,
    euler,
    joint,
    negative_texts,
    recent,
    schedule,
    start_scene,
)
from lct_core.generation.common import history_noise
from lct_core.generation.history import choose
from lct_core.noise import keyed_generator
from lct_core.patterns import context_causal
from lct_core.script import Script, ScriptShot
from lct_core.testing.definition import definition
from lct_core.testing.strategies import shots
from lct_core.testing.tolerances import BOUNDS, error
from tests.toys import CROSS, toy

FLOAT32 = BOUNDS[torch.float32]
SCHEMES = ("anchored", "paper")
FOUR = [Shot(2, (2, 2, 3)), Shot(0, (1, 1, 1)), Shot(3, (1, 4, 2)), Shot(1, (3, 1, 2))]  # two of them are images
MODES = {"joint": joint, "conditional": conditional, "autoregressive": autoregressive, "causal": causal}
SHOT_AFTER_SHOT = ("autoregressive", "causal")


@once
def width(step, steps):
    """Of a step, as the difference of the two levels: 1 / steps, but for its last bit."""
    return (1 - step / steps) - (1 - (step + 1) / steps)


def scene_model(scheme="anchored"):
    return retrofit(tiny(), scheme=scheme)


def random(*size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def draw(*counts, with_global, batch=2, seed=0):
    """Shots of noise with texts; a global shot before them has no latents."""
    generator, adapter = torch.Generator().manual_seed(seed), scene_model().adapter
    scene = [adapter.example(shot, batch=batch, generator=generator, dtype=torch.float32) for shot in counts]
    overall = ShotInput(text=random(batch, 4, 16, seed=seed + 1), role="global")
    return [overall, *scene] if with_global else scene


def clean(scene, *indices):
    return {i: random(*scene[i].latents.shape, seed=100 + i) for i in indices}


def run(mode, model, scene, given, **options):
    """Any mode: joint generation is that of nothing given."""
    return joint(model, scene, **options) if mode == "joint" else MODES[mode](model, scene, given, **options)


def same(got, expected):
    """Bit for bit, shot by shot."""
    return len(got) == len(expected) and all(
        x is y is None or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(got, expected, strict=True)
    )


def worst(got, expected):
    assert [x is None for x in got] == [x is None for x in expected]
    return max(error(x, y) for x, y in zip(got, expected, strict=True) if y is not None)


# The definitions: loops over steps, with all shots in one call. What they keep from step to step is float32.


def velocity(model, shots, levels, *, pattern, guidance=None):
    """Plain classifier-free guidance: two calls, in the second of which every text is a negative one."""
    positive = [None if v is None else v.float() for v in model(shots, levels, pattern=pattern)]
    if guidance is None:
        return positive
    scale, text, overall = guidance
    negative = [replace(s, text=(overall if s.role == "global" else text).to(s.text)) for s in shots]
    said = zip(positive, model(negative, levels, pattern=pattern), strict=True)
    return [None if p is None else n.float() + scale * (p - n.float()) for p, n in said]


def noised(latents, noise, t_c):
    """A clean shot at the level of a condition, in float32 at least."""
    wide = torch.promote_types(latents.dtype, torch.float32)
    held = torch.tensor(t_c / 1000, dtype=torch.float32).to(wide)
    return (1 - held) * latents.to(wide) + held * noise.to(wide)


def fresh(shot, i, seed):
    """Another noise than the one that a generated shot started from: by its index in the scene."""
    noise = torch.randn(shot.latents.shape, generator=keyed_generator("history", seed, i), dtype=torch.float32)
    return noise.to(shot.latents)


@torch.no_grad()
def at_once(model, scene, given, *, steps, t_c=100.0, pattern="bidirectional", guidance=None):
    """All shots that are not given, from those that are, at one noise level."""
    state = {i: shot.latents.float() for i, shot in enumerate(scene) if shot.role == "shot"}
    state |= {i: noised(latents, scene[i].latents, t_c) for i, latents in given.items()}
    for step in range(steps):
        t = 1 - step / steps
        levels = [0.0 if shot.role == "global" else t_c / 1000 if i in given else t for i, shot in enumerate(scene)]
        now = [replace(s, latents=state[i].to(s.latents)) if i in state else s for i, s in enumerate(scene)]
        change = velocity(model, now, torch.tensor(levels), pattern=pattern, guidance=guidance)
        state |= {i: z - width(step, steps) * change[i] for i, z in state.items() if i not in given}
    return [given.get(i, state.get(i)) for i in range(len(scene))]


def with_dummy_video(scene, model):
    """A global shot's video: zeros, one latent frame, as large as the scene's first shot, whichever shots are seen.

    Where text is cross-attended, it has none.
    """
    first, *rest = scene
    if first.role != "global" or model.adapter.traits.text == "cross":
        return list(scene)
    return [replace(first, latents=torch.zeros_like(rest[0].latents[:, :, :1])), *rest]


def one_by_one(model, scene, given, *, seen, seed=0, **options):
    """Shot after shot, every step with the history in the call; with context-causal attention: causal, uncached."""
    done, scene = dict(given), with_dummy_video(scene, model)
    for i, shot in enumerate(scene):
        if shot.role == "shot" and i not in done:
            row = [j for j in range(i) if scene[j].role == "global"] + list(seen(i)) + [i]
            history = {place: done[j] for place, j in enumerate(row) if j in done}
            done[i] = at_once(model, [scene[j] for j in row], history, **options)[-1]
            scene[i] = replace(shot, latents=fresh(shot, i, seed))
    return [done.get(i) for i in range(len(scene))]


@torch.no_grad()
def by_hand(model, scene, given, *, seen, steps, t_c=100.0, guidance=None, seed=0):
    """Causal with any history: a cache for each branch, in which a shot stays as it was written."""
    scale, text, overall = guidance or (1, None, None)
    caches = [KVCache() for _ in range(1 if guidance is None else 2)]
    result, scene = [], with_dummy_video(scene, model)

    def look(i, latents, t):
        shot = scene[i] if latents is None else replace(scene[i], latents=latents.to(scene[i].latents))
        worded = [shot.text, overall if shot.role == "global" else text][: len(caches)]
        said = [
            model([replace(shot, text=words.to(shot.text))], t, pattern="context_causal", cache=cache)[0]
            for words, cache in zip(worded, caches, strict=True)
        ]
        if said[0] is None:
            return None
        return said[0].float() if len(said) == 1 else said[1].float() + scale * (said[0].float() - said[1].float())

    for i, shot in enumerate(scene):
        if shot.role == "global":
            latents, level = shot.latents, torch.zeros(1)
            result.append(None)
        else:
            for cache in caches:
                cache.select([*[j for j in range(i) if scene[j].role == "global"], *seen(i)])
            latents, level = given.get(i, shot.latents.float()), torch.tensor([t_c / 1000])
            for step in range(0 if i in given else steps):
                latents = latents - width(step, steps) * look(i, latents, torch.tensor([1 - step / steps]))
            result.append(latents)
            latents = noised(latents, shot.latents if i in given else fresh(shot, i, seed), t_c)
        look(i, latents, level)
        for cache in caches:
            cache.append(i)
    return result


def earlier(scene, i):
    return [j for j in range(i) if scene[j].role == "shot"]


def windows(scene, window):
    """What :func:`recent` shall choose."""
    return lambda i: [j for j in earlier(scene, i) if i - j < window]


def within(passes, guidance=None):
    """What a cache may change in passes that follow one another.

    Each pass may add what one may; guidance takes ``scale`` of one velocity and ``1 - scale`` of the other.
    """
    scale = 1 if guidance is None else guidance[0]
    return passes * (abs(scale) + abs(1 - scale)) * FLOAT32["cached"].absolute


def negatives(batch=2, seed=50):
    """Of a scale and texts of other lengths than any prompt's: as the definitions take them."""
    return 3.0, random(batch, 6, 16, seed=seed), random(batch, 7, 16, seed=seed + 1)


def guide(scale, text, overall):
    return Guidance(scale=scale, text=text, global_text=overall)


# Every mode against its definition.

varied = pytest.mark.parametrize(  # every pair of them; test_any_scene_by_its_definition has all three
    ("scheme", "with_global", "guided"),
    [("anchored", False, False), ("anchored", True, True), ("paper", False, True), ("paper", True, False)],
)
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)
with_and_without_global = pytest.mark.parametrize("with_global", [False, True])
guided_or_not = pytest.mark.parametrize("guided", [False, True])
every_mode = pytest.mark.parametrize("mode", MODES)
shot_after_shot = pytest.mark.parametrize("mode", SHOT_AFTER_SHOT)
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


# Models that cross-attend their text: a global prompt there has no video.


def told(*, batch=2):
    """A prompt and three shots of a cross-attending toy, with extras."""
    adapter, generator = toy(**CROSS), torch.Generator().manual_seed(0)
    counts = [Shot(2, (2, 2, 1)), Shot(4, (1, 1, 1)), Shot(1, (1, 2, 2))]
    scene = [adapter.example(shot, batch=batch, generator=generator, dtype=torch.float32) for shot in counts]
    return [ShotInput(text=random(batch, 3, 5, seed=1), role="global"), *scene]


heard = pytest.mark.parametrize("text", ["own_and_global", "all"])


def cross_attending(text):
    adapter = toy(**CROSS)
    return retrofit(adapter.model, backbone=adapter, text=text)


def of_toys(guided):
    return (3.0, random(2, 6, 5, seed=50), random(2, 7, 5, seed=51)) if guided else None


@heard
@guided_or_not
@pytest.mark.parametrize("mode", ["joint", "conditional"])
@pytest.mark.parametrize("pattern", ["bidirectional", "context_causal"])
def test_a_prompt_without_video_beside_all_shots(text, guided, mode, pattern):
    model, scene, guidance = cross_attending(text), told(), of_toys(guided)
    given = {} if mode == "joint" else clean(scene, 1)
    options = {"steps": 2, "pattern": pattern}
    got = run(mode, model, scene, given, guidance=guidance and guide(*guidance), **options)
    assert same(got, at_once(model, scene, given, guidance=guidance, **options))


@heard
@guided_or_not
@pytest.mark.parametrize("places", [[], [1]])
def test_a_prompt_without_video_auto_regressively(text, guided, places):
    model, scene, guidance = cross_attending(text), told(), of_toys(guided)
    given, options = clean(scene, *places), {"steps": 2, "t_c": 200.0, "pattern": "bidirectional"}
    got = autoregressive(model, scene, given, guidance=guidance and guide(*guidance), **options)
    expected = one_by_one(model, scene, given, seen=partial(earlier, scene), guidance=guidance, **options)
    assert same(got, expected)


@heard
@guided_or_not
@pytest.mark.parametrize("places", [[], [1]])
def test_a_prompt_without_video_is_kept_in_a_cache(text, guided, places):
    """Its text alone; and it is heard as in one call."""
    model, scene, guidance = cross_attending(text), told(), of_toys(guided)
    given, options = clean(scene, *places), {"steps": 2, "t_c": 200.0}
    made = partial(causal, model, given=given, guidance=guidance and guide(*guidance), **options)
    expected = one_by_one(
        model, scene, given, seen=partial(earlier, scene), pattern="context_causal", guidance=guidance, **options
    )
    assert worst(made(scene), expected) <= within(2 * (3 - len(places)), guidance)
    other = made([replace(scene[0], text=random(2, 3, 5, seed=9)), *scene[1:]])
    last = len(scene) - 1
    assert error(other[last], expected[last]) > 1e-3


@heard
@guided_or_not
def test_a_selection_behind_a_prompt_without_video(text, guided):
    model, scene, guidance = cross_attending(text), told(), of_toys(guided)
    chosen = {1: [], 2: [1], 3: [1]}
    got = causal(
        model,
        scene,
        history=lambda shot, before: chosen[shot],
        guidance=guidance and guide(*guidance),
        steps=2,
        t_c=200.0,
    )
    assert same(got, by_hand(model, scene, {}, seen=chosen.get, guidance=guidance, steps=2, t_c=200.0))


@every_mode
def test_a_prompt_that_nobody_hears_is_refused(mode):
    with pytest.raises(ValueError, match=r"^shots: got a global shot, which nobody sees"):
        run(mode, cross_attending("own"), told(), {}, steps=1)


@every_mode
def test_the_extras_of_every_shot_are_heard(mode):
    """In each mode the shots' own strengths go into every call, whichever shots are in it."""
    model, scene = cross_attending("all"), told()
    watched = Watched(model)
    run(mode, watched, scene, {}, steps=1)
    strengths = [shot.extras.get("strength") for shot in scene]
    for shots_in_call, _ in watched.calls:
        for shot in shots_in_call:
            (place,) = [i for i, own in enumerate(scene) if own.text is shot.text]
            assert shot.extras.get("strength") is strengths[place]
    weak = [replace(s, extras={"strength": 0.1 * s.extras["strength"]}) if s.role == "shot" else s for s in scene]
    assert worst(run(mode, model, weak, {}, steps=1), run(mode, model, scene, {}, steps=1)) > 1e-3


# Histories.


@varied
@pytest.mark.parametrize(
    ("places", "chosen"),
    [
        ([], {0: [], 1: [0], 2: [1], 3: [2]}),
        ([0, 1], {0: [], 1: [], 2: [1, 0], 3: [2, 0]}),
        ([0], {0: [], 1: [0], 2: [], 3: [1, 2, 0]}),  # what was dropped comes back
    ],
)
def test_causal_with_a_selection_keeps_every_shot_as_it_was_written(scheme, with_global, guided, places, chosen):
    model, scene = scene_model(scheme), draw(*FOUR, with_global=with_global)
    given = clean(scene, *[i + with_global for i in places])
    guidance = negatives() if guided else None

    def seen(i):
        return [j + with_global for j in chosen[i - with_global]]

    options = {"steps": 2, "t_c": 200.0}
    got = causal(
        model,
        scene,
        given,
        history=lambda shot, before: seen(shot),
        guidance=guidance and guide(*guidance),
        **options,
    )
    assert same(got, by_hand(model, scene, given, seen=seen, guidance=guidance, **options))
    again = one_by_one(model, scene, given, seen=seen, guidance=guidance, pattern="context_causal", **options)
    assert worst(got, again) > 1e-3  # there, shots of the history see one another anew


@both_schemes
def test_causal_puts_selected_shots_side_by_side(scheme):
    """Without a cache: shots that were made alone, in another order than their own, at their new places."""
    model, scene = scene_model(scheme), draw(*FOUR, with_global=False)
    chosen = {0: [], 1: [], 2: [], 3: [2, 0, 1]}

    def alone(row):
        """No shot but the last sees one before it."""
        *history, last = range(row.num_shots)
        return selected_history(row, [[]] * last + [history])

    got = causal(model, scene, history=lambda shot, before: chosen[shot], steps=2)
    by_definition = partial(one_by_one, model, scene, {}, steps=2, pattern=alone)
    bound = FLOAT32["cached"].absolute + FLOAT32["moved keys"].absolute
    assert worst(got, by_definition(seen=chosen.get)) <= 2 * bound  # in each of two steps
    assert worst(got, by_definition(seen=partial(earlier, scene))) > 1e-3


@shot_after_shot
@with_and_without_global
def test_nine_shots_are_seen_by_default(mode, with_global):
    scene = draw(*[Shot(1, (1, 1, 1))] * 10, with_global=with_global)
    generate = partial(MODES[mode], scene_model(), scene, clean(scene, *earlier(scene, len(scene) - 1)), steps=1)
    got = generate()
    assert same(got, generate(history=lambda shot, before: before[-8:]))
    for others in (generate(history=lambda shot, before: before[-7:]), generate(history=lambda shot, before: before)):
        assert worst(got, others) > 1e-3


@shot_after_shot
@with_and_without_global
def test_a_history_is_asked_with_the_scenes_own_indices(mode, with_global):
    asked = []
    scene = draw(*FOUR, with_global=with_global)
    MODES[mode](
        scene_model(), scene, steps=1, history=lambda shot, before: (asked.append((shot, list(before))), before)[1]
    )
    everyone = list(range(with_global, with_global + 4))
    assert asked == [(shot, everyone[:n]) for n, shot in enumerate(everyone)]


@drawn(before=st.lists(st.integers(0, 99), unique=True).map(sorted), window=st.integers(1, 12))
def test_recent(before, window):
    seen = list(recent(window)(100, before))
    assert seen == [i for n, i in enumerate(before) if n + window > len(before)]
    assert choose(recent(window), [*before, 100, 101], 100) == seen


@drawn(data=st.data(), scene=st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True).map(sorted))
def test_a_history_chooses_among_earlier_shots_in_any_order(data, scene):
    shot = data.draw(st.sampled_from(scene))
    chosen = data.draw(st.lists(st.sampled_from(scene), max_size=4))
    before_it = [i for i in scene if i < shot]
    if set(chosen) <= set(before_it) and len(set(chosen)) == len(chosen):
        assert choose(lambda shot, before: tuple(chosen), scene, shot) == chosen
    else:
        with pytest.raises(ValueError, match=rf"^history: got \[.*\] for shot {shot}, expected "):
            choose(lambda shot, before: chosen, scene, shot)


@shot_after_shot
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([7], r"^history: got \[7\] for shot 1, expected some of the earlier shots, \[\]"),
        ([3], r"^history: got \[3\] for shot 1, expected some of the earlier shots"),
        ([1], r"^history: got \[1\] for shot 1, expected some of the earlier shots"),  # itself
        ([0], r"^history: got \[0\] for shot 1, expected some of the earlier shots"),  # the global one
    ],
)
def test_refuses_a_history_of_other_shots(mode, chosen, message):
    with pytest.raises(ValueError, match=message):
        MODES[mode](scene_model(), draw(*FOUR, with_global=True), steps=1, history=lambda shot, before: chosen)


@shot_after_shot
def test_refuses_a_history_with_a_shot_twice(mode):
    scene = draw(*FOUR, with_global=False)
    with pytest.raises(ValueError, match=r"^history: got \[0, 0\] for shot 1, expected every shot once"):
        MODES[mode](scene_model(), scene, steps=1, history=lambda shot, before: [*before, *before])


@pytest.mark.parametrize("window", [0, -1, "9"])
def test_refuses_an_empty_window(window):
    with pytest.raises(ValueError, match=rf"^window: got {window!r}, expected at least 1, the current shot"):
        recent(window)


# The noise of the history.


@shot_after_shot
@with_and_without_global
def test_another_seed_changes_every_shot_but_the_first(mode, with_global):
    scene = draw(*FOUR, with_global=with_global)
    generate = partial(MODES[mode], scene_model(), scene, steps=2)
    plain, same_seed, other = generate(t_c=300.0), generate(t_c=300.0, seed=0), generate(t_c=300.0, seed=1)
    assert same(plain, same_seed)
    first = with_global + 1
    assert same(plain[:first], other[:first])
    assert all(error(x, y) > 1e-3 for x, y in zip(plain[first:], other[first:], strict=True))
    assert same(generate(t_c=0), generate(t_c=0, seed=1))  # a clean history has none


@shot_after_shot
def test_given_shots_do_not_depend_on_the_seed(mode):
    scene = draw(*FOUR, with_global=True)
    generate = partial(MODES[mode], scene_model(), scene, clean(scene, 1, 2, 3), steps=2, t_c=300.0)
    assert same(generate(), generate(seed=1))


@shot_after_shot
@with_and_without_global
def test_a_generated_shots_history_has_another_noise_than_it_started_from(mode, with_global):
    """At t_c = 1000 the history is its noise; a given shot's is the one that the scene has."""
    counts = [Shot(1, (4, 8, 8)), Shot(1, (1, 1, 1))]
    scene = draw(*counts, with_global=with_global)
    start, i = scene[with_global].latents, int(with_global)

    def history(given, **options):
        """What stood for the first shot in the last call that had it."""
        watched = Watched(scene_model())
        MODES[mode](watched, scene, given, steps=1, t_c=1000, **options)
        seen = [shot.latents for shots, _ in watched.calls for shot in shots if shot.role == "shot"]
        return [z for z in seen if z.shape == start.shape][-1]

    def correlation(x, y):
        return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].abs()

    noise = history({})
    assert torch.equal(noise, fresh(scene[i], i, 0))
    assert torch.equal(history({}, seed=7), fresh(scene[i], i, 7))
    assert correlation(noise, start) < 5 / start.numel() ** 0.5
    assert abs(noise.mean()) < 5 / start.numel() ** 0.5
    assert abs(noise.std() - 1) < 5 / start.numel() ** 0.5
    assert torch.equal(history(clean(scene, i)), start)


def test_shots_and_seeds_have_history_noise_of_their_own():
    (shot,) = draw(FOUR[0], with_global=False)
    draws = [history_noise(shot, i, seed) for i in range(3) for seed in (0, 1, 2**40)]
    assert len({z.flatten()[0].item() for z in draws}) == 9
    half = replace(shot, latents=shot.latents.bfloat16())
    assert torch.equal(history_noise(half, 2, 0), history_noise(shot, 2, 0))  # whatever the scene's dtype


# Half precision.


def halved(scene):
    return [
        replace(s, text=s.text.bfloat16(), latents=None if s.latents is None else s.latents.bfloat16()) for s in scene
    ]


@once
def half_model():
    return retrofit(tiny().bfloat16())


def expected_in(mode, model, scene, given, **options):
    """Any mode's definition."""
    if mode in ("joint", "conditional"):
        return at_once(model, scene, given, **options)
    return (by_hand if mode == "causal" else one_by_one)(model, scene, given, seen=partial(earlier, scene), **options)


@every_mode
@with_and_without_global
@guided_or_not
def test_a_half_precision_model_and_a_float32_state(mode, with_global, guided):
    """The model gets its own dtype; what becomes of the shots is kept, stepped and guided in float32."""
    scene, given = case(mode, with_global)
    scene, watched, told = halved(scene), Watched(half_model()), []
    options = {"steps": 3} if mode == "joint" else {"steps": 3, "t_c": 300.0}
    guidance = negatives() if guided else None
    got = run(mode, watched, scene, given, guidance=guidance and guide(*guidance), callback=told.append, **options)
    taken = [x for shots, _ in watched.calls for shot in shots for x in (shot.text, shot.latents) if x is not None]
    assert {x.dtype for x in taken} == {torch.bfloat16}
    assert {z.dtype for z in [*got, *(z for step in told for z in step.latents)] if z is not None} == {torch.float32}
    assert same(got, expected_in(mode, half_model(), scene, given, guidance=guidance, **options))
    made = [z for i, z in enumerate(got) if z is not None and i not in given]
    assert not any(torch.equal(z, z.bfloat16().float()) for z in made)


@conditioned
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_given_shots_of_any_dtype(mode, half, dtype):
    scene, given = case(mode)
    scene, model = (halved(scene), half_model()) if half else (scene, scene_model())
    given, watched = {i: z.to(dtype) for i, z in given.items()}, Watched(model)
    got = run(mode, watched, scene, given, steps=2, t_c=300.0)
    called = {shot.latents.dtype for shots, _ in watched.calls for shot in shots if shot.latents is not None}
    assert called == {scene[1].latents.dtype}
    assert all(got[i] is z for i, z in given.items())
    assert all(z.dtype == torch.float32 for i, z in enumerate(got) if z is not None and i not in given)
    assert same(got, expected_in(mode, model, scene, given, steps=2, t_c=300.0))


@every_mode
def test_a_finer_scene_is_kept_as_fine(mode):
    scene, given = case(mode)
    fine = [replace(s, text=s.text.double(), latents=None if s.latents is None else s.latents.double()) for s in scene]
    got = run(mode, retrofit(tiny().double()), fine, given, steps=2)
    assert all(z.dtype == torch.float64 for i, z in enumerate(got) if z is not None and i not in given)
    assert worst(got, run(mode, scene_model(), scene, given, steps=2)) < 1e-4


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_levels_are_float32_whatever_the_default_dtype(mode, dtype):
    scene, given = case(mode)
    expected, watched, before = generated(mode, scene, given), Watched(scene_model()), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = generated(mode, scene, given, model=watched)
    finally:
        torch.set_default_dtype(before)
    assert {t.dtype for _, t in watched.calls} == {torch.float32}
    assert same(got, expected)


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


# Guidance.


class Watched:
    """A scene model that keeps what it was called with."""

    def __init__(self, model):
        self.model, self.adapter, self.calls = model, model.adapter, []

    def __call__(self, shots, t, **options):
        self.calls.append((list(shots), t))
        return self.model(shots, t, **options)


def generated(mode, scene, given, *, guidance=None, model=None, steps=2):
    return run(mode, model or scene_model(), scene, given, steps=steps, guidance=guidance)


def case(mode, with_global=True):
    """A scene, and what is given of it: the first shot, or any where shots see later ones."""
    scene = draw(*FOUR, with_global=with_global)
    return scene, {} if mode == "joint" else clean(scene, with_global + (mode == "conditional"))


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
def test_the_negative_branch_replaces_every_text_and_nothing_else(mode):
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
def test_a_global_shot_takes_the_shots_negative_prompt_unless_it_has_its_own(mode):
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


# The loop.


@drawn(steps=st.integers(1, 64), rate=st.floats(-4, 4))
def test_euler_is_exact_for_a_constant_velocity(steps, rate):
    noise = [random(1, 2, 1, 2, 3, seed=0).double(), random(1, 2, 2, 1, 1, seed=1).double()]
    got = euler(lambda latents, t: [torch.full_like(z, rate) for z in latents], noise, steps=steps)
    for z, start in zip(got, noise, strict=True):
        assert (z - (start - rate)).abs().max() <= 1e-13 * steps  # roundings, one each step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_euler_does_not_lose_small_steps(dtype):
    """Half precision would round each of them away."""
    seen = []
    (got,) = euler(
        lambda latents, t: (seen.append(latents[0].dtype), [torch.full_like(latents[0], 0.01)])[1],
        [torch.ones(1, 1, 1, 1, 1, dtype=dtype)],
        steps=64,
    )
    assert {got.dtype, *seen} == {torch.promote_types(dtype, torch.float32)}
    assert got.item() == pytest.approx(0.99, abs=1e-5)


@pytest.mark.parametrize("rate", [1.0, -1.5, 0.5])
def test_euler_is_of_first_order(rate):
    """For dz/dt = rate z, from t = 1 to 0: z shrinks by e^-rate; each step multiplies by 1 - rate / steps."""
    noise = random(1, 2, 1, 2, 3, seed=0).double()
    errors = []
    for steps in (32, 64, 128, 256):
        (z,) = euler(lambda latents, t: [rate * z for z in latents], [noise], steps=steps)
        assert torch.allclose(z, noise * (1 - rate / steps) ** steps, rtol=1e-12, atol=0)
        errors.append(error(z, noise * torch.tensor(-rate, dtype=torch.float64).exp()))
    assert all(1.9 < a / b < 2.1 for a, b in pairwise(errors))


@drawn(steps=st.integers(1, 50))
def test_the_levels_of_a_loop(steps):
    visited, reached = [], []
    euler(
        lambda latents, t: (visited.append(t), latents)[1],
        [torch.ones(1, 1, 1, 1, 1)],
        steps=steps,
        callback=lambda step: reached.append(step.t),
    )
    assert visited == [1 - i / steps for i in range(steps)]
    assert reached == [*visited[1:], 0.0]
    assert visited[0] == 1
    assert visited[-1] == pytest.approx(1 / steps)


@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0, 12.0])
def test_a_schedule_is_the_schedulers(shift):
    """Of diffusers' pipelines, which give it levels that are equal steps apart and let it shift them."""
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 32 for i in range(32)])
    assert schedule(32, shift=shift) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert schedule(32, shift=1) == [1 - i / 32 for i in range(33)]


def test_a_loop_follows_any_levels():
    visited, levels = [], [1.0, 0.9, 0.2, 0.0]
    noise = random(1, 2, 1, 2, 3, seed=0).double()
    (z,) = euler(lambda latents, t: (visited.append(t), latents)[1], [noise], steps=tuple(levels))
    assert visited == levels[:-1]
    assert torch.allclose(z, noise * (1 - 0.1) * (1 - 0.7) * (1 - 0.2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_follows_levels(mode):
    scene, given = case(mode)
    equal, shifted = (generated(mode, scene, given, steps=schedule(4, shift=shift)) for shift in (1, 3))
    assert same(equal, generated(mode, scene, given, steps=4))
    left = [i for i, z in enumerate(equal) if z is not None and i not in (given or {})]
    assert not any(torch.equal(equal[i], shifted[i]) for i in left)


@pytest.mark.parametrize(
    "levels",
    [[], [1.0], [0.0, 1.0], [1.0, 0.5], [0.9, 0.0], [1.0, 0.5, 0.5, 0.0], [1.0, float("nan"), 0.0], [1, "0.5", 0]],
)
def test_refuses_levels_that_do_not_go_down_from_one_to_zero(levels):
    with pytest.raises(ValueError, match=r"^steps: got the levels \[.*expected numbers that go down from 1 to 0"):
        euler(lambda latents, t: latents, [torch.ones(1, 1, 1, 1, 1)], steps=levels)


@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf"), None, "3", torch.tensor(3.0)])
def test_refuses_a_shift_that_is_not_positive(shift):
    with pytest.raises(ValueError, match=r"^shift: got .*expected a positive number"):
        schedule(4, shift=shift)


def test_what_a_callback_of_a_loop_is_told():
    noise, told = [torch.ones(1, 1, 1, 1, 2), torch.ones(1, 1, 2, 1, 1)], []
    got = euler(
        lambda latents, t: [torch.full_like(z, t) for z in latents],
        noise,
        steps=2,
        callback=told.append,
    )
    assert [(step.shots, step.step, step.steps, step.t) for step in told] == [((0, 1), 1, 2, 0.5), ((0, 1), 2, 2, 0.0)]
    for step, left in zip(told, (0.5, 0.25), strict=True):
        assert isinstance(step, Step)
        assert same(step.latents, [torch.full_like(z, left) for z in noise])
    assert same(got, told[-1].latents)
    assert all(torch.equal(z, torch.ones_like(z)) for z in noise)  # untouched


def test_a_velocity_for_every_shot():
    with pytest.raises(ValueError, match="shorter"):
        euler(lambda latents, t: latents[:1], [torch.ones(1, 1, 1, 1, 1)] * 2, steps=1)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "32", None])
def test_refuses_what_is_no_number_of_steps(steps):
    message = rf"^steps: got {steps!r}, expected an int of at least 1"
    with pytest.raises(ValueError, match=message):
        euler(lambda latents, t: latents, [torch.ones(1, 1, 1, 1, 1)], steps=steps)
    for mode in MODES:
        scene, given = case(mode)
        with pytest.raises(ValueError, match=message):
            generated(mode, scene, given, steps=steps)


@every_mode
@with_and_without_global
@guided_or_not
def test_what_a_callback_is_told(mode, with_global, guided):
    scene, given = case(mode, with_global)
    told, steps = [], 3
    guidance = guide(*negatives()) if guided else None
    got = run(mode, scene_model(), scene, given, steps=steps, guidance=guidance, callback=told.append)
    made = [i for i, shot in enumerate(scene) if shot.role == "shot" and i not in given]
    loops = [(i,) for i in made] if mode in SHOT_AFTER_SHOT else [tuple(made)]
    assert [(step.shots, step.step, step.steps, step.t) for step in told] == [
        (loop, n, steps, 1 - n / steps) for loop in loops for n in (1, 2, 3)
    ]
    assert all(isinstance(step, Step) for step in told)
    assert all(same(step.latents, [got[i] for i in step.shots]) for step in told[steps - 1 :: steps])
    assert all([z.shape for z in step.latents] == [scene[i].latents.shape for i in step.shots] for step in told)
    assert worst(told[0].latents, told[-1].latents if len(loops) == 1 else told[steps - 1].latents) > 1e-3
    assert same(got, run(mode, scene_model(), scene, given, steps=steps, guidance=guidance))  # it changes nothing


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
    rooms, make = [], kv_cache.empty
    for module in (kv_cache, arrangement):
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


# Refusals.


def refused(mode, scene, given, message, **options):
    watched = Watched(scene_model())
    with pytest.raises(ValueError, match=message):
        MODES[mode](watched, scene, given, steps=1, **options)
    assert not watched.calls  # before any work is done


@conditioned
@pytest.mark.parametrize("t_c", [-1, 1000.5, float("nan")])
@pytest.mark.parametrize("places", [[], [1]])
def test_refuses_levels_off_the_scale(mode, t_c, places):
    scene = draw(*FOUR, with_global=True)
    message = rf"^t_c: got {t_c}, expected a level from 0 \(clean\) to 1000 \(noise\); the paper uses 100 to 500"
    refused(mode, scene, clean(scene, *places), message, t_c=t_c)


@conditioned
@pytest.mark.parametrize("place", [5, -1, "hero", 0])
def test_refuses_given_shots_that_are_not_there(mode, place):
    scene = draw(*FOUR, with_global=True)
    message = rf"^given: got shot {place!r}, expected one of \[1, 2, 3, 4\], the scene's shots counting from 0"
    refused(mode, scene, {place: torch.zeros(2, 4, 1, 4, 6)}, message)


@conditioned
@with_and_without_global
@pytest.mark.parametrize(("places", "last", "first"), [([2], 2, 0), ([3, 0], 3, 1), ([1, 0, 3], 3, 2)])
def test_refuses_given_shots_after_one_that_would_not_see_them(mode, with_global, places, last, first):
    scene = draw(*FOUR, with_global=with_global)
    given = clean(scene, *[i + with_global for i in places])
    patterns = ["context_causal", context_causal] if mode == "conditional" else [None]
    message = (
        rf"^given: shot {last + with_global} comes after shot {first + with_global}, which is to be generated and "
        "would not see it; put given shots first, or .* conditional, with a bidirectional model"
    )
    for pattern in patterns:
        refused(mode, scene, given, message, **({"pattern": pattern} if pattern else {}))


@conditioned
@pytest.mark.parametrize("place", [1, 4])  # the last is a condition of none that is made before it
@pytest.mark.parametrize("latents", [torch.zeros(2, 4, 9, 4, 6), torch.zeros(1, 4, 2, 4, 6), torch.zeros(2, 4), None])
def test_refuses_given_shots_of_another_shape(mode, place, latents):
    scene = draw(*FOUR, with_global=True)
    came = list(latents.shape) if latents is not None else None
    expected = list(scene[place].latents.shape)
    message = f"given: shot {place} is {came}, expected the shape of its noise in the scene, {expected}"
    refused(mode, scene, {place: latents}, "^" + re.escape(message))


@conditioned
@with_and_without_global
def test_refuses_to_generate_nothing(mode, with_global):
    scene = draw(*FOUR[:2], with_global=with_global)
    every = list(range(with_global, with_global + 2))
    message = rf"^given: shots \[{every[0]}, {every[1]}\] are given, expected at least one left to generate"
    refused(mode, scene, clean(scene, *every), message)


@every_mode
@pytest.mark.parametrize("places", [[], [0], [1, 0], [0, 0, 1]])
def test_refuses_scenes_without_shots_and_global_shots_elsewhere(mode, places):
    kinds = draw(FOUR[0], with_global=True)
    scene = [kinds[i] for i in places]
    message = r"^scene: got roles \[.*\], expected shots, and before them at most one global shot"
    with pytest.raises(ValueError, match=message):
        run(mode, scene_model(), scene, {}, steps=1)


@every_mode
@with_and_without_global
def test_refuses_shots_without_noise(mode, with_global):
    scene, given = case(mode, with_global)
    for i in range(with_global, len(scene)):
        missing = [replace(shot, latents=None) if n == i else shot for n, shot in enumerate(scene)]
        with pytest.raises(ValueError, match=rf"^scene: shot {i} has latents None, expected the noise .*shot_noise"):
            run(mode, scene_model(), missing, given, steps=1)


# From a script to a scene.


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


# The surface.


def test_the_public_surface_is_frozen():
    types = ["Director", "Guidance", "History", "Step", "Take"]
    modes = ["autoregressive", "causal", "conditional", "euler", "joint"]
    assert generation.__all__ == [*types, *modes, "negative_texts", "recent", "schedule", "start_scene"]


def test_the_papers_defaults():
    defaults = {
        mode: {name: p.default for name, p in inspect.signature(MODES[mode]).parameters.items()} for mode in MODES
    }
    assert {mode: each["steps"] for mode, each in defaults.items()} == dict.fromkeys(MODES, 32)
    assert {mode: each["guidance"] for mode, each in defaults.items()} == dict.fromkeys(MODES)
    assert {each["t_c"] for mode, each in defaults.items() if mode != "joint"} == {100.0}
    assert {mode: each.get("seed") for mode, each in defaults.items()} == {
        mode: 0 if mode in SHOT_AFTER_SHOT else None for mode in MODES
    }
