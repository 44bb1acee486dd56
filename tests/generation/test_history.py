"""Which shots are seen, and the noise that they are seen with."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given as drawn, strategies as st

from lct_core import Shot, selected_history
from lct_core.generation import (
    causal,
    recent,
)
from lct_core.generation.common import history_noise
from lct_core.generation.history import choose
from lct_core.testing.tolerances import BOUNDS, error
from tests.generation.definitions import (
    FOUR,
    MODES,
    SHOT_AFTER_SHOT,
    Watched,
    both_schemes,
    by_hand,
    clean,
    draw,
    earlier,
    fresh,
    guide,
    negatives,
    one_by_one,
    same,
    scene_model,
    varied,
    with_and_without_global,
    worst,
)

FLOAT32 = BOUNDS[torch.float32]
SCHEMES = ("anchored", "paper")


# Every mode against its definition.


shot_after_shot = pytest.mark.parametrize("mode", SHOT_AFTER_SHOT)


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
def test_causal_with_a_selection_keeps_written_keys(scheme, with_global, guided, places, chosen):
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
def test_history_noise_differs_from_the_starting_noise(mode, with_global):
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
