import copy
import pickle
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
from hypothesis import given

from lct_core.layout import Layout, Range, Shot
from lct_core.testing.strategies import layouts, shots

A = Shot(text=2, grid=(1, 2, 3))
B = Shot(text=0, grid=(2, 1, 1))
GLOBAL = Shot(text=4, grid=(1, 2, 3), role="global")


def test_range():
    span = Range(2, 5)
    assert span.size == 3
    assert "abcdefg"[span.slice] == "cde"
    assert span == (2, 5)


def test_shot_counts_its_tokens():
    assert (A.video, A.tokens) == (6, 8)
    assert (B.video, B.tokens) == (2, 2)


def test_shot_takes_any_sequence_as_grid_and_stays_hashable():
    shot = Shot(text=1, grid=[1, 2, 3])
    assert shot.grid == (1, 2, 3)
    assert hash(shot) == hash(Shot(text=1, grid=(1, 2, 3)))


@pytest.mark.parametrize("text", [-1, 1.0, True, None])
def test_shot_refuses_text(text):
    with pytest.raises(ValueError, match=r"^text: got .*expected a number of text tokens"):
        Shot(text=text, grid=(1, 1, 1))


@pytest.mark.parametrize("grid", [(), (1, 1), (1, 1, 1, 1), (0, 1, 1), (1, -1, 1), (1, 1, 1.0), (1, True, 1)])
def test_shot_refuses_grid(grid):
    with pytest.raises(ValueError, match=r"^grid: got .*expected three ints of at least 1"):
        Shot(text=0, grid=grid)


@pytest.mark.parametrize("text", [0, 3])
def test_a_global_prompt_may_be_without_video(text):
    prompt = Shot(text=text, grid=[0, 0, 0], role="global")
    assert (prompt.grid, prompt.video, prompt.tokens) == ((0, 0, 0), 0, text)
    with pytest.raises(ValueError, match=r"^grid: got \(0, 0, 0\), expected three ints of at least 1"):
        Shot(text=text, grid=(0, 0, 0))


@pytest.mark.parametrize("grid", [(0, 0, 1), (0, 2, 3), (1, 0, 0), (0, 0), (0.0, 0.0, 0.0), (False, False, False)])
def test_a_global_prompt_has_a_whole_video_or_none(grid):
    with pytest.raises(ValueError, match=r"^grid: got .*expected three ints of at least 1"):
        Shot(text=1, grid=grid, role="global")


def test_shot_refuses_role():
    with pytest.raises(ValueError, match=r"^role: got 'dummy', expected"):
        Shot(text=0, grid=(1, 1, 1), role="dummy")


def test_layout_by_hand():
    layout = Layout([[GLOBAL, A], [B]])
    assert layout.text_first
    assert layout.shots == (GLOBAL, A, B)
    assert layout.num_shots == 3
    assert layout.tokens == 20
    assert layout.spans == ((0, 10), (10, 18), (18, 20))
    assert layout.scene_spans == ((0, 18), (18, 20))
    assert layout.scene_shots == (range(0, 2), range(2, 3))


@pytest.mark.parametrize(
    ("scenes", "message"),
    [
        ([], "got no scene"),
        ([[A], []], r"scene 1 \(counting from 0\) has no shot"),
        ([[A, (2, (1, 1, 1))]], r"shot 1 of scene 0 is .*expected a Shot"),
        ([[B], [A, GLOBAL]], r"shot 1 of scene 1 \(counting from 0\) is global"),
    ],
)
def test_layout_refuses(scenes, message):
    with pytest.raises(ValueError, match=f"^scenes: {message}"):
        Layout(scenes)


@pytest.mark.parametrize("value", [A, Layout([[A]])])
def test_immutable(value):
    with pytest.raises(FrozenInstanceError):
        value.text = 3


def without_dummy_video(layout):
    """As where text is cross-attended."""
    bare = [[Shot(s.text, (0, 0, 0), role="global") if s.role == "global" else s for s in x] for x in layout.scenes]
    return Layout(bare, layout.text_first)


with_and_without_dummy_video = layouts() | layouts().map(without_dummy_video)


@given(with_and_without_dummy_video)
def test_spans_partition_the_row(layout):
    for spans in (layout.spans, layout.scene_spans):
        assert (spans[0].start, spans[-1].stop) == (0, layout.tokens)
        assert all(before.stop == after.start for before, after in pairwise(spans))
    assert [span.size for span in layout.spans] == [shot.tokens for shot in layout.shots]
    assert [i for scene in layout.scene_shots for i in scene] == list(range(layout.num_shots))
    for scene, span, indices in zip(layout.scenes, layout.scene_spans, layout.scene_shots, strict=True):
        assert tuple(layout.shots[i] for i in indices) == scene
        assert span == (layout.spans[indices[0]].start, layout.spans[indices[-1]].stop)


@given(with_and_without_dummy_video)
def test_video_only_drops_the_text_and_nothing_else(layout):
    video = layout.video_only
    assert video.tokens == sum(shot.video for shot in layout.shots)
    assert [(s.text, s.grid, s.role) for s in video.shots] == [(0, s.grid, s.role) for s in layout.shots]
    assert video.text_first == layout.text_first
    assert video.video_only == video


@given(with_and_without_dummy_video)
def test_equal_layouts_are_one_key(layout):
    twins = [Layout(layout.scenes, layout.text_first), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))]
    assert {layout, *twins} == {layout}
    assert Layout(layout.scenes, not layout.text_first) != layout


@given(shots())
def test_a_single_shot_is_a_layout(shot):
    assert Layout([[shot]]).tokens == shot.tokens
