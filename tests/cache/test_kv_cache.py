"""A KV cache: what it knows, writes, copies and refuses."""

import copy
import pickle
from dataclasses import replace
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lct_backbones.mmdit import MMDiT, MMDiTBackbone, tiny
from lct_core import KVCache, Layout, Shot, ShotInput, retrofit, selected_history
from lct_core.testing.tolerances import BOUNDS, error
from tests.cache.caches import FIVE, SIXTH, Watched, call, draw, fill, scene_model, stored

FLOAT32 = BOUNDS[torch.float32]


# What it knows.


def test_an_empty_cache():
    cache = KVCache(capacity=100)
    assert (cache.shots, cache.ids, cache.end, cache.nbytes) == ((), (), 0, 0)
    cache.select([])
    cache.reposition()
    assert (cache.shots, cache.ids, cache.end, cache.nbytes) == ((), (), 0, 0)


@pytest.mark.parametrize(("scheme", "extents"), [("anchored", [3, 1, 4]), ("paper", [5, 1, 7])])
def test_it_knows_its_shots(scheme, extents):
    cache = KVCache()
    model = retrofit(tiny(), scheme=scheme)
    given = draw(*FIVE[:3], batch=2)
    t = torch.tensor([[0.25, 0.5, 0.75], [0.0, 1.0, 0.125]])
    with torch.no_grad():
        model(given[:2], t[:, :2], cache=cache)
        assert cache.ids == ()  # nothing is kept before append
        cache.append("a", ("b", 1))
        model(given[2:], t[:, 2:], cache=cache)
        cache.append(3)
    assert cache.ids == ("a", ("b", 1), 3)
    assert [entry.id for entry in cache.shots] == ["a", ("b", 1), 3]
    assert [entry.shot for entry in cache.shots] == FIVE[:3]
    assert [entry.level for entry in cache.shots] == [(0.25, 0.0), (0.5, 1.0), (0.75, 0.125)]
    assert [entry.extent for entry in cache.shots] == extents
    starts = list(accumulate(extents, initial=0))
    assert [entry.origin for entry in cache.shots] == [entry.written for entry in cache.shots] == starts[:-1]
    assert cache.end == starts[-1]


def test_bytes():
    cache = fill(KVCache(), FIVE[:3], batch=2)
    model = scene_model().backbone
    token = 2 * 4 * 2 * model.heads * model.head_dim * len(model.blocks)  # keys and values, batch of two
    history, longest = sum(shot.tokens for shot in FIVE[:3]), max(shot.tokens for shot in FIVE[:3])
    assert cache.nbytes == token * history
    rows = token * (history + longest)  # made anew, with room for the next
    cache.reposition([10, 20, 30])
    assert cache.nbytes == rows + token * history // 2  # and the keys as they were written
    cache.reposition([0, 20, 30])
    assert cache.nbytes == rows + token * (history - FIVE[0].tokens) // 2
    cache.reposition()
    assert cache.nbytes == rows


def test_capacity_is_made_room_for_at_once():
    model = scene_model().backbone
    tokens = sum(shot.tokens for shot in FIVE)
    cache = Watched(capacity=tokens + 5)
    given, pointers = draw(*FIVE), set()
    for i, shot in enumerate(given):
        call(scene_model(), shot, cache)
        cache.append(i)
        pointers.add(tuple(x.data_ptr() for views in cache.views.values() for x in views))
        assert cache.nbytes == 2 * 4 * (tokens + 5) * model.heads * model.head_dim * len(model.blocks)
    assert len(pointers) == 1


# Writing in place.


def test_steps_write_in_place_behind_the_history():
    cache = fill(Watched(), FIVE)
    kept, history = [x.clone() for x in stored(cache)], sum(shot.tokens for shot in FIVE)
    assert {x.shape[1] for x in kept} == {history}
    pointers = None
    for step in range(4):
        (shot,) = draw(SIXTH, seed=step)
        call(scene_model(), shot, cache, level=1 - step / 4)
        views = stored(cache)
        assert all(torch.equal(x[:, :history], old) for x, old in zip(views, kept, strict=True))
        assert pointers in (None, [x.data_ptr() for x in views])
        pointers = [x.data_ptr() for x in views]
    cache.append("sixth")
    after = [x.clone() for x in stored(cache)]
    call(scene_model(), draw(Shot(9, (4, 4, 4)))[0], cache)  # longer than any: room is made, the contents stay
    for x, old in zip(stored(cache), after, strict=True):
        assert torch.equal(x[:, : old.shape[1]], old)
    assert pointers != [x.data_ptr() for x in stored(cache)]


def test_the_last_step_is_what_is_kept():
    one, other = (fill(KVCache(), FIVE[:2]) for _ in range(2))
    first, second, third = draw(SIXTH, SIXTH, FIVE[3])
    call(scene_model(), first, one, level=0.9)  # as good as never made
    for cache in (one, other):
        call(scene_model(), second, cache, level=0.1)
        cache.append("sixth")
    assert torch.equal(call(scene_model(), third, one), call(scene_model(), third, other))
    assert one.shots == other.shots


def test_a_shot_can_be_given_up():
    cache, longer = fill(KVCache(), FIVE[:2]), draw(FIVE[2])[0]
    (shot,) = draw(SIXTH)
    expected = call(scene_model(), shot, cache)
    call(scene_model(), longer, cache)
    assert torch.equal(call(scene_model(), shot, cache), expected)


class Allocations(TorchDispatchMode):
    """The largest tensor with memory of its own that any operator returns, in elements."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        made = [x.untyped_storage().nbytes() // x.element_size() for x in tensors(out)
                if x.untyped_storage().data_ptr() not in given]  # fmt: skip
        self.largest = max([self.largest, *made])
        return out


def tensors(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("pattern", ["bidirectional", "context_causal"])
@torch.no_grad()
def test_no_step_copies_the_history(pattern):
    model, counts = scene_model(), [Shot(8, (4, 4, 4))] * 8
    cache = fill(KVCache(), counts)
    (shot,) = draw(Shot(1, (1, 2, 2)))
    call(model, shot, cache)  # makes room
    history = sum(shot.tokens for shot in counts) * model.backbone.heads * model.backbone.head_dim
    with Allocations() as step:
        model([shot], torch.tensor([0.5]), pattern=pattern, cache=cache)
    assert 0 < step.largest < history / 4
    with Allocations() as copying:  # which this would see
        model(
            [shot],
            torch.tensor([0.5]),
            pattern=lambda row: selected_history(row, [[]] * 8 + [[0, 2, 3, 4, 6]]),
            cache=cache,
        )
    assert copying.largest > history / 4


# Batches, pickles and refusals.


@torch.no_grad()
def test_entries_of_a_batch_do_not_mix():
    together = fill(KVCache(), FIVE, batch=3)
    together.select([3, 0])
    (shot,) = draw(SIXTH, batch=3, seed=5)
    out = call(scene_model(), shot, together)
    for entry in range(3):
        alone = KVCache()
        for i, given in enumerate(draw(*FIVE, batch=3)):
            call(scene_model(), one_of(given, entry), alone)
            alone.append(i)
        alone.select([3, 0])
        assert (
            error(out[entry, None], call(scene_model(), one_of(shot, entry), alone)) <= FLOAT32["definition"].absolute
        )


def one_of(shot, entry):
    return ShotInput(latents=shot.latents[entry, None], text=shot.text[entry, None])


@pytest.mark.parametrize("twin_of", [lambda cache: pickle.loads(pickle.dumps(cache)), copy.deepcopy])
@torch.no_grad()
def test_a_copy_goes_its_own_way(twin_of):
    cache = fill(KVCache(), FIVE)
    cache.select([3, 1])
    twin = twin_of(cache)
    assert (twin.shots, twin.ids, twin.nbytes) == (cache.shots, cache.ids, cache.nbytes)
    shot, other = draw(SIXTH, SIXTH)
    expected = call(scene_model(), shot, cache)
    assert torch.equal(call(scene_model(), shot, twin), expected)
    call(scene_model(), other, twin)
    twin.append("other")
    twin.reposition([7, 8, 9])
    assert torch.equal(call(scene_model(), shot, cache), expected)
    assert not torch.equal(call(scene_model(), shot, twin), expected)
    twin.select(range(5))  # the keys as they were written are copied too
    cache.select(range(5))
    assert torch.equal(call(scene_model(), shot, twin), call(scene_model(), shot, cache))


def test_a_cache_is_for_generation():
    cache = fill(KVCache(), FIVE[:1])
    (shot,) = draw(SIXTH)
    call(scene_model(), shot, cache)  # overwritten in part by the call that fails
    with pytest.raises(ValueError, match=r"^cache: a KV cache is for generation; call under torch.no_grad\(\)"):
        scene_model()([shot], torch.tensor([0.5]), cache=cache)
    with pytest.raises(ValueError, match=r"^append: no call has written"):
        cache.append("half written")
    assert torch.equal(call(scene_model(), shot, cache), call(scene_model(), shot, fill(KVCache(), FIVE[:1])))


def test_frozen_weights_need_no_graph():
    frozen = retrofit(tiny().requires_grad_(False))
    cache = KVCache()
    (shot,) = draw(SIXTH)
    (out,) = frozen([shot], torch.tensor([0.5]), cache=cache)
    assert torch.equal(out, call(scene_model(), shot, KVCache()))


def test_append_refuses():
    cache = KVCache()
    with pytest.raises(ValueError, match=r"^append: no call has written to this cache since"):
        cache.append("a")
    with torch.no_grad():
        scene_model()(draw(*FIVE[:2]), torch.tensor([0.5, 0.5]), cache=cache)
    for ids in ([], ["a"], ["a", "b", "c"]):
        with pytest.raises(
            ValueError, match=rf"^ids: got {len(ids)}, .*expected 2, one for each shot of the last call"
        ):
            cache.append(*ids)
    with pytest.raises(ValueError, match=r"^ids: \['a'\] are taken; the cache holds \[\]"):
        cache.append("a", "a")
    assert cache.shots == ()
    cache.append("a", "b")  # after a refusal it is still to be had
    with pytest.raises(ValueError, match=r"^append: no call has written"):
        cache.append("c", "d")
    call(scene_model(), draw(SIXTH)[0], cache)
    with pytest.raises(ValueError, match=r"^ids: \['b'\] are taken; the cache holds \['a', 'b'\]"):
        cache.append("b")
    cache.select(["a"])
    call(scene_model(), draw(SIXTH)[0], cache)
    with pytest.raises(ValueError, match=r"^ids: \['b'\] are taken; the cache holds \['a', 'b'\]"):
        cache.append("b")  # it is parked


@pytest.mark.parametrize("change", [partial(KVCache.select, ids=[0]), KVCache.reposition])
def test_what_was_written_for_other_places_cannot_be_appended(change):
    cache = fill(KVCache(), FIVE[:2])
    call(scene_model(), draw(SIXTH)[0], cache)
    change(cache)
    with pytest.raises(ValueError, match=r"^append: no call has written to this cache since the last"):
        cache.append("sixth")


@pytest.mark.parametrize("history", [[0], []])
def test_refuses_another_scheme(history):
    cache = fill(KVCache(), FIVE[:1])
    cache.select(history)  # what is parked counts too: it can be selected again
    with pytest.raises(
        ValueError, match=r"^cache: its shots were written in scheme 'anchored', this model's is 'paper'"
    ):
        call(scene_model("paper"), draw(SIXTH)[0], cache)


def test_refuses_ids_that_cannot_be_looked_up():
    cache = KVCache()
    call(scene_model(), draw(SIXTH)[0], cache)
    with pytest.raises(ValueError, match=r"^ids: got \[\[1\]\], expected hashable names"):
        cache.append([1])


def test_select_refuses_and_changes_nothing():
    cache = fill(KVCache(), FIVE[:3])
    call(scene_model(), draw(SIXTH)[0], cache)
    before = cache.shots
    with pytest.raises(ValueError, match=r"^ids: \['x', 7\] are not in the cache; it holds \[0, 1, 2\]"):
        cache.select([0, "x", 7])
    with pytest.raises(ValueError, match=r"^ids: \[\[0\]\] are not in the cache"):
        cache.select([[0]])
    with pytest.raises(ValueError, match=r"^ids: got \[0, 1, 0\], expected every shot once"):
        cache.select([0, 1, 0])
    with pytest.raises(ValueError, match=r"^origins: got 2, expected 3, one for each selected shot"):
        cache.reposition([0, 1])
    with pytest.raises(ValueError, match=r"^origins: got \[0.5\], expected whole numbers: steps along the diagonal"):
        cache.reposition([0, 0.5, 9])
    assert cache.shots == before
    cache.append("still there")


def test_a_global_shot_stays_first():
    cache = KVCache()
    (shot,) = draw(FIVE[0])
    dummy = ShotInput(latents=torch.zeros(1, 4, 1, 2, 2), text=shot.text, role="global")
    with torch.no_grad():
        assert scene_model()([dummy], torch.zeros(1), cache=cache) == [None]
        cache.append("global")
        call(scene_model(), shot, cache)
        cache.append("first")
        with pytest.raises(ValueError, match=r"^ids: got \['first', 'global'\], expected a global shot to come first"):
            cache.select(["first", "global"])
        with pytest.raises(ValueError, match=r"^scenes: shot 2 of scene 0 .* is global"):
            scene_model()([dummy], torch.zeros(1), cache=cache)
    assert cache.ids == ("global", "first")


def other_model(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return retrofit(MMDiT(**{"channels": 4, "text_width": 16, "width": 48, "depth": 3, "heads": 2, **options}))


def half_turned(model):
    """The same model, but for which channels are rotated together."""
    adapter = MMDiTBackbone(model.backbone)
    adapter.traits = replace(adapter.traits, pairing="half")
    return retrofit(model.backbone, backbone=adapter)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (scene_model, 2, r"^cache: it holds keys of batch 1, .*; this call has 2, .*; use another cache"),
        (partial(other_model, heads=4), 1, r"^cache: its shots were written by a model with other RoPE angles"),
        (partial(other_model, theta=99.0), 1, r"^cache: .* RoPE angles than this one; use another cache, or the model"),
        (lambda: half_turned(scene_model()), 1, r"^cache: .* other RoPE angles"),
        (partial(other_model, depth=4), 1, r"^cache: it holds 1 shots, but nothing for block 3, site 'self'"),
        (
            lambda: retrofit(tiny().bfloat16()),
            1,
            r"^cache: .*torch.float32; this call has 1, \[2, 24\], torch.bfloat16",
        ),
    ],
)
def test_refuses_what_does_not_fit_the_history(model, batch, message):
    model, cache = model(), fill(KVCache(), FIVE[:1])
    dtype = next(model.backbone.parameters()).dtype
    (shot,) = draw(SIXTH, batch=batch, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        call(model, shot, cache)
    (good,) = draw(SIXTH)
    untouched = fill(KVCache(), FIVE[:1])
    for each in (cache, untouched):
        each.reposition([7])  # by the angles of the model that wrote it
    assert torch.equal(call(scene_model(), good, cache), call(scene_model(), good, untouched))


def test_refuses_two_scenes():
    cache = fill(KVCache(), FIVE[:1])
    with pytest.raises(ValueError, match=r"^cache: got 2 scenes, expected one: a cache is the history of one scene"):
        scene_model()([[shot] for shot in draw(*FIVE[:2])], torch.tensor([0.5, 0.5]), cache=cache)


def test_entries_are_immutable():
    (entry,) = fill(KVCache(), FIVE[:1]).shots
    with pytest.raises(AttributeError):
        entry.origin = 3
    assert Layout([[entry.shot]]).tokens == FIVE[0].tokens
