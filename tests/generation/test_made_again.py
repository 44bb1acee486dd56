"""What is left of a scene where a shot is made again."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from lct_core import Experts, KVCache, Shot, selected_history
from lct_core.generation import Director, Take, causal
from lct_core.patterns import context_causal, first_frames
from lct_core.routing import TopK
from lct_core.testing.tolerances import error
from tests.generation.definitions import (
    FLOAT32,
    clean,
    draw,
    guide,
    negatives,
    random,
    same,
    scene_model,
    worst,
)
from tests.generation.takes import SMALL, a_scene_of_two_threads, made

STEPS = 2


def keys(cache, i):
    """How a cached shot's keys and values tell: what a probe sees of it alone."""
    with torch.no_grad():
        probe = draw(Shot(1, (1, 1, 1)), with_global=False, seed=3)
        twin = cache.fork()
        twin.select([i])
        return scene_model()(probe, torch.tensor([0.5]), pattern="context_causal", cache=twin)[0]


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


def test_keeping_a_revised_shot_keeps_its_prompt():
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
