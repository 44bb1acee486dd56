"""Prompts of models that cross-attend their text: a global prompt there has no video."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from lct_core.generation import (
    autoregressive,
    causal,
)
from lct_core.testing.tolerances import BOUNDS, error
from tests.generation.definitions import (
    Watched,
    at_once,
    by_hand,
    clean,
    cross_attending,
    earlier,
    every_mode,
    guide,
    guided_or_not,
    of_toys,
    one_by_one,
    random,
    run,
    same,
    told,
    within,
    worst,
)

FLOAT32 = BOUNDS[torch.float32]
heard = pytest.mark.parametrize("text", ["own_and_global", "all"])


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
