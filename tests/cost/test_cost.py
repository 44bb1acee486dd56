"""What a generation takes, planned, against the operations and tensors that there are while it runs."""

from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch

from lct_backbones.mmdit import MMDiT, tiny
from lct_core import Shot, ShotInput, registry, retrofit
from lct_core.cache import Budget, KVCache
from lct_core.cost import Cost, Live, Meter, Throughput, example, fitted, measure, passes, plan, takes_of, throughput
from lct_core.experts import Experts
from lct_core.generation import Guidance
from lct_core.generation.director import Director
from lct_core.generation.takes import Take
from lct_core.patterns import first_frames
from lct_core.routing import TopK
from tests.backbones.test_families import CASES, FAMILIES
from tests.operations import Operations
from tests.toys import Toy, ToyBackbone

pytestmark = pytest.mark.internals

FIRST = [import_module(f"tests.backbones.families.{family}").CASES[0] for family in FAMILIES]


def scene_for(model, shots, *, overall=3):
    """Shots that the model takes, behind a global one; with what a director starts from."""
    adapter, cross = model.adapter, model.adapter.traits.text == "cross"
    given = [example(adapter, shot, dtype=torch.float32) for shot in shots]
    counts = [adapter.shot(shot) for shot in given]
    text = max(overall, adapter.traits.text_tokens[0])
    first = example(
        adapter, Shot(text, (0, 0, 0) if cross else (1, *counts[0].grid[1:]), "global"), dtype=torch.float32
    )
    counts.insert(0, Shot(first.text.shape[1], (0, 0, 0) if cross else (1, *counts[0].grid[1:]), "global"))
    return counts, [ShotInput(text=first.text, extras=first.extras, role="global"), *given]


def direct(director, takes):
    for take in takes:
        director.keep(director.shoot(take), take)
    return director


def counted(run):
    with torch.no_grad(), Operations() as counter:
        run()
    return counter.total


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_every_operation_of_every_family(case):
    own = case.model()
    model = retrofit(own, text="own" if registry().adapter(own).traits.text == "joint" else "own_and_global")
    counts, scene = scene_for(model, case.shots)
    meter = Meter(model)
    for mode in ("joint", "causal") if str(case).startswith(("wan", "hunyuan_video,", "mochi")) else ("causal",):
        takes = takes_of(mode, counts)
        expected = counted(lambda takes=takes: direct(Director(model, scene, steps=1), takes))
        got = meter.cost(counts, passes(counts, takes, steps=1)).total
        learned = "mochi" in str(case)  # whose angles are a product of matrices, and left out
        assert got == pytest.approx(expected, rel=5e-3 if learned else 0)
    assert not any(weight.is_meta for weight in own.parameters())


MIXED = [
    Take((1, 2), history=(), cached=False, pattern="bidirectional"),
    Take((3,), history=(1, 2)),
    Take((4,), history=(1, 3), cached=False, pattern="bidirectional"),
    Take((5, 6), history=(4, 2)),
    Take((7,), history=(6,)),
]


@pytest.mark.parametrize("write", ["pass", "nearest"])
def test_every_operation_of_takes_that_differ(write):
    model = retrofit(tiny())
    counts, scene = scene_for(model, [Shot(n, (1, 2, n)) for n in range(1, 8)])
    run = passes(counts, MIXED, steps=2, write=write)
    expected = counted(lambda: direct(Director(model, scene, steps=2, write=write), MIXED))
    assert Meter(model).cost(counts, run).total == expected
    passes_of_their_own = {"pass": [0, 1, 2, 3, 4, 5, 6], "nearest": [0, 1, 2, 4, 5, 6]}  # 3 was made alone, by cache
    assert [step.made for step in run if step.times == 1] == [(i,) for i in passes_of_their_own[write]]


@pytest.mark.parametrize("window", [1, 3])
def test_every_operation_with_a_window_and_a_given_shot(window):
    model, steps = retrofit(tiny()), 2
    counts, scene = scene_for(model, [Shot(2, (1, 2, 2))] * 5)
    takes = takes_of("causal", counts, window=window, given=(1, 2))

    def run():
        director = Director(model, scene, steps=steps)
        director.give(1, scene[1].latents)
        director.give(2, scene[2].latents, history=(1,)[: window - 1])
        direct(director, takes)

    assert Meter(model).cost(counts, passes(counts, takes, steps=steps, window=window)).total == counted(run)


def narrow(**options):
    """A model whose activations are more than its coordinates."""
    torch.manual_seed(0)
    return retrofit(MMDiT(channels=4, text_width=16, width=128, depth=2, heads=2), **options)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        narrow,
        partial(narrow, batch_shots=True),
        *(case.model for case in FIRST if str(case).startswith(("wan", "hunyuan_video,"))),
    ],
)
def test_activations_are_those_of_a_run(make):
    model = make()
    model = model if not isinstance(model, torch.nn.Module) else retrofit(model)
    counts = [model.adapter.shot(example(model.adapter, s, dtype=torch.float32)) for s in [Shot(20, (4, 8, 8))] * 3]
    scene = [example(model.adapter, shot, dtype=torch.float32) for shot in counts]
    meter = Meter(model)
    for mode in ("joint", "causal"):
        step = passes(counts, takes_of(mode, counts), steps=1)[-1]
        cache = KVCache(capacity=sum(shot.tokens for shot in counts)) if mode == "causal" else None
        row = [scene[i] for i in step.row]
        call = partial(model, row, torch.full((len(row),), 0.5), pattern=step.pattern, cache=cache)
        if cache is not None:
            for i in step.behind:
                model([scene[i]], torch.full((1,), 0.5), pattern="context_causal", cache=cache)
                cache.append(i)
        call()
        with Live() as live:
            call()
        assert meter.activations(counts, step) == pytest.approx(live.peak, rel=0.05)


@pytest.mark.parametrize("text", ["own", "own_and_global"])
def test_a_history_that_both_branches_share(text):
    case = next(case for case in FIRST if str(case).startswith("wan"))
    model = retrofit(case.model(), text=text)
    counts, scene = scene_for(model, [case.shots[0]] * 3)
    if text == "own":  # nobody would see a global one
        counts, scene = counts[1:], scene[1:]
    positive = scene[-1].text
    guidance = Guidance(text=torch.zeros_like(positive), shared_history=True)
    director = Director(model, scene, steps=2, guidance=guidance)
    expected = counted(lambda: direct(director, takes_of("causal", counts)))
    found = plan(model, counts, steps=2, negative=counts, shared_history=True)
    assert found.cost.total == expected
    (cache,) = director.caches
    assert found.cache == cache.bytes_by_tier
    assert found.peak_cache == cache.peak_nbytes
    assert found.peak_cache < plan(model, counts, steps=2, negative=counts).peak_cache


@pytest.mark.parametrize("guided", [False, True])
def test_the_least_budget_is_enough(guided):
    model = retrofit(tiny())
    counts, scene = scene_for(model, [Shot(3, (2, 4, 4))] * 5)
    options = {"negative": counts, "steps": 2} if guided else {"steps": 2}
    for write in ("pass", "nearest"):
        budget = Budget(device=plan(model, counts, write=write, **options).least_budget)
        found = plan(model, counts, write=write, budget=budget, **options)
        assert found.cache["host"] > 0
        guidance = Guidance(text=scene[1].text, global_text=scene[0].text) if guided else None
        director = Director(
            model, scene, steps=2, write=write, guidance=guidance, new_cache=partial(KVCache, budget=budget)
        )
        caches = direct(director, takes_of("causal", counts)).caches
        near = {entry.id for cache in caches for entry in cache.shots if entry.tier == "device"}
        assert len(near) <= (1 if write == "pass" else 2)  # what a call, or keys that are held, leave room for
        held = sum(cache.peak_nbytes for cache in caches)
        assert held == found.peak_cache if write == "pass" else 0.9 * found.peak_cache < held <= found.peak_cache


@pytest.mark.parametrize(
    ("count", "guided", "options"),
    [
        (4, False, {}),
        (9, True, {}),
        (20, True, {}),
        (20, False, {"storage": "int8"}),
        (20, True, {"budget": Budget(device=500_000)}),
        (9, True, {"storage": "int8", "budget": Budget(device=400_000)}),
    ],
)
def test_the_cache_holds_what_was_planned(count, guided, options):
    model = retrofit(tiny())
    counts, scene = scene_for(model, [Shot(3, (2, 4, 4))] * count)
    guidance = Guidance(text=torch.zeros(1, 1, 16)) if guided else None
    negative = [replace(shot, text=1) for shot in counts] if guided else None
    found = plan(model, counts, steps=1, negative=negative, **options)
    director = Director(model, scene, steps=1, guidance=guidance, new_cache=partial(KVCache, **options))
    caches = direct(director, takes_of("causal", counts)).caches
    assert len(caches) == 1 + guided
    assert found.peak_cache == pytest.approx(sum(cache.peak_nbytes for cache in caches), rel=0.02)
    for tier, nbytes in found.cache.items():
        assert nbytes == pytest.approx(sum(cache.bytes_by_tier[tier] for cache in caches), rel=0.02)
    assert found.peak == found.weights + found.peak_cache + found.activations
    assert sum(take.cost.total for take in found.takes) == found.cost.total


@pytest.mark.parametrize("seen", [3, 9])
def test_there_is_room_for_a_window(seen):
    """In the plan as in the run, also where takes see more than that."""
    model = retrofit(tiny())
    counts, scene = scene_for(model, [Shot(3, (2, 4, 4))] * 9)
    takes = takes_of("causal", counts, window=seen)
    found = plan(model, counts, mode=takes, steps=1, window=3)
    (cache,) = direct(Director(model, scene, steps=1, window=3), takes).caches
    assert found.peak_cache == cache.peak_nbytes
    assert (found.peak_cache < plan(model, counts, mode=takes, steps=1).peak_cache) == (seen == 3)


def test_keys_are_planned_as_a_run_writes_them():
    """With their take's pattern."""
    model = retrofit(tiny())
    counts, scene = scene_for(model, [Shot(3, (2, 4, 4))] * 4)
    pattern = partial(first_frames, causal=True)
    takes = [replace(take, pattern=pattern) for take in takes_of("causal", counts)]
    expected = counted(lambda: direct(Director(model, scene, steps=1), takes))
    assert Meter(model).cost(counts, passes(counts, takes, steps=1)).total == expected


def test_what_goes_to_files_is_planned_too(tmp_path):
    model = retrofit(tiny())
    counts, scene = scene_for(model, [Shot(3, (2, 4, 4))] * 9)
    budget = Budget(device=300_000, host=60_000, folder=tmp_path)
    found = plan(model, counts, steps=1, budget=budget)
    assert not [*tmp_path.iterdir()]
    director = Director(model, scene, steps=1, new_cache=partial(KVCache, budget=budget))
    (cache,) = direct(director, takes_of("causal", counts)).caches
    assert found.cache == cache.bytes_by_tier
    assert found.cache["disk"]
    assert found.peak_cache == cache.peak_nbytes


def test_a_budget_too_small_is_told_in_bytes():
    with pytest.raises(ValueError, match="device=1000"):
        plan(retrofit(tiny()), SCENE, budget=Budget(device=1000))


def test_a_throughput_is_found_again_from_what_it_gives():
    true = Throughput(linear=2e9, attention=5e8, call=3e-4, shot=2e-4, together=8e8)
    kinds = ((1, 0, 1, 1, 0), (5, 3, 1, 1, 0), (5, 9, 1, 4, 9), (9, 1, 2, 2, 0), (2, 5, 1, 3, 5), (2, 9, 3, 3, 2))
    costs = [Cost(10**6 * n, 10**6 * m, k, j, 10**6 * i) for n, m, k, j, i in kinds]
    found = fitted(costs, [true.seconds(cost) for cost in costs])
    each = found.linear, found.attention, found.call, found.shot, found.together
    assert each == pytest.approx((2e9, 5e8, 3e-4, 2e-4, 8e8), rel=1e-6)
    alone = [replace(cost, together=0) for cost in costs]
    found = fitted(alone, [true.seconds(cost) for cost in alone])
    assert (found.attention, found.together) == pytest.approx((5e8, 5e8), rel=1e-6)  # it was not measured
    without = replace(true, call=0.0, shot=0.0)
    found = fitted(costs, [without.seconds(cost) for cost in costs])
    assert (found.linear, found.attention, found.together) == pytest.approx((2e9, 5e8, 8e8), rel=1e-3)


def test_where_one_term_cannot_be_told_the_rest_is_fitted():
    slow_without_attention = [Cost(10**9, 0, 1, 1), Cost(10**9, 10**6, 1, 1)]
    found = fitted(slow_without_attention, [1.0, 0.9])
    assert found.linear == found.attention > 0
    with pytest.raises(ValueError, match="costs: got 0 for 0 times"):
        fitted([], [])


def test_a_model_is_measured_and_the_result_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "_LEAST", 0.0)  # seconds of a pass
    model = retrofit(tiny())
    counts, _ = scene_for(model, [Shot(3, (2, 4, 4))] * 3)
    found = measure(model, counts, rounds=1)
    assert min(found.linear, found.attention) > 0
    assert found.where.startswith("MMDiT, float32, kernel auto, cpu")
    found.save(tmp_path / "throughput.json")
    assert Throughput.load(tmp_path / "throughput.json") == found
    planned = plan(model, counts, throughput=found)
    assert planned.seconds == pytest.approx(sum(take.seconds for take in planned.takes)) == found.seconds(planned.cost)
    assert plan(model, counts).seconds is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"linear": 1}', '{"linear": -1, "attention": 1, "call": 0, "shot": 0, "where": ""}']
)
def test_what_is_no_throughput_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: not a throughput"):
        Throughput.load(tmp_path / "other.json")


SCENE = [Shot(2, (1, 2, 2), "global"), *[Shot(2, (2, 2, 2))] * 2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "later"}, "mode: got 'later'"),
        ({"steps": 0}, "steps: got 0"),
        ({"given": (1, 2)}, r"given: got \[1, 2\]"),
        ({"given": (7,)}, r"given: got \[7\]"),
        ({"pattern": "all", "mode": "joint"}, "pattern: got 'all'"),
        ({"pattern": TopK(1), "mode": "joint"}, "pattern: got a TopK, which chooses from queries and keys"),
        ({"mode": [Take((1,), pattern=TopK(1))]}, "pattern: got a TopK"),
        ({"shared_history": True}, "shared_history: got True without negative"),
        ({"shared_history": True, "negative": SCENE}, "shared_history: got True, but the text of MMDiT"),
        ({"shared_history": True, "negative": SCENE, "write": "nearest"}, "shared_history: got True|write: got"),
        ({"write": "twice"}, "write: got 'twice'"),
        ({"mode": [Take((9,))]}, r"takes: got shots \[9\]"),
        ({"negative": SCENE[:2]}, "negative: got "),
        ({"storage": "int4"}, "storage: got 'int4'"),
        ({"budget": Budget(device=10, host=10)}, "budget"),
    ],
)
def test_what_cannot_be_planned_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan(retrofit(tiny()), SCENE, **wrong)


def test_models_that_cannot_be_planned_with_are_refused():
    with pytest.raises(ValueError, match="model: got a MMDiT, expected a SceneModel"):
        Meter(tiny())
    with pytest.raises(ValueError, match=r"model: got a Experts, expected .* of two experts, plan with one"):
        Meter(Experts(retrofit(tiny()), retrofit(tiny()), boundary=0.5))
    with pytest.raises(ValueError, match=r"scene: got roles \['global'\]"):
        plan(retrofit(tiny()), SCENE[:1])

    class Looks(ToyBackbone):
        def head(self, state):
            return super().head(state) * float(state.streams["x"].mean() > 0)

    with pytest.raises(ValueError, match=r"Toy cannot be run on the meta device.*Looks"):
        Meter(Looks(Toy())).cost(SCENE, passes(SCENE, takes_of("joint", SCENE)))
    fixed = next(case for case in CASES if "5B I2V: condition, learned" in str(case))
    with pytest.raises(ValueError, match=r"scene: got a shot of 5 text tokens and the grid \(9, 9, 9\), expected"):
        Meter(registry().adapter(fixed.model())).sites(Shot(5, (9, 9, 9)))


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"linear": 0, "attention": 1}, "linear: got 0, expected a finite number, above 0"),
        ({"linear": 1, "attention": float("nan")}, "attention: got nan, expected a finite number, above 0"),
        ({"linear": 1, "attention": 1, "call": -1}, "call: got -1, expected a finite number, 0 or more"),
        ({"linear": 1, "attention": 1, "together": True}, "together: got True, expected a finite number, above 0"),
    ],
)
def test_rates_that_nothing_has(rates, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Throughput(**rates)
