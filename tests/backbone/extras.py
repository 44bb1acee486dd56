"""An adapter that takes extras of every kind."""

import torch

from lct_core import ShotInput, retrofit
from tests.toys import toy

LATENTS = (2, 3, 3, 4, 6)


def random(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def shot(role="shot", **extras):
    return ShotInput(latents=random(*LATENTS), text=random(2, 4, 5, seed=1), extras=extras, role=role)


def scene_model(**config):
    adapter = toy(**config)
    return retrofit(adapter.model, backbone=adapter)


T = torch.tensor([0.5])
