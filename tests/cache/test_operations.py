"""Any order of operations on a cache, against a model made of lists."""

import copy
import pickle
import tempfile
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lct_core import KVCache, Shot
from lct_core.cache import Budget, StagedShots
from lct_core.cache.quantize import quantize
from lct_core.testing.strategies import shots
from lct_core.testing.tolerances import BOUNDS, error
from tests.cache.caches import scene_model
from tests.draws import draws

FLOAT32 = BOUNDS[torch.float32]


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
        origins, extents = (tuple(entry[name] for entry in entries) for name in ("origin", "extent"))
        levels = torch.tensor([entry["level"] for entry in entries]).T
        staged = StagedShots(tuple(counts), levels, origins, extents)
        branch.staged, seen = None, [*branch.history, *entries]

        def call():
            on = {"scheme": "anchored", "diagonal": self.diagonal, "pairing": self.pairing}
            with branch.cache.writing(staged, **on) as write:
                for block, site in ((0, "tokens"), (0, "text"), (1, "tokens")):
                    k, v = (torch.cat([entry["sites"][site][i] for entry in entries], dim=1) for i in range(2))
                    keys, values = write((block, site), site, k, v)
                    assert torch.equal(values, torch.cat([entry["sites"][site][1] for entry in seen], dim=1))
                    assert keys.shape == values.shape
                    for entry, got in zip(
                        seen, keys.split([getattr(e["shot"], site) for e in seen], dim=1), strict=True
                    ):
                        self.check(site, entry, got)

        if self.affords(call):
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
            branch.cache._holdings[0].budget, self.budget = Budget(), Budget()
            for chosen in ([entry["id"] for entry in branch.history], sorted(branch.entries)):
                branch.cache.select(chosen, reposition=False)
                branch.show(chosen)
                self.written(branch, [Shot(1, (1, 1, 1))], 1)
        if hasattr(self, "folder"):
            self.folder.cleanup()


Operations.TestCase.settings = settings(max_examples=draws(200, 2000), stateful_step_count=20, deadline=None)
TestOperations = Operations.TestCase
