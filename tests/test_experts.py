"""Two experts for high and low noise levels: which of them runs, and that their histories stay apart."""

import copy
from functools import partial

import pytest
import torch

from lct_backbones.mmdit import tiny
from lct_core import ExpertCache, Experts, KVCache, Layout, Shot, ShotInput, retrofit
from lct_core.cache import Budget
from lct_core.generation import Guidance, autoregressive, causal, joint
from lct_core.testing.tolerances import BOUNDS, error

FLOAT32 = BOUNDS[torch.float32]
BOUNDARY = 0.6


def expert(scale):
    model = tiny()
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    return retrofit(model)


@pytest.fixture
def experts():
    return Experts(expert(1.0), expert(0.9), boundary=BOUNDARY)


def draw(layout, *, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    adapter = retrofit(tiny()).adapter
    scene = [adapter.example(s, batch=batch, generator=generator, dtype=torch.float32) for s in layout.shots]
    return [
        ShotInput(text=given.text, role="global") if shot.role == "global" else given
        for shot, given in zip(layout.shots, scene, strict=True)
    ]


SCENE = draw(Layout([[Shot(3, (1, 1, 1), role="global"), Shot(2, (1, 2, 3)), Shot(4, (2, 2, 2)), Shot(1, (1, 3, 2))]]))


def same(got, expected):
    pairs = list(zip(got, expected, strict=True))
    assert [g is None for g, _ in pairs] == [x is None for _, x in pairs]
    return all(torch.equal(g, x) for g, x in pairs if x is not None)


@pytest.mark.parametrize("level", [0.0, 0.3, BOUNDARY - 1e-3, BOUNDARY, 0.9, 1.0])
@torch.no_grad()
def test_the_level_decides_who_runs(experts, level):
    t = torch.tensor([0.0, level, level, level])
    chosen, other = (experts.high, experts.low) if level >= BOUNDARY else (experts.low, experts.high)
    out = experts(SCENE, t)
    assert same(out, chosen(SCENE, t))
    assert not same(out, other(SCENE, t))


@torch.no_grad()
def test_the_denoised_shots_decide_and_not_those_beside_them(experts):
    t = torch.tensor([0.0, 0.1, 0.9, 0.2])
    assert same(experts(SCENE, t), experts.high(SCENE, t))  # by default the noisiest
    assert same(experts(SCENE, t, denoised=[2]), experts.high(SCENE, t))
    assert same(experts(SCENE, t, denoised=[1, 3]), experts.low(SCENE, t))


@torch.no_grad()
def test_shots_on_both_sides_are_refused(experts):
    with pytest.raises(ValueError, match=r"^t: the denoised shots are at \[.*\], on both sides of the boundary 0.6"):
        experts(SCENE, torch.tensor([0.0, 0.1, 0.9, 0.9]), denoised=[1, 2])
    scene = [ShotInput(latents=s.latents, text=s.text) for s in draw(Layout([[Shot(2, (1, 2, 2))]]), batch=2)]
    with pytest.raises(ValueError, match="call once for each side"):
        experts(scene, torch.tensor([[0.1], [0.9]]))


@torch.no_grad()
def test_one_expert_twice_is_that_expert():
    model, guidance = expert(1.0), Guidance(text=torch.zeros(1, 2, 16), scale=2.0)
    twice = Experts(model, retrofit(copy.deepcopy(model.backbone)), boundary=BOUNDARY)
    for mode in (joint, causal, autoregressive):
        got, expected = (mode(m, SCENE, steps=4, guidance=guidance) for m in (twice, model))
        assert same(got, expected)


@torch.no_grad()
def test_cached_equals_uncached_for_both_experts(experts):
    got = causal(experts, SCENE, t_c=300, steps=5, seed=3)
    uncached = autoregressive(experts, SCENE, t_c=300, steps=5, seed=3, pattern="context_causal")
    worst = max(error(g, x) for g, x in zip(got[1:], uncached[1:], strict=True))
    assert worst <= FLOAT32["cached"].absolute
    mixed = causal(experts.low, SCENE, t_c=300, steps=5, seed=3)  # else the comparison would say nothing
    assert error(mixed[3], got[3]) > 1e-2


@torch.no_grad()
def test_both_experts_must_have_written_what_is_kept(experts):
    cache, shot = ExpertCache(), SCENE[1:2]
    experts(shot, torch.tensor([0.9]), cache=cache)
    with pytest.raises(ValueError, match=r"^append: one expert alone has written these shots last"):
        cache.append("one")
    experts(shot, torch.tensor([0.1]), cache=cache, denoised=())
    experts(shot, torch.tensor([0.9]), cache=cache)  # the high one writes again
    with pytest.raises(ValueError, match=r"denoised=\(\)"):
        cache.append("one")
    experts(shot, torch.tensor([0.1]), cache=cache, denoised=())
    cache.append("one")
    assert cache.ids == ("one",)
    assert [entry.level for entry in cache.high.shots] == [entry.level for entry in cache.low.shots]
    assert cache.nbytes == cache.high.nbytes + cache.low.nbytes > 0


@torch.no_grad()
def test_a_selected_history_is_selected_for_both(experts):
    cache = ExpertCache()
    for i in (1, 2):
        experts([SCENE[i]], torch.tensor([0.1]), pattern="context_causal", cache=cache, denoised=())
        cache.append(i)
    cache.select([2])
    assert [e.id for e in cache.high.shots] == [e.id for e in cache.low.shots] == [2]
    for level in (0.9, 0.2):
        plain = KVCache()
        alone = experts.high if level >= BOUNDARY else experts.low
        for i in (1, 2):
            alone([SCENE[i]], torch.tensor([0.1]), pattern="context_causal", cache=plain)
            plain.append(i)
        plain.select([2])
        t = torch.tensor([level])
        assert same(experts([SCENE[3]], t, cache=cache), alone([SCENE[3]], t, cache=plain))


@torch.no_grad()
def test_what_a_cache_offers_is_done_to_both(experts, tmp_path):
    cache = ExpertCache(branch="positive")
    for i in (1, 2):
        experts([SCENE[i]], torch.tensor([0.1]), pattern="context_causal", cache=cache, denoised=())
        if i == 2:
            cache.hold()
            experts([SCENE[3]], torch.tensor([0.9]), cache=cache)  # one alone writes again
        cache.append(i, prompts=[f"shot {i}"])
    t = torch.tensor([0.9])
    expected = experts([SCENE[3]], t, cache=cache)
    assert cache.dependents(1) == (2,)
    assert [(e.id, e.prompt, e.branch) for e in cache.held] == [(1, "shot 1", "positive"), (2, "shot 2", "positive")]
    assert list(cache.spans()) == [1, 2]
    cache.move(1, tier="host")
    cache.pin(1)
    fork = cache.fork()
    cache.save(tmp_path, experts)
    loaded = ExpertCache.load(tmp_path, experts)
    for each in (cache, fork, loaded):
        assert same(experts([SCENE[3]], t, cache=each), expected)
    assert [e.tier for e in cache.low.shots] == ["host", "device"]
    assert cache.bytes_by_tier["host"] == cache.high.bytes_by_tier["host"] * 2 > 0
    fork.reorder([2, 1])
    fork.drop(1)
    assert (fork.high.ids, fork.low.ids, cache.ids) == ((2,), (2,), (1, 2))
    with pytest.raises(ValueError, match=r"holds \['high', 'low'\], expected \['history'\]"):
        KVCache.load(tmp_path, experts.high)


@pytest.mark.parametrize("refusing", ["high", "low"])
@torch.no_grad()
def test_what_one_cannot_do_is_done_to_neither(experts, refusing):
    cache = ExpertCache()

    def write(i):
        experts([SCENE[i]], torch.tensor([0.1]), pattern="context_causal", cache=cache, denoised=())

    for i in (1, 2):
        write(i)
        cache.append(i)
    one = getattr(cache, refusing)
    budget, none = one._holdings[0].budget, Budget(device=0)
    refused = [
        partial(cache.append, 3),
        cache.hold,
        partial(cache.select, [2]),
        partial(cache.reorder, [2, 1]),
        partial(cache.reposition, [5, 50]),
        partial(cache.drop, 1),
        partial(cache.pin, 1),
        partial(cache.unpin, 2),
        partial(cache.move, 1, tier="host"),
    ]
    for change in refused:
        write(3)
        one._holdings[0].budget, before = none, [(each.held, each.nbytes) for each in (cache.high, cache.low)]
        with pytest.raises(ValueError, match=r"^budget: "):
            change()
        one._holdings[0].budget = budget
        assert [(each.held, each.nbytes) for each in (cache.high, cache.low)] == before
    cache.append(3)  # it is to be had still
    assert cache.high.ids == cache.low.ids == (1, 2, 3)
    plain = KVCache()
    for i in (1, 2, 3):
        experts.high([SCENE[i]], torch.tensor([0.1]), pattern="context_causal", cache=plain)
        plain.append(i)
    t = torch.tensor([0.9])
    assert same(experts([SCENE[1]], t, cache=cache), experts.high([SCENE[1]], t, cache=plain))


def test_refusals(experts):
    with pytest.raises(ValueError, match=r"^boundary: got 875"):
        Experts(experts.high, experts.low, boundary=875)
    with pytest.raises(ValueError, match="high, low: their traits, scheme or text differ"):
        Experts(experts.high, retrofit(tiny(), scheme="paper"), boundary=0.5)
    with pytest.raises(ValueError, match=r"^cache: got a KVCache, expected an ExpertCache"):
        experts(SCENE, torch.tensor([0.0, 0.9, 0.9, 0.9]), cache=KVCache())
    with pytest.raises(ValueError, match=r"^denoised: got \[7\]"):
        experts(SCENE, torch.tensor([0.0, 0.9, 0.9, 0.9]), denoised=[7])
    with pytest.raises(ValueError, match=r"^cache: got a ExpertCache, expected a KVCache"):
        experts.high(SCENE, torch.tensor([0.0, 0.9, 0.9, 0.9]), cache=ExpertCache())


def test_a_cache_is_not_of_the_other_kind_of_model(experts, tmp_path):
    for cache, model, words in (
        (ExpertCache(), experts.high, "SceneModel, which has no ExpertCache"),
        (KVCache(), experts, "Experts, which has no KVCache"),
    ):
        message = f"^model: got {words}, expected the kind of model that wrote it"
        with pytest.raises(ValueError, match=message):
            cache.save(tmp_path, model)
        with pytest.raises(ValueError, match=message):
            type(cache).load(tmp_path, model)
        assert not [*tmp_path.iterdir()]
