import re
from dataclasses import replace
from functools import cache as once
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from lct_backbones.mmdit import tiny
from lct_core import KVCache, Layout, Range, Shot, attention, retrofit, selected_history
from lct_core.patterns import context_causal
from lct_core.plan import AttentionPlan, Segment
from lct_core.plugins import torch_kernels
from lct_core.plugins.hooks import KernelRequest, KernelSpec, hookimpl
from lct_core.plugins.registry import Registry
from lct_core.routing import Tally, TopK, attend_routed
from lct_core.testing.strategies import layouts
from lct_core.testing.tolerances import BOUNDS, error
from tests.toys import TOYS, toy

FLOAT32 = BOUNDS[torch.float32]
LAYOUT = Layout(
    [
        [
            Shot(2, (1, 2, 2), role="global"),
            Shot(3, (3, 2, 2)),
            Shot(0, (2, 1, 3)),
            Shot(1, (3, 2, 1)),
            Shot(2, (2, 2, 2)),
        ],
        [Shot(2, (2, 1, 2)), Shot(1, (4, 1, 2))],
    ]
)
COUNTS = [
    Shot(2, (1, 2, 2), role="global"),
    Shot(3, (2, 2, 2)),
    Shot(1, (3, 1, 2)),
    Shot(2, (2, 2, 1)),
    Shot(1, (2, 2, 2)),
]
ROUTERS = [TopK(1), TopK(2, chunk=1, head_groups=2), TopK(2, chunk=2, queries=None)]


def draw_qkv(layout, *, queries=None, batch=1, heads=(4, 2), dim=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (queries or layout.tokens, heads[0]), (layout.tokens, heads[1]), (layout.tokens, heads[1])
    return [torch.randn(batch, *shape, dim, generator=generator, dtype=dtype) for shape in shapes]


@st.composite
def routers(draw):
    sizes = st.none() | st.integers(1, 3)
    return TopK(
        draw(st.integers(0, 4)),
        chunk=draw(sizes),
        queries=draw(sizes),
        head_groups=draw(st.sampled_from([1, 2])),
        causal=draw(st.booleans()),
    )


# the definition, token by token


def chunks_of(layout, frames):
    """For every token of the row its scene, its shot, and what of the shot it is pooled with."""
    row = []
    for scene, shots in enumerate(layout.scene_shots):
        for i in shots:
            length, height, width = layout.shots[i].grid
            video = [None if frames is None else f // frames for f in range(length) for _ in range(height * width)]
            text = [None if frames is None else "text"] * layout.shots[i].text
            row += [(scene, i, part) for part in (text + video if layout.text_first else video + text)]
    return row


def definition(router, q, k, layout):
    """Who sees whom, ``[batch, heads, queries, keys]``."""
    key_of, query_of = chunks_of(layout, router.chunk), chunks_of(layout, router.queries)
    behind = layout.tokens - q.shape[1]
    heads, per_key_head, per_group = q.shape[2], q.shape[2] // k.shape[2], q.shape[2] // router.head_groups
    mask = torch.zeros(len(q), heads, q.shape[1], layout.tokens, dtype=torch.bool)
    for entry in range(len(q)):
        for head in range(heads):
            group = [h for h in range(heads) if h // per_group == head // per_group]
            for mine in dict.fromkeys(query_of[behind:]):
                scene, shot, _ = mine
                alike = [i - behind for i, chunk in enumerate(query_of) if chunk == mine]
                choice = {}
                for other in dict.fromkeys(key_of):
                    later = router.causal and other[1] > shot
                    if other[0] != scene or other[1] == shot or later or layout.shots[other[1]].role == "global":
                        continue
                    pooled = [i for i, chunk in enumerate(key_of) if chunk == other]
                    products = [q[entry, alike, h].mean(0) @ k[entry, pooled, h // per_key_head].mean(0) for h in group]
                    choice[other] = float(sum(products)) / len(group)
                best = sorted(choice, key=lambda chunk: -choice[chunk])[: router.k]
                for i, other in enumerate(key_of):
                    shared = other[0] == scene and layout.shots[other[1]].role == "global"
                    seen_by_all = shared and (not router.causal or other[1] <= shot)
                    mask[entry, head, alike, i] = other in best or other[1] == shot or seen_by_all
    return mask


def dense(plans, heads):
    """The plans as one mask, ``[batch, heads, queries, keys]``."""
    each = [[plan.dense() for plan in groups for _ in range(heads // len(groups))] for groups in plans]
    return torch.stack([torch.stack(groups) for groups in each])


def masked_attention(q, k, v, mask):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@given(st.data())
def test_routes_and_attention_equal_their_definition(data):
    layout = data.draw(layouts(max_scenes=2, max_shots=3, max_text=2, max_grid=(3, 2, 2)))
    router, batch = data.draw(routers()), data.draw(st.integers(1, 2))
    current = data.draw(
        st.sampled_from([s.size for s in layout.scene_spans[-1:]] + [layout.tokens, layout.spans[-1].size])
    )
    q, k, v = draw_qkv(layout, queries=current, batch=batch, seed=data.draw(st.integers(0, 99)))
    plans, expected = router.route(q, k, layout), definition(router, q, k, layout)
    assert [len(groups) for groups in plans] == [router.head_groups] * batch
    assert torch.equal(dense(plans, 4), expected)
    assert error(attend_routed(q, k, v, plans), masked_attention(q, k, v, expected)) <= 1e-12
    for plan in (plan for groups in plans for plan in groups):  # as few segments as there are
        assert all(a.keys != b.keys for a, b in pairwise(plan.segments))


@given(layouts(), st.none() | st.integers(1, 3), st.none() | st.integers(1, 3), st.booleans())
def test_choosing_all_is_the_pattern_and_none_the_shot_alone(layout, chunk, queries, causal):
    q, k, _ = draw_qkv(layout)
    router = TopK(99, chunk=chunk, queries=queries, causal=causal)
    assert router.route(q, k, layout) == [[router(layout)]]
    assert not causal or router(layout) == context_causal(layout)
    alone = [[shots.start] if layout.shots[shots.start].role == "global" and i > shots.start else []
             for shots in layout.scene_shots for i in shots]  # fmt: skip
    assert TopK(0, chunk=chunk, queries=queries).route(q, k, layout) == [[selected_history(layout, alone)]]


def test_of_equal_chunks_the_earliest_is_chosen():
    layout = Layout([[Shot(0, (2, 1, 1))] * 9])
    q, k, _ = draw_qkv(layout)
    expected = selected_history(layout, [range(min(i, 3)) for i in range(9)])
    assert TopK(3).route(torch.zeros_like(q), k, layout) == [[expected]]
    assert TopK(6, chunk=1).route(q, torch.ones_like(k), layout) == [[expected]]


def test_chunks_that_touch_are_one_range_of_keys():
    layout = Layout([[Shot(0, (4, 1, 1)), Shot(0, (1, 1, 1))]])
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 3.0, 2.0, 0.0, 0.0])[None, :, None, None]
    for count, keys in [(1, ((1, 2), (4, 5))), (2, ((1, 3), (4, 5))), (3, ((0, 3), (4, 5))), (4, ((0, 5),))]:
        [[plan]] = TopK(count, chunk=1).route(q, k, layout)
        assert [segment.keys for segment in plan.segments] == [keys]


def test_half_precision_and_autocast_choose_as_float32_does():
    q, k, _ = draw_qkv(LAYOUT, dtype=torch.bfloat16)
    router = TopK(2, chunk=1, head_groups=2)
    expected = router.route(q.float(), k.float(), LAYOUT)
    assert router.route(q, k, LAYOUT) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert router.route(q.float(), k.float(), LAYOUT) == expected
    close = torch.tensor([1.0, 1.0, 1.0, 1 + 2**-7, 0.0])  # means of which bfloat16 makes one
    layout = Layout([[Shot(0, (2, 1, 1)), Shot(0, (2, 1, 1)), Shot(0, (1, 1, 1))]])
    [[plan]] = TopK(1).route(torch.ones(1, 1, 1, 1).bfloat16(), close[None, :, None, None].bfloat16(), layout)
    assert [segment.keys for segment in plan.segments] == [((2, 5),)]


@pytest.mark.parametrize("router", ROUTERS)
def test_entries_of_a_batch_route_by_themselves(router):
    q, k, v = draw_qkv(LAYOUT, batch=3, dtype=torch.float32)
    plans = router.route(q, k, LAYOUT)
    out = attend_routed(q, k, v, plans)
    assert any(a != b for a, b in pairwise(plans))
    for i in range(3):
        own = [x[i : i + 1].clone() for x in (q, k, v)]
        assert router.route(own[0], own[1], LAYOUT) == [plans[i]]
        assert torch.equal(attend_routed(*own, [plans[i]]), out[i : i + 1])


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_equal_dense_attention_with_the_same_choice(router):
    tensors = [x.requires_grad_() for x in draw_qkv(LAYOUT, batch=2)]
    plans = router.route(*tensors[:2], LAYOUT)
    got, expected = attend_routed(*tensors, plans), masked_attention(*tensors, dense(plans, 4))
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(out, tensors, weights) for out in (got, expected)), strict=True):
        assert error(a, b) <= 1e-12


def test_a_tally_counts_pairs():
    tally = Tally(TopK(1, chunk=1, head_groups=2))
    assert tally.kept == 1
    q, k, _ = draw_qkv(LAYOUT, batch=2)
    plans = tally.route(q, k, LAYOUT)
    assert plans == tally.router.route(q, k, LAYOUT)
    assert tally.pairs == dense(plans, 2).sum() / 2
    assert tally.full == 2 * context_causal(LAYOUT).pairs
    last = LAYOUT.spans[-1].size
    tally.route(q[:, -last:], k, LAYOUT)  # what comes behind a cache
    assert tally.full == 2 * (context_causal(LAYOUT).pairs + last * LAYOUT.scene_spans[-1].size)
    assert 0 < tally.kept == tally.pairs / tally.full < 1


# in a scene model


@once
def model(kind="mmdit"):
    if kind == "mmdit":
        return retrofit(tiny())
    adapter = toy(**TOYS[kind])
    return retrofit(adapter.model, backbone=adapter, text=getattr(adapter, "scope", "own"))


def draw(scene_model, counts, *, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"batch": batch, "generator": generator, "dtype": torch.float32}
    return [scene_model.adapter.example(shot, **options) for shot in counts]


def noise(counts):
    return torch.tensor([0.0 if shot.role == "global" else 0.2 + 0.1 * i for i, shot in enumerate(counts)])


@pytest.mark.parametrize("kind", ["mmdit", *TOYS])
@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_cached_equals_uncached(kind, router):
    scene_model = model(kind)
    router = replace(router, head_groups=min(router.head_groups, scene_model.adapter.traits.kv_heads))
    counts = [shot for shot in COUNTS if shot.role == "shot"]
    scene, cache = draw(scene_model, counts, batch=2), KVCache()
    together = scene_model(scene, noise(counts), pattern=router)
    full = scene_model(scene, noise(counts), pattern="context_causal")
    assert error(together[-1], full[-1]) > 1e-3  # something is left out
    for i, shot in enumerate(scene):
        (one,) = scene_model([shot], noise(counts)[i : i + 1], pattern=router, cache=cache)
        assert FLOAT32["cached"].given(0) >= error(one, together[i])
        cache.append(i)


@torch.no_grad()
def test_a_cached_choice_is_among_the_selected_history():
    scene, cache, levels = draw(model(), COUNTS), KVCache(), noise(COUNTS)
    for i in range(4):
        model()([scene[i]] if i else scene[:1], levels[i : i + 1], pattern=TopK(1), cache=cache)
        cache.append(i)
    cache.select([0, 3, 1])
    few, all_seen = (
        model()([scene[4]], levels[4:], pattern=pattern, cache=cache)[0] for pattern in (TopK(2), "context_causal")
    )
    assert torch.equal(few, all_seen)


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_later_shots_and_other_scenes_change_nothing(router):
    scene, levels = draw(model(), COUNTS), noise(COUNTS)
    expected = model()(scene, levels, pattern=router)
    longer = draw(model(), [Shot(4, (5, 3, 3))], seed=1)
    assert torch.equal(model()(scene[:3], levels[:3], pattern=router)[2], expected[2])
    changed = model()([*scene[:3], *longer, scene[4]], levels, pattern=router)
    assert all(torch.equal(a, b) for a, b in zip(changed[1:3], expected[1:3], strict=True))
    assert error(changed[4], expected[4]) > 1e-3
    other = draw(model(), [Shot(1, (2, 1, 2)), Shot(2, (1, 2, 2))], seed=2)
    packed = model()([other, scene], torch.cat([levels[1:3], levels]), pattern=router)[1]
    assert all(torch.equal(a, b) for a, b in zip(packed[1:], expected[1:], strict=True))


@torch.no_grad()
def test_to_choose_all_is_the_causal_model():
    scene, levels = draw(model(), COUNTS), noise(COUNTS)
    pairs = (model()(scene, levels, pattern=pattern)[1:] for pattern in (TopK(9), "context_causal"))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_checkpointing_chooses_once():
    class Counted(TopK):
        calls = 0

        def route(self, q, k, layout):
            Counted.calls += 1
            return super().route(q, k, layout)

    found = []
    for checkpointing in (False, True):
        scene_model, Counted.calls = retrofit(tiny(), gradient_checkpointing=checkpointing), 0
        outputs = scene_model(draw(scene_model, COUNTS), noise(COUNTS), pattern=Counted(1, chunk=1, head_groups=2))
        sum(x.square().mean() for x in outputs[1:]).backward()
        assert Counted.calls == len(scene_model.adapter.blocks)
        found.append([p.grad for p in scene_model.backbone.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert all(error(a, b) <= FLOAT32["checkpointed"].absolute for a, b in zip(*found, strict=True))


def test_the_page_does_what_it_says(capsys):
    page = (Path(__file__).parents[1] / "docs" / "sparse.md").read_text(encoding="utf-8")
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    assert re.fullmatch(r"\d\d% of the pairs of full context-causal attention\n", capsys.readouterr().out)


# errors, and what is kept of plans


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "k: got -1, expected an int of at least 0$"),
        ({"k": 1.5}, "k: got 1.5, "),
        ({"k": True}, "k: got True, "),
        ({"k": 1, "chunk": 0}, "chunk: got 0, expected an int of at least 1, or None for whole shots"),
        ({"k": 1, "chunk": "shot"}, "chunk: got 'shot', "),
        ({"k": 1, "queries": 0}, "queries: got 0, expected an int of at least 1, or None for whole shots"),
        ({"k": 1, "head_groups": None}, "head_groups: got None, expected an int of at least 1$"),
    ],
)
def test_wrong_numbers_are_errors(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TopK(**options)


def test_what_does_not_fit_is_an_error():
    q, k, v = draw_qkv(LAYOUT)
    for queries, keys in ((q[:, 1:], k), (q, k[:, 1:]), (q[:, :0], k)):
        with pytest.raises(
            ValueError, match=r"^q, k: got .* expected all of its keys, and the queries of all shots or"
        ):
            TopK(1).route(queries, keys, LAYOUT)
    with pytest.raises(ValueError, match=r"^head_groups: got 4 for q .* expected a divisor of the number of key heads"):
        TopK(1, head_groups=4).route(q, k, LAYOUT)
    with pytest.raises(ValueError, match=r"^plans: got those of 2 entries for q .* expected 1"):
        attend_routed(q, k, v, 2 * TopK(1).route(q, k, LAYOUT))


class Plugin:
    """A kernel that needs every segment's keys in one range."""

    @hookimpl
    def lct_kernels(self):
        def refusals(request):
            return ["it cannot gather keys"] if request.plan.form == "gathered" else []

        return [KernelSpec(name="plain", summary="for a test", load=lambda: torch_kernels.sdpa, refusals=refusals)]


def test_a_kernel_asked_for_by_name_that_cannot_gather_refuses(monkeypatch):
    own = Registry()
    own.register(Plugin(), name="test")
    monkeypatch.setattr(attention, "registry", lambda: own)
    q, k, v = draw_qkv(LAYOUT)
    near, far = (TopK(count).route(q, k, LAYOUT) for count in (9, 1))
    attend_routed(q, k, v, near, kernel="plain")
    with pytest.raises(ValueError, match=r"(?s)^kernel: no kernel for .* plain: it cannot gather keys"):
        attend_routed(q, k, v, far, kernel="plain")


def test_kernels_are_remembered_for_so_many_segments_of_plans(monkeypatch):
    monkeypatch.setattr(import_module("lct_core.plugins.registry"), "_MOST_SEGMENTS", 40)
    own, kept = Registry(), []
    for i in range(30):
        plan = AttentionPlan(4, 99, tuple(Segment(Range(q, q + 1), (Range(i, i + q + 1),)) for q in range(4)))
        request = KernelRequest(plan, torch.device("cpu"), torch.float32, 2, 2, 8, False)
        assert own.kernel("sdpa", request) is torch_kernels.sdpa
        kept.append([kind.plan for _, kind, _ in own._resolved])
        assert plan in kept[-1]
    assert [len(plans) for plans in kept] == [*range(1, 11)] * 3
