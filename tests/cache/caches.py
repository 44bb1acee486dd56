"""Caches and models that the tests of the cache share."""

from contextlib import contextmanager
from functools import cache as once

import torch

from lct_backbones.mmdit import tiny
from lct_core import KVCache, Shot, retrofit

FIVE = [Shot(2, (2, 2, 3)), Shot(0, (1, 1, 1)), Shot(3, (1, 4, 2)), Shot(1, (3, 1, 2)), Shot(4, (2, 2, 2))]
SIXTH = Shot(2, (2, 3, 2))


@once
def scene_model(scheme="anchored"):
    return retrofit(tiny(), scheme=scheme)


def draw(*counts, batch=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [scene_model().adapter.example(shot, batch=batch, generator=generator, dtype=dtype) for shot in counts]


@torch.no_grad()
def fill(cache, counts, *, model=None, batch=1, seed=0):
    """Generate shots one by one, each under its number."""
    model = model or scene_model()
    for i, shot in enumerate(draw(*counts, batch=batch, seed=seed)):
        call(model, shot, cache)
        cache.append(i)
    return cache


@torch.no_grad()
def call(model, shot, cache, level=0.5):
    return model([shot], torch.tensor([level]), pattern="context_causal", cache=cache)[0]


class Watched(KVCache):
    """Keeps the views that the engine got."""

    @contextmanager
    def writing(self, *args, **options):
        self.views = {}
        with super().writing(*args, **options) as write:

            def watched(key, *given):
                self.views[key] = write(key, *given)
                return self.views[key]

            yield watched


def stored(cache):
    return [x for views in cache.views.values() for x in views]
