"""Given shots, levels and scenes that are refused."""

import re
from dataclasses import replace

import pytest
import torch

from lct_core.patterns import context_causal
from tests.generation.definitions import (
    FOUR,
    MODES,
    SHOT_AFTER_SHOT,
    Watched,
    case,
    clean,
    draw,
    every_mode,
    run,
    scene_model,
    with_and_without_global,
)

# Every mode against its definition.


conditioned = pytest.mark.parametrize("mode", ["conditional", *SHOT_AFTER_SHOT])


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
def test_refuses_scenes_without_shots(mode, places):
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
