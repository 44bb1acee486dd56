"""Attention plans: ranges, rows, varlen and block masks of what is seen."""

import copy
import pickle
import tracemalloc

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import (
    PATTERNS,
    bidirectional,
    context_causal,
    own_and_global_text,
    own_shot,
    own_text,
    seen_text,
    selected_history,
)
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins.torch_kernels import sdpa
from lct_core.testing.strategies import layouts
from tests.operations import Operations
from tests.plans import GLOBAL, A, B, check_varlen, histories


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
def test_block_mask_equals_torchs_own():
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
