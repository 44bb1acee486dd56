"""Where the keys and values of a cache are: tiers, budgets, forks, 8 bits. What comes out is the same everywhere."""

import gc
import weakref
from contextlib import contextmanager
from functools import cache as once

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lct_backbones.mmdit import tiny
from lct_core import KVCache, Shot, ShotInput, retrofit
from lct_core.cache import Budget, StagedShots, recency
from lct_core.cache.quantize import quantize
from lct_core.cache.tiers import bring
from lct_core.cache.working import WorkingRows

FOUR = [Shot(2, (2, 2, 3)), Shot(0, (1, 1, 1)), Shot(3, (1, 4, 2)), Shot(1, (3, 1, 2))]
FIFTH = Shot(2, (2, 3, 2))
TOKENS = sum(shot.tokens for shot in FOUR)


@once
def scene_model(device="cpu"):
    return retrofit(tiny().to(device))


def draw(*counts, seed=0, device="cpu"):
    generator, adapter = torch.Generator().manual_seed(seed), retrofit(tiny()).adapter
    given = [adapter.example(shot, batch=1, generator=generator, dtype=torch.float32) for shot in counts]
    return [ShotInput(latents=shot.latents.to(device), text=shot.text.to(device)) for shot in given]


@torch.no_grad()
def call(shot, cache, level=0.5):
    model = scene_model(str(shot.latents.device))
    return model([shot], torch.tensor([level]), pattern="context_causal", cache=cache)[0]


def fill(cache, counts=FOUR, device="cpu"):
    for i, shot in enumerate(draw(*counts, device=device)):
        call(shot, cache)
        cache.append(i)
    return cache


def token_bytes():
    model = scene_model().backbone
    return 2 * 4 * model.heads * model.head_dim * len(model.blocks)


class Watched(KVCache):
    """Keeps where the rows were that the engine got."""

    @contextmanager
    def writing(self, *args, **options):
        self.rows = []
        with super().writing(*args, **options) as write:

            def watched(*given):
                views = write(*given)
                self.rows += [x.untyped_storage().data_ptr() for x in views]
                return views

            yield watched


# The same outputs, wherever the history is.


@pytest.mark.parametrize("tiers", [["host"] * 4, ["disk"] * 4, ["device", "host", "disk", "device"]])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2)])
def test_an_offloaded_history_changes_no_bit(tmp_path, tiers, order):
    """Moved on the diagonal, where the order is another."""
    resident, cache = fill(KVCache()), fill(KVCache(budget=Budget(folder=tmp_path)))
    for i, tier in enumerate(tiers):
        cache.move(i, tier=tier)
    fifth, sixth = draw(FIFTH, FOUR[2], seed=1)
    for each in (resident, cache):
        each.select(order)
    assert [entry.tier for entry in cache.shots] == [tiers[i] for i in order]
    for _ in range(2):
        assert torch.equal(call(fifth, cache), call(fifth, resident))
    for each in (resident, cache):
        each.append("fifth")
    assert torch.equal(call(sixth, cache), call(sixth, resident))
    cache.move(*range(4), tier="device")  # and back: in rows again
    assert torch.equal(call(sixth, cache), call(sixth, resident))
    del cache, each
    gc.collect()
    assert list(tmp_path.iterdir()) == []  # files go with their last user


def test_a_history_in_8_bits_is_what_its_numbers_say():
    """As a cache in which the keys and values were those that 8 bits give."""
    for storage in ("int8", "fp8"):

        class Rounded(KVCache):
            """Rounds what a call writes."""

            def append(self, *ids):
                start = sum(entry.shot.tokens for entry in self.shots)
                stop = start + sum(shot.tokens for shot in self.staged.shots)
                for site in self._holdings[0].sites.values():
                    for x in (site.row.k, site.row.v):
                        x[:, start:stop] = quantize(x[:, start:stop], storage).dequantize()  # noqa: B023
                super().append(*ids)

        rounded, small, native = Rounded(), KVCache(storage=storage), KVCache()
        for i, shot in enumerate(draw(*FOUR)):
            assert torch.equal(call(shot, small), call(shot, rounded))
            for each in (rounded, small):
                each.append(i)
        fill(native)
        (fifth,) = draw(FIFTH, seed=1)
        assert torch.equal(call(fifth, small), call(fifth, rounded))
        assert not torch.equal(call(fifth, small), call(fifth, native))
        assert set(small.errors) == set(range(4))
        assert all(0 < e < 0.1 for errors in small.errors.values() for e in errors)
        assert native.errors == {}
        held = small.bytes_by_tier["device"]
        small.move(*range(4), tier="host")
        assert held - small.bytes_by_tier["device"] >= small.bytes_by_tier["host"] > TOKENS * token_bytes() / 4


def test_appending_keeps_what_was_held():
    for storage in ("native", "int8"):
        plain, cache = (KVCache(storage=storage) for _ in range(2))
        first, second, third = draw(*FOUR[:3])
        for each in (plain, cache):
            call(first, each)
            each.append("first")
        call(second, plain, level=0.1)
        plain.append("second")
        call(second, cache, level=0.1)
        cache.hold()
        assert cache.staged.levels.item() == pytest.approx(0.1)
        call(second, cache, level=0.9)
        call(third, cache)
        cache.append("second")
        assert cache.shots == plain.shots
        assert torch.equal(call(third, cache), call(third, plain))
        with pytest.raises(ValueError, match=r"^hold: no call has written"):
            fill(KVCache(), FOUR[:1]).hold()


# Forks.


@pytest.mark.parametrize("first", ["original", "fork"])
@pytest.mark.parametrize("staged", [False, True])
@torch.no_grad()
def test_forks_share_until_they_differ(first, staged):
    cache = fill(Watched(capacity=200))
    fifth, other, sixth = draw(FIFTH, FIFTH, FOUR[0], seed=1)
    call(fifth, cache)
    shared = set(cache.rows)
    if not staged:
        cache.append("fourth")
    fork = cache.fork()
    fork.__class__ = Watched
    assert fork.staged is None
    assert {
        x.untyped_storage().data_ptr() for s in fork._holdings[0].sites.values() for x in (s.row.k, s.row.v)
    } == shared
    branches = [(cache, fifth), (fork, other)]
    for each, shot in branches if first == "original" else branches[::-1]:
        if each is fork or not staged:  # else it has written before the fork
            call(shot, each)
        each.append("fifth")
    assert set(cache.rows).isdisjoint(fork.rows)
    assert shared == set(cache.rows if staged or first == "original" else fork.rows)  # who came first stayed
    for each, shot in branches:
        alone = fill(KVCache())
        for i, behind in [("fourth", fifth)] * (not staged) + [("fifth", shot)]:
            call(behind, alone)
            alone.append(i)
        assert torch.equal(call(sixth, each), call(sixth, alone))
    fork.select([2, 0])
    fork.drop(1)
    assert cache.ids[:4] == (0, 1, 2, 3)


def test_dependents():
    cache = fill(KVCache(), FOUR[:1])
    for seen, i in (([0], 1), ([], 2), ([1], 3), ([2], 4)):
        cache.select(seen)
        call(draw(FOUR[0])[0], cache)
        cache.append(i)
    assert cache.dependents(0) == (1, 3)
    assert cache.dependents(2) == (4,)
    assert cache.dependents(3) == ()
    cache.drop(1)
    assert cache.dependents(1) == (3,)  # whose traces are there still
    with pytest.raises(ValueError, match=r"^ids: \['x'\] are not in the cache"):
        cache.dependents("x")


def test_a_selection_that_changes_no_row_copies_nothing():
    """Of a model that cross-attends its text, another global prompt costs its text alone."""
    cache, size = KVCache(), (1, 2, 3)
    prompts, shot = [Shot(2, (0, 0, 0), role="global"), Shot(4, (0, 0, 0), role="global")], Shot(3, (1, 2, 2))
    for i, each in enumerate([*prompts, shot]):
        if i:
            cache.select([])
        staged = StagedShots((each,), torch.zeros(1, 1), (0,), (1,))
        with cache.writing(staged, scheme="anchored", diagonal=None, pairing=None) as write:
            for space in ("video", "text"):
                k = torch.randn(1, getattr(each, space), *size[1:])
                write((0, space), space, k, k)
        cache.append(i)
    cache.select([0, 2])
    video, text = (cache._holdings[0].sites[0, space].row for space in ("video", "text"))
    cache.select([1, 2])
    assert cache._holdings[0].sites[0, "video"].row is video
    assert cache._holdings[0].sites[0, "text"].row is not text


# Budgets.


def test_a_budget_keeps_what_is_worth_most(tmp_path):
    each, batch = [Shot(2, (1, 3, 2))] * 4, 8 * token_bytes()
    budget = Budget(device=5 * batch, host=2 * batch, folder=tmp_path)
    cache = fill(KVCache(budget=budget), each)
    assert [entry.tier for entry in cache.shots] == [
        "host",
        "host",
        "device",
        "device",
    ]
    cache.select([])
    cache.pin(0)
    cache.select([1, 0])
    assert {e.id: e.tier for e in cache.held}[0] == "device"
    assert cache.peak_nbytes <= budget.device
    assert recency(cache.held)[0] == 0
    resident = fill(KVCache(), each)
    resident.select([1, 0])
    (fifth,) = draw(FIFTH, seed=1)
    assert torch.equal(call(fifth, cache), call(fifth, resident))


def test_a_budget_too_small_is_refused_first():
    shot = Shot(2, (1, 3, 2))
    cache = KVCache(budget=Budget(device=3 * 8 * token_bytes(), host=0))
    fill(cache, [shot])
    call(draw(shot)[0], cache)
    before, shots = cache.nbytes, cache.shots
    (longer,) = draw(Shot(2, (8, 3, 2)))
    with pytest.raises(ValueError, match=r"^budget: .*; give a larger budget, a folder=, a storage in 8 bits, drop"):
        call(longer, cache)
    assert (cache.nbytes, cache.shots) == (before, shots)
    call(draw(shot)[0], cache)  # it goes on
    with pytest.raises(ValueError, match=r"^device: got -1"):
        Budget(device=-1)
    with pytest.raises(ValueError, match=r"^policy: got 'recency', expected a function"):
        Budget(policy="recency")
    with pytest.raises(ValueError, match=r"^storage: got 'int4'"):
        KVCache(storage="int4")
    for capacity in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"^capacity: got .*, expected a number of tokens, 0 or more"):
            KVCache(capacity=capacity)
    with pytest.raises(ValueError, match=r"^budget: got 80, expected Budget\(device=...,"):
        KVCache(budget=80)
    with pytest.raises(ValueError, match=r"^policy: it ranks \[\]"):
        fill(KVCache(budget=Budget(host=1, policy=lambda shots: [])), [shot])
    with pytest.raises(ValueError, match=r"no folder for files"):
        fill(KVCache(), [shot]).move(0, tier="disk")


class Live(TorchFunctionMode):
    """The most bytes alive at once in tensors that were made with ``torch.empty``: what a cache holds."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.empty:
            self.live += out.nbytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(out, self.gone, out.nbytes)
        return out

    def gone(self, nbytes):
        self.live -= nbytes


def keep(cache, i, shot, device="cpu"):
    """What a call and append do, at the engine's side."""
    staged = StagedShots((shot,), torch.zeros(1, 1), (cache.end,), (3,))
    diagonal = torch.ones(1, 2, dtype=torch.float64, device=device)
    x = torch.ones(1, shot.tokens, 2, 8, device=device)
    with cache.writing(staged, scheme="anchored", diagonal=diagonal, pairing="half") as write:
        for block in range(3):
            write((block, "self"), "tokens", x, x)
    cache.append(i)


@pytest.mark.parametrize("storage", ["native", "int8"])
@pytest.mark.parametrize("capacity", [0, 200])
def test_the_peak_is_what_was_alive(capacity, storage):
    """While rows grow, where a window slides and comes back, and where shots go."""
    with Live() as live:
        cache = KVCache(capacity=capacity, storage=storage)
        steps = [(lambda i=i: cache.select(range(i - 3, i))) for i in range(5, 8)]
        steps += [lambda: cache.select(range(8)), lambda: cache.drop(3, 4, 5), lambda: cache.select([7, 0])]
        for i, shot in enumerate([*FOUR, *FOUR]):
            if i > 4:
                steps.pop(0)()
            keep(cache, i, shot)
            assert (cache.nbytes, cache.peak_nbytes) == (live.live, live.peak)
        for step in steps:
            step()
            assert (cache.nbytes, cache.peak_nbytes) == (live.live, live.peak)


@pytest.mark.parametrize("storage", ["native", "int8"])
def test_tensors_on_meta_give_the_numbers_of_a_run(storage):
    found = []
    for device in ("cpu", "meta"):
        cache = KVCache(capacity=40, storage=storage)
        for i, shot in enumerate([*FOUR, *FOUR]):
            cache.select(list(cache.ids)[-2:])
            keep(cache, i, shot, device)
        cache.move(0, 7, tier="host")
        keep(cache, 8, FIFTH, device)
        found.append((cache.peak_nbytes, cache.bytes_by_tier))
    assert found[0] == found[1]


def test_the_second_working_row_of_a_gpu_is_part_of_the_budget():
    found = {}
    for kind in ("cpu", "cuda"):
        cache = KVCache(storage="int8", budget=Budget(device=220_000))
        cache._holdings[0].working = WorkingRows(kind=kind)
        for i, shot in enumerate([Shot(2, (4, 4, 4))] * 9):
            keep(cache, i, shot, "meta")
        assert cache.peak_nbytes <= 220_000
        keep(cache, 9, FIFTH, "meta")
        found[kind] = cache.peak_nbytes, sum(entry.tier == "device" for entry in cache.shots)
    (_, near), (_, near_on_gpu) = found["cpu"], found["cuda"]
    assert near > near_on_gpu > 0


def test_offloading_in_8_bits_is_part_of_the_peak(monkeypatch):
    """Where the device is another than the host, of which tensors on meta are an example."""
    alone = 2 * FIFTH.tokens * 2 * 8
    cache = KVCache(storage="int8", budget=Budget(device=10**6))
    x = torch.ones(1, FIFTH.tokens, 2, 8, device="meta")
    fifth = StagedShots((FIFTH,), torch.zeros(1, 1), (0,), (3,))
    with cache.writing(fifth, scheme="anchored", diagonal=None, pairing=None) as write:
        for block in range(3):
            write((block, "self"), "tokens", x, x)
    staged, working = 3 * alone * 4, alone * 4
    assert cache.bytes_by_tier["device"] == staged + working
    monkeypatch.setattr(WorkingRows, "release", lambda rows: None)
    cache.append(0)
    assert cache.peak_nbytes > staged + working + alone


def test_8_bits_are_brought_some_tokens_at_a_time():
    """What is elsewhere comes in 8 bits, a few thousand tokens at once."""
    x = torch.randn(1, 3 * 4096 + 5, 1, 2)
    small, brought = quantize(x, "int8"), []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.Tensor.to:
                brought.append(out.shape)
            return out

    row = torch.empty_like(x)
    with Watch():
        bring(small, row)
    assert torch.equal(row, small.dequantize())
    assert [shape[1] for shape in brought[1:]] == [4096, 4096, 4096, 5]  # behind the scales


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", ["native", "int8"])
def test_prefetch_changes_no_bit_on_a_gpu(tmp_path, storage):
    near = fill(KVCache(storage=storage), device="cuda")
    far = fill(KVCache(storage=storage, budget=Budget(folder=tmp_path)), device="cuda")
    far.move(0, 2, tier="host")
    far.move(1, tier="disk")
    (fifth,) = draw(FIFTH, seed=1, device="cuda")
    for order in ((0, 1, 2, 3), (3, 0, 1)):
        for each in (near, far):
            each.select(order)
        for _ in range(5):
            assert torch.equal(call(fifth, far), call(fifth, near))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cache_is_loaded_to_the_present_gpu(tmp_path):
    cache = fill(KVCache(), device="cuda")
    cache.save(tmp_path, scene_model("cuda:0"))
    loaded = KVCache.load(tmp_path, scene_model("cuda:0"), device="cuda")
    (fifth,) = draw(FIFTH, seed=1, device="cuda")
    assert torch.equal(call(fifth, loaded), call(fifth, cache))
