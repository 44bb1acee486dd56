"""A scene made take by take: what each take sees, and what is refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from lct_core import KVCache
from lct_core.generation import Director, Take, causal, start_scene
from lct_core.patterns import context_causal
from lct_core.script import Script, ScriptShot
from tests.generation.definitions import (
    MODES,
    at_once,
    clean,
    draw,
    fresh,
    guide,
    negatives,
    noised,
    random,
    same,
    scene_model,
    width,
    with_dummy_video,
    worst,
)
from tests.generation.takes import SMALL, a_scene_of_two_threads, behind, denoised, made

STEPS = 2


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


def test_a_shot_keeps_its_role():
    director = Director(scene_model(), scene := draw(*SMALL, with_global=True))
    with pytest.raises(ValueError, match=r"^shot: got the role 'shot', expected 'global', as before"):
        director.revise(0, scene[1])
