"""The walk through the blocks: streams, extras, compilation, checkpointing and gradients."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch

from lct_backbones.mmdit import MMDiTBackbone, tiny
from lct_core import Layout, Shot, State, retrofit
from lct_core.engine import walk
from lct_core.testing.definition import definition
from lct_core.testing.tolerances import BOUNDS, error
from tests.engine.scenes import (
    ADAPTERS,
    PATTERNS,
    draw,
    flat,
    gradients,
    random_levels,
    retrofitted,
    shot_by_shot,
    suited,
    worst,
)
from tests.toys import CROSS, Toy, ToyBackbone, toy

pytestmark = pytest.mark.internals

FLOAT32 = BOUNDS[torch.float32]
SCHEMES = ("anchored", "paper")


# What an adapter may take or refuse.


@torch.no_grad()
def test_streams_that_only_one_site_changes_are_kept():
    class Counts(ToyBackbone):
        def encode(self, inputs, timestep):
            state = super().encode(inputs, timestep)
            return State({**state.streams, "first": torch.zeros(1), "second": torch.zeros(1)}, state.conditioning)

        def finish(self, block, site, state, attended, aux):
            count = "first" if site.name == "self" else "second"
            return {**super().finish(block, site, state, attended, aux), count: state.streams[count] + 1}

        def head(self, state):
            seen.append((state.streams["first"].item(), state.streams["second"].item()))
            return super().head(state)

    seen = []
    adapter = Counts(Toy(second="own_shot"))
    (scene,) = draw(adapter, Layout([[Shot(1, (1, 1, 2)), Shot(2, (1, 1, 1))]]))
    retrofitted(adapter)(scene, torch.tensor([0.5, 0.5]))
    assert seen == [(2, 2), (2, 2)]  # once in each of two blocks, for each of two shots


@torch.no_grad()
def test_extras_reach_their_shot():
    adapter = toy()
    (scene,) = draw(adapter, Layout([[Shot(1, (1, 2, 2)), Shot(2, (1, 1, 1))]]))
    strong = replace(scene[1], extras={"strength": torch.tensor([2.0])})
    model, t = retrofitted(adapter), torch.tensor([0.3, 0.6])
    plain, changed = (model([scene[0], second], t, pattern="own_shot") for second in (scene[1], strong))
    assert torch.equal(plain[0], changed[0])
    assert not torch.equal(plain[1], changed[1])
    (alone,) = model([strong], t[1:])
    assert torch.equal(alone, adapter.model(strong.latents, 1 - t[1:], strong.text, strength=torch.tensor([2.0])))


# What lies between two attentions, compiled.


LARGER = Layout([[Shot(3, (0, 0, 0), role="global"), Shot(2, (2, 2, 2)), Shot(4, (1, 2, 3))]])


@torch.no_grad()
def test_a_compiled_model_equals_it_uncompiled():
    torch.compiler.reset()
    plain, compiled = (retrofitted(toy(**CROSS, scope="all"), compile=on) for on in (False, True))
    t, (scene,) = random_levels(LARGER, batch=2), draw(plain.adapter, LARGER, batch=2)
    got, expected = (model(scene, t, pattern="context_causal") for model in (compiled, plain))
    assert worst(got, expected) <= FLOAT32["compiled"].absolute
    cached = shot_by_shot(compiled, scene, t)
    assert worst(cached, expected) <= FLOAT32["compiled"].absolute + FLOAT32["cached"].absolute


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
def test_gradients_of_a_compiled_model():
    torch.compiler.reset()
    plain, compiled = (retrofitted(toy(), compile=on, gradient_checkpointing=on) for on in (False, True))
    layout = Layout([LARGER.scenes[0][1:]])
    t, (scene,) = random_levels(layout), draw(plain.adapter, layout)
    expected, got = (gradients(model, scene, t, "context_causal") for model in (plain, compiled))
    together = [torch.cat([gradient.flatten() for gradient in of.values()]) for of in (got, expected)]
    assert error(*together) <= FLOAT32["compiled"].absolute


@torch.no_grad()
def test_all_blocks_share_what_is_compiled(monkeypatch):
    """Else a deep model would take minutes to compile, and run into torch's limit of graphs for one function."""
    layout, made = Layout([[Shot(3, (2, 2, 2))]]), []
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    for depth in (2, 4):
        torch.compiler.reset()
        walk._compiled.cache_clear()
        torch._dynamo.utils.counters.clear()
        model = retrofitted(toy(**CROSS, depth=depth), compile=True)
        (scene,) = draw(model.adapter, layout)
        model(scene, torch.tensor([0.5]))
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    walk._compiled.cache_clear()
    # A block is four graphs: what comes before and after each of its two attentions. Before torch 2.15, two of the
    # second block's are made once more, and serve all that follow.
    assert made[0] == made[1] < 2 * 4


def test_a_compiled_model_can_be_copied_and_pickled():
    model = retrofit(tiny(), compile=True)
    assert copy.deepcopy(model).compile
    assert pickle.loads(pickle.dumps(model)).compile
    assert not retrofit(tiny()).compile


# Training.


def saved_bytes(model, scene, t):
    """Bytes of activations that autograd keeps, each memory once."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(scene, t)
    del out
    return sum(kept.values())


@ADAPTERS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_checkpointing_changes_memory_and_no_gradient(make, pattern):
    plain = make()
    least = 0 if plain.traits.text == "joint" else 1
    layout = Layout([[Shot(2, (1, 2, 3), role="global"), Shot(3, (2, 2, 3)), Shot(least, (1, 1, 1))]])
    layout = suited(plain, layout)
    (scene,), t = draw(plain, layout, batch=2), random_levels(layout, batch=2)
    model = retrofitted(plain)
    checkpointed = make()
    saving = retrofitted(checkpointed, gradient_checkpointing=True)
    a, b = gradients(model, scene, t, pattern), gradients(saving, scene, t, pattern)
    for name, gradient in a.items():
        assert gradient is not None
        assert error(b[name], gradient) <= FLOAT32["checkpointed"].absolute
    assert saved_bytes(saving, scene, t) < saved_bytes(model, scene, t) / 2


def test_checkpointing_recomputes_every_block_once():
    adapter = MMDiTBackbone(tiny())
    calls = []
    qkv = adapter.qkv
    adapter.qkv = lambda block, site, state: (calls.append(block), qkv(block, site, state))[1]
    model = retrofitted(adapter, gradient_checkpointing=True)
    (scene,) = draw(adapter, Layout([[Shot(1, (1, 1, 2))]]))
    (out,) = model(scene, torch.tensor([0.5]))
    assert calls == adapter.blocks
    out.sum().backward()
    assert calls == [*adapter.blocks, *reversed(adapter.blocks)]


def test_gradients_equal_the_definitions(model):
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (2, 1, 1))], [Shot(1, (1, 1, 2)), Shot(0, (1, 1, 1))]])
    scenes, t = draw(model.adapter, layout), random_levels(layout)
    results = []
    for run in (
        lambda: flat(model(scenes, t, pattern="context_causal")),
        lambda: definition(model.adapter, scenes, t, scheme=model.scheme, pattern="context_causal"),
    ):
        model.backbone.zero_grad()
        sum(out.square().mean() for out in run()).backward()
        results.append(torch.cat([p.grad.flatten() for p in model.backbone.parameters()]))
    model.backbone.zero_grad()
    assert error(*results) <= FLOAT32["definition"].absolute
