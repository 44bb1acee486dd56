import copy
import pickle
import tracemalloc
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operations import Operations
from torch.nn.attention.flex_attention import create_block_mask

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
from lct_core.plugins.torch_kernels import sdpa
from lct_core.testing.strategies import layouts

GLOBAL = Shot(text=2, grid=(1, 1, 2), role="global")
A = Shot(text=1, grid=(1, 2, 1))
B = Shot(text=0, grid=(1, 1, 1))


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


@st.composite
def histories(draw, layout):
    """For every shot some of the earlier shots of its scene, in any order."""
    chosen = []
    for scene in layout.scene_shots:
        for shot in scene:
            earlier = list(range(scene.start, shot))
            chosen.append(draw(st.lists(st.sampled_from(earlier), max_size=4)) if earlier else [])
    return chosen


@st.composite
def raw_plans(draw):
    """Sizes and segments of any plan: key ranges in any order, overlapping, touching, doubled or empty."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    keys = draw(st.integers(1, 24))
    ends = st.tuples(st.integers(0, keys), st.integers(0, keys)).map(lambda ends: tuple(sorted(ends)))
    segments, start = [], 0
    for size in sizes:
        ranges = draw(st.lists(ends, min_size=1, max_size=4).filter(lambda rs: any(a < b for a, b in rs)))
        segments.append(((start, start + size), ranges))
        start += size
    return start, keys, segments


plans = raw_plans().map(lambda raw: AttentionPlan(raw[0], raw[1], tuple(Segment(q, tuple(k)) for q, k in raw[2])))


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


@given(raw_plans())
def test_a_plan_is_the_union_of_its_ranges(raw):
    queries, keys, segments = raw
    plan = AttentionPlan(queries, keys, tuple(Segment(q, tuple(k)) for q, k in segments))
    expected = torch.zeros(queries, keys, dtype=torch.bool)
    for (start, stop), ranges in segments:
        for q in range(start, stop):
            for a, b in ranges:
                for k in range(a, b):
                    expected[q, k] = True
    assert torch.equal(plan.dense(), expected)
    assert plan.pairs == expected.sum()
    for segment, (q, _) in zip(plan.segments, segments, strict=True):
        assert segment.queries == q
        assert segment.num_keys == expected[q[0]].sum()
        ends = [end for r in segment.keys for end in r]
        assert ends == sorted(set(ends))  # in order, apart, none empty: no key twice, and no more ranges than needed


@given(plans, st.data())
def test_rows_are_the_rows_of_the_dense_mask(plan, data):
    start = data.draw(st.integers(0, plan.queries - 1))
    stop = data.draw(st.integers(start + 1, plan.queries))
    rows = plan.rows(Range(start, stop))
    assert torch.equal(rows.dense(), plan.dense()[start:stop])
    assert rows.pairs == plan.dense()[start:stop].sum()


@pytest.mark.parametrize("queries", [Range(-1, 3), Range(0, 12), Range(11, 13), Range(2, 2)])
def test_rows_outside_the_query_space_are_an_error(queries):
    with pytest.raises(ValueError, match=r"^segments: "):
        bidirectional(Layout([[A, A, A, B]])).rows(queries)


def from_varlen(varlen, queries, keys):
    """Who sees whom, as a variable-length kernel reads its arguments."""
    dense = torch.zeros(queries, keys, dtype=torch.int64)
    for i, used in enumerate(varlen.seqused_k.tolist()):
        q = slice(varlen.cu_seqlens_q[i], varlen.cu_seqlens_q[i + 1])
        places = torch.arange(varlen.cu_seqlens_k[i], varlen.cu_seqlens_k[i] + used)
        for k in places if varlen.key_index is None else varlen.key_index[places]:
            dense[q, k] += 1
    return dense


def check_varlen(plan):
    varlen = plan.varlen()
    sequences = len(plan.segments)
    assert torch.equal(from_varlen(varlen, plan.queries, plan.keys), plan.dense().long())  # 1, not 2: no key twice
    sizes = varlen.cu_seqlens_q.diff()
    assert (len(sizes), varlen.seqused_k.shape) == (sequences, (sequences,))
    assert varlen.cu_seqlens_q[0] == 0
    assert varlen.cu_seqlens_q[-1] == plan.queries
    assert (varlen.max_seqlen_q, varlen.max_seqlen_k) == (sizes.max(), varlen.seqused_k.max())
    assert {varlen.cu_seqlens_q.dtype, varlen.cu_seqlens_k.dtype, varlen.seqused_k.dtype} == {torch.int32}
    assert (varlen.key_index is None) == all(len(s.keys) == 1 for s in plan.segments)
    assert varlen.cu_seqlens_k.shape == (sequences + 1,)
    if varlen.key_index is not None:  # end to end
        assert torch.equal(varlen.cu_seqlens_k.diff(), varlen.seqused_k)
        assert varlen.cu_seqlens_k[-1] == len(varlen.key_index)


@given(plans)
def test_varlen_equals_dense(plan):
    check_varlen(plan)


@given(layouts(), st.sampled_from(sorted(PATTERNS)))
def test_varlen_of_every_pattern_needs_no_gather(layout, name):
    plan = PATTERNS[name](layout)
    assert plan.varlen().key_index is None
    check_varlen(plan)


@given(st.data())
def test_varlen_of_a_history_equals_dense(data):
    layout = data.draw(layouts())
    check_varlen(selected_history(layout, data.draw(histories(layout))))


def test_both_varlen_forms_occur():
    layout = Layout([[A, B, A]])
    near, far = (selected_history(layout, [[], [], [shot]]).varlen() for shot in (1, 0))
    assert near.key_index is None
    assert near.cu_seqlens_k.tolist() == [0, 3, 3, 7]
    assert far.key_index.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 6]


def blocks_of(dense, block_size):
    """``(some, full)`` of every block; a block that the space does not fill is not full."""
    (query_block, key_block), (queries, keys) = block_size, dense.shape
    rows, columns = -(-queries // query_block), -(-keys // key_block)
    padded = torch.zeros(rows * query_block, columns * key_block, dtype=torch.bool)
    padded[:queries, :keys] = dense
    blocks = padded.unflatten(1, (columns, key_block)).unflatten(0, (rows, query_block)).movedim(1, 2)
    return blocks.flatten(2).any(-1), blocks.flatten(2).all(-1)


def listed(num_blocks, indices):
    """The blocks that a BlockMask lists, as a boolean matrix."""
    out = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(num_blocks[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        assert sorted(columns) == list(range(len(columns)))
        out[row, columns[:count]] = True
    return out


def check_block_mask(plan, block_size):
    dense = plan.dense()
    mask = plan.block_mask(block_size=block_size)
    zero, q, k = torch.tensor(0), torch.arange(plan.queries)[:, None], torch.arange(plan.keys)[None]
    assert torch.equal(mask.mask_mod(zero, zero, q, k), dense)
    some, full = blocks_of(dense, block_size)
    assert torch.equal(mask.to_dense()[0, 0].bool(), some)
    assert torch.equal(listed(mask.kv_num_blocks, mask.kv_indices), some & ~full)
    assert torch.equal(listed(mask.full_kv_num_blocks, mask.full_kv_indices), full)
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), (some & ~full).T)  # the backward's
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), full.T)
    assert mask.shape == (1, 1, plan.queries, plan.keys)
    assert tuple(mask.BLOCK_SIZE) == block_size


@given(plans, st.tuples(st.integers(1, 11), st.integers(1, 11)))
def test_block_mask_equals_dense(plan, block_size):
    check_block_mask(plan, block_size)


@given(st.data())
def test_block_mask_of_every_pattern_equals_dense(data):
    layout = data.draw(layouts(max_scenes=2))
    block_size = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    for pattern in PATTERNS.values():
        check_block_mask(pattern(layout), block_size)
    check_block_mask(selected_history(layout, data.draw(histories(layout))), block_size)


@pytest.mark.internals
def test_block_mask_equals_the_one_that_torch_makes_of_the_dense_mask():
    shots = [Shot(text=17, grid=(2, 9, 11)), Shot(text=0, grid=(1, 16, 16)), Shot(text=5, grid=(3, 7, 13))]
    plan = selected_history(Layout([shots, shots[:1]]), [[], [0], [0], []])
    dense = plan.dense()
    oracle = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, plan.queries, plan.keys, device="cpu")
    mask = plan.block_mask()
    assert mask.BLOCK_SIZE == oracle.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        ours, theirs = ((getattr(m, f"{kind}_num_blocks"), getattr(m, f"{kind}_indices")) for m in (mask, oracle))
        assert torch.equal(ours[0], theirs[0])
        assert ours[0].sum() > 0  # full and partial blocks both occur
        assert torch.equal(listed(*ours), listed(*theirs))
        assert (ours[0].dtype, ours[1].dtype) == (theirs[0].dtype, theirs[1].dtype)


@pytest.mark.internals
@given(plans, st.sampled_from([1, 3]), st.sampled_from([2, 8]))
def test_flops_are_those_that_run(plan, heads, head_dim):
    q, k, v = (torch.zeros(1, n, heads, head_dim, requires_grad=True) for n in (plan.queries, plan.keys, plan.keys))
    with Operations() as forward:
        out = sdpa(q, k, v, plan, 1.0)
    with Operations() as backward:
        out.sum().backward()
    assert forward.total == plan.flops(heads=heads, head_dim=head_dim)
    assert backward.total == plan.flops(heads=heads, head_dim=head_dim, backward=True)


@given(raw_plans())
def test_equal_plans_are_one_key(raw):
    queries, keys, segments = raw
    plan = AttentionPlan(queries, keys, tuple(Segment(q, tuple(k)) for q, k in segments))
    hash(plan)
    split = tuple(
        Segment(q, tuple((i, i + 1) for a, b in reversed(ranges) for i in range(a, b))) for q, ranges in segments
    )
    twins = [AttentionPlan(queries, keys, split), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))]
    assert {plan, *twins} == {plan}
    assert AttentionPlan(queries, keys + 1, plan.segments) != plan
    *before, last = plan.segments
    seeing_all = AttentionPlan(queries, keys, (*before, Segment(last.queries, (Range(0, keys),))))
    assert (seeing_all == plan) == (last.num_keys == keys)


def test_patterns_that_coincide_are_one_plan():
    layout = Layout([[A]])
    assert {bidirectional(layout), context_causal(layout), own_shot(layout)} == {own_shot(layout)}
    assert len({pattern(Layout([[A, B]])) for pattern in PATTERNS.values()}) == 3


def text_of_the_past(layout):
    return seen_text(layout, context_causal(layout.video_only))


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), own_text, own_and_global_text, text_of_the_past])
def test_a_plan_costs_per_shot_never_per_token(pattern):
    layout = Layout([[Shot(text=1000, grid=(100, 1000, 1000))] * 9, [Shot(text=1, grid=(100, 1000, 1000))]])
    assert layout.tokens > 10**9
    tracemalloc.start()
    plan = pattern(layout)
    rows = plan.rows(Range(5, plan.queries - 5))
    assert rows.pairs < plan.pairs
    assert plan == pattern(layout)
    assert {plan: plan.varlen().max_seqlen_q}[plan] >= 10**8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_pairs_of_a_billion_tokens():
    size = 10**8
    plan = context_causal(Layout([[Shot(text=0, grid=(1, 1, size))] * 10]))
    assert plan.pairs == sum((i + 1) * size**2 for i in range(10))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_block_mask_of_a_long_scene_is_small(name):
    shot = Shot(text=111, grid=(11, 30, 34))
    plan = PATTERNS[name](Layout([[shot] * 9]))
    assert plan.queries > 100_000
    mask = plan.block_mask()
    tensors = [x for x in vars(mask).values() if isinstance(x, torch.Tensor)]
    tables = [c.cell_contents for c in mask.mask_mod.__closure__ if isinstance(c.cell_contents, torch.Tensor)]
    assert len(tensors) == 8
    assert len(tables) == 3
    assert sum(x.untyped_storage().nbytes() for x in (*tensors, *tables)) < 50 * 2**20


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], r"they end at query 0, expected 6, the size of the query space"),
        ([((0, 5), [(0, 4)])], r"they end at query 5, expected 6"),
        ([((0, 7), [(0, 4)])], r"they end at query 7, expected 6"),
        ([((1, 6), [(0, 4)])], r"segment 0 has queries \(1, 6\), expected a range from 0 on"),
        ([((0, 2), [(0, 4)]), ((3, 6), [(0, 4)])], r"segment 1 has queries \(3, 6\), expected a range from 2 on"),
        ([((0, 4), [(0, 4)]), ((3, 6), [(0, 4)])], r"segment 1 has queries \(3, 6\), expected a range from 4 on"),
        ([((3, 6), [(0, 4)]), ((0, 3), [(0, 4)])], r"segment 0 has queries \(3, 6\), expected a range from 0 on"),
        ([((0, 0), [(0, 4)]), ((0, 6), [(0, 4)])], r"segment 0 has queries \(0, 0\), expected a range from 0 on"),
        ([((0, 6), [])], r"the queries \(0, 6\) of segment 0 see no key, expected at least one"),
        ([((0, 6), [(2, 2)])], r"the queries \(0, 6\) of segment 0 see no key"),
        ([((0, 6), [(0, 5)])], r"segment 0 sees keys \[\(0, 5\)\], expected ranges within \(0, 4\)"),
        (
            [((0, 6), [(2, 3), (-1, 1)])],
            r"segment 0 sees keys \[\(-1, 1\), \(2, 3\)\], expected ranges within \(0, 4\)",
        ),
        ([((0, 6), [(0, 4), (3, 1)])], r"key ranges \[\(3, 1\)\] stop before they start"),
    ],
)
def test_a_plan_refuses(segments, message):
    with pytest.raises(ValueError, match=f"^segments: {message}"):
        AttentionPlan(6, 4, tuple(Segment(Range(*q), tuple(Range(*r) for r in keys)) for q, keys in segments))


@given(layouts())
def test_the_form_is_what_the_segments_are(layout):
    for plan in (
        bidirectional(layout),
        context_causal(layout),
        own_shot(layout),
        *map(context_causal(layout).rows, layout.spans),
    ):
        seen = [{key for r in keys for key in range(*r)} for _, keys in plan.segments]
        contiguous = all(max(keys) - min(keys) + 1 == len(keys) for keys in seen)
        apart = sum(map(len, seen)) == len(set().union(*seen))
        expected = "gathered" if not contiguous else "dense" if len(seen) == 1 else "packed" if apart else "overlapping"
        assert plan.form == expected


def test_the_forms_of_lcts_patterns():
    scene = Layout([[A, B, A]])
    packed = Layout([[A, B], [A]])
    assert bidirectional(scene).form == "dense"
    assert bidirectional(packed).form == own_shot(scene).form == own_text(Layout([[A, A]])).form == "packed"
    assert context_causal(scene).form == context_causal(packed).form == "overlapping"
    assert context_causal(scene).rows(scene.spans[-1]).form == "dense"
    assert selected_history(scene, [[], [0], [0]]).form == "gathered"
    assert own_and_global_text(Layout([[GLOBAL, A, A]])).form == "gathered"
