"""Examples as rows: one batch where they are alike, side by side where they are not."""

from itertools import chain

import pytest
import torch

from lct_core import Layout, Shot, ShotInput, sample_levels, tuning_loss
from lct_core.testing.tolerances import BOUNDS, error
from lct_core.training import (
    Example,
    to_row,
)
from tests.training.scenes import CHANNELS, WIDTH, make

FLOAT32 = BOUNDS[torch.float32]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SHORT, LONG = (1, 2, 2), (3, 2, 4)


def example(*sizes, text=2, seed=0):
    """A global shot where a size is None, else a shot of so many frames, rows and columns."""
    draws = generator(seed)
    shots, noise = [], []
    for size in sizes:
        words = torch.randn(1, text, WIDTH, generator=draws)
        if size is None:
            shots.append(ShotInput(text=words, role="global"))
            noise.append(None)
        else:
            latents, eps = torch.randn(2, 1, CHANNELS, *size, generator=draws)
            shots.append(ShotInput(latents=latents, text=words))
            noise.append(eps)
    return Example(shots, noise)


@pytest.mark.parametrize(
    "sizes",
    [[(SHORT,)], [(SHORT,)] * 3, [(None, SHORT, LONG)] * 2, [(SHORT, LONG, SHORT)] * 2, [(None, LONG)]],
)
def test_examples_of_one_layout_are_a_batch(sizes):
    examples = [example(*each, seed=i) for i, each in enumerate(sizes)]
    row = to_row(examples, generator=generator())
    (scene,), (noise,) = row.scenes, row.noise
    assert row.levels.shape == (len(examples), len(sizes[0]))
    for j, (shot, eps) in enumerate(zip(scene, noise, strict=True)):
        assert shot.role == examples[0].shots[j].role
        assert torch.equal(shot.text, torch.cat([e.shots[j].text for e in examples]))
        if shot.role == "global":
            assert shot.latents is None
            assert eps is None
        else:
            assert torch.equal(shot.latents, torch.cat([e.shots[j].latents for e in examples]))
            assert torch.equal(eps, torch.cat([e.noise[j] for e in examples]))


@pytest.mark.parametrize(
    "examples",
    [
        [example(SHORT), example(LONG)],
        [example(SHORT), example(SHORT, SHORT)],
        [example(SHORT), example(None, SHORT)],
        [example(SHORT), example(SHORT), example(SHORT, text=1)],
        [example(SHORT, LONG), example(LONG, SHORT)],
    ],
)
def test_examples_of_other_layouts_stand_side_by_side(examples):
    row = to_row(examples, generator=generator())
    assert row.levels.shape == (1, sum(len(e.shots) for e in examples))
    assert all(a is b for a, b in zip(chain(*row.scenes), chain(*(e.shots for e in examples)), strict=True))
    assert all(a is b for a, b in zip(chain(*row.noise), chain(*(e.noise for e in examples)), strict=True))
    assert [len(scene) for scene in row.scenes] == [len(e.shots) for e in examples]


@pytest.mark.parametrize("sizes", [[(None, SHORT, LONG)] * 3, [(None, SHORT), (SHORT, SHORT, LONG)]])
def test_every_shot_has_its_own_level(sizes):
    examples = [example(*each) for each in sizes]
    levels = to_row(examples, generator=generator(5), mean=1.0, std=2.0).levels.flatten()
    again = generator(5)
    expected = [
        sample_levels(
            Layout([[Shot(0, (1, 1, 1), role="shot" if s else "global") for s in each]]),
            generator=again,
            mean=1.0,
            std=2.0,
        )
        for each in sizes
    ]
    assert torch.equal(levels, torch.cat(expected))
    is_global = torch.tensor([size is None for each in sizes for size in each])
    assert bool((levels[is_global] == 0).all())
    assert len(levels[~is_global].unique()) == int((~is_global).sum())


def test_no_example_is_said():
    with pytest.raises(ValueError, match=r"^examples: got none, expected at least one"):
        to_row([], generator=generator())


def one_by_one(model, examples, levels):
    return [tuning_loss(model, e.shots, t, e.noise).shots for e, t in zip(examples, levels, strict=True)]


@torch.no_grad()
def test_both_forms_of_a_row_have_the_loss_of_their_examples():
    """Every shot weighs the same, in whichever scene and however long it is."""
    model = make()
    examples = [example(None, SHORT, LONG, seed=i) for i in range(3)]
    row = to_row(examples, generator=generator())
    shots = torch.stack(one_by_one(model, examples, row.levels))
    batched = tuning_loss(model, row.scenes, row.levels, row.noise)
    assert error(batched.shots, shots.mean(0)) <= FLOAT32["definition"].absolute
    assert error(batched.mean, shots.mean()) <= FLOAT32["definition"].absolute
    beside = tuning_loss(model, [e.shots for e in examples], row.levels.reshape(1, -1), [e.noise for e in examples])
    assert error(beside.shots, shots.flatten()) <= FLOAT32["definition"].absolute
    assert error(beside.mean, batched.mean) <= FLOAT32["definition"].absolute

    examples = [example(None, SHORT, LONG), example(LONG), example(SHORT, SHORT, text=1)]
    row = to_row(examples, generator=generator())
    shots = torch.cat(one_by_one(model, examples, row.levels[0].split([3, 1, 2])))
    beside = tuning_loss(model, row.scenes, row.levels, row.noise)
    assert error(beside.shots, shots) <= FLOAT32["definition"].absolute
    assert error(beside.mean, shots.mean()) <= FLOAT32["definition"].absolute


def test_a_row_moves_to_a_device():
    row = to_row([example(None, SHORT), example(LONG)], generator=generator())
    moved = row.to(torch.device("meta"))
    assert torch.equal(moved.levels, row.levels)  # where noise is drawn
    for before, after in zip(chain(*row.scenes), chain(*moved.scenes), strict=True):
        assert (after.role, after.text.device.type, after.text.shape) == (before.role, "meta", before.text.shape)
        assert (after.latents is None) == (before.latents is None)
        assert after.latents is None or after.latents.device.type == "meta"
    assert [eps if eps is None else eps.device.type for eps in chain(*moved.noise)] == [None, "meta", "meta"]
