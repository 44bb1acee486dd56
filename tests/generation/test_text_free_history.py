"""One text-free history for both branches of guidance."""

from dataclasses import replace

import pytest
import torch

from lct_core import Experts, Extra, KVCache, retrofit
from lct_core.generation import Director, Guidance, Take
from lct_core.testing.definition import definition
from lct_core.testing.tolerances import error
from tests.backbones.test_families import CASES, Scene
from tests.generation.definitions import (
    FLOAT32,
    cross_attending,
    draw,
    fresh,
    noised,
    of_toys,
    random,
    same,
    scene_model,
    told,
    width,
    worst,
)
from tests.generation.takes import SMALL, made
from tests.toys import CROSS, toy

STEPS = 2


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
def test_cross_attended_text_can_be_left_out():
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
    """Each step equals the definition, with a history written without any prompt, in half the memory."""
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
    with pytest.raises(ValueError, match=r'^write: got "nearest", .* which depend on its prompt; '):
        Director(cross_attending("own"), told()[1:], guidance=guidance, write="nearest")
    adapter = toy(**CROSS)
    adapter.traits = replace(adapter.traits, extras={"strength": Extra((), prompt=True)})
    with pytest.raises(ValueError, match=r"^shared_history: got True, but Toy takes more of a prompt than text"):
        Director(retrofit(adapter.model, backbone=adapter), told()[1:], guidance=guidance)
