import random

import pytest
import torch
from hypothesis import given, strategies as st

from lct_core.packing import WINDOW, plan_rows

BUDGET = 300_000


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def paper_scenes(count, seed):
    """Scenes drawn like the paper's: 1 to 9 shots, 5 on average, of 1.5K to 29K tokens."""
    draw = random.Random(seed)
    return [[draw.randint(1_500, 29_000) for _ in range(draw.randint(1, 9))] for _ in range(count)]


def fills(rows, scenes):
    return [sum(sum(scenes[i]) for i in row) for row in rows]


def fewest_rows(scenes, budget):
    return -(-sum(map(sum, scenes)) // budget)


@given(
    scenes=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=9), max_size=40),
    seed=st.integers(0, 2**31),
)
def test_every_scene_is_whole_in_one_row(scenes, seed):
    rows = plan_rows(scenes, budget=180, generator=rng(seed))
    assert sorted(i for row in rows for i in row) == list(range(len(scenes)))
    assert all(0 < fill <= 180 for fill in fills(rows, scenes))
    assert sum(2 * fill <= 180 for fill in fills(rows, scenes)) <= 1
    assert rows == plan_rows(scenes, budget=180, generator=rng(seed))


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_within_one_percent_of_the_fewest(seed):
    scenes = paper_scenes(2 * WINDOW + 1, seed)
    rows = plan_rows(scenes, budget=BUDGET, generator=rng(seed))
    assert len(rows) <= 1.01 * fewest_rows(scenes, BUDGET)
    assert sorted(fills(rows, scenes))[1] > 0.98 * BUDGET


def test_a_hundred_thousand_scenes():
    scenes = paper_scenes(100_000, seed=0)
    rows = plan_rows(scenes, budget=BUDGET, generator=rng())
    assert sorted(i for row in rows for i in row) == list(range(len(scenes)))
    assert max(fills(rows, scenes)) <= BUDGET
    assert len(rows) <= 1.01 * fewest_rows(scenes, BUDGET)


def test_seeds_differ_and_the_generator_moves_on():
    scenes = paper_scenes(200, seed=0)
    generator = rng(0)
    first, second = (plan_rows(scenes, budget=BUDGET, generator=generator) for _ in range(2))
    assert first != second
    assert first == plan_rows(scenes, budget=BUDGET, generator=rng(0))
    assert first != plan_rows(scenes, budget=BUDGET, generator=rng(1))


def test_order_in_a_row_is_random():
    # two scenes share a row; the larger one is placed first, and comes first in half of the rows
    pairs = plan_rows([[60], [40]] * 1000, budget=100, generator=rng())
    assert len(pairs) == 1000
    larger_first = sum(row[0] % 2 == 0 for row in pairs)
    assert 430 < larger_first < 570


def test_order_of_rows_is_random():
    # without a shuffle, rows would come sorted by how full they are
    scenes = paper_scenes(2000, seed=1)
    order = fills(plan_rows(scenes, budget=BUDGET, generator=rng()), scenes)
    rank = torch.tensor(order, dtype=torch.float64).argsort().argsort().double()
    assert abs(torch.corrcoef(torch.stack([rank, torch.arange(len(order)).double()]))[0, 1]) < 0.15


def test_the_emptiest_row_comes_anywhere():
    places = {plan_rows([[2]] * 9 + [[1]], budget=2, generator=rng(seed)).index([9]) for seed in range(200)}
    assert places == set(range(10))


def test_every_window_mixes_scenes_from_everywhere():
    scenes = [[1]] * (2 * WINDOW)
    rows = plan_rows(scenes, budget=2, generator=rng())
    assert len(rows) == WINDOW
    from_the_front = sum(i < WINDOW for row in rows[: WINDOW // 2] for i in row)
    assert abs(from_the_front / WINDOW - 0.5) < 0.05


def test_no_scene_no_row():
    assert plan_rows([], budget=10, generator=rng()) == []


@pytest.mark.parametrize(
    ("scenes", "message"),
    [
        ([[5], [6, 5]], r"scene 1 \(counting from 0\) has 11 tokens, 1 more than the budget of 10"),
        ([[1], []], r"scene 1 \(counting from 0\) has 0 shots, expected 1 to 3 \(max_shots\)"),
        ([[1, 1, 1, 1]], r"scene 0 \(counting from 0\) has 4 shots, expected 1 to 3 \(max_shots\)"),
        ([[1, 0]], r"scene 0 \(counting from 0\) has token counts \[1, 0\], expected ints of at least 1"),
        ([[-1, 3]], r"scene 0 .* has token counts \[-1, 3\], expected ints of at least 1"),
        ([[1, 2.0]], r"scene 0 .* has token counts \[1, 2.0\], expected ints of at least 1"),
    ],
)
def test_refusals(scenes, message):
    with pytest.raises(ValueError, match=f"^scenes: {message}"):
        plan_rows(scenes, budget=10, generator=rng(), max_shots=3)


def test_the_window_is_the_papers():
    plan_rows([[1] * 9], budget=10, generator=rng())
    with pytest.raises(ValueError, match=r"has 10 shots, expected 1 to 9 \(max_shots\); choose some of its shots"):
        plan_rows([[1] * 10], budget=10, generator=rng())
