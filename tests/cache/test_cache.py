import copy
import pickle
import tempfile
from dataclasses import replace
from functools import cache as once
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

from lct_backbones.mmdit import MMDiT, MMDiTBackbone, tiny
from lct_core import KVCache, Layout, Shot, ShotInput, retrofit, selected_history
from lct_core.cache import Budget, Stage
from lct_core.cache.quantize import quantize
from lct_core.testing.strategies import shots
from lct_core.testing.tolerances import BOUNDS, error

FLOAT32 = BOUNDS[torch.float32]
DTYPES = (torch.float32, torch.bfloat16)
FIVE = [Shot(2, (2, 2, 3)), Shot(0, (1, 1, 1)), Shot(3, (1, 4, 2)), Shot(1, (3, 1, 2)), Shot(4, (2, 2, 2))]
SIXTH = Shot(2, (2, 3, 2))


@once
def scene_model(scheme="anchored"):
    return retrofit(tiny(), scheme=scheme)


def draw(*counts, batch=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [scene_model().adapter.example(shot, batch=batch, generator=generator, dtype=dtype) for shot in counts]


@torch.no_grad()
def fill(cache, counts, *, model=None, batch=1, seed=0):
    """Generate shots one by one, each under its number."""
    model = model or scene_model()
    for i, shot in enumerate(draw(*counts, batch=batch, seed=seed)):
        call(model, shot, cache)
        cache.append(i)
    return cache


@torch.no_grad()
def call(model, shot, cache, level=0.5):
    return model([shot], torch.tensor([level]), pattern="context_causal", cache=cache)[0]


class Watched(KVCache):
    """Keeps the views that the engine got."""

    def begin(self, *args):
        self.views = {}
        super().begin(*args)

    def write(self, key, space, k, v):
        self.views[key] = super().write(key, space, k, v)
        return self.views[key]


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


def stored(cache):
    return [x for views in cache.views.values() for x in views]


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


# Selecting and moving, against a definition.


@pytest.mark.parametrize("scheme", ["anchored", "paper"])
@pytest.mark.parametrize("chosen", [(0, 3), (3, 0), (4,), (2, 1, 4), ()])
@pytest.mark.parametrize("reposition", [True, False])
@torch.no_grad()
def test_a_sixth_shot_behind_some_of_five(scheme, chosen, reposition):
    """The same keys and values as were written, the keys turned anew at their new places, and plain attention."""
    adapter, written = MMDiTBackbone(tiny()), []
    qkv = adapter.qkv
    adapter.qkv = lambda block, site, state: (written.append(qkv(block, site, state)), written[-1])[1]
    model = retrofit(adapter.model, scheme=scheme, backbone=adapter)
    cache = fill(KVCache(), FIVE, model=model)
    parts = [written[3 * i : 3 * i + 3] for i in range(5)]  # by shot, then block
    places = {i: entry.origin for i, entry in enumerate(cache.shots)}
    extents = {i: entry.extent for i, entry in enumerate(cache.shots)}
    if reposition:
        places = dict(zip(chosen, accumulate([extents[i] for i in chosen], initial=0), strict=False))
    end = max((places[i] + extents[i] for i in chosen), default=0)
    (shot,), t = draw(SIXTH, seed=9), torch.tensor([0.7])
    cache.select(chosen, reposition=reposition)
    (got,) = model([shot], t, pattern="context_causal", cache=cache)

    def turned(x, count, origin):
        return freshly_turned(x, adapter.rope(coordinates(count, origin, scheme)))

    state = adapter.encode(shot, 1000 * t)
    for block, index in zip(adapter.blocks, range(3), strict=True):
        q, k, v, aux = qkv(block, None, state)
        keys = [turned(parts[i][index].k, FIVE[i], places[i]) for i in chosen] + [turned(k, SIXTH, end)]
        values = torch.cat([parts[i][index].v for i in chosen] + [v], dim=1)
        out = exact_attention(turned(q, SIXTH, end), torch.cat(keys, dim=1), values)
        state.streams.update(adapter.finish(block, None, state, out, aux))
    expected = adapter.unpatchify(adapter.head(state), SIXTH)
    assert error(got, expected) <= FLOAT32["cached"].absolute


def coordinates(shot, origin, scheme):
    start = origin + (shot.text if scheme == "paper" else 0)
    text = [[origin + (i if scheme == "paper" else 0)] * 3 for i in range(shot.text)]
    frames, height, width = shot.grid
    video = [[start + f, start + y, start + x] for f in range(frames) for y in range(height) for x in range(width)]
    return torch.tensor(text + video, dtype=torch.float64)


def freshly_turned(x, angles):
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)


def exact_attention(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).float()


@torch.no_grad()
def test_selection_order_is_the_order_on_the_diagonal():
    (shot,) = draw(SIXTH)
    outputs = {}
    for chosen in [(0, 3), (3, 0), (0,), (3,)]:
        cache = fill(KVCache(), FIVE)
        cache.select(chosen)
        assert tuple(entry.id for entry in cache.shots) == chosen
        assert [entry.origin for entry in cache.shots] == [0, 3][: len(chosen)]
        assert set(cache.ids) == set(range(5))
        assert cache.end == 3 * len(chosen)
        outputs[chosen] = call(scene_model(), shot, cache)
    for a in outputs:
        for b in outputs:
            assert (error(outputs[a], outputs[b]) < 1e-4) == (a == b)


@torch.no_grad()
def test_parked_shots_come_back():
    cache, untouched = (fill(KVCache(), FIVE) for _ in range(2))
    (shot,) = draw(SIXTH)
    size = cache.nbytes
    cache.select([3])
    assert cache.nbytes > size  # nothing is thrown away
    call(scene_model(), shot, cache)
    cache.append("new")
    cache.select([])
    assert (cache.shots, cache.end) == ((), 0)
    cache.select(range(5))
    assert cache.shots == untouched.shots
    assert torch.equal(call(scene_model(), shot, cache), call(scene_model(), shot, untouched))  # to the last bit
    cache.select(["new", 0])
    assert [(e.id, e.written, e.origin) for e in cache.shots] == [("new", 3, 0), (0, 0, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_moving_there_and_back_is_exact_and_moves_do_not_add_up(dtype):
    model = retrofit(tiny().to(dtype))
    cache = Watched()
    raw = []
    qkv = model.adapter.qkv
    model.adapter.qkv = lambda *args: (raw.append(qkv(*args)), raw[-1])[1]
    for i, shot in enumerate(draw(*FIVE[:3], dtype=dtype)):
        call(model, shot, cache)
        cache.append(i)
    before = [x.clone() for x in stored(cache)]
    extents = [entry.extent for entry in cache.shots]
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        origins = torch.randint(-50, 500, (3,), generator=generator).tolist()
        cache.reposition(origins)
        assert [entry.origin for entry in cache.shots] == origins
        assert cache.end == max(o + e for o, e in zip(origins, extents, strict=True))
    unit = torch.ones(1, 3, dtype=torch.float64)
    steps = [o - e.written for o, e in zip(origins, cache.shots, strict=True)]
    moves = torch.cat(
        [model.adapter.rope(n * unit).expand(shot.tokens, -1, -1) for n, shot in zip(steps, FIVE, strict=False)]
    )
    places = torch.cat([coordinates(shot, origin, "anchored") for shot, origin in zip(FIVE, origins, strict=False)])
    call(model, draw(SIXTH, dtype=dtype)[0], cache)  # which shows it
    history = sum(shot.tokens for shot in FIVE[:3])
    for block, (k, v) in enumerate(cache.views.values()):
        bound = BOUNDS[dtype]["moved keys"].absolute
        k, v = k[:, :history], v[:, :history]
        assert error(k, freshly_turned(before[2 * block], moves)) <= bound  # one move from where it was written
        if dtype == torch.float32:  # in bfloat16 that was a rounding of its own
            unturned = torch.cat([raw[3 * i + block].k for i in range(3)], dim=1)
            assert error(k, freshly_turned(unturned, model.adapter.rope(places))) <= bound
        assert torch.equal(v, before[2 * block + 1])
    assert not torch.equal(cache.views[0, "self"][0], before[0])
    cache.reposition()
    call(model, draw(SIXTH, dtype=dtype)[0], cache)
    assert all(torch.equal(x[:, :history], old) for x, old in zip(stored(cache), before, strict=True))
    assert [entry.origin for entry in cache.shots] == [entry.written for entry in cache.shots]


@torch.no_grad()
def test_moving_the_whole_history_along_with_the_shot_changes_nothing():
    cache = fill(KVCache(), FIVE)
    (shot,) = draw(SIXTH)
    expected = call(scene_model(), shot, cache)
    cache.reposition([entry.origin + 1000 for entry in cache.shots])
    assert error(call(scene_model(), shot, cache), expected) <= FLOAT32["shifted"].absolute
    cache.reposition([entry.origin * 2 for entry in cache.shots])
    assert error(call(scene_model(), shot, cache), expected) > 1e-3


# Any order of operations, against a model made of lists.


class Branch:
    """A cache, and what a plain model of it says that it holds."""

    def __init__(self, cache, history=(), parked=(), staged=None, held=None):
        self.cache, self.history, self.parked = cache, list(history), list(parked)
        self.staged, self.held = staged, held

    def fork(self):
        copied = {entry["id"]: dict(entry) for entry in (*self.history, *self.parked)}
        history, parked = ([copied[entry["id"]] for entry in part] for part in (self.history, self.parked))
        return Branch(self.cache.fork(), history, parked)

    @property
    def entries(self):
        return {entry["id"]: entry for entry in (*self.history, *self.parked)}

    def show(self, history, origins=None):
        """Other shots, or the same elsewhere."""
        entries = self.entries
        self.history = [entries[i] for i in history]
        self.parked = [entry for i, entry in entries.items() if i not in history]
        self.staged = self.held = None
        for entry, origin in zip(self.history, origins or [], strict=False):
            entry["origin"] = origin

    def lined_up(self, history):
        return list(accumulate((self.entries[i]["extent"] for i in history), initial=0))[:-1]


class Operations(RuleBasedStateMachine):
    """The cache and its forks at the engine's side, and beside each nothing but lists of tensors."""

    @initialize(
        batch=st.integers(1, 2),
        pairing=st.sampled_from(["interleaved", "half"]),
        capacity=st.sampled_from([0, 30]),
        storage=st.sampled_from(["native", "native", "int8", "fp8"]),
        budget=st.sampled_from([{}, {}, {"device": 6000}, {"device": 9000, "host": 1500}, {"host": 0}]),
    )
    def start(self, batch, pairing, capacity, storage, budget):
        self.batch, self.pairing, self.storage = batch, pairing, storage
        self.folder = tempfile.TemporaryDirectory()
        self.budget = Budget(**budget, folder=Path(self.folder.name, "tier"))
        self.branches = [Branch(KVCache(capacity=capacity, storage=storage, budget=self.budget))]
        self.diagonal = torch.tensor([[0.7, 0.03]], dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(0)
        self.count = 0

    def random(self, tokens):
        return torch.randn(self.batch, tokens, 2, 5, generator=self.generator)

    def affords(self, operation, *args, **kwargs):
        """Whether the budget allows it; if not, nothing has changed."""
        try:
            operation(*args, **kwargs)
        except ValueError as refusal:
            if not str(refusal).startswith("budget: "):
                raise
            assert self.budget.device is not None
            return False
        return True

    def some(self, data):
        return data.draw(st.sampled_from(self.branches))

    def subset(self, data, entries, **bounds):
        ids = [entry["id"] for entry in entries]
        return data.draw(st.lists(st.sampled_from(ids), unique=True, **bounds)) if ids else []

    @rule(
        data=st.data(),
        counts=st.lists(shots(max_text=2, max_grid=(1, 2, 2)), min_size=1, max_size=2),
        extent=st.integers(1, 4),
    )
    def write(self, data, counts, extent):
        self.written(self.some(data), counts, extent)

    def written(self, branch, counts, extent):
        end = max((entry["origin"] + entry["extent"] for entry in branch.history), default=0)
        assert branch.cache.end == end
        entries = [
            {
                "shot": shot,
                "written": end + i * extent,
                "origin": end + i * extent,
                "extent": extent,
                "level": (0.5, 0.25),
                "pinned": False,
                "sites": {site: [self.random(getattr(shot, site)) for _ in "kv"] for site in ("tokens", "text")},
            }
            for i, shot in enumerate(counts)
        ]
        branch.cache.begin("anchored", self.diagonal, self.pairing)
        branch.staged, seen = None, [*branch.history, *entries]
        for block, site in ((0, "tokens"), (0, "text"), (1, "tokens")):
            k, v = (torch.cat([entry["sites"][site][i] for entry in entries], dim=1) for i in range(2))
            views = []
            if not self.affords(lambda: views.extend(branch.cache.write((block, site), site, k, v))):  # noqa: B023
                return
            keys, values = views
            assert torch.equal(values, torch.cat([entry["sites"][site][1] for entry in seen], dim=1))
            assert keys.shape == values.shape
            for entry, got in zip(seen, keys.split([getattr(e["shot"], site) for e in seen], dim=1), strict=True):
                self.check(site, entry, got)
        origins, extents = (tuple(entry[name] for entry in entries) for name in ("origin", "extent"))
        levels = torch.tensor([entry["level"] for entry in entries]).T
        branch.cache.stage(Stage(tuple(counts), levels, origins, extents))
        branch.staged = entries

    def check(self, site, entry, got):
        written, steps = entry["sites"][site][0], entry["origin"] - entry["written"]
        if site == "text" or steps == 0:
            assert torch.equal(got, written)
        elif got.numel():
            pairs = written[..., :4].double().unflatten(-1, (-1, 2) if self.pairing == "interleaved" else (2, -1))
            pairs = pairs if self.pairing == "interleaved" else pairs.mT
            moved = torch.view_as_real(
                torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * steps * self.diagonal)
            )
            moved = (moved if self.pairing == "interleaved" else moved.mT).flatten(-2)
            assert error(got, torch.cat([moved, written[..., 4:]], dim=-1)) <= FLOAT32["moved keys"].absolute

    @rule(data=st.data())
    def append(self, data):
        self.appended(self.some(data))

    @rule(data=st.data(), shot=shots(max_text=2, max_grid=(1, 2, 2)), extent=st.integers(1, 4))
    def write_and_append(self, data, shot, extent):
        branch = self.some(data)
        self.written(branch, [shot], extent)
        self.appended(branch)

    write_and_append_again = write_and_append_once_more = write_and_append

    def appended(self, branch):
        if (entries := branch.held or branch.staged) is None:
            with pytest.raises(ValueError, match=r"^append: no call has written"):
                branch.cache.append("nothing")
            return
        ids = [self.count + 1 + i for i in range(len(entries))]
        prompts = [f"prompt {i}" for i in ids]
        if not self.affords(branch.cache.append, *ids, prompts=prompts):
            return
        self.count += len(ids)
        saw = [entry["id"] for entry in branch.history]
        for i, entry in zip(ids, entries, strict=True):
            entry |= {"id": i, "prompt": f"prompt {i}", "saw": (*saw, *(other for other in ids if other != i))}
            if self.storage != "native":
                entry["sites"] = {
                    site: [quantize(x, self.storage).dequantize() for x in kv] for site, kv in entry["sites"].items()
                }
        branch.history += entries
        branch.staged = branch.held = None

    @rule(data=st.data())
    def hold(self, data):
        branch = self.some(data)
        if branch.staged is not None and self.affords(branch.cache.hold):
            branch.held, branch.staged = branch.staged, None

    @rule(data=st.data(), reposition=st.booleans())
    def select(self, data, reposition):
        branch = self.some(data)
        chosen = self.subset(data, branch.entries.values())
        if self.affords(branch.cache.select, chosen, reposition=reposition):
            branch.show(chosen, branch.lined_up(chosen) if reposition else None)

    @rule(data=st.data(), reposition=st.booleans())
    def reorder(self, data, reposition):
        branch = self.some(data)
        order = data.draw(st.permutations([entry["id"] for entry in branch.history]))
        if self.affords(branch.cache.reorder, order, reposition=reposition):
            branch.show(order, branch.lined_up(order) if reposition else None)

    @rule(data=st.data())
    def reposition(self, data):
        branch = self.some(data)
        ids, origins = [entry["id"] for entry in branch.history], None
        if data.draw(st.booleans()):
            origins = data.draw(st.lists(st.integers(-9, 99), min_size=len(ids), max_size=len(ids)))
        if self.affords(branch.cache.reposition, origins):
            branch.show(ids, branch.lined_up(ids) if origins is None else origins)

    @rule(data=st.data())
    def drop(self, data):
        branch = self.some(data)
        gone = self.subset(data, branch.entries.values(), max_size=2)
        if self.affords(branch.cache.drop, *gone):
            if not {entry["id"] for entry in branch.history}.isdisjoint(gone):
                branch.staged = branch.held = None
            branch.history, branch.parked = (
                [entry for entry in part if entry["id"] not in gone] for part in (branch.history, branch.parked)
            )

    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data, pinned):
        branch = self.some(data)
        chosen = self.subset(data, branch.entries.values(), max_size=2)
        if self.affords(branch.cache.pin if pinned else branch.cache.unpin, *chosen):
            for i in chosen:
                branch.entries[i]["pinned"] = pinned

    @rule(data=st.data(), tier=st.sampled_from(["device", "host", "disk"]))
    def move(self, data, tier):
        branch = self.some(data)
        chosen = self.subset(data, branch.entries.values(), max_size=2)
        try:
            if self.affords(branch.cache.move, *chosen, tier=tier):
                assert {e.tier for e in branch.cache.held if e.id in chosen} <= {tier}
        except ValueError as refusal:
            if not str(refusal).startswith("ids: ") or self.budget == Budget(folder=self.budget.folder):
                raise

    @precondition(lambda self: len(self.branches) < 4)
    @rule(data=st.data())
    def fork(self, data):
        self.branches.append(self.some(data).fork())

    @rule(data=st.data(), copied=st.sampled_from([copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))
    def copied(self, data, copied):
        branch = self.some(data)
        branch.cache = copied(branch.cache)

    @rule(data=st.data())
    def saved(self, data):
        number = data.draw(st.sampled_from(range(len(self.branches))))
        branch, folder = self.branches[number], Path(self.folder.name, str(number))
        branch.cache.save(folder, scene_model())
        branch.cache = KVCache.load(folder, scene_model(), budget=self.budget)
        branch.staged = branch.held = None

    @invariant()
    def known(self):
        names = ("id", "shot", "level", "written", "origin", "extent", "saw", "prompt", "pinned")
        for branch in self.branches:
            cache = branch.cache
            assert [tuple(getattr(e, n) for n in names) for e in cache.shots] == [
                tuple(e[n] for n in names) for e in branch.history
            ]
            assert cache.ids[: len(branch.history)] == tuple(entry["id"] for entry in branch.history)
            assert sorted(cache.ids) == sorted(branch.entries)
            assert [entry.selected for entry in cache.held] == [i < len(branch.history) for i in range(len(cache.ids))]
            limits = {"device": self.budget.device, "host": self.budget.host}
            assert all(n is None or cache.bytes_by_tier[tier] <= n for tier, n in limits.items())
            assert self.budget.device is None or cache.peak_nbytes <= self.budget.device
            assert cache.peak_nbytes >= cache.bytes_by_tier["device"]

    def teardown(self):
        for branch in getattr(self, "branches", []):  # what all of them hold in the end
            branch.cache._own.budget, self.budget = Budget(), Budget()
            for chosen in ([entry["id"] for entry in branch.history], sorted(branch.entries)):
                branch.cache.select(chosen, reposition=False)
                branch.show(chosen)
                self.written(branch, [Shot(1, (1, 1, 1))], 1)
        if hasattr(self, "folder"):
            self.folder.cleanup()


Operations.TestCase.settings = settings(max_examples=200, stateful_step_count=20, deadline=None)
TestOperations = Operations.TestCase


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
