"""Keys of the step nearest to t_c."""

from dataclasses import replace

import pytest
import torch

from lct_core import Experts
from lct_core.generation import Director, Take, schedule
from lct_core.testing.tolerances import error
from tests.generation.definitions import (
    Watched,
    clean,
    draw,
    guide,
    negatives,
    noised,
    random,
    same,
    scene_model,
)
from tests.generation.takes import SMALL, behind, made

STEPS = 2


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
    with pytest.raises(
        ValueError,
        match=r'^write: got "nearest", .*, which runs one expert; .*expected "pass"',
    ):
        Director(experts, scene, write="nearest")
