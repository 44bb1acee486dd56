import pytest
import torch
from hypothesis import find, given, strategies as st

from lct_core.cache import KVCache, StagedShots
from lct_core.layout import Layout, Shot
from lct_core.testing.strategies import cache_operations, layouts, levels, shots

BOUNDS = {"max_scenes": 2, "max_shots": 3, "max_text": 4, "max_grid": (1, 2, 3)}


@given(shots(max_text=2, max_grid=(1, 2, 3)))
def test_shots_keep_their_bounds(shot):
    assert shot.role == "shot"
    assert 0 <= shot.text <= 2
    assert all(n <= most for n, most in zip(shot.grid, (1, 2, 3), strict=True))


@given(layouts(**BOUNDS))
def test_layouts_keep_their_bounds(layout):
    assert len(layout.scenes) <= 2
    for scene in layout.scenes:
        assert 1 <= sum(shot.role == "shot" for shot in scene) <= 3
    for shot in layout.shots:
        assert shot.text <= 4
        assert all(n <= most for n, most in zip(shot.grid, (1, 2, 3), strict=True))


@given(layouts(with_global=True))
def test_a_global_shot_has_one_frame_like_the_first_shot(layout):
    for dummy, first, *_ in layout.scenes:
        assert dummy.role == "global"
        assert dummy.grid == (1, *first.grid[1:])


@pytest.mark.parametrize("text_first", [True, False])
def test_options_are_kept(text_first):
    @given(layouts(with_global=False, text_first=text_first))
    def check(layout):
        assert layout.text_first is text_first
        assert all(shot.role == "shot" for shot in layout.shots)

    check()


@pytest.mark.parametrize(
    "condition",
    [
        lambda layout: layout.tokens == 1,
        lambda layout: all(shot.text == 0 for shot in layout.shots),
        lambda layout: any(shot.text > 0 for shot in layout.shots),
        lambda layout: any(shot.video == 1 for shot in layout.shots),
        lambda layout: layout.num_shots == 1,
        lambda layout: len(layout.scenes) > 1 and layout.num_shots > 3,
        lambda layout: len({scene[0].role for scene in layout.scenes}) == 2,
        lambda layout: layout.text_first,
        lambda layout: not layout.text_first,
    ],
)
def test_layouts_reach_the_edges(condition):
    find(layouts(), condition)


def test_layouts_shrink_to_one_token():
    assert find(layouts(text_first=True), lambda layout: True) == Layout([[Shot(text=0, grid=(1, 1, 1))]])


@given(st.data())
def test_levels_fit_their_layout(data):
    layout = data.draw(layouts())
    t = data.draw(levels(layout))
    assert (t.shape, t.dtype) == ((layout.num_shots,), torch.float32)
    assert ((t >= 0) & (t <= 1)).all()
    assert all(level == 0 for level, shot in zip(t, layout.shots, strict=True) if shot.role == "global")


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_levels_reach_both_ends(edge):
    layout = Layout([[Shot(text=0, grid=(1, 1, 1))]])
    find(levels(layout), lambda t: t.item() == edge)


@given(cache_operations())
def test_drawn_operations_suit_a_cache(operations):
    cache, values, seen, held = KVCache(), [], [], []
    for operation in operations:
        if operation.name == "append":
            shot = operation.shot
            v = torch.randn(1, shot.tokens, 1, 4)
            staged = StagedShots((shot,), torch.zeros(1, 1), (cache.end,), (max(shot.grid),))
            diagonal = torch.ones(1, 2, dtype=torch.float64)
            with cache.writing(staged, scheme="anchored", diagonal=diagonal, pairing="half") as write:
                _, visible = write((0, "self"), "tokens", torch.randn_like(v), v)
                assert torch.equal(visible, torch.cat([*(values[i] for i in seen), v], dim=1))
            cache.append(len(values))
            seen.append(len(values))
            held.append(len(values))
            values.append(v)
        elif operation.name == "reposition":
            cache.reposition(operation.origins)
        elif operation.name == "move":
            cache.move(*operation.ids, tier=operation.tier)
        elif operation.name in ("select", "reorder"):
            getattr(cache, operation.name)(operation.ids)
            seen = list(operation.ids)
        else:
            getattr(cache, operation.name)(*operation.ids)
            gone = operation.ids if operation.name == "drop" else ()
            seen, held = ([i for i in each if i not in gone] for each in (seen, held))
        assert [entry.id for entry in cache.shots] == seen
        assert sorted(cache.ids) == held


@pytest.mark.parametrize(
    "condition",
    [
        lambda operations: any(o.name == "select" and not o.ids for o in operations),
        lambda operations: any(o.name == "select" and list(o.ids) != sorted(o.ids) for o in operations),
        lambda operations: any(o.name == "reposition" and o.origins for o in operations),
        lambda operations: [o.name for o in operations[-2:]] == ["select", "append"],
    ],
)
def test_cache_operations_reach_the_edges(condition):
    find(cache_operations(), condition)
