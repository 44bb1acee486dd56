import copy
import inspect
import io
import pickle
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lct_core as lct
from lct_backbones.mmdit import MMDiT, MMDiTBackbone, tiny
from lct_core import Backbone, KVCache, Layout, Shot, ShotInput, State, retrofit
from lct_core.engine.scene import with_dummy_video
from lct_core.testing.conformance import conformance
from lct_core.testing.definition import definition
from lct_core.testing.strategies import layouts, levels, shots
from lct_core.testing.tolerances import BOUNDS, error
from tests.toys import CROSS, TOYS, Toy, ToyBackbone, toy

FLOAT32 = BOUNDS[torch.float32]
SCHEMES = ("anchored", "paper")
PATTERNS = ("bidirectional", "context_causal")
small = partial(layouts, max_grid=(2, 2, 3), text_first=True)
one_scene = partial(small, max_scenes=1, max_shots=4)


def adapters():
    return {"MMDiT": lambda: MMDiTBackbone(tiny()), **{name: partial(toy, **config) for name, config in TOYS.items()}}


CASES = [pytest.param(make, id=name) for name, make in adapters().items()]
ADAPTERS = pytest.mark.parametrize("make", CASES)
JOINT = pytest.mark.parametrize("make", [case for case in CASES if case.values[0]().traits.text == "joint"])


def scope(adapter):
    return getattr(adapter, "scope", "own")


def retrofitted(adapter, **options):
    return retrofit(adapter.model, backbone=adapter, **{"text": scope(adapter), **options})


@pytest.fixture(scope="module", params=SCHEMES)
def model(request):
    return retrofit(tiny(), scheme=request.param)


@pytest.fixture
def fresh():
    return retrofit(tiny())


def draw(adapter, layout, *, batch=1, seed=0):
    """Inputs of a row's scenes, one list per scene; the dummy videos of global shots are left to the engine."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            ShotInput(text=given.text, role="global") if shot.role == "global" else given
            for shot in scene
            for given in [adapter.example(shot, batch=batch, generator=generator, dtype=torch.float32)]
        ]
        for scene in layout.scenes
    ]


def suited(adapter, layout):
    """The layout that a model takes: where it cross-attends text, prompts are without video, or not there."""
    if adapter.traits.text == "joint":
        return layout
    bare = [[replace(s, grid=(0, 0, 0)) if s.role == "global" else s for s in scene] for scene in layout.scenes]
    return Layout([[s for s in scene if s.role != "global" or scope(adapter) != "own"] for scene in bare])


def with_zeros(scenes):
    """The same with every dummy video given, as the definition needs it: one frame of zeros."""
    return [
        [
            replace(shot, latents=torch.zeros_like(scene[1].latents[:, :, :1])) if shot.role == "global" else shot
            for shot in scene
        ]
        for scene in scenes
    ]


def alone_too(adapter, scenes):
    """The same in the form in which a global shot can stand alone in a call."""
    return with_zeros(scenes) if adapter.traits.text == "joint" else scenes


def random_levels(layout, *, batch=1, seed=0):
    t = torch.rand(batch, layout.num_shots, generator=torch.Generator().manual_seed(seed))
    t[:, [i for i, shot in enumerate(layout.shots) if shot.role == "global"]] = 0
    return t


def worst(got, expected):
    """The largest error of the shots that have an output; which have one must agree."""
    pairs = list(zip(got, expected, strict=True))
    assert [g is None for g, _ in pairs] == [x is None for _, x in pairs]
    return max(error(g, x) for g, x in pairs if x is not None)


def flat(scenes):
    return [shot for scene in scenes for shot in scene]


def shot_by_shot(model, scene, t, *, pattern="context_causal", cache=None, sizes=None):
    """Several calls with a cache, each of some of the scene's shots."""
    cache, outputs = KVCache() if cache is None else cache, []
    for start, stop in pairwise(accumulate(sizes or [1] * len(scene), initial=0)):
        outputs += model(scene[start:stop], t[:, start:stop], pattern=pattern, cache=cache)
        cache.append(*range(start, stop))
    return outputs


# The invariants, on layouts of every kind.


@given(shot=shots(max_grid=(3, 3, 3)), seed=st.integers(0, 99), t=st.floats(0, 1, width=32))
@torch.no_grad()
def test_one_shot_is_the_base_model_to_the_last_bit(shot, seed, t):
    base, model = tiny(), retrofit(tiny())
    (scene,) = draw(model.adapter, Layout([[shot]]), batch=2, seed=seed)
    t = torch.tensor([t])
    (out,) = model(scene, t)
    assert torch.equal(out, base(scene[0].latents, (1000 * t).expand(2), scene[0].text))


@given(data=st.data(), layout=small(), pattern=st.sampled_from(PATTERNS))
@torch.no_grad()
def test_equals_the_definition(model, data, layout, pattern):
    t, scenes = data.draw(levels(layout)), draw(model.adapter, layout)
    got = flat(model(scenes, t, pattern=pattern))
    truth = definition(model.adapter, with_zeros(scenes), t, scheme=model.scheme, pattern=pattern)
    expected = [None if shot.role == "global" else x for shot, x in zip(layout.shots, truth, strict=True)]
    if all(x is None for x in expected):
        return
    assert worst(got, expected) <= FLOAT32["definition"].absolute
    for shot, out in zip(flat(scenes), got, strict=True):
        assert out is None if shot.role == "global" else out.shape == shot.latents.shape


@given(data=st.data(), layout=one_scene())
@torch.no_grad()
def test_a_shot_does_not_depend_on_later_shots(model, data, layout):
    first = 1 + (layout.shots[0].role == "global")
    keep = data.draw(st.integers(first, layout.num_shots))
    t, (scene,) = random_levels(layout), draw(model.adapter, layout)
    full = model(scene, t, pattern="context_causal")
    (others,) = draw(model.adapter, layout, seed=1)
    changed = model(scene[:keep] + others[keep:], t, pattern="context_causal")
    absent = model(scene[:keep], t[:, :keep], pattern="context_causal")
    assert worst([*changed[:keep], *absent], [*full[:keep], *full[:keep]]) == FLOAT32["causal"].absolute == 0


@given(data=st.data(), layout=one_scene(with_global=False))
@torch.no_grad()
def test_cached_equals_uncached(model, data, layout):
    cuts = data.draw(st.lists(st.booleans(), min_size=layout.num_shots - 1, max_size=layout.num_shots - 1))
    ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [layout.num_shots]
    sizes = [stop - start for start, stop in pairwise([0, *ends])]
    t, (scene,) = random_levels(layout, batch=2), draw(model.adapter, layout, batch=2)
    full = model(scene, t, pattern="context_causal")
    assert worst(shot_by_shot(model, scene, t, sizes=sizes), full) <= FLOAT32["cached"].absolute


@given(layout=small(), pattern=st.sampled_from(PATTERNS))
@torch.no_grad()
def test_packing_changes_no_scene(model, layout, pattern):
    t, scenes = random_levels(layout), draw(model.adapter, layout)
    row = model(scenes, t, pattern=pattern)
    assert [len(out) for out in row] == [len(scene) for scene in scenes]
    for scene, places, together in zip(scenes, layout.scene_shots, row, strict=True):
        alone = model(scene, t[:, list(places)], pattern=pattern)
        assert worst(together, alone) == FLOAT32["packed"].absolute == 0


@given(layout=small(), pattern=st.sampled_from(PATTERNS), steps=st.integers(-1000, 100_000))
@torch.no_grad()
def test_moving_a_whole_scene_changes_nothing(model, layout, pattern, steps):
    moved = copy.copy(model.adapter)
    moved.rope = lambda coords: model.adapter.rope(coords + steps)
    t, scenes = random_levels(layout), draw(model.adapter, layout)
    got, expected = (flat(m(scenes, t, pattern=pattern)) for m in (retrofitted(moved, scheme=model.scheme), model))
    assert worst(got, expected) <= FLOAT32["shifted"].absolute


# Adapters of other kinds.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in TOYS.items()])
def test_toys_conform(config, scheme, dtype):
    broken = [
        finding
        for finding in conformance(partial(toy, **config), schemes=[scheme], dtypes=[dtype])
        if not finding.holds
    ]
    assert not broken


WITH_GLOBALS = Layout(
    [
        [Shot(4, (1, 2, 3), role="global"), Shot(2, (2, 2, 3)), Shot(1, (1, 1, 1)), Shot(5, (1, 3, 2))],
        [Shot(3, (2, 1, 2))],
        [Shot(1, (1, 1, 2), role="global"), Shot(2, (1, 1, 2))],
    ]
)


@ADAPTERS
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_scenes_with_global_shots_equal_the_definition(make, scheme, pattern):
    adapter = make()
    layout = suited(adapter, WITH_GLOBALS)
    t, scenes = random_levels(layout, batch=2), draw(adapter, layout, batch=2)
    got = flat(retrofitted(adapter, scheme=scheme)(scenes, t, pattern=pattern))
    truth = definition(adapter, with_zeros(scenes), t, scheme=scheme, pattern=pattern, text=scope(adapter))
    assert [out is None for out in got] == [shot.role == "global" for shot in layout.shots]
    bound = FLOAT32["definition"].absolute
    assert max(error(out, x) for out, x in zip(got, truth, strict=True) if out is not None) <= bound


@ADAPTERS
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_cached_global_shot_equals_an_uncached_one(make, scheme):
    adapter = make()
    model = retrofitted(adapter, scheme=scheme)
    layout = suited(adapter, Layout(WITH_GLOBALS.scenes[:1]))
    t, (scene,) = random_levels(layout), alone_too(adapter, draw(adapter, layout))
    full = model(scene, t, pattern="context_causal")
    assert worst(shot_by_shot(model, scene, t), full) <= FLOAT32["cached"].absolute


@ADAPTERS
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_cached_history_moves_in_the_adapters_own_units(make, scheme):
    """Moved as one with the shot that follows, it changes nothing; moved against it, it does, where there is RoPE."""
    adapter = make()
    model = retrofitted(adapter, scheme=scheme)
    layout = Layout([[Shot(2, (2, 2, 2)), Shot(1, (1, 1, 3)), Shot(3, (1, 2, 2))]])
    (scene,), t, cache = draw(adapter, layout), random_levels(layout), KVCache()
    shot_by_shot(model, scene[:2], t, cache=cache)
    (before,) = model(scene[2:], t[:, 2:], cache=cache)
    cache.reposition([entry.origin + 100 for entry in cache.shots])
    (after,) = model(scene[2:], t[:, 2:], cache=cache)
    assert error(after, before) <= FLOAT32["shifted"].absolute
    cache.reposition([entry.origin + 7 * i for i, entry in enumerate(reversed(cache.shots))])
    (apart,) = model(scene[2:], t[:, 2:], cache=cache)
    assert (error(apart, before) > 1e-4) == (adapter.traits.pairing is not None)


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
def test_a_prompt_alone_in_a_call_is_written_and_takes_no_place(text, scheme):
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
def test_a_shot_without_text_needs_a_global_prompt_to_cross_attend():
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


# What an adapter may take or refuse.


@torch.no_grad()
def test_streams_that_only_one_site_changes_are_kept():
    class Counts(ToyBackbone):
        def encode(self, inputs, timestep):
            state = super().encode(inputs, timestep)
            return State({**state.streams, "first": torch.zeros(1), "second": torch.zeros(1)}, state.conditioning)

        def finish(self, block, site, state, attended, aux):
            count = "first" if site.name == "self" else "second"
            return {**super().finish(block, site, state, attended, aux), count: state.streams[count] + 1}

        def head(self, state):
            seen.append((state.streams["first"].item(), state.streams["second"].item()))
            return super().head(state)

    seen = []
    adapter = Counts(Toy(second="own_shot"))
    (scene,) = draw(adapter, Layout([[Shot(1, (1, 1, 2)), Shot(2, (1, 1, 1))]]))
    retrofitted(adapter)(scene, torch.tensor([0.5, 0.5]))
    assert seen == [(2, 2), (2, 2)]  # once in each of two blocks, for each of two shots


@torch.no_grad()
def test_extras_reach_their_shot():
    adapter = toy()
    (scene,) = draw(adapter, Layout([[Shot(1, (1, 2, 2)), Shot(2, (1, 1, 1))]]))
    strong = replace(scene[1], extras={"strength": torch.tensor([2.0])})
    model, t = retrofitted(adapter), torch.tensor([0.3, 0.6])
    plain, changed = (model([scene[0], second], t, pattern="own_shot") for second in (scene[1], strong))
    assert torch.equal(plain[0], changed[0])
    assert not torch.equal(plain[1], changed[1])
    (alone,) = model([strong], t[1:])
    assert torch.equal(alone, adapter.model(strong.latents, 1 - t[1:], strong.text, strength=torch.tensor([2.0])))


# The face.


@torch.no_grad()
def test_outputs_are_nested_like_shots(fresh):
    scenes = draw(fresh.adapter, WITH_GLOBALS, batch=2)
    t = random_levels(WITH_GLOBALS, batch=2)
    row = fresh(scenes, t)
    assert [[None if x is None else x.shape for x in scene] for scene in row] == [
        [None if shot.role == "global" else shot.latents.shape for shot in scene] for scene in scenes
    ]
    one = fresh(tuple(scenes[0]), t[:, :4])  # one scene: one list, whatever kind of sequence it is
    assert one[0] is None
    assert all(torch.equal(a, b) for a, b in zip(one[1:], row[0][1:], strict=True))
    (nested,) = fresh([scenes[0]], t[:, :4])
    assert all(torch.equal(a, b) for a, b in zip(nested[1:], one[1:], strict=True))


@torch.no_grad()
def test_a_level_for_all_entries_is_a_level_for_each(fresh):
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (1, 1, 3))]])
    (scene,) = draw(fresh.adapter, layout, batch=3)
    t = torch.tensor([0.25, 0.75])
    for a, b in zip(fresh(scene, t), fresh(scene, t.expand(3, 2)), strict=True):
        assert torch.equal(a, b)


@ADAPTERS
@torch.no_grad()
def test_every_entry_of_a_batch_has_its_own_levels(make):
    adapter = make()
    model = retrofitted(adapter)
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (2, 1, 1))]])
    (scene,), t = draw(adapter, layout, batch=3), random_levels(layout, batch=3)
    together = model(scene, t)
    for entry in range(3):
        alone = [
            ShotInput(
                latents=s.latents[entry, None],
                text=s.text[entry, None],
                extras={name: x[entry, None] for name, x in s.extras.items()},
            )
            for s in scene
        ]
        got = [out[entry, None] for out in together]
        assert worst(got, model(alone, t[entry])) <= FLOAT32["definition"].absolute


@torch.no_grad()
def test_levels_map_to_the_models_own_timesteps(fresh):
    seen = []
    fresh.adapter.encode = lambda inputs, timestep, encode=fresh.adapter.encode: (
        seen.append(timestep),
        encode(inputs, timestep),
    )[1]
    (scene,) = draw(fresh.adapter, Layout([[Shot(1, (1, 1, 1)), Shot(1, (1, 1, 1))]]), batch=2)
    t = torch.tensor([[0.0, 1.0], [0.25, 0.5]])
    fresh(scene, t)
    assert torch.equal(torch.stack(seen, 1), 1000 * t)
    seen.clear()
    coarse = torch.full((2, 2), 0.7).bfloat16()
    fresh(scene, coarse)  # a level in bfloat16 is scaled in float32, not rounded again
    assert torch.equal(torch.stack(seen, 1), 1000 * coarse.float())


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
def test_an_ordinary_shot_of_zeros_would_be_the_same_to_the_others(fresh):
    """The global prompt is 'a normal text-video pair' (paper, 3.2.2): only its output is missing."""
    layout = Layout([[Shot(3, (1, 2, 2), role="global"), Shot(1, (2, 2, 2))]])
    (scene,), t = draw(fresh.adapter, layout), random_levels(layout)
    ordinary = ShotInput(latents=torch.zeros_like(scene[1].latents[:, :, :1]), text=scene[0].text)
    assert torch.equal(fresh(scene, t)[1], fresh([ordinary, scene[1]], t)[1])


# The model itself.


def test_the_models_own_forward_is_untouched(fresh):
    base = tiny()
    signature = inspect.signature(base.forward)
    (scene,) = draw(fresh.adapter, Layout([[Shot(2, (2, 1, 2))]]), batch=2)
    arguments = {"latents": scene[0].latents, "timestep": torch.tensor([10.0, 900.0]), "text": scene[0].text}
    assert torch.equal(fresh.backbone(**arguments), base(*arguments.values()))
    assert list(fresh.backbone.state_dict()) == list(base.state_dict())
    for model in (fresh.backbone, copy.deepcopy(fresh.backbone)):
        assert inspect.signature(model.forward) == signature
        for block, original in zip(model.blocks, base.blocks, strict=True):
            assert inspect.signature(block.forward) == inspect.signature(original.forward)


def test_names_the_model():
    base = tiny()
    model = lct.retrofit(base, scheme="anchored", kernel="auto")
    assert model.backbone is base
    assert isinstance(model.adapter, MMDiTBackbone)
    assert (model.scheme, model.kernel, model.gradient_checkpointing) == ("anchored", "auto", False)
    assert lct.retrofit(base, backbone="mmdit").backbone is base


@torch.no_grad()
def test_retrofit_twice_makes_two_engines_of_one_model():
    base = tiny()
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (1, 1, 2))]])
    (scene,), t = draw(MMDiTBackbone(base), layout), random_levels(layout)
    expected = [retrofit(tiny(), scheme=scheme)(scene, t) for scheme in SCHEMES]
    models = [retrofit(base, scheme=scheme) for scheme in SCHEMES]
    keys = list(base.state_dict())
    for model, outputs in zip(models, expected, strict=True):
        assert model.backbone is base
        assert all(torch.equal(a, b) for a, b in zip(model(scene, t), outputs, strict=True))
    assert keys == list(tiny().state_dict())
    assert not torch.equal(expected[0][1], expected[1][1])


@pytest.mark.internals
@torch.no_grad()
def test_a_deep_copy_of_the_backbone_alone_can_be_retrofitted(fresh):
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (1, 1, 2))]])
    (scene,), t = draw(fresh.adapter, layout), random_levels(layout)
    expected = fresh(scene, t)
    twin = retrofit(copy.deepcopy(fresh.backbone))
    for parameter in fresh.backbone.parameters():
        parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(twin(scene, t), expected, strict=True))
    base = scene[0].latents, 1000 * t[:, 0], scene[0].text
    assert torch.equal(twin.backbone(*base), tiny()(*base))


@torch.no_grad()
def test_weights_go_into_a_fresh_model_through_a_file(fresh):
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (1, 1, 2))]])
    (scene,), t = draw(fresh.adapter, layout), random_levels(layout)
    for parameter in fresh.backbone.parameters():
        parameter.add_(0.01)
    file = io.BytesIO()
    torch.save(fresh.backbone.state_dict(), file)
    file.seek(0)
    other = tiny()
    assert not torch.equal(retrofit(other)(scene, t)[0], fresh(scene, t)[0])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(retrofit(other)(scene, t), fresh(scene, t), strict=True))


@ADAPTERS
@torch.no_grad()
def test_everything_runs_inside_the_modules_own_call(make):
    """Else the hooks of sharding and offload would fire at the wrong time, or never."""
    adapter = make()
    model = retrofitted(adapter)
    inside, calls = set(), []
    for module in (model.backbone, *adapter.blocks):
        module.register_forward_pre_hook(lambda module, args: inside.add(module))
        module.register_forward_hook(lambda module, args, output: calls.append(module))
        module.register_forward_hook(lambda module, args, output: inside.discard(module))

    def watched(method, needed):
        def call(*args):
            assert model.backbone in inside
            assert needed != "block" or args[0] in inside
            return method(*args)

        return call

    for name, needed in {
        "encode": "model",
        "qkv": "block",
        "finish": "block",
        "head": "model",
        "unpatchify": "model",
    }.items():
        setattr(adapter, name, watched(getattr(adapter, name), needed))
    layout = Layout([[Shot(1, (1, 1, 2)), Shot(2, (1, 1, 1)), Shot(1, (2, 1, 1))]])
    (scene,) = draw(adapter, layout)
    for cache in (None, KVCache()):
        calls.clear()
        model(scene, random_levels(layout), cache=cache)
        assert calls == [*adapter.blocks, model.backbone]  # once, however many shots there are
        assert not inside


def test_a_replaced_forward_is_not_lost_in_silence():
    base = tiny()
    base.blocks[1].forward = base.blocks[1].forward
    with pytest.raises(ValueError, match=r"^model: this Block's forward was replaced on the instance.*retrofit first"):
        retrofit(base)


@torch.no_grad()
def test_a_hook_added_after_the_retrofit_stays():
    """Offloading libraries wrap forward on the instance, with functools.wraps."""
    from functools import wraps

    base, calls = tiny(), []
    retrofit(base)
    inner = base.blocks[0].forward

    @wraps(inner)
    def hooked(*args, **kwargs):
        calls.append(args)
        return inner(*args, **kwargs)

    base.blocks[0].forward = hooked
    model = retrofit(base, scheme="paper")
    layout = Layout([[Shot(1, (1, 1, 2)), Shot(2, (1, 1, 1))]])
    (scene,), t = draw(model.adapter, layout), random_levels(layout)
    got, expected = model(scene, t), retrofit(tiny(), scheme="paper")(scene, t)
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Shots of equal shape as a batch.

TWINS = Layout(
    [
        [
            Shot(4, (1, 2, 2), role="global"),
            Shot(4, (1, 2, 2)),  # as long as its global shot
            Shot(2, (2, 2, 3)),
            Shot(4, (2, 1, 2)),  # as many tokens on another grid
            Shot(2, (2, 2, 3)),
        ],
        [Shot(2, (2, 2, 3)), Shot(8, (2, 2, 3)), Shot(3, (1, 1, 1))],
        [Shot(4, (1, 1, 2), role="global"), Shot(4, (1, 1, 2)), Shot(2, (3, 2, 2))],
    ]
)
UNEQUAL = Layout([[Shot(2, (1, 2, 2)), Shot(3, (1, 2, 2))], [Shot(2, (2, 1, 1)), Shot(1, (1, 1, 1))]])


def alike(layout):
    """Shots with as many text and video tokens, by their indices in the row."""
    groups = {}
    for i, shot in enumerate(layout.shots):
        groups.setdefault((shot.text, shot.video), []).append(i)
    return list(groups.values())


def both_ways(make, **options):
    """The same model twice: its shots one by one, and in batches."""
    return [
        retrofitted(adapter, batch_shots=batched, **options) for adapter, batched in ((make(), False), (make(), True))
    ]


@ADAPTERS
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_a_batch_of_shots_equals_them_one_by_one(make, scheme, pattern):
    one_by_one, batched = both_ways(make, scheme=scheme)
    layout = suited(batched.adapter, TWINS)
    t, scenes = random_levels(layout, batch=2), draw(batched.adapter, layout, batch=2)
    got, expected = (model(scenes, t, pattern=pattern) for model in (batched, one_by_one))
    assert [len(outs) for outs in got] == [len(outs) for outs in expected] == [len(scene) for scene in layout.scenes]
    assert worst(flat(got), flat(expected)) <= FLOAT32["batched"].absolute
    for shot, out in zip(flat(scenes), flat(got), strict=True):
        assert out is None if shot.role == "global" else out.shape == shot.latents.shape


@given(data=st.data(), layout=small(), pattern=st.sampled_from(PATTERNS))
@torch.no_grad()
def test_any_row_in_batches_equals_it_one_by_one(model, data, layout, pattern):
    batched = retrofit(model.backbone, scheme=model.scheme, batch_shots=True)
    t, scenes = data.draw(levels(layout)), draw(model.adapter, layout)
    got, expected = (flat(m(scenes, t, pattern=pattern)) for m in (batched, model))
    if all(out is None for out in expected):
        return
    assert worst(got, expected) <= FLOAT32["batched"].absolute
    if len(alike(layout)) == layout.num_shots:
        assert worst(got, expected) == 0


@ADAPTERS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_batch_of_shots(make, checkpointing):
    one_by_one, batched = both_ways(make)
    batched.gradient_checkpointing = checkpointing
    layout = suited(batched.adapter, TWINS)
    t, scenes = random_levels(layout, batch=2), draw(batched.adapter, layout, batch=2)
    expected, got = (gradients(model, scenes, t, "context_causal") for model in (one_by_one, batched))
    assert got.keys() == expected.keys()
    together = [torch.cat([gradient.flatten() for gradient in of.values()]) for of in (got, expected)]
    assert error(*together) <= FLOAT32["batched"].absolute  # alone, those that should be 0 have no size to compare to


@ADAPTERS
@pytest.mark.parametrize("ends", [[1, 2, 3, 4], [2], [1], [3, 4]])
@torch.no_grad()
def test_a_batch_of_shots_with_a_cache(make, ends):
    """Equal shots in one call or in several, the same is written into the cache and read from it."""
    one_by_one, batched = both_ways(make)
    layout = suited(batched.adapter, Layout(TWINS.scenes[:1]))
    t, (scene,) = random_levels(layout, batch=2), alone_too(batched.adapter, draw(batched.adapter, layout, batch=2))
    sizes = [stop - start for start, stop in pairwise(sorted({0, *ends, len(scene)}))]
    full = one_by_one(scene, t, pattern="context_causal")
    caches = KVCache(), KVCache()
    expected, got = (
        shot_by_shot(model, scene, t, cache=cache, sizes=sizes)
        for model, cache in zip((one_by_one, batched), caches, strict=True)
    )
    assert worst(got, expected) <= FLOAT32["batched"].absolute
    assert worst(got, full) <= FLOAT32["batched"].absolute
    assert caches[0].nbytes == caches[1].nbytes
    assert [entry.origin for entry in caches[0].shots] == [entry.origin for entry in caches[1].shots]


@ADAPTERS
@torch.no_grad()
def test_one_shot_is_the_base_model_to_the_last_bit_also_with_batches(make):
    base, (_, model) = make(), both_ways(make)
    for shot in (Shot(3, (2, 2, 3)), Shot(1, (1, 1, 1))):
        t, (scene,) = torch.tensor([0.3]), draw(base, Layout([[shot]]), batch=2)
        expected = base.single_shot(scene[0], base.traits.timestep(t).expand(2))
        assert torch.equal(model(scene, t)[0], expected)
        assert torch.equal(model([scene], t)[0][0], expected)


@ADAPTERS
@torch.no_grad()
def test_shots_that_are_not_alike_run_one_by_one_to_the_last_bit(make):
    one_by_one, batched = both_ways(make)
    t, scenes = random_levels(UNEQUAL, batch=2), draw(batched.adapter, UNEQUAL, batch=2)
    got, expected = (flat(model(scenes, t)) for model in (batched, one_by_one))
    assert worst(got, expected) == 0


@ADAPTERS
@pytest.mark.parametrize("layout", [TWINS, UNEQUAL, Layout(TWINS.scenes[1:2])])
@torch.no_grad()
def test_a_block_is_run_once_for_all_shots_that_are_alike(make, layout):
    def watched(calls, name, run):
        def call(block, site, state, *rest):
            calls.append((name, block, site.name, len(next(iter(state.streams.values())))))
            return run(block, site, state, *rest)

        return call

    for model in both_ways(make):
        calls, adapter = [], model.adapter
        layout = suited(adapter, layout)
        for name in ("qkv", "finish"):
            setattr(adapter, name, watched(calls, name, getattr(adapter, name)))
        model(draw(adapter, layout, batch=2), random_levels(layout, batch=2))
        groups = alike(layout) if model.batch_shots else [[i] for i in range(layout.num_shots)]
        assert calls == [
            (name, block, site.name, 2 * len(group))
            for block in adapter.blocks
            for site in adapter.sites(block)
            for name in ("qkv", "finish")
            for group in groups
        ]
    assert len(alike(TWINS)) == 5
    assert len(alike(UNEQUAL)) == UNEQUAL.num_shots


def test_shots_run_one_by_one_by_default():
    assert not retrofit(tiny()).batch_shots


# What lies between two attentions, compiled.


LARGER = Layout([[Shot(3, (0, 0, 0), role="global"), Shot(2, (2, 2, 2)), Shot(4, (1, 2, 3))]])


@pytest.mark.internals
@torch.no_grad()
def test_a_compiled_model_equals_it_uncompiled():
    torch.compiler.reset()
    plain, compiled = (retrofitted(toy(**CROSS, scope="all"), compile=on) for on in (False, True))
    t, (scene,) = random_levels(LARGER, batch=2), draw(plain.adapter, LARGER, batch=2)
    got, expected = (model(scene, t, pattern="context_causal") for model in (compiled, plain))
    assert worst(got, expected) <= FLOAT32["compiled"].absolute
    cached = shot_by_shot(compiled, scene, t)
    assert worst(cached, expected) <= FLOAT32["compiled"].absolute + FLOAT32["cached"].absolute


@pytest.mark.internals
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
def test_gradients_of_a_compiled_model():
    torch.compiler.reset()
    plain, compiled = (retrofitted(toy(), compile=on, gradient_checkpointing=on) for on in (False, True))
    layout = Layout([LARGER.scenes[0][1:]])
    t, (scene,) = random_levels(layout), draw(plain.adapter, layout)
    expected, got = (gradients(model, scene, t, "context_causal") for model in (plain, compiled))
    together = [torch.cat([gradient.flatten() for gradient in of.values()]) for of in (got, expected)]
    assert error(*together) <= FLOAT32["compiled"].absolute


@pytest.mark.internals
@torch.no_grad()
def test_all_blocks_share_what_is_compiled(monkeypatch):
    """Else a deep model would take minutes to compile, and run into torch's limit of graphs for one function."""
    layout, made = Layout([[Shot(3, (2, 2, 2))]]), []
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    for depth in (2, 4):
        torch.compiler.reset()
        lct.scene_model._compiled.cache_clear()
        torch._dynamo.utils.counters.clear()
        model = retrofitted(toy(**CROSS, depth=depth), compile=True)
        (scene,) = draw(model.adapter, layout)
        model(scene, torch.tensor([0.5]))
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    lct.scene_model._compiled.cache_clear()
    # A block is four graphs: what comes before and after each of its two attentions. Before torch 2.15, two of the
    # second block's are made once more, and serve all that follow.
    assert made[0] == made[1] < 2 * 4


@pytest.mark.internals
def test_a_compiled_model_can_be_copied_and_pickled():
    model = retrofit(tiny(), compile=True)
    assert copy.deepcopy(model).compile
    assert pickle.loads(pickle.dumps(model)).compile
    assert not retrofit(tiny()).compile


# Training.


def gradients(model, scenes, t, pattern):
    model.backbone.zero_grad()
    outs = model(scenes, t, pattern=pattern)
    outs = flat(outs) if isinstance(outs[0], list) else outs
    sum(out.square().mean() for out in outs if out is not None).backward()
    return {name: p.grad for name, p in model.backbone.named_parameters()}


def saved_bytes(model, scene, t):
    """Bytes of activations that autograd keeps, each memory once."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(scene, t)
    del out
    return sum(kept.values())


@pytest.mark.internals
@ADAPTERS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_checkpointing_changes_memory_and_no_gradient(make, pattern):
    plain = make()
    least = 0 if plain.traits.text == "joint" else 1
    layout = Layout([[Shot(2, (1, 2, 3), role="global"), Shot(3, (2, 2, 3)), Shot(least, (1, 1, 1))]])
    layout = suited(plain, layout)
    (scene,), t = draw(plain, layout, batch=2), random_levels(layout, batch=2)
    model = retrofitted(plain)
    checkpointed = make()
    saving = retrofitted(checkpointed, gradient_checkpointing=True)
    a, b = gradients(model, scene, t, pattern), gradients(saving, scene, t, pattern)
    for name, gradient in a.items():
        assert gradient is not None
        assert error(b[name], gradient) <= FLOAT32["checkpointed"].absolute
    assert saved_bytes(saving, scene, t) < saved_bytes(model, scene, t) / 2


@pytest.mark.internals
def test_checkpointing_recomputes_every_block_once():
    adapter = MMDiTBackbone(tiny())
    calls = []
    qkv = adapter.qkv
    adapter.qkv = lambda block, site, state: (calls.append(block), qkv(block, site, state))[1]
    model = retrofitted(adapter, gradient_checkpointing=True)
    (scene,) = draw(adapter, Layout([[Shot(1, (1, 1, 2))]]))
    (out,) = model(scene, torch.tensor([0.5]))
    assert calls == adapter.blocks
    out.sum().backward()
    assert calls == [*adapter.blocks, *reversed(adapter.blocks)]


def test_gradients_equal_the_definitions(model):
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (2, 1, 1))], [Shot(1, (1, 1, 2)), Shot(0, (1, 1, 1))]])
    scenes, t = draw(model.adapter, layout), random_levels(layout)
    results = []
    for run in (
        lambda: flat(model(scenes, t, pattern="context_causal")),
        lambda: definition(model.adapter, scenes, t, scheme=model.scheme, pattern="context_causal"),
    ):
        model.backbone.zero_grad()
        sum(out.square().mean() for out in run()).backward()
        results.append(torch.cat([p.grad.flatten() for p in model.backbone.parameters()]))
    model.backbone.zero_grad()
    assert error(*results) <= FLOAT32["definition"].absolute


# Autocast.


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@ADAPTERS
@torch.no_grad()
def test_one_shot_equals_the_base_model_under_autocast(make):
    adapter, base = make(), make()
    model = retrofitted(adapter)
    layout = Layout([[Shot(3, (2, 2, 2))]])
    (scene,), t = draw(adapter, layout, batch=2), random_levels(layout, batch=2)
    clean, noise = adapter.traits.timesteps
    with autocast():
        (out,) = model(scene, t)
        expected = base.single_shot(scene[0], clean + (noise - clean) * t[:, 0])
    assert out.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@torch.no_grad()
def test_autocast_leaves_float64_alone():
    adapter, base = toy(pairing=None), toy(pairing=None)
    for a in (adapter, base):
        a.model.double()
    generator = torch.Generator().manual_seed(0)
    shot = adapter.example(Shot(3, (2, 2, 2)), batch=1, generator=generator, dtype=torch.float64)
    with autocast():
        (out,) = retrofitted(adapter)([shot], torch.tensor([0.5], dtype=torch.float64))
        expected = base.single_shot(shot, torch.tensor([0.5], dtype=torch.float64))
    assert out.dtype == torch.float64
    assert error(out, expected) <= FLOAT32["definition"].absolute  # in bfloat16 it would be a thousand times that


@ADAPTERS
@torch.no_grad()
def test_autocast_with_a_cache(make):
    adapter = make()
    model = retrofitted(adapter)
    layout = Layout([[Shot(3, (2, 2, 2)), Shot(1, (1, 1, 2)), Shot(2, (1, 2, 1))]])
    (scene,), t = draw(adapter, layout), random_levels(layout)
    truth = model(scene, t, pattern="context_causal")
    cache, exact = KVCache(), KVCache()
    shot_by_shot(model, scene, t, cache=exact)
    with autocast():
        full = model(scene, t, pattern="context_causal")
        cached = shot_by_shot(model, scene, t, cache=cache)
    own = worst(full, truth)
    assert 0 < own < 0.1
    assert worst(cached, full) <= BOUNDS[torch.bfloat16]["cached"].given(own)
    assert 2 * cache.nbytes == exact.nbytes  # the cache holds what attention takes: two bytes, not four


@torch.no_grad()
def test_angles_stay_exact_under_autocast():
    """Angles in float32, as HunyuanVideo has them, would be rounded to bfloat16 by an autocast matmul."""
    adapter = toy(angle_dtype=torch.float32)
    seen, rope = [], adapter.rope

    def watched(coords):
        angles = rope(coords)
        seen.append((coords, angles))
        return angles

    adapter.rope = watched
    model = retrofitted(adapter)
    layout = Layout([[Shot(3, (2, 2, 2)), Shot(1, (1, 1, 2))]])
    (scene,), t = draw(adapter, layout), random_levels(layout)
    with autocast():
        shot_by_shot(model, scene, t)
    assert any(coords.shape == (1, 3) for coords, _ in seen)  # one step along the diagonal, for the cache
    for coords, angles in seen:
        assert angles.dtype == torch.float32
        assert torch.equal(angles, rope(coords))


@torch.no_grad()
def test_a_float64_model_rotates_in_float64():
    adapter = MMDiTBackbone(tiny().double())
    generator, counts = torch.Generator().manual_seed(0), [Shot(2, (1, 2, 2)), Shot(1, (2, 1, 1))]
    scene = [adapter.example(shot, batch=1, generator=generator, dtype=torch.float64) for shot in counts]
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)
    truth = definition(adapter, [scene], t, scheme="anchored", pattern="bidirectional")
    assert worst(retrofitted(adapter)(scene, t), truth) <= FLOAT32["definition"].absolute ** 2  # twice as many digits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rotation_is_in_float32_whatever_the_models_dtype(monkeypatch, dtype):
    seen, rotate = [], lct.backbone.rotate
    monkeypatch.setattr("lct_core.backbone.rotate", lambda x, by: (seen.append(by), rotate(x, by))[1])
    adapter = MMDiTBackbone(tiny().to(dtype))
    shot = adapter.example(Shot(1, (1, 1, 2)), batch=1, generator=torch.Generator(), dtype=dtype)
    (out,) = retrofitted(adapter)([shot], torch.tensor([0.5]))
    assert out.dtype == dtype
    assert {by.cos.dtype for by in seen} == {by.sin.dtype for by in seen} == {torch.float32}


# What is refused.


def given_shot(channels=4, size=(1, 2, 2), text=(1, 3, 16), **options):
    text = torch.zeros(text) if isinstance(text, tuple) else text
    return ShotInput(latents=torch.zeros(len(text) if text is not None else 1, channels, *size), text=text, **options)


@pytest.mark.parametrize(
    ("shots", "t", "message"),
    [
        ([], [0.5], r"^shots: got \[\], expected one scene"),
        ([[]], [0.5], r"^shots: got \[\[\]\], expected one scene"),
        ([[given_shot()], []], [0.5], r"^shots: got \[\[ShotInput\], \[\]\], .*none of them empty"),
        ([given_shot(), [given_shot()]], [0.5, 0.5], r"^shots: got \[ShotInput, \[ShotInput\]\], expected one scene"),
        (torch.zeros(1, 4, 1, 2, 2), [0.5], r"^shots: got Tensor, expected one scene, a sequence of ShotInput"),
        (
            [given_shot(channels=5)],
            [0.5],
            r"^latents: got \[1, 5, 1, 2, 2\], expected \[batch, 4, frames, height, width\]",
        ),
        (
            [ShotInput(latents=torch.zeros(4, 1, 2, 2), text=torch.zeros(1, 3, 16))],
            [0.5],
            r"^latents: got \[4, 1, 2, 2\]",
        ),
        ([ShotInput(latents=None, text=torch.zeros(1, 3, 16))], [0.5], "^latents: got None, expected"),
        (
            [given_shot(size=(1, 3, 2))],
            [0.5],
            r"^latents: got frames, height, width \(1, 3, 2\), expected positive multiples",
        ),
        (
            [given_shot(size=(0, 2, 2))],
            [0.5],
            r"^latents: .*\(0, 2, 2\), expected positive multiples of the patch \(1, 2, 2\)",
        ),
        ([given_shot(text=None)], [0.5], "^text: got None, expected a floating-point tensor"),
        ([given_shot(text=(1, 3, 15))], [0.5], r"^text: got \[1, 3, 15\], expected \[1, tokens, 16\]"),
        (
            [ShotInput(latents=torch.zeros(2, 4, 1, 2, 2), text=torch.zeros(1, 3, 16))],
            [0.5],
            r"^text: got \[1, 3, 16\], expected \[2, tokens, 16\]: one encoded prompt for every entry",
        ),
        ([given_shot(extras={"size": 1})], [0.5], r"^extras: got \['size'\], which MMDiT does not take; it takes none"),
        ([given_shot(role="dummy")], [0.5], r"^role: got 'dummy', expected"),
        (
            [given_shot(), given_shot(text=(2, 3, 16))],
            [0.5, 0.5],
            r"^shots: shot 1 has a batch of 2, expected 1 like the first",
        ),
        ([given_shot(), given_shot(role="global")], [0.5, 0.0], r"^scenes: shot 1 of scene 0 .* is global"),
        (
            [ShotInput(text=torch.zeros(1, 3, 16), role="global")],
            [0.0],
            "^shots: a global shot without latents needs a shot with latents",
        ),
        (
            [ShotInput(text=torch.zeros(1, 3, 16), role="global"), given_shot()],
            [0.5, 0.5],
            r"^t: got \[0.5, 0.5\], expected 0 for a global shot",
        ),
        (
            [ShotInput(text=torch.zeros(2, 3, 16), role="global"), given_shot(text=(2, 3, 16))],
            [[0.0, 0.5], [0.5, 0.5]],
            r"^t: got .*expected 0 for a global shot",
        ),
        ([given_shot()], [0.5, 0.5], r"^t: got \[2\], expected floating-point noise levels \[1\] or \[1, 1\]"),
        ([given_shot()], [[0.5], [0.5]], r"^t: got \[2, 1\], expected floating-point noise levels \[1\] or \[1, 1\]"),
        ([given_shot()], 0.5, r"^t: got \[\], expected floating-point noise levels"),
        ([given_shot()], [1], r"^t: got \[1\], expected floating-point noise levels"),
        ([given_shot()], None, r"^t: got None, expected floating-point noise levels"),
        (
            [given_shot()],
            [500.0],
            r"^t: got levels from 500 to 500, expected \[0, 1\].*divide a 0-1000 timestep by 1000",
        ),
        ([given_shot()], [-0.1], r"^t: got levels from -0.1 to -0.1, expected \[0, 1\]"),
        ([given_shot()], [float("nan")], r"^t: got levels from nan to nan, expected \[0, 1\]"),
    ],
)
def test_refuses(fresh, shots, t, message):
    with pytest.raises(ValueError, match=message):
        fresh(shots, None if t is None else torch.tensor(t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": "causal"},
            r"^pattern: got 'causal', expected one of \['bidirectional', 'context_causal', 'own_shot'\]",
        ),
        (
            {"pattern": lambda layout: lct.bidirectional(Layout([[Shot(1, (1, 1, 1))]]))},
            "^plan: it has 2 queries and 2 keys",
        ),
        (
            {"pattern": lambda layout: lct.selected_history(layout, [])},
            "^history: got 0 entries, expected one for each",
        ),
    ],
)
def test_refuses_patterns(fresh, options, message):
    with pytest.raises(ValueError, match=message):
        fresh([given_shot()], torch.tensor([0.5]), **options)


def test_refuses_scenes_beside_one_another_with_a_cache(fresh):
    with pytest.raises(ValueError, match=r"^cache: got 2 scenes, expected one"):
        fresh([[given_shot()], [given_shot()]], torch.tensor([0.5, 0.5]), cache=KVCache())


def test_refuses_an_unknown_kernel():
    with pytest.raises(ValueError, match=r'^kernel: got \'none\', expected "auto" or one of \['):
        retrofit(tiny(), kernel="none")([given_shot()], torch.tensor([0.5]))


def test_retrofit_refuses():
    base = tiny()
    with pytest.raises(ValueError, match=r'^scheme: got \'mrope\', expected "paper"'):
        retrofit(base, scheme="mrope")
    with pytest.raises(ValueError, match=r"^backbone: this adapter adapts another model"):
        retrofit(base, backbone=MMDiTBackbone(tiny()))
    with pytest.raises(ValueError, match=r"^model: no backbone handles torch.nn.modules.linear.Linear"):
        retrofit(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^backbone: got 'none', expected one of \["):
        retrofit(base, backbone="none")
    assert "forward" not in vars(base)  # a refused model is left alone


class Fussy(ToyBackbone):
    """Cannot be served while it has reasons."""

    reasons = ()

    def refusals(self):
        return list(self.reasons)


def test_a_model_that_cannot_be_served_is_refused_with_every_reason():
    adapter = Fussy(Toy())
    adapter.reasons = ("its cache is on", "its LoRA is fused")
    message = "^model: this Toy cannot be served: its cache is on; its LoRA is fused$"
    with pytest.raises(ValueError, match=message):
        retrofitted(adapter)
    assert "forward" not in vars(adapter.model)
    adapter.reasons = ()
    model, (scene,) = retrofitted(adapter), draw(adapter, Layout([[Shot(1, (1, 1, 2))]]))
    before = model(scene, torch.tensor([0.5]))
    adapter.reasons = ("its cache is on", "its LoRA is fused")  # also where it was set up so after the retrofit
    with pytest.raises(ValueError, match=message):
        model(scene, torch.tensor([0.5]))
    adapter.reasons = ()
    assert worst(model(scene, torch.tensor([0.5])), before) == 0


def test_an_adapter_with_rope_must_give_angles():
    class Silent(ToyBackbone):
        rope = Backbone.rope

    with pytest.raises(NotImplementedError, match=r"^Silent.rope: traits.pairing is 'interleaved'"):
        retrofitted(Silent(Toy()))([given_shot(channels=3, text=(1, 3, 5))], torch.tensor([0.5]))


def test_a_subclass_of_a_known_model_is_handled():
    class Mine(MMDiT):
        pass

    assert isinstance(retrofit(Mine(channels=4, text_width=16, width=48, depth=1, heads=2)).adapter, MMDiTBackbone)
