"""Who sees whom: prompts that are cross-attended, patterns of one's own, the global shot."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st

import lct_core as lct
from lct_backbones.mmdit import tiny
from lct_core import KVCache, Layout, Shot, ShotInput, retrofit
from lct_core.engine.scene import with_dummy_video
from lct_core.testing.definition import definition
from lct_core.testing.strategies import levels
from lct_core.testing.tolerances import BOUNDS, error
from tests.engine.scenes import (
    CASES,
    PATTERNS,
    WITH_GLOBALS,
    draw,
    flat,
    random_levels,
    retrofitted,
    shot_by_shot,
    small,
    with_zeros,
    worst,
)
from tests.toys import CROSS, toy

FLOAT32 = BOUNDS[torch.float32]
SCHEMES = ("anchored", "paper")
JOINT = pytest.mark.parametrize("make", [case for case in CASES if case.values[0]().traits.text == "joint"])


# Whose prompts are heard where text is cross-attended.


SCOPES = ("own", "own_and_global", "all")


@st.composite
def spoken(draw, text, **options):
    """Layouts in which every shot has a text; prompts are without video, and only there where they are heard."""
    layout = draw(small(with_global=None if text != "own" else False, **options))
    said = [
        [Shot(max(shot.text, 1), (0, 0, 0) if shot.role == "global" else shot.grid, role=shot.role) for shot in scene]
        for scene in layout.scenes
    ]
    return Layout(said, layout.text_first)


@pytest.mark.parametrize("text", SCOPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@given(data=st.data(), pattern=st.sampled_from(PATTERNS))
@torch.no_grad()
def test_cross_attended_text_equals_the_definition(text, scheme, data, pattern):
    layout, adapter = data.draw(spoken(text)), toy(**CROSS)
    t, scenes = data.draw(levels(layout)), draw(adapter, layout)
    got = flat(retrofitted(adapter, scheme=scheme, text=text)(scenes, t, pattern=pattern))
    truth = definition(adapter, with_zeros(scenes), t, scheme=scheme, pattern=pattern, text=text)
    expected = [None if shot.role == "global" else x for shot, x in zip(layout.shots, truth, strict=True)]
    assert worst(got, expected) <= FLOAT32["definition"].absolute


@pytest.mark.parametrize("text", SCOPES)
@given(data=st.data())
@torch.no_grad()
def test_cached_cross_attention_equals_uncached(text, data):
    layout = data.draw(spoken(text, max_scenes=1))
    ends = sorted(data.draw(st.sets(st.integers(1, layout.num_shots), max_size=3)) | {layout.num_shots})
    model = retrofitted(toy(**CROSS), text=text)
    t, (scene,) = random_levels(layout, batch=2), draw(model.adapter, layout, batch=2)
    full = model(scene, t, pattern="context_causal")
    cached = shot_by_shot(model, scene, t, sizes=[b - a for a, b in pairwise([0, *ends])])
    assert worst(cached, full) <= FLOAT32["cached"].absolute


@pytest.mark.parametrize("text", SCOPES)
@pytest.mark.parametrize(
    "history",
    [
        [[], [], [], [], []],
        [[], [0], [0], [0], [0]],
        [[], [], [1], [1, 2], [1, 2, 3]],
        [[], [], [], [1], [0, 2]],
    ],
)
@torch.no_grad()
def test_prompts_are_heard_by_who_sees_their_shot(text, history):
    """In one block attention to video comes before attention to text: a changed text shows in no video but its own.

    Each shot's prompt is changed in turn, and which shots change is compared with who sees whom; a global prompt is
    heard by all, named in a history or not.
    """
    with_prompt = text != "own"
    layout = Layout(
        [
            [
                Shot(2, (0, 0, 0), role="global"),
                Shot(2, (1, 2, 2)),
                Shot(3, (1, 1, 1)),
                Shot(1, (2, 1, 1)),
                Shot(2, (1, 2, 1)),
            ]
        ]
    )
    model = retrofitted(toy(**CROSS, depth=1), text=text)
    (scene,), t = draw(model.adapter, layout), random_levels(layout)
    if not with_prompt:
        scene, t = scene[1:], t[:, 1:]
        history = [[i - 1 for i in seen if i] for seen in history[1:]]
    pattern = partial(lct.selected_history, history=history)
    before = model(scene, t, pattern=pattern)
    shots = [i for i, shot in enumerate(scene) if shot.role == "shot"]
    for changed, shot in enumerate(scene):
        others = [replace(s, text=s.text + 1) if i == changed else s for i, s in enumerate(scene)]
        after = model(others, t, pattern=pattern)
        heard = {i for i in shots if not torch.equal(after[i], before[i])}
        everywhere = shot.role == "global"
        assert heard == {i for i in shots if everywhere or i == changed or (text == "all" and changed in history[i])}


@pytest.mark.parametrize("text", ["own_and_global", "all"])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_prompt_alone_takes_no_place(text, scheme):
    model, cache = retrofitted(toy(**CROSS), text=text, scheme=scheme), KVCache()
    ((prompt, _),) = draw(model.adapter, Layout([[Shot(3, (0, 0, 0), role="global"), Shot(1, (1, 1, 1))]]))
    assert model([prompt], torch.zeros(1), pattern="context_causal", cache=cache) == [None]
    cache.append("prompt")
    (entry,) = cache.shots
    assert entry.shot == Shot(3, (0, 0, 0), role="global")
    assert (entry.origin, entry.extent, cache.end) == (0, 0, 0)
    assert model([prompt], torch.zeros(1)) == [None]  # without a cache: nothing to do


@torch.no_grad()
def test_a_selection_from_a_cache_keeps_texts_with_their_shots():
    """Shots written seeing themselves and the prompt alone; any of them, selected, are as in a row of their own."""
    model, cache = retrofitted(toy(**CROSS), text="all"), KVCache()
    layout = Layout([[Shot(2, (0, 0, 0), role="global"), Shot(4, (1, 2, 2)), Shot(1, (2, 1, 1)), Shot(3, (1, 1, 2))]])
    (scene,), t = draw(model.adapter, layout), random_levels(layout)
    shot_by_shot(model, scene[:3], t, pattern="own_shot", cache=cache)
    for chosen in ([0, 2], [0, 2, 1], [0], [0, 1, 2]):
        cache.select(chosen)
        (got,) = model(scene[3:], t[:, 3:], pattern="context_causal", cache=cache)
        row, history = [*chosen, 3], [*([] for _ in chosen), range(len(chosen))]
        *_, expected = model([scene[i] for i in row], t[:, row], pattern=partial(lct.selected_history, history=history))
        assert error(got, expected) <= FLOAT32["shifted"].absolute


@torch.no_grad()
def test_a_prompt_without_video_is_left_without():
    adapter = toy(**CROSS)
    (scene,) = draw(adapter, Layout([[Shot(2, (0, 0, 0), role="global"), Shot(1, (3, 2, 2))]]))
    assert with_dummy_video(scene, adapter) == scene
    seen = []
    model = retrofitted(adapter, text="all")
    model.backbone.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
    model(scene, torch.zeros(2))
    assert scene[0].latents is None  # what the caller gave stays as it was
    assert seen[0][0] is None


@torch.no_grad()
def test_a_shot_without_text_needs_a_global_prompt():
    layout = Layout([[Shot(2, (0, 0, 0), role="global"), Shot(0, (1, 1, 1))]])
    for text in ("own_and_global", "all"):
        model = retrofitted(toy(**CROSS), text=text)
        (scene,) = draw(model.adapter, layout)
        (_, out) = model(scene, torch.zeros(2))
        assert out.isfinite().all()
        with pytest.raises(ValueError, match=r"^layout: shot 0 .* has no text to attend to"):
            model(scene[1:], torch.zeros(1))


@torch.no_grad()
def test_refuses_prompts_that_nobody_sees():
    layout = Layout([[Shot(2, (0, 0, 0), role="global"), Shot(1, (1, 1, 1))]])
    model = retrofitted(toy(**CROSS), text="own")
    (scene,) = draw(model.adapter, layout)
    message = (
        r'^shots: got a global shot, which nobody sees.*expected none, or retrofit\(model, text="own_and_global"\)'
    )
    for row in ([scene], [scene[:1]], [scene[1:], scene]):
        with pytest.raises(ValueError, match=message):
            model(row, torch.zeros(len(flat(row))))


@pytest.mark.parametrize("text", SCOPES)
def test_refuses_dummy_video_where_text_is_cross_attended(text):
    model = retrofitted(toy(**CROSS), text=text)
    (scene,) = with_zeros(draw(model.adapter, Layout([[Shot(2, (1, 1, 1), role="global"), Shot(1, (1, 2, 2))]])))
    message = r"^shots: the global shot has latents \[1, 3, 1, 4, 4\], expected none: this model cross-attends"
    with pytest.raises(ValueError, match=message):
        model(scene, torch.zeros(2))


def test_refuses_a_choice_of_prompts_that_there_is_not():
    with pytest.raises(ValueError, match=r"^text: got 'global', expected one of \('own', 'own_and_global', 'all'\)"):
        retrofit(tiny(), text="global")
    for text in ("own_and_global", "all"):
        base = tiny()
        with pytest.raises(ValueError, match=f'^text: got {text!r}, but the text of MMDiT takes part .*expected "own"'):
            retrofit(base, text=text)
        assert "forward" not in vars(base)


# The face.


@torch.no_grad()
def test_custom_pattern(fresh):
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(0, (1, 1, 1)), Shot(1, (2, 1, 2)), Shot(3, (1, 2, 1))]])
    (scene,), (others,), t = draw(fresh.adapter, layout), draw(fresh.adapter, layout, seed=1), random_levels(layout)
    chosen = partial(lct.selected_history, history=[[], [0], [0], [0, 2]])
    before = fresh(scene, t, pattern=chosen)
    after = fresh([scene[0], others[1], *scene[2:]], t, pattern=chosen)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    everything = partial(lct.selected_history, history=[[], [0], [0, 1], [0, 1, 2]])
    nothing = partial(lct.selected_history, history=[[], [], [], []])
    for pattern, name in ((everything, "context_causal"), (nothing, "own_shot")):
        got, expected = (fresh(scene, t, pattern=p) for p in (pattern, name))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@torch.no_grad()
def test_a_custom_pattern_sees_the_history(fresh):
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (1, 1, 1)), Shot(0, (2, 1, 2))]])
    (scene,), t = draw(fresh.adapter, layout), random_levels(layout)
    history, seen = [[], [0], [0]], []

    def pattern(row):
        seen.append(row)
        return lct.selected_history(row, history[: row.num_shots])

    full = fresh(scene, t, pattern=pattern)
    cached = shot_by_shot(fresh, scene, t, pattern=pattern)
    assert worst(cached, full) <= FLOAT32["cached"].absolute
    assert seen == [layout, *(Layout([layout.shots[: i + 1]]) for i in range(3))]


@torch.no_grad()
def test_own_shot_pattern_is_the_base_model(fresh):
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(0, (2, 1, 1))], [Shot(1, (1, 1, 3))]])
    scenes, t = draw(fresh.adapter, layout), random_levels(layout)
    got = flat(fresh(scenes, t, pattern="own_shot"))
    alone = [fresh([shot], t[:, i : i + 1])[0] for i, shot in enumerate(flat(scenes))]
    assert worst(got, alone) <= FLOAT32["shifted"].absolute  # each stands elsewhere on the diagonal than alone


# The global shot.


@JOINT
@torch.no_grad()
def test_the_dummy_video_is_one_frame_of_zeros(make):
    adapter = make()
    model = retrofitted(adapter)
    scenes, t = draw(adapter, WITH_GLOBALS, batch=2), random_levels(WITH_GLOBALS, batch=2)
    given = []
    model.backbone.register_forward_pre_hook(lambda module, args: given.extend(args[1]))
    filled, explicit = (model(s, t) for s in (scenes, with_zeros(scenes)))
    for a, b in zip(flat(filled), flat(explicit), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    first = scenes[0][1].latents
    assert given[0].role == "global"
    assert torch.equal(given[0].latents, torch.zeros(2, first.shape[1], 1, *first.shape[3:]))
    assert scenes[0][0].latents is None  # what the caller gave stays as it was


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_the_global_shot_is_seen_and_has_no_output(model, pattern):
    layout = Layout([[Shot(3, (1, 2, 2), role="global"), Shot(1, (1, 2, 2)), Shot(0, (1, 1, 1))]])
    (scene,), t = draw(model.adapter, layout), random_levels(layout)
    none, *before = model(scene, t, pattern=pattern)
    assert none is None
    _, *after = model([ShotInput(text=scene[0].text + 1, role="global"), *scene[1:]], t, pattern=pattern)
    without = model(scene[1:], t[:, 1:], pattern=pattern)
    for a, b, c in zip(before, after, without, strict=True):
        assert error(b, a) > 1e-3
        assert error(c, a) > 1e-3


@torch.no_grad()
def test_the_dummy_video_acts_like_a_shot_of_zeros(fresh):
    """The global prompt is 'a normal text-video pair' (paper, 3.2.2): only its output is missing."""
    layout = Layout([[Shot(3, (1, 2, 2), role="global"), Shot(1, (2, 2, 2))]])
    (scene,), t = draw(fresh.adapter, layout), random_levels(layout)
    ordinary = ShotInput(latents=torch.zeros_like(scene[1].latents[:, :, :1]), text=scene[0].text)
    assert torch.equal(fresh(scene, t)[1], fresh([ordinary, scene[1]], t)[1])
