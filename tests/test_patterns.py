"""The patterns: who sees whom, against the definitions token by token."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st

from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import (
    PATTERNS,
    bidirectional,
    context_causal,
    first_frames,
    own_and_global_text,
    own_shot,
    own_text,
    seen_text,
    selected_history,
)
from lct_core.plan import AttentionPlan, Segment
from lct_core.testing.strategies import layouts
from tests.plans import GLOBAL, A, B, check_varlen, histories


def tokens_of(layout):
    """``(scene, shot, is_text)`` of every token of the row."""
    row, index = [], 0
    for number, scene in enumerate(layout.scenes):
        for shot in scene:
            text, video = [(number, index, True)] * shot.text, [(number, index, False)] * shot.video
            row += text + video if layout.text_first else video + text
            index += 1
    return row


def dense_by(sees, queries, keys):
    rows = [[sees(q, k) for k in keys] for q in queries]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(queries), len(keys))


def self_attention(layout, sees):
    return dense_by(sees, tokens_of(layout), tokens_of(layout))


def cross_attention(layout, sees):
    """From the video tokens to the text tokens, each in row order."""
    tokens = tokens_of(layout)
    return dense_by(sees, [t for t in tokens if not t[2]], [t for t in tokens if t[2]])


DEFINITIONS = {
    "bidirectional": lambda q, k: q[0] == k[0],
    "context_causal": lambda q, k: q[0] == k[0] and k[1] <= q[1],
    "own_shot": lambda q, k: q[1] == k[1],
}


@pytest.mark.parametrize("name", PATTERNS)
@given(layout=layouts())
def test_patterns_equal_their_definition(name, layout):
    plan = PATTERNS[name](layout)
    assert (plan.queries, plan.keys) == (layout.tokens, layout.tokens)
    assert torch.equal(plan.dense(), self_attention(layout, DEFINITIONS[name]))


def test_patterns_by_name():
    assert dict(PATTERNS) == {"bidirectional": bidirectional, "context_causal": context_causal, "own_shot": own_shot}


@given(st.data())
def test_selected_history_equals_its_definition(data):
    layout = data.draw(layouts())
    history = data.draw(histories(layout))
    expected = self_attention(layout, lambda q, k: k[1] == q[1] or k[1] in history[q[1]])
    assert torch.equal(selected_history(layout, history).dense(), expected)


@given(layouts())
def test_selected_history_has_the_other_patterns_at_its_ends(layout):
    everything = [range(scene.start, shot) for scene in layout.scene_shots for shot in scene]
    assert selected_history(layout, everything) == context_causal(layout)
    assert selected_history(layout, [()] * layout.num_shots) == own_shot(layout)


def test_a_global_shot_is_seen_only_where_it_is_named():
    layout = Layout([[GLOBAL, A, A]])
    plan = selected_history(layout, [[], [0], iter([1, 1])])
    assert [s.keys for s in plan.segments] == [((0, 4),), ((0, 7),), ((4, 10),)]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([[], []], r"got 2 entries, expected one for each of the 4 shots"),
        ([[], [], [], [], []], r"got 5 entries, expected one for each of the 4 shots"),
        ([[], [1], [], []], r"shot 1 is to see shot 1, expected earlier shots of its own scene: \[0\]"),
        ([[1], [], [], []], r"shot 0 is to see shot 1, expected earlier shots of its own scene: \[\]"),
        ([[], [], [], [1]], r"shot 3 is to see shot 1, expected earlier shots of its own scene: \[2\]"),
        ([[], [-1], [], []], r"shot 1 is to see shot -1"),
        ([[], [], [], [4]], r"shot 3 is to see shot 4"),
    ],
)
def test_a_wrong_history_is_an_error(history, message):
    with pytest.raises(ValueError, match=f"^history: {message}"):
        selected_history(Layout([[A, B], [B, A]]), history)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("video_only", [False, True])
@given(data=st.data())
def test_first_frames_equals_its_definition(causal, video_only, data):
    layout = data.draw(bare() if video_only else layouts())
    layout = layout.video_only if video_only else layout
    row = []  # (scene, shot, frame) of every token; -1 for text
    for scene, shots in enumerate(layout.scene_shots):
        for shot in shots:
            frames, height, width = layout.shots[shot].grid
            video = [(scene, shot, frame) for frame in range(frames) for _ in range(height * width)]
            text = [(scene, shot, -1)] * layout.shots[shot].text
            row += text + video if layout.text_first else video + text

    def sees(q, k):
        whole = q[1] == k[1] or layout.shots[k[1]].role == "global"
        return q[0] == k[0] and (k[1] <= q[1] or not causal) and (whole or k[2] == 0)

    plan, expected = first_frames(layout, causal=causal), dense_by(sees, row, row)
    assert torch.equal(plan.dense(), expected)
    if plan.queries:
        assert plan.pairs == expected.sum()
        check_varlen(plan)  # no key twice


def test_first_frames_ends_with_the_frame():
    """The neighbour of the summary is not in it: neither the next frame's first token nor the next shot's."""
    plan = first_frames(Layout([[Shot(text=1, grid=(2, 1, 2)), Shot(text=1, grid=(1, 1, 1)), B]]))
    assert [s.keys for s in plan.segments] == [((0, 5), (6, 8)), ((1, 3), (5, 8)), ((1, 3), (6, 8))]


@pytest.mark.parametrize(
    ("pattern", "with_global"), [(own_text, False), (own_and_global_text, True)], ids=["own", "own_and_global"]
)
@given(layout=layouts())
def test_cross_attention_to_text_equals_its_definition(pattern, with_global, layout):
    def sees(q, k):
        return q[1] == k[1] or (with_global and q[0] == k[0] and layout.shots[k[1]].role == "global")

    expected = cross_attention(layout, sees)
    if expected.any(1).all():
        plan = pattern(layout)
        assert (plan.queries, plan.keys) == expected.shape
        assert torch.equal(plan.dense(), expected)
    else:
        blind = [shot for _, shot, is_text in tokens_of(layout) if not is_text][int((~expected.any(1)).nonzero()[0])]
        with pytest.raises(ValueError, match=rf"^layout: shot {blind} \(in row order\) has no text") as caught:
            pattern(layout)
        assert ("or a global shot in its scene" in str(caught.value)) == with_global


def test_a_shot_without_text_sees_the_global_text():
    plan = own_and_global_text(Layout([[GLOBAL, A, B]]))
    assert [s.keys for s in plan.segments] == [((0, 2),), ((0, 3),), ((0, 2),)]
    with pytest.raises(ValueError, match=r"^layout: shot 2 \(in row order\) has no text"):
        own_text(Layout([[GLOBAL, A, B]]))
    with pytest.raises(ValueError, match=r"^layout: shot 3 \(in row order\) has no text"):
        own_and_global_text(Layout([[GLOBAL, A, B], [B]]))  # the global text of another scene is not seen


@st.composite
def bare(draw):
    """Layouts among whose global prompts some are without dummy video, as where text is cross-attended."""
    layout = draw(layouts())
    return Layout(
        [
            [
                Shot(shot.text, (0, 0, 0), role="global") if shot.role == "global" and draw(st.booleans()) else shot
                for shot in scene
            ]
            for scene in layout.scenes
        ],
        layout.text_first,
    )


@st.composite
def plans_over(draw, size):
    """Any plan of as many queries as keys, whatever scenes they belong to."""
    cuts = draw(st.sets(st.integers(1, size), max_size=5)) | {size}
    ends = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted).filter(lambda ends: ends[0] < ends[1])
    segments = [
        Segment(Range(start, stop), tuple(Range(*r) for r in draw(st.lists(ends, min_size=1, max_size=3))))
        for start, stop in pairwise(sorted({0, *cuts}))
    ]
    return AttentionPlan(size, size, tuple(segments))


@given(st.data())
def test_seen_text_equals_its_definition(data):
    layout = data.draw(bare())
    video = layout.video_only
    kinds = [pattern(video) for pattern in PATTERNS.values()]
    kinds.append(selected_history(video, data.draw(histories(layout))))
    plan = data.draw(st.sampled_from(kinds) | plans_over(video.tokens))
    shows, row = plan.dense(), [token for token in tokens_of(layout) if not token[2]]

    def sees(q, k):
        """Some video token of the text's shot is seen from the query, or it is the prompt of the query's scene."""
        if q[0][0] == k[0] and layout.shots[k[1]].role == "global":
            return True
        return any(shows[q[1], i] for i, token in enumerate(row) if token[1] == k[1])

    texts = [token for token in tokens_of(layout) if token[2]]
    expected = dense_by(sees, [(token, i) for i, token in enumerate(row)], texts)
    if expected.any(1).all():
        got = seen_text(layout, plan)
        assert (got.queries, got.keys) == expected.shape
        assert torch.equal(got.dense(), expected)
    else:
        deaf = row[int((~expected.any(1)).nonzero()[0])][1]
        with pytest.raises(ValueError, match=rf"^layout: shot {deaf} \(in row order\) has no text to attend to"):
            seen_text(layout, plan)


@given(bare())
def test_seen_text_has_the_other_texts_at_its_ends(layout):
    layout = Layout(
        [[Shot(max(shot.text, 1), shot.grid, role=shot.role) for shot in scene] for scene in layout.scenes],
        layout.text_first,
    )
    assert seen_text(layout, own_shot(layout.video_only)).dense().equal(own_and_global_text(layout).dense())
    scenes = cross_attention(layout, lambda q, k: q[0] == k[0])
    assert torch.equal(seen_text(layout, bidirectional(layout.video_only)).dense(), scenes)


@pytest.mark.parametrize("name", PATTERNS)
@given(layout=bare())
def test_shots_without_tokens_are_in_no_plan(name, layout):
    """A prompt without video and text among the tokens of self-attention: nobody there to see or to be seen."""
    video = layout.video_only
    plan = PATTERNS[name](video)
    assert torch.equal(plan.dense(), self_attention(video, DEFINITIONS[name]))
    assert all(segment.queries.size for segment in plan.segments)


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), partial(selected_history, history=[[]])])
def test_a_prompt_alone_has_a_plan_without_queries(pattern):
    layout = Layout([[Shot(2, (0, 0, 0), role="global")]])
    plan = pattern(layout.video_only)
    assert plan == AttentionPlan(0, 0, ())
    assert (plan.pairs, plan.dense().shape) == (0, (0, 0))
    for texts in (own_text(layout), own_and_global_text(layout), seen_text(layout, plan)):
        assert texts == AttentionPlan(0, 2, ())
        assert texts.rows(Range(0, 0)) == texts


def test_prompts_without_video_behind_a_history_leave_no_rows():
    layout = Layout([[Shot(2, (0, 0, 0), role="global"), A, A]])
    plan = own_and_global_text(layout)
    assert plan.rows(Range(plan.queries, plan.queries)).segments == ()
