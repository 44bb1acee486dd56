"""The modes of generation by their definitions: loops over steps, with all shots in one call."""

from dataclasses import replace
from functools import cache as once

import pytest
import torch

from lct_backbones.mmdit import tiny
from lct_core import KVCache, Shot, ShotInput, retrofit
from lct_core.generation import (
    Guidance,
    autoregressive,
    causal,
    conditional,
    joint,
)
from lct_core.noise import keyed_generator
from lct_core.testing.tolerances import BOUNDS, error
from tests.toys import CROSS, toy

FLOAT32 = BOUNDS[torch.float32]
SCHEMES = ("anchored", "paper")
FOUR = [Shot(2, (2, 2, 3)), Shot(0, (1, 1, 1)), Shot(3, (1, 4, 2)), Shot(1, (3, 1, 2))]  # two of them are images
MODES = {"joint": joint, "conditional": conditional, "autoregressive": autoregressive, "causal": causal}
SHOT_AFTER_SHOT = ("autoregressive", "causal")


@once
def width(step, steps):
    """Of a step, as the difference of the two levels: 1 / steps, but for its last bit."""
    return (1 - step / steps) - (1 - (step + 1) / steps)


def scene_model(scheme="anchored"):
    return retrofit(tiny(), scheme=scheme)


def random(*size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def draw(*counts, with_global, batch=2, seed=0):
    """Shots of noise with texts; a global shot before them has no latents."""
    generator, adapter = torch.Generator().manual_seed(seed), scene_model().adapter
    scene = [adapter.example(shot, batch=batch, generator=generator, dtype=torch.float32) for shot in counts]
    overall = ShotInput(text=random(batch, 4, 16, seed=seed + 1), role="global")
    return [overall, *scene] if with_global else scene


def clean(scene, *indices):
    return {i: random(*scene[i].latents.shape, seed=100 + i) for i in indices}


def run(mode, model, scene, given, **options):
    """Any mode: joint generation is that of nothing given."""
    return joint(model, scene, **options) if mode == "joint" else MODES[mode](model, scene, given, **options)


def same(got, expected):
    """Bit for bit, shot by shot."""
    return len(got) == len(expected) and all(
        x is y is None or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(got, expected, strict=True)
    )


def worst(got, expected):
    assert [x is None for x in got] == [x is None for x in expected]
    return max(error(x, y) for x, y in zip(got, expected, strict=True) if y is not None)


def velocity(model, shots, levels, *, pattern, guidance=None):
    """Plain classifier-free guidance: two calls, in the second of which every text is a negative one."""
    positive = [None if v is None else v.float() for v in model(shots, levels, pattern=pattern)]
    if guidance is None:
        return positive
    scale, text, overall = guidance
    negative = [replace(s, text=(overall if s.role == "global" else text).to(s.text)) for s in shots]
    said = zip(positive, model(negative, levels, pattern=pattern), strict=True)
    return [None if p is None else n.float() + scale * (p - n.float()) for p, n in said]


def noised(latents, noise, t_c):
    """A clean shot at the level of a condition, in float32 at least."""
    wide = torch.promote_types(latents.dtype, torch.float32)
    held = torch.tensor(t_c / 1000, dtype=torch.float32).to(wide)
    return (1 - held) * latents.to(wide) + held * noise.to(wide)


def fresh(shot, i, seed):
    """Another noise than the one that a generated shot started from: by its index in the scene."""
    noise = torch.randn(shot.latents.shape, generator=keyed_generator("history", seed, i), dtype=torch.float32)
    return noise.to(shot.latents)


@torch.no_grad()
def at_once(model, scene, given, *, steps, t_c=100.0, pattern="bidirectional", guidance=None):
    """All shots that are not given, from those that are, at one noise level."""
    state = {i: shot.latents.float() for i, shot in enumerate(scene) if shot.role == "shot"}
    state |= {i: noised(latents, scene[i].latents, t_c) for i, latents in given.items()}
    for step in range(steps):
        t = 1 - step / steps
        levels = [0.0 if shot.role == "global" else t_c / 1000 if i in given else t for i, shot in enumerate(scene)]
        now = [replace(s, latents=state[i].to(s.latents)) if i in state else s for i, s in enumerate(scene)]
        change = velocity(model, now, torch.tensor(levels), pattern=pattern, guidance=guidance)
        state |= {i: z - width(step, steps) * change[i] for i, z in state.items() if i not in given}
    return [given.get(i, state.get(i)) for i in range(len(scene))]


def with_dummy_video(scene, model):
    """A global shot's video: zeros, one latent frame, as large as the scene's first shot, whichever shots are seen.

    Where text is cross-attended, it has none.
    """
    first, *rest = scene
    if first.role != "global" or model.adapter.traits.text == "cross":
        return list(scene)
    return [replace(first, latents=torch.zeros_like(rest[0].latents[:, :, :1])), *rest]


def one_by_one(model, scene, given, *, seen, seed=0, **options):
    """Shot after shot, every step with the history in the call; with context-causal attention: causal, uncached."""
    done, scene = dict(given), with_dummy_video(scene, model)
    for i, shot in enumerate(scene):
        if shot.role == "shot" and i not in done:
            row = [j for j in range(i) if scene[j].role == "global"] + list(seen(i)) + [i]
            history = {place: done[j] for place, j in enumerate(row) if j in done}
            done[i] = at_once(model, [scene[j] for j in row], history, **options)[-1]
            scene[i] = replace(shot, latents=fresh(shot, i, seed))
    return [done.get(i) for i in range(len(scene))]


@torch.no_grad()
def by_hand(model, scene, given, *, seen, steps, t_c=100.0, guidance=None, seed=0):
    """Causal with any history: a cache for each branch, in which a shot stays as it was written."""
    scale, text, overall = guidance or (1, None, None)
    caches = [KVCache() for _ in range(1 if guidance is None else 2)]
    result, scene = [], with_dummy_video(scene, model)

    def look(i, latents, t):
        shot = scene[i] if latents is None else replace(scene[i], latents=latents.to(scene[i].latents))
        worded = [shot.text, overall if shot.role == "global" else text][: len(caches)]
        said = [
            model([replace(shot, text=words.to(shot.text))], t, pattern="context_causal", cache=cache)[0]
            for words, cache in zip(worded, caches, strict=True)
        ]
        if said[0] is None:
            return None
        return said[0].float() if len(said) == 1 else said[1].float() + scale * (said[0].float() - said[1].float())

    for i, shot in enumerate(scene):
        if shot.role == "global":
            latents, level = shot.latents, torch.zeros(1)
            result.append(None)
        else:
            for cache in caches:
                cache.select([*[j for j in range(i) if scene[j].role == "global"], *seen(i)])
            latents, level = given.get(i, shot.latents.float()), torch.tensor([t_c / 1000])
            for step in range(0 if i in given else steps):
                latents = latents - width(step, steps) * look(i, latents, torch.tensor([1 - step / steps]))
            result.append(latents)
            latents = noised(latents, shot.latents if i in given else fresh(shot, i, seed), t_c)
        look(i, latents, level)
        for cache in caches:
            cache.append(i)
    return result


def earlier(scene, i):
    return [j for j in range(i) if scene[j].role == "shot"]


def within(passes, guidance=None):
    """What a cache may change in passes that follow one another.

    Each pass may add what one may; guidance takes ``scale`` of one velocity and ``1 - scale`` of the other.
    """
    scale = 1 if guidance is None else guidance[0]
    return passes * (abs(scale) + abs(1 - scale)) * FLOAT32["cached"].absolute


def negatives(batch=2, seed=50):
    """Of a scale and texts of other lengths than any prompt's: as the definitions take them."""
    return 3.0, random(batch, 6, 16, seed=seed), random(batch, 7, 16, seed=seed + 1)


def guide(scale, text, overall):
    return Guidance(scale=scale, text=text, global_text=overall)


varied = pytest.mark.parametrize(  # every pair of them; test_any_scene_by_its_definition has all three
    ("scheme", "with_global", "guided"),
    [("anchored", False, False), ("anchored", True, True), ("paper", False, True), ("paper", True, False)],
)
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)
with_and_without_global = pytest.mark.parametrize("with_global", [False, True])
guided_or_not = pytest.mark.parametrize("guided", [False, True])
every_mode = pytest.mark.parametrize("mode", MODES)


def cross_attending(text):
    adapter = toy(**CROSS)
    return retrofit(adapter.model, backbone=adapter, text=text)


class Watched:
    """A scene model that keeps what it was called with."""

    def __init__(self, model):
        self.model, self.adapter, self.calls = model, model.adapter, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def new_cache(self, **options):
        return self.model.new_cache(**options)

    def __call__(self, shots, t, **options):
        self.calls.append((list(shots), t))
        return self.model(shots, t, **options)


def generated(mode, scene, given, *, guidance=None, model=None, steps=2):
    return run(mode, model or scene_model(), scene, given, steps=steps, guidance=guidance)


def case(mode, with_global=True):
    """A scene, and what is given of it: the first shot, or any where shots see later ones."""
    scene = draw(*FOUR, with_global=with_global)
    return scene, {} if mode == "joint" else clean(scene, with_global + (mode == "conditional"))


def of_toys(guided):
    return (3.0, random(2, 6, 5, seed=50), random(2, 7, 5, seed=51)) if guided else None


def told(*, batch=2):
    """A prompt and three shots of a cross-attending toy, with extras."""
    adapter, generator = toy(**CROSS), torch.Generator().manual_seed(0)
    counts = [Shot(2, (2, 2, 1)), Shot(4, (1, 1, 1)), Shot(1, (1, 2, 2))]
    scene = [adapter.example(shot, batch=batch, generator=generator, dtype=torch.float32) for shot in counts]
    return [ShotInput(text=random(batch, 3, 5, seed=1), role="global"), *scene]
