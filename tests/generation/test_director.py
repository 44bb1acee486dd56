"""A scene made take by take: what each take sees, and what is left when one is made again."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from lct_core import Experts, Extra, KVCache, Shot, retrofit, selected_history
from lct_core.generation import Director, Guidance, Take, causal, schedule, start_scene
from lct_core.masks import context_causal, first_frames
from lct_core.routing import TopK
from lct_core.script import Script, ScriptShot
from lct_core.testing.definition import definition
from lct_core.testing.tolerances import error
from tests.backbones.test_families import CASES, Scene
from tests.generation.test_generation import (
    FLOAT32,
    MODES,
    Watched,
    at_once,
    clean,
    cross_attending,
    draw,
    fresh,
    guide,
    negatives,
    noised,
    of_toys,
    random,
    same,
    scene_model,
    told,
    width,
    with_dummy_video,
    worst,
)
from tests.toys import CROSS, toy

STEPS = 2
SMALL = [Shot(1 + i % 2, (1, 1 + i % 2, 2)) for i in range(8)]


def made(director, *shots, **options):
    """Shoot a take, and keep it."""
    take = Take(shots, **options)
    results = director.shoot(take)
    director.keep(results, take)
    return results


@torch.no_grad()
def denoised(call, noise, *, levels=None):
    """A loop over one shot, written out."""
    for t, s in pairwise(levels or schedule(STEPS)):
        noise = noise - (t - s) * call(noise, torch.tensor([t]))
    return noise


@torch.no_grad()
def behind(model, written, shot, *, seen, guidance=None, levels=None):
    """What is made of a shot behind shots that are written to a cache, each behind its own history at its level.

    ``written`` is, for each of them in order, its input, latents, level and history.
    """
    scale, text, overall = guidance or (1, None, None)
    caches = [KVCache() for _ in range(1 if guidance is None else 2)]

    def call(shot, latents, t):
        now = shot if latents is None else replace(shot, latents=latents)
        worded = [shot.text, overall if shot.role == "global" else text][: len(caches)]
        said = [
            model([replace(now, text=words)], t, pattern="context_causal", cache=cache)[0]
            for words, cache in zip(worded, caches, strict=True)
        ]
        return said[0] if len(said) == 1 or said[0] is None else said[1] + scale * (said[0] - said[1])

    for i, (given, latents, level, history) in written.items():
        for cache in caches:
            cache.select(history)
        call(given, latents, torch.tensor([level]))
        for cache in caches:
            cache.append(i)
    for cache in caches:
        cache.select(seen)
    return denoised(partial(call, shot), shot.latents, levels=levels)


# One scene, every kind of take.


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("scheme", ["anchored", "paper"])
def test_takes_of_every_kind_in_one_scene(scheme, guided):
    """Each take equals its own definition: loops over plain calls of the model."""
    model, scene, t_c = scene_model(scheme), draw(*SMALL, with_global=True), {1: 0.0, 3: 500, 6: 250.0}
    guidance = negatives() if guided else None
    director = Director(model, scene, steps=STEPS, seed=5, t_c=t_c, guidance=guidance and guide(*guidance))
    given = clean(scene, 6, 7)
    scene = with_dummy_video(scene, model)

    def as_history(i):
        level = t_c.get(i, 100.0)
        shot = scene[i] if i in given else replace(scene[i], latents=fresh(scene[i], i, 5))
        return shot, noised(director.done[i], shot.latents, level), level / 1000

    def cached(shot, *seen, **histories):
        """Behind shots that were made from these."""
        written = {0: (scene[0], None, 0.0, [])}
        for name, history in histories.items():
            i = int(name.removeprefix("s"))
            written[i] = (*as_history(i), [0, *history])
        return behind(model, written, scene[shot], seen=[0, *seen], guidance=guidance)

    def again(*history, shot):
        """The history run again in every step: what at_once does, but for levels of their own."""
        row = [scene[0], *(replace(s, latents=z) for s, z, _ in map(as_history, history)), scene[shot]]
        levels = [0.0, *(level for *_, level in map(as_history, history))]
        scale, text, overall = guidance or (1, None, None)

        def call(latents, t):
            now, t = [*row[:-1], replace(row[-1], latents=latents)], torch.tensor([*levels, t])
            positive = model(now, t)[-1]
            if guidance is None:
                return positive
            negative = model([replace(s, text=overall if s.role == "global" else text) for s in now], t)[-1]
            return negative + scale * (positive - negative)

        return denoised(call, scene[shot].latents)

    results = made(director, 1, 2, cached=False, pattern="bidirectional")  # jointly
    expected = at_once(model, scene[:3], {}, steps=STEPS, guidance=guidance)
    assert same([results[1], results[2]], expected[1:])

    results = made(director, 3, history=(1, 2))  # cached
    assert torch.equal(results[3], cached(3, 1, 2, s1=[], s2=[1]))

    results = made(director, 4, history=(3, 1), cached=False, pattern="bidirectional")  # the history run again
    assert torch.equal(results[4], again(3, 1, shot=4))

    results = made(director, 5, history=(4,))  # an extension: of its prompt alone can one tell that there is no cut
    assert torch.equal(results[5], cached(5, 4, s1=[], s2=[1], s3=[1, 2], s4=[3, 1]))

    for i, latents in given.items():
        director.give(i, latents)
    results = made(director, 8, history=(6, 7), cached=False, pattern="bidirectional")  # composed
    assert torch.equal(results[8], again(6, 7, shot=8))
    results = made(director, 8, history=(7, 6))  # and once more, through the cache
    assert torch.equal(results[8], cached(8, 7, 6, s7=[], s6=[]))
    assert list(director.done) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert director.stale == ()


@pytest.mark.parametrize("pattern", ["context_causal", "bidirectional"])
def test_shots_made_together_behind_a_cached_history(pattern):
    model, scene = scene_model(), draw(*SMALL[:4], with_global=False)
    director = Director(model, scene, steps=STEPS)
    for i in (0, 1):
        director.give(i, clean(scene, i)[i], t_c=0.0)
    results = made(director, 2, 3, history=(1, 0), pattern=pattern)
    cache, latents = KVCache(), [scene[2].latents, scene[3].latents]
    with torch.no_grad():
        for i, history in ((1, []), (0, [])):
            cache.select(history)
            model([replace(scene[i], latents=director.done[i])], torch.zeros(1), pattern="context_causal", cache=cache)
            cache.append(i)
        cache.select([1, 0])
        for step in range(STEPS):
            now = [replace(scene[i], latents=z) for i, z in zip((2, 3), latents, strict=True)]
            change = model(now, torch.full((2,), 1 - step / STEPS), pattern=pattern, cache=cache)
            latents = [z - width(step, STEPS) * v for z, v in zip(latents, change, strict=True)]
    assert same([results[2], results[3]], latents)
    assert director.history == {0: (), 1: (), 2: (1, 0), 3: (1, 0, 2)}


def test_an_extension_is_a_prompt_without_a_cut():
    shots = ScriptShot(text="one"), ScriptShot(text="two", cut=False)
    prompts = []

    class Codec:
        def text(self, prompt):
            prompts.append(prompt)
            return random(len(prompt.split()), 16, seed=len(prompt))

        def latent_shape(self, frames, height, width):
            return 4, frames, height, width

    scene = start_scene(Script(shots=shots), Codec(), (1, 2, 2), seed=0)
    assert prompts == ["[SHOT CUT] one", "two"]
    director = Director(scene_model(), scene, steps=1)
    for i in (0, 1):
        made(director, i)
    assert same([director.done[0], director.done[1]], causal(scene_model(), scene, steps=1))


@pytest.mark.parametrize("mode", ["conditional", "autoregressive", "causal"])
def test_levels_by_shot(mode):
    scene = draw(*SMALL[:4], with_global=True)
    generate = partial(MODES[mode], scene_model(), scene, clean(scene, 1, 2), steps=1)
    assert same(generate(t_c=300), generate(t_c={1: 300, 2: 300.0, 3: 300, 4: 300}))
    assert same(generate(t_c={}), generate(t_c=100))
    got = generate(t_c={2: 700})
    assert all(worst([got[3]], [others[3]]) > 1e-3 for others in (generate(t_c=100), generate(t_c=700)))


# What is made again.


def keys(cache, i):
    """How a cached shot's keys and values tell: what a probe sees of it alone."""
    with torch.no_grad():
        probe = draw(Shot(1, (1, 1, 1)), with_global=False, seed=3)
        twin = cache.fork()
        twin.select([i])
        return scene_model()(probe, torch.tensor([0.5]), pattern="context_causal", cache=twin)[0]


def a_scene_of_two_threads(**options):
    """Shots 0, 1 from 0, 2 from 1; and 3, 4 from 3; and 5 from 2 and 4."""
    scene = draw(*SMALL[:7], with_global=False)
    watched = Watched(scene_model())
    director = Director(watched, scene, steps=1, **options)
    for i, history in enumerate([(), (0,), (1,), (), (3,), (2, 4)]):
        made(director, i, history=history)
    return watched, director


def test_a_shot_made_again_invalidates_what_depended_on_it():
    watched, director = a_scene_of_two_threads()
    made(director, 6, history=(5,))  # so that 5 is written
    (cache,), before = director.caches, dict(director.done)
    assert set(cache.ids) == {0, 1, 2, 3, 4, 5}
    tell = {i: keys(cache, i) for i in cache.ids}
    director.revise(1, replace(director.scene[1], latents=random(2, 4, 1, 4, 4, seed=7)))
    again = director.shoot(Take((1,), (0,)))
    assert director.stale == ()  # nothing yet
    assert torch.equal(director.done[1], before[1])
    director.keep(again, Take((1,), (0,)))
    assert director.stale == (2, 5, 6)
    assert set(cache.ids) == {0, 3, 4}
    assert all(torch.equal(keys(cache, i), tell[i]) for i in cache.ids)
    assert torch.equal(director.done[1], again[1])
    watched.calls.clear()
    director.shoot(Take((5,), (3, 4)))
    assert len(watched.calls) == 1  # nothing is written again

    for take in (Take((6,), (5,)), Take((6,), (2,), cached=False), Take((6,))):
        with pytest.raises(
            ValueError, match=r"^history: shots \[.*\] depended on what was replaced since; make them again"
        ):
            director.shoot(take)
    director.keep({2: director.done[2]}, Take((2,), (1,)))  # as it is
    assert director.stale == (5, 6)
    assert torch.equal(director.done[2], before[2])
    made(director, 5, history=(2, 4))
    assert director.stale == (6,)
    made(director, 6, history=(5,))
    assert director.stale == ()
    assert worst([director.done[6]], [before[6]]) > 1e-6
    assert torch.equal(keys(cache, 3), tell[3])
    assert error(keys(cache, 2), tell[2]) > 1e-6  # behind another shot


def test_a_shot_kept_again_as_it_is_gives_the_same():
    _, director = a_scene_of_two_threads()
    made(director, 6, history=(0, 5))
    before = director.done[6]
    director.keep({0: director.done[0]}, Take((0,), ()))
    assert director.stale == (1, 2, 5, 6)
    for i, history in ((1, (0,)), (2, (1,)), (5, (2, 4))):
        director.keep({i: director.done[i]}, Take((i,), history))
    assert torch.equal(director.shoot(Take((6,), (0, 5)))[6], before)


def test_shots_made_together_depend_on_one_another():
    for pattern, stale in (("bidirectional", (0, 2)), ("context_causal", (2,)), (context_causal, (2,))):
        director = Director(scene_model(), draw(*SMALL[:3], with_global=False), steps=1)
        made(director, 0, 1, cached=False, pattern=pattern)
        made(director, 2, history=(1,))
        made(director, 1, history=())
        assert director.stale == stale


def test_a_given_shot_is_never_stale():
    """Its keys are written again, behind what is there now."""
    scene = draw(*SMALL[:4], with_global=True)
    director = Director(scene_model(), scene, steps=1)
    made(director, 1)
    director.give(2, clean(scene, 2)[2], history=(1,))
    made(director, 3, history=(2,))
    assert set(director.caches[0].ids) == {0, 1, 2}
    made(director, 1)
    assert director.stale == (3,)
    assert set(director.caches[0].ids) == {0}
    assert torch.equal(director.shoot(Take((4,), (2,)))[4], director.shoot(Take((4,), (2,)))[4])
    director.discard(1)
    with pytest.raises(
        ValueError, match=r"^history: shot 2 was made from shots \[1\], which are no longer what they were"
    ):
        director.shoot(Take((4,), (2,)))
    director.give(2, director.done[2])
    director.shoot(Take((4,), (2,)))


def test_what_is_left_of_a_history_closes_up():
    """As if what was dropped from it had never been there."""
    scene = draw(*SMALL[:5], with_global=False)
    dropped, never = (Director(scene_model(), scene, steps=1) for _ in range(2))
    for director in (dropped, never):
        for i in (0, 1, 2):
            director.give(i, clean(scene, i)[i])
    dropped.shoot(Take((3,), (0, 1, 2)))
    never.shoot(Take((3,), (0, 2)))
    dropped.discard(1)
    assert torch.equal(dropped.shoot(Take((4,), (0, 2)))[4], never.shoot(Take((4,), (0, 2)))[4])


def test_keys_that_one_branch_lacks_are_written_again():
    """A call that fails in between leaves nothing by halves."""
    scene = draw(*SMALL[:3], with_global=True)
    broken, whole = (Director(scene_model(), scene, steps=1, guidance=guide(*negatives())) for _ in range(2))
    for director in (broken, whole):
        made(director, 1)
    positive, negative = broken.caches
    append, negative.append = negative.append, None
    with pytest.raises(TypeError):
        broken.shoot(Take((2,)))
    assert len(positive.ids) > len(negative.ids)
    negative.append = append
    assert torch.equal(broken.shoot(Take((2,)))[2], whole.shoot(Take((2,)))[2])


def one_before(layout):
    """Every shot sees the one before it."""
    return selected_history(layout, [[i - 1] if i else [] for i in range(layout.num_shots)])


@pytest.mark.parametrize("pattern", [one_before, partial(first_frames, causal=True), TopK(1, chunk=1)])
def test_keys_are_written_as_the_shot_was_made(pattern):
    """With its take's pattern, be it sparse or routed by data: the same as all in one row."""
    scene = draw(*SMALL[:4], with_global=False)
    cached, again = (Director(scene_model(), scene, steps=1, t_c=0) for _ in range(2))
    for director in (cached, again):
        director.give(0, clean(scene, 0)[0])
        for i in (1, 2, 3):
            made(director, i, history=tuple(range(i)), cached=director is cached, pattern=pattern)
    assert worst(list(cached.done.values()), list(again.done.values())) <= 3 * FLOAT32["cached"].absolute
    full = cached.shoot(Take((3,), (0, 1, 2)))
    assert error(full[3], cached.done[3]) > 1e-3


def test_another_global_prompt_makes_all_stale():
    scene = draw(*SMALL[:3], with_global=True)
    director = Director(scene_model(), scene, steps=1)
    director.give(1, clean(scene, 1)[1])
    made(director, 2)
    expected = Director(scene_model(), [replace(scene[0], text=random(2, 3, 16, seed=8)), *scene[1:]], steps=1)
    director.revise(0, replace(scene[0], text=random(2, 3, 16, seed=8)))
    assert director.stale == (2,)
    assert director.caches[0].ids == ()
    expected.give(1, director.done[1])
    assert same(list(made(director, 2).values()), list(made(expected, 2).values()))
    assert director.stale == ()


def test_a_revised_shot_is_history_as_it_was_made():
    """Whenever its keys are written."""
    scene = draw(*SMALL[:3], with_global=False)
    one, other = (Director(scene_model(), scene, steps=1) for _ in range(2))
    for director in (one, other):
        made(director, 0)
    made(one, 1)
    for director in (one, other):
        director.revise(0, replace(scene[0], text=random(2, 5, 16, seed=8)))
    assert torch.equal(one.shoot(Take((1,)))[1], other.shoot(Take((1,)))[1])
    assert error(one.shoot(Take((0,)))[0], one.done[0]) > 1e-3


def test_a_revised_shot_that_is_kept_as_it_is_keeps_its_prompt():
    """Its keys are those of what was made; another take of it has the new prompt."""
    scene = draw(*SMALL[:3], with_global=False)
    one, other = (Director(scene_model(), scene, steps=1) for _ in range(2))
    for director in (one, other):
        made(director, 0)
        made(director, 1)
    one.revise(1, replace(scene[1], text=random(2, 5, 16, seed=8)))
    for director in (one, other):
        director.keep({1: director.done[1]}, Take((1,), ()))
    take = Take((2,), (1,))
    assert torch.equal(one.shoot(take)[2], other.shoot(take)[2])
    one.keep({1: one.done[1].clone()}, Take((1,), ()))
    assert error(one.shoot(take)[2], other.shoot(take)[2]) > 1e-3


def test_a_shot_after_the_last():
    scene = draw(*SMALL[:3], with_global=True)
    director = Director(scene_model(), scene[:-1], steps=1)
    for i in (1, 2):
        made(director, i)
    director.revise(3, scene[3])
    made(director, 3)
    assert same([director.done.get(i) for i in range(4)], causal(scene_model(), scene, steps=1))


def test_a_fork_goes_its_own_way():
    _, director = a_scene_of_two_threads()
    expected = director.shoot(Take((6,), (5, 4)))[6]
    fork = director.fork()
    fork.revise(4, replace(fork.scene[4], text=random(2, 9, 16, seed=8)))
    made(fork, 4, history=(3,))
    assert fork.stale == (5,)
    assert director.stale == ()
    made(fork, 5, history=(2, 4))
    made(fork, 6, history=(5, 4))
    assert torch.equal(director.shoot(Take((6,), (5, 4)))[6], expected)
    made(director, 6, history=(5, 4))
    assert torch.equal(director.done[6], expected)
    assert error(fork.done[6], expected) > 1e-6
    assert 6 not in a_scene_of_two_threads()[1].done


def test_experts_go_the_same_way():
    """Made again, forked, closed up: two experts that are one model."""
    scene, guidance = draw(*SMALL[:4], with_global=True), guide(*negatives())
    experts = Experts(scene_model(), scene_model(), boundary=0.6)
    one, two = (Director(model, scene, steps=STEPS, guidance=guidance) for model in (scene_model(), experts))
    results = []
    for director in (one, two):
        for i in (1, 2, 3):
            made(director, i)
        fork = director.fork()
        fork.revise(2, replace(scene[2], text=random(2, 3, 16, seed=8)))
        made(fork, 2, history=(1,))
        made(fork, 3, history=(1, 2))
        made(director, 4)
        made(fork, 4, history=(3, 1))
        results.append([*director.done.values(), *fork.done.values()])
    assert same(*results)


@pytest.mark.parametrize("guided", [False, True])
def test_caches_of_another_make(guided):
    """With a history in host memory: the same to the last bit; in eight bits: nearly."""
    scene, guidance = draw(*SMALL[:6], with_global=True), guide(*negatives()) if guided else None

    def generated(*, tier="device", **options):
        director = Director(scene_model(), scene, steps=1, guidance=guidance, **options)
        for i in range(1, 7):
            made(director, i)
            for cache in director.caches:
                cache.move(*cache.ids, tier=tier)
        assert [cache.branch for cache in director.caches] == ["positive", "negative"][: 1 + guided]
        return director, list(director.done.values())

    _, expected = generated()
    offloaded, got = generated(tier="host")
    assert all(cache.bytes_by_tier["host"] for cache in offloaded.caches)
    assert same(got, expected)
    small, got = generated(new_cache=partial(KVCache, storage="int8"))
    assert all(cache.errors for cache in small.caches)
    assert 0 < worst(got, expected) < 0.05


@pytest.mark.parametrize("cached", [True, False])
def test_history_is_the_window_of_nine_by_default(cached):
    scene = draw(*[Shot(1, (1, 1, 1))] * 11, with_global=False)
    director = Director(scene_model(), scene, steps=1)
    for i in (10, *range(9)):
        director.give(i, clean(scene, i)[i])
    take = Take((9,), cached=cached)
    assert director.seen(take) == tuple(range(1, 9))
    assert torch.equal(director.shoot(take)[9], director.shoot(replace(take, history=tuple(range(1, 9))))[9])
    director.discard(8)
    assert director.seen(replace(take, shots=(8, 9))) == tuple(range(1, 8))  # with both of them, nine
    narrow = Director(scene_model(), scene, window=2)
    narrow.give(0, clean(scene, 0)[0])
    assert [narrow.seen(replace(take, shots=shots)) for shots in ((1,), (1, 2), (1, 2, 3))] == [(0,), (), ()]
    with pytest.raises(ValueError, match=r"^window: got 0, expected at least 1"):
        Director(scene_model(), scene, window=0)


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (Take((0,)), r"^shots: got \[0\], expected some of \[1, 2, 3\], the scene's shots"),
        (Take((4,)), r"^shots: got \[4\], expected some of \[1, 2, 3\]"),
        (Take((3,), (2,)), r"^history: shots \[2\] are not done, expected some of \[1\]"),
        (Take((3,), (0,)), r"^history: shots \[0\] are not done.*the global shot is always seen"),
        (Take((2,), (3,), cached=False), r"^history: shots \[3\] are not done"),
    ],
)
def test_refuses_takes_of_what_is_not_there(take, message):
    scene = draw(*SMALL[:3], with_global=True)
    director = Director(scene_model(), scene, steps=1)
    director.give(1, clean(scene, 1)[1])
    for refuse in (director.seen, director.shoot, partial(director.keep, {})):
        with pytest.raises(ValueError, match=message):
            refuse(take)


@pytest.mark.parametrize(
    ("shots", "history", "message"),
    [
        ((), (), r"^shots: got \[\], expected at least one"),
        ((2, 1), (), r"^shots: got \[2, 1\], expected at least one, in the scene's order, each once"),
        ((1, 1), (), r"^shots: got \[1, 1\]"),
        (3, (), r"^shots: got 3, expected shots by their index"),
        ((-1,), (), r"^shots: got \(-1,\), expected shots by their index"),
        ((1,), (True,), r"^history: got \(True,\), expected shots by their index"),
        ((1,), (0, 0), r"^history: got \[0, 0\] for shots \[1\], expected every shot once"),
        ((1,), (1,), r"^history: got \[1\] for shots \[1\], expected every shot once, and none of those"),
    ],
)
def test_refuses_what_is_no_take(shots, history, message):
    with pytest.raises(ValueError, match=message):
        Take(shots, history)


def test_refuses_a_history_that_would_turn_in_a_circle():
    _, director = a_scene_of_two_threads()
    message = r"^history: shots \[2\] depend on \[0\], which the take makes; .* director.give\(2, director.done\[2\]\)"
    with pytest.raises(ValueError, match=message):
        director.shoot(Take((0,), (2, 3)))
    director.give(2, director.done[2])
    made(director, 0, history=(3, 2), cached=False, pattern="bidirectional")
    assert director.stale == (1, 5)


def test_refuses_a_history_that_is_not_seen():
    scene = draw(*SMALL[:3], with_global=False)
    director = Director(scene_model(), scene, steps=1)
    director.give(2, clean(scene, 2)[2])
    for pattern in ("context_causal", context_causal):
        with pytest.raises(ValueError, match=r"^history: shot 2 comes after shot 1, which would not see it"):
            director.shoot(Take((1,), (2,), cached=False, pattern=pattern))
    director.shoot(Take((1,), (2,)))  # in the cache it comes first


def test_refuses_to_keep_what_was_not_made():
    scene = draw(*SMALL[:3], with_global=False)
    director = Director(scene_model(), scene, steps=1)
    take = Take((0, 1), cached=False)
    results = director.shoot(take)
    with pytest.raises(ValueError, match=r"^results: got shots \[0\], expected those of the take, \[0, 1\]"):
        director.keep({0: results[0]}, take)
    with pytest.raises(ValueError, match=r"^given: shot 1 is \[.*\], expected the shape of its noise"):
        director.keep({0: results[0], 1: results[0]}, take)
    with pytest.raises(ValueError, match=r"^t_c: got 2000, expected a level"):
        director.keep(results, take, t_c=2000)
    with pytest.raises(ValueError, match=r"^given: got shot 7"):
        director.give(7, results[0])
    with pytest.raises(ValueError, match=r"^i: shot 0 is not done"):
        director.discard(0)
    with pytest.raises(ValueError, match=r"^i: got shot 4, expected one of the 3 shots from 0, or the next"):
        director.revise(4, scene[0])
    with pytest.raises(ValueError, match=r"^scene: shot 1 has latents None"):
        director.revise(1, replace(scene[1], latents=None))
    assert director.done == {}


@pytest.mark.parametrize("level", [{1: -1}, {0: "high"}, "high"])
def test_refuses_levels_by_shot_off_the_scale(level):
    with pytest.raises(
        ValueError, match=r"^t_c: got (-1 for shot 1|'high' for shot 0|'high'), expected a level from 0"
    ):
        Director(scene_model(), draw(*SMALL[:2], with_global=False), t_c=level)


# Keys of the step nearest to t_c.


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("t_c", "steps", "nearest"),
    [
        (300, 4, 0.25),
        (100.0, 4, 0.25),
        (800, 4, 0.75),
        (1000, 2, 1.0),
        (375, 4, 0.25),
        (600, [1.0, 0.7, 0.3, 0.0], 0.7),
    ],
)
def test_the_nearest_steps_keys_are_those_of_a_plain_call(t_c, steps, nearest, guided):
    """At that step's level, on its latents, behind the same history; the lower level where two are as near."""
    scene, guidance = draw(*SMALL[:3], with_global=False), negatives() if guided else None
    watched, reached = Watched(scene_model()), {}
    director = Director(watched, scene, t_c=t_c, steps=steps, write="nearest", guidance=guidance and guide(*guidance))
    director.give(0, clean(scene, 0)[0])
    take = Take((1,), (0,))
    results = director.shoot(take, callback=lambda step: reached.update({step.t: step.latents[0]}))
    director.keep(results, take)
    watched.calls.clear()
    got = director.shoot(Take((2,), (0, 1)))
    assert {len(shots) for shots, _ in watched.calls} == {1}
    calls = steps if isinstance(steps, int) else len(steps) - 1
    assert len(watched.calls) == calls * (1 + guided)  # no pass to write shot 1
    levels = schedule(steps) if isinstance(steps, int) else steps
    at_nearest = {1.0: scene[1].latents, **reached}[nearest]
    first = noised(director.done[0], scene[0].latents, t_c)
    written = {0: (scene[0], first, t_c / 1000, []), 1: (scene[1], at_nearest, nearest, [0])}
    expected = behind(scene_model(), written, scene[2], seen=[0, 1], guidance=guidance, levels=levels)
    assert torch.equal(got[2], expected)
    for cache in director.caches:
        (_, entry) = cache.shots
        assert entry.level == (torch.tensor(nearest).item(),) * 2


def test_the_keys_of_a_take_that_is_not_kept_are_forgotten():
    """What is kept instead, kept later, or made otherwise is written in a pass."""
    scene = draw(*SMALL[:4], with_global=False)
    passes = Director(scene_model(), scene, steps=3, t_c=400)
    nearest = Director(scene_model(), scene, steps=3, t_c=400, write="nearest")
    for director in (passes, nearest):
        made(director, 0, 1)  # several at once
        first, second = director.shoot(Take((2,), (0,))), director.shoot(Take((2,), (1,)))
        director.keep(first, Take((2,), (0,)))  # not the last one
        assert error(first[2], second[2]) > 1e-3
    take = Take((3,), (1, 2))
    assert torch.equal(passes.shoot(take)[3], nearest.shoot(take)[3])
    assert set(nearest.caches[0].ids) == {0, 1, 2}
    for director in (passes, nearest):
        director.shoot(Take((2,), (1,)))
        director.give(2, clean(scene, 2)[2])
    assert torch.equal(passes.shoot(take)[3], nearest.shoot(take)[3])
    copies = {i: z.clone() for i, z in nearest.shoot(Take((2,), (1,))).items()}
    for director in (passes, nearest):
        director.keep(copies, Take((2,), (1,)))
    assert torch.equal(passes.shoot(take)[3], nearest.shoot(take)[3])
    for director in (passes, nearest):
        director.keep(director.shoot(Take((2,), (1,))), Take((2,), (1,)), t_c=900)  # to which another step is nearest
    assert torch.equal(passes.shoot(take)[3], nearest.shoot(take)[3])
    for director in (passes, nearest):
        director.keep(director.shoot(Take((2,), (0,))), Take((2,), (1,)))  # as if it had been made from another
    assert torch.equal(passes.shoot(take)[3], nearest.shoot(take)[3])
    for change in (
        lambda director: director.give(0, clean(scene, 0)[0]),
        lambda director: director.keep({0: director.done[0]}, Take((0,))),
        lambda director: (director.discard(0), director.give(0, clean(scene, 0)[0])),
        lambda director: director.revise(2, replace(scene[2], text=random(2, 5, 16, seed=8))),
    ):
        for director in (passes, nearest):
            results = director.shoot(Take((2,), (0,)))
            change(director)  # what is seen, or what it is
            director.keep(results, Take((2,), (0,)))
            director.keep({1: director.done[1]}, Take((1,), (0,)))
        assert torch.equal(passes.shoot(take)[3], nearest.shoot(take)[3])
    results = [director.shoot(Take((2,), (1,))) for director in (passes, nearest)]
    fork = nearest.fork()  # which leaves them behind
    for director, result in zip((passes, fork), results, strict=True):
        director.keep(result, Take((2,), (1,)))
    assert torch.equal(passes.shoot(take)[3], fork.shoot(take)[3])
    for director in (passes, fork):
        made(director, 2, history=(1,), cached=False)  # without a cache
    assert torch.equal(passes.shoot(take)[3], fork.shoot(take)[3])


def test_a_shot_made_again_has_its_new_keys_at_the_nearest_step():
    scene = draw(*SMALL[:4], with_global=True)
    again, once = (Director(scene_model(), scene, steps=3, t_c=400, write="nearest") for _ in range(2))
    for director in (again, once):
        made(director, 1)
    made(again, 2)
    made(again, 3)
    again.revise(2, replace(scene[2], latents=random(*scene[2].latents.shape, seed=9)))
    once.revise(2, again.scene[2])
    for director in (again, once):
        made(director, 2)
        made(director, 3)
    assert same(list(again.done.values()), list(once.done.values()))
    assert again.stale == ()


def test_an_interrupted_take_leaves_nothing():
    class Interrupt(Exception):
        pass

    def interrupt(step):
        if step.step == 2:
            raise Interrupt

    scene = draw(*SMALL[:3], with_global=True)
    for write in ("pass", "nearest"):
        interrupted, plain = (Director(scene_model(), scene, steps=3, t_c=900, write=write) for _ in range(2))
        for i in (1, 2, 3):
            with pytest.raises(Interrupt):
                interrupted.shoot(Take((i,)), callback=interrupt)
            assert i not in interrupted.done
            for director in (interrupted, plain):
                made(director, i)
        assert same(list(interrupted.done.values()), list(plain.done.values()))


def test_refuses_other_ways_to_write():
    scene, experts = draw(*SMALL[:2], with_global=False), Experts(scene_model(), scene_model(), boundary=0.5)
    with pytest.raises(ValueError, match=r"^write: got 'step', expected one of \('pass', 'nearest'\)"):
        Director(scene_model(), scene, write="step")
    with pytest.raises(ValueError, match=r'^write: got "nearest", but both experts need the keys.*expected "pass"'):
        Director(experts, scene, write="nearest")


# One text-free history for both branches.


def text_free_definition(model, scene, levels, *, free=None):
    """What is predicted for the last shot behind others that hear no prompt, by the model's definition."""
    scene = [s if s.latents is not None else replace(s, latents=torch.zeros(2, 3, 1, 2, 2)) for s in scene]
    free = [i for i, s in enumerate(scene[:-1]) if s.role == "shot"] if free is None else free
    options = {"scheme": model.scheme, "pattern": "context_causal", "text": model.text, "text_free": free}
    with torch.no_grad():
        return definition(model.adapter, [scene], levels, **options)


@pytest.mark.parametrize("text", ["own", "own_and_global", "all"])
def test_shots_that_hear_no_prompt(text):
    model, scene = cross_attending(text), told()
    scene = scene[text == "own" :]
    levels = torch.tensor([0.0, 0.3, 0.7, 0.4][text == "own" :])
    with torch.no_grad():
        got = model(scene, levels, pattern="context_causal", text_free=True)
        heard = model(scene, levels, pattern="context_causal")
        other = [replace(s, text=s.text + 1) for s in scene]
        assert same(model(other, levels, pattern="context_causal", text_free=True), got)
    expected = text_free_definition(model, scene, levels, free=range(len(scene)))
    first = text != "own"
    assert worst(got[first:], expected[first:]) <= FLOAT32["definition"].absolute
    assert worst(got[first:], heard[first:]) > 1e-3


@torch.no_grad()
def test_every_family_that_cross_attends_its_text_can_leave_it_out():
    """Whatever the text, and shot after shot as in one row; the cache has no text of theirs."""
    cases = {case.name.split(",")[0]: case for case in reversed(CASES) if case.text}
    assert set(cases) >= {"cosmos", "ltx", "ltx2", "skyreels_v2", "wan"}
    for case in cases.values():
        scene, model, cache, got = Scene(case), retrofit(case.model()), KVCache(), []
        for i, shot in enumerate(scene.shots):
            (out,) = model([shot], scene.t[:, i, None], pattern="context_causal", cache=cache, text_free=True)
            got.append(out)
            cache.append(i)
        options = {"scheme": "anchored", "pattern": "context_causal", "text_free": range(len(scene.shots))}
        assert worst(got, definition(model.adapter, [scene.shots], scene.t, **options)) <= FLOAT32["cached"].absolute
        other = [replace(shot, text=shot.text.flip(1)) for shot in scene.shots]
        row = [model(shots, scene.t, pattern="context_causal", text_free=True) for shots in (scene.shots, other)]
        assert same(*row)
        assert [entry.shot.text for entry in cache.shots] == [0] * len(got)


def test_joint_text_cannot_be_left_out():
    scene = draw(*SMALL[:2], with_global=False)
    with pytest.raises(ValueError, match=r"^text_free: got True, but the text of MMDiT takes part in self-attention"):
        scene_model()(scene, torch.tensor([0.1, 0.2]), text_free=True)


@pytest.mark.parametrize("with_global", [False, True])
def test_one_history_for_both_branches(with_global):
    """Each step equals the definition, with a history that hears no prompt, in half the memory."""
    model = cross_attending("own_and_global" if with_global else "own")
    scene, (scale, text, overall) = told()[not with_global :], of_toys(True)
    guidance = Guidance(scale=scale, text=text, global_text=overall, shared_history=True)
    director = Director(model, scene, guidance=guidance, steps=STEPS, t_c=200)
    first = int(with_global)
    for i in range(first, first + 3):
        made(director, i)
    rows = range(first, first + 2)
    conditions = [noised(director.done[i], fresh(scene[i], i, 0), 200) for i in rows]
    latents = scene[-1].latents
    for step in range(STEPS):
        t = torch.tensor([0.0] * first + [0.2, 0.2, 1 - step / STEPS])
        now = [replace(scene[i], latents=z) for i, z in zip(rows, conditions, strict=True)]
        said = []
        for words, prompt in ((scene[-1].text, scene[0].text), (text, overall)):
            whole = [replace(scene[0], text=prompt)] if with_global else []
            row = [*whole, *now, replace(scene[-1], latents=latents, text=words)]
            said.append(text_free_definition(model, row, t)[-1])
        latents = latents - width(step, STEPS) * (said[1] + scale * (said[0] - said[1]))
    passes = STEPS * (scale + abs(1 - scale))
    assert error(director.done[first + 2], latents) <= passes * FLOAT32["definition"].absolute
    apart = Director(model, scene, guidance=replace(guidance, shared_history=False), steps=STEPS, t_c=200)
    for i in range(first, first + 3):
        made(apart, i)
    assert error(apart.done[first + 2], latents) > 1e-3
    (cache,) = director.caches
    assert cache.nbytes <= sum(each.nbytes for each in apart.caches) / 2
    if with_global:
        assert {entry.id for entry in cache.held if entry.shot.role == "global"} == {("global", 0), ("global", 1)}
    assert all(entry.shot.text == 0 for entry in cache.held if entry.shot.role == "shot")


def test_a_text_free_history_does_not_depend_on_its_prompts():
    model, scene, (scale, text, overall) = cross_attending("own_and_global"), told(), of_toys(True)
    guidance = Guidance(scale=scale, text=text, global_text=overall, shared_history=True)
    director = Director(model, scene, guidance=guidance, steps=1)
    other = Director(model, [replace(s, text=s.text + (s.role == "shot")) for s in scene], guidance=guidance, steps=1)
    for each in (director, other):
        for i, latents in {1: torch.ones_like(scene[1].latents), 2: torch.ones_like(scene[2].latents)}.items():
            each.give(i, latents)
    other.revise(3, scene[3])
    assert torch.equal(director.shoot(Take((3,), (1, 2)))[3], other.shoot(Take((3,), (1, 2)))[3])


def test_another_global_prompt_for_one_history():
    model, scene, (scale, text, overall) = cross_attending("own_and_global"), told(), of_toys(True)
    guidance = Guidance(scale=scale, text=text, global_text=overall, shared_history=True)
    revised, new = replace(scene[0], text=random(2, 3, 5, seed=9)), {}
    one, other = Director(model, scene, guidance=guidance, steps=1), None
    for i in (1, 2):
        made(one, i)
    one.revise(0, revised)
    assert one.stale == (1, 2)
    assert one.caches[0].ids == ()
    other = Director(model, [revised, *scene[1:]], guidance=guidance, steps=1)
    for director in (one, other):
        for i in (1, 2, 3):
            new.setdefault(i, []).append(made(director, i)[i])
    assert all(torch.equal(*pair) for pair in new.values())


def test_one_history_serves_experts():
    high, low = cross_attending("own"), cross_attending("own")
    guidance = Guidance(scale=2.0, text=random(2, 6, 5, seed=50), shared_history=True)
    plain = Director(low, told()[1:], guidance=guidance, steps=STEPS)
    experts = Director(Experts(high, low, boundary=0.6), told()[1:], guidance=guidance, steps=STEPS)
    for i in range(3):
        made(plain, i)
        made(experts, i)
    assert same(list(plain.done.values()), list(experts.done.values()))


def test_refuses_one_history_where_it_would_not_serve_both():
    guidance = Guidance(text=torch.zeros(1, 2, 16), shared_history=True)
    joint_text = r"^shared_history: got True, but the text of MMDiT takes part in self-attention"
    with pytest.raises(ValueError, match=joint_text):
        Director(scene_model(), draw(*SMALL[:2], with_global=False), guidance=guidance)
    guidance = Guidance(text=torch.zeros(1, 2, 5), shared_history=True)
    with pytest.raises(ValueError, match=r'^shared_history: got True, but with text="all" a shot hears the prompts'):
        Director(cross_attending("all"), told(), guidance=guidance)
    with pytest.raises(ValueError, match=r'^write: got "nearest", but one history for both branches hears no prompt'):
        Director(cross_attending("own"), told()[1:], guidance=guidance, write="nearest")
    adapter = toy(**CROSS)
    adapter.traits = replace(adapter.traits, extras={"strength": Extra((), prompt=True)})
    with pytest.raises(ValueError, match=r"^shared_history: got True, but Toy takes more of a prompt than text"):
        Director(retrofit(adapter.model, backbone=adapter), told()[1:], guidance=guidance)
