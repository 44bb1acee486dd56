"""Scenes and models that the tests of the engine share."""

from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch

from lct_backbones.mmdit import MMDiTBackbone, tiny
from lct_core import KVCache, Layout, Shot, ShotInput, retrofit
from lct_core.testing.strategies import layouts
from lct_core.testing.tolerances import error
from tests.toys import TOYS, toy

PATTERNS = ("bidirectional", "context_causal")
small = partial(layouts, max_grid=(2, 2, 3), text_first=True)


def adapters():
    return {"MMDiT": lambda: MMDiTBackbone(tiny()), **{name: partial(toy, **config) for name, config in TOYS.items()}}


CASES = [pytest.param(make, id=name) for name, make in adapters().items()]
ADAPTERS = pytest.mark.parametrize("make", CASES)


def scope(adapter):
    return getattr(adapter, "scope", "own")


def retrofitted(adapter, **options):
    return retrofit(adapter.model, backbone=adapter, **{"text": scope(adapter), **options})


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


WITH_GLOBALS = Layout(
    [
        [Shot(4, (1, 2, 3), role="global"), Shot(2, (2, 2, 3)), Shot(1, (1, 1, 1)), Shot(5, (1, 3, 2))],
        [Shot(3, (2, 1, 2))],
        [Shot(1, (1, 1, 2), role="global"), Shot(2, (1, 1, 2))],
    ]
)


def gradients(model, scenes, t, pattern):
    model.backbone.zero_grad()
    outs = model(scenes, t, pattern=pattern)
    outs = flat(outs) if isinstance(outs[0], list) else outs
    sum(out.square().mean() for out in outs if out is not None).backward()
    return {name: p.grad for name, p in model.backbone.named_parameters()}


def given_shot(channels=4, size=(1, 2, 2), text=(1, 3, 16), **options):
    text = torch.zeros(text) if isinstance(text, tuple) else text
    return ShotInput(latents=torch.zeros(len(text) if text is not None else 1, channels, *size), text=text, **options)
