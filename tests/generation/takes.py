"""Scenes that are made take by take, and what the takes should be."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch

from lct_core import KVCache, Shot
from lct_core.generation import Director, Take, schedule
from tests.generation.definitions import (
    Watched,
    draw,
    scene_model,
)

STEPS = 2
SMALL = [Shot(1 + i % 2, (1, 1 + i % 2, 2)) for i in range(8)]


def made(director, *shots, **options):
    """Shoot a take, and keep it."""
    take = Take(shots, **options)
    results = director.shoot(take)
    director.keep(results, take)
    return results


@torch.no_grad()
def denoised(call, noise, *, levels=None):
    """A loop over one shot, written out."""
    for t, s in pairwise(levels or schedule(STEPS)):
        noise = noise - (t - s) * call(noise, torch.tensor([t]))
    return noise


@torch.no_grad()
def behind(model, written, shot, *, seen, guidance=None, levels=None):
    """What is made of a shot behind shots that are written to a cache, each behind its own history at its level.

    ``written`` is, for each of them in order, its input, latents, level and history.
    """
    scale, text, overall = guidance or (1, None, None)
    caches = [KVCache() for _ in range(1 if guidance is None else 2)]

    def call(shot, latents, t):
        now = shot if latents is None else replace(shot, latents=latents)
        worded = [shot.text, overall if shot.role == "global" else text][: len(caches)]
        said = [
            model([replace(now, text=words)], t, pattern="context_causal", cache=cache)[0]
            for words, cache in zip(worded, caches, strict=True)
        ]
        return said[0] if len(said) == 1 or said[0] is None else said[1] + scale * (said[0] - said[1])

    for i, (given, latents, level, history) in written.items():
        for cache in caches:
            cache.select(history)
        call(given, latents, torch.tensor([level]))
        for cache in caches:
            cache.append(i)
    for cache in caches:
        cache.select(seen)
    return denoised(partial(call, shot), shot.latents, levels=levels)


def a_scene_of_two_threads(**options):
    """Shots 0, 1 from 0, 2 from 1; and 3, 4 from 3; and 5 from 2 and 4."""
    scene = draw(*SMALL[:7], with_global=False)
    watched = Watched(scene_model())
    director = Director(watched, scene, steps=1, **options)
    for i, history in enumerate([(), (0,), (1,), (), (3,), (2, 4)]):
        made(director, i, history=history)
    return watched, director
