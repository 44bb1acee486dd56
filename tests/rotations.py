"""Rows and rotations that the tests of rotary kernels share."""

from itertools import chain

import torch

from lct_core import Layout, Shot, retrofit, rotation

PAIRINGS = ("interleaved", "half", "half_per_axis")
LENGTHS = (3, 0, 1, 4)


def draw(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def turn(pairing, tokens, *, heads=1, pairs=9, dtype=torch.float32, device="cpu"):
    return rotation(
        100 * draw(tokens, heads, pairs, seed=7, dtype=torch.float64, device=device), pairing=pairing, dtype=dtype
    )


def shots_of(lengths=LENGTHS, *, heads=2, head_dim=22, dtype=torch.float32):
    """What some shots' projections give: views, of which no token is contiguous."""
    return [draw(2, n, heads, 3, head_dim, seed=i, dtype=dtype).select(3, 1) for i, n in enumerate(lengths)]


def inside(tokens, *shape, dtype, device="cpu"):
    """A place for some tokens in a larger buffer of NaNs, and the buffer without it."""
    batch, heads, head_dim = shape
    buffer = torch.full((batch, tokens + 5, heads + 1, head_dim + 2), float("nan"), dtype=dtype, device=device)
    place = (slice(None), slice(2, 2 + tokens), slice(heads), slice(head_dim))

    def beside():
        rest = buffer.clone()
        rest[place] = float("nan")
        return rest

    return buffer[place], beside


ROW = Layout(
    [
        [Shot(2, (2, 2, 3)), Shot(2, (2, 2, 3)), Shot(1, (1, 1, 1))],
        [Shot(3, (1, 2, 2)), Shot(1, (1, 1, 1))],
    ]
)


def scenes_of(adapter, layout=ROW, *, batch=1):
    generator = torch.Generator().manual_seed(0)
    return [
        [adapter.example(shot, batch=batch, generator=generator, dtype=torch.float32) for shot in scene]
        for scene in layout.scenes
    ]


def levels_of(layout=ROW):
    return torch.rand(layout.num_shots, generator=torch.Generator().manual_seed(1))


def engine(adapter, **options):
    return retrofit(adapter.model, backbone=adapter, text=getattr(adapter, "scope", "own"), **options)


def flat(scenes):
    return list(chain.from_iterable(scenes))


def same(got, expected):
    assert len(got) == len(expected) > 0
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
