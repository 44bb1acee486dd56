"""What a retrofit makes of a model, what it leaves alone, and which models it refuses."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn

import lct_core as lct
from lct_backbones.mmdit import MMDiT, MMDiTBackbone, tiny
from lct_core import Backbone, KVCache, Layout, Shot, retrofit
from tests.engine.scenes import ADAPTERS, draw, given_shot, random_levels, retrofitted, worst
from tests.toys import Toy, ToyBackbone

SCHEMES = ("anchored", "paper")


# The model itself.


def test_the_models_own_forward_is_untouched(fresh):
    base = tiny()
    signature = inspect.signature(base.forward)
    (scene,) = draw(fresh.adapter, Layout([[Shot(2, (2, 1, 2))]]), batch=2)
    arguments = {"latents": scene[0].latents, "timestep": torch.tensor([10.0, 900.0]), "text": scene[0].text}
    assert torch.equal(fresh.backbone(**arguments), base(*arguments.values()))
    assert list(fresh.backbone.state_dict()) == list(base.state_dict())
    for model in (fresh.backbone, copy.deepcopy(fresh.backbone)):
        assert inspect.signature(model.forward) == signature
        for block, original in zip(model.blocks, base.blocks, strict=True):
            assert inspect.signature(block.forward) == inspect.signature(original.forward)


def test_names_the_model():
    base = tiny()
    model = lct.retrofit(base, scheme="anchored", kernel="auto")
    assert model.backbone is base
    assert isinstance(model.adapter, MMDiTBackbone)
    assert (model.scheme, model.kernel, model.gradient_checkpointing) == ("anchored", "auto", False)
    assert lct.retrofit(base, backbone="mmdit").backbone is base


@torch.no_grad()
def test_retrofit_twice_makes_two_engines_of_one_model():
    base = tiny()
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (1, 1, 2))]])
    (scene,), t = draw(MMDiTBackbone(base), layout), random_levels(layout)
    expected = [retrofit(tiny(), scheme=scheme)(scene, t) for scheme in SCHEMES]
    models = [retrofit(base, scheme=scheme) for scheme in SCHEMES]
    keys = list(base.state_dict())
    for model, outputs in zip(models, expected, strict=True):
        assert model.backbone is base
        assert all(torch.equal(a, b) for a, b in zip(model(scene, t), outputs, strict=True))
    assert keys == list(tiny().state_dict())
    assert not torch.equal(expected[0][1], expected[1][1])


@pytest.mark.internals
@torch.no_grad()
def test_a_deep_copy_of_the_backbone_alone_can_be_retrofitted(fresh):
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (1, 1, 2))]])
    (scene,), t = draw(fresh.adapter, layout), random_levels(layout)
    expected = fresh(scene, t)
    twin = retrofit(copy.deepcopy(fresh.backbone))
    for parameter in fresh.backbone.parameters():
        parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(twin(scene, t), expected, strict=True))
    base = scene[0].latents, 1000 * t[:, 0], scene[0].text
    assert torch.equal(twin.backbone(*base), tiny()(*base))


@torch.no_grad()
def test_weights_go_into_a_fresh_model_through_a_file(fresh):
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (1, 1, 2))]])
    (scene,), t = draw(fresh.adapter, layout), random_levels(layout)
    for parameter in fresh.backbone.parameters():
        parameter.add_(0.01)
    file = io.BytesIO()
    torch.save(fresh.backbone.state_dict(), file)
    file.seek(0)
    other = tiny()
    assert not torch.equal(retrofit(other)(scene, t)[0], fresh(scene, t)[0])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(retrofit(other)(scene, t), fresh(scene, t), strict=True))


@ADAPTERS
@torch.no_grad()
def test_everything_runs_inside_the_modules_own_call(make):
    """Else the hooks of sharding and offload would fire at the wrong time, or never."""
    adapter = make()
    model = retrofitted(adapter)
    inside, calls = set(), []
    for module in (model.backbone, *adapter.blocks):
        module.register_forward_pre_hook(lambda module, args: inside.add(module))
        module.register_forward_hook(lambda module, args, output: calls.append(module))
        module.register_forward_hook(lambda module, args, output: inside.discard(module))

    def watched(method, needed):
        def call(*args):
            assert model.backbone in inside
            assert needed != "block" or args[0] in inside
            return method(*args)

        return call

    for name, needed in {
        "encode": "model",
        "qkv": "block",
        "finish": "block",
        "head": "model",
        "unpatchify": "model",
    }.items():
        setattr(adapter, name, watched(getattr(adapter, name), needed))
    layout = Layout([[Shot(1, (1, 1, 2)), Shot(2, (1, 1, 1)), Shot(1, (2, 1, 1))]])
    (scene,) = draw(adapter, layout)
    for cache in (None, KVCache()):
        calls.clear()
        model(scene, random_levels(layout), cache=cache)
        assert calls == [*adapter.blocks, model.backbone]  # once, however many shots there are
        assert not inside


def test_a_replaced_forward_is_not_lost_in_silence():
    base = tiny()
    base.blocks[1].forward = base.blocks[1].forward
    with pytest.raises(ValueError, match=r"^model: this Block's forward was replaced on the instance.*retrofit first"):
        retrofit(base)


@torch.no_grad()
def test_a_hook_added_after_the_retrofit_stays():
    """Offloading libraries wrap forward on the instance, with functools.wraps."""
    from functools import wraps

    base, calls = tiny(), []
    retrofit(base)
    inner = base.blocks[0].forward

    @wraps(inner)
    def hooked(*args, **kwargs):
        calls.append(args)
        return inner(*args, **kwargs)

    base.blocks[0].forward = hooked
    model = retrofit(base, scheme="paper")
    layout = Layout([[Shot(1, (1, 1, 2)), Shot(2, (1, 1, 1))]])
    (scene,), t = draw(model.adapter, layout), random_levels(layout)
    got, expected = model(scene, t), retrofit(tiny(), scheme="paper")(scene, t)
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# What is refused.


def test_refuses_an_unknown_kernel():
    with pytest.raises(ValueError, match=r'^kernel: got \'none\', expected "auto" or one of \['):
        retrofit(tiny(), kernel="none")([given_shot()], torch.tensor([0.5]))


def test_retrofit_refuses():
    base = tiny()
    with pytest.raises(ValueError, match=r'^scheme: got \'mrope\', expected "paper"'):
        retrofit(base, scheme="mrope")
    with pytest.raises(ValueError, match=r"^backbone: this adapter adapts another model"):
        retrofit(base, backbone=MMDiTBackbone(tiny()))
    with pytest.raises(ValueError, match=r"^model: no backbone handles torch.nn.modules.linear.Linear"):
        retrofit(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^backbone: got 'none', expected one of \["):
        retrofit(base, backbone="none")
    assert "forward" not in vars(base)  # a refused model is left alone


class Fussy(ToyBackbone):
    """Cannot be served while it has reasons."""

    reasons = ()

    def refusals(self):
        return list(self.reasons)


def test_an_unservable_model_is_refused_with_every_reason():
    adapter = Fussy(Toy())
    adapter.reasons = ("its cache is on", "its LoRA is fused")
    message = "^model: this Toy cannot be served: its cache is on; its LoRA is fused$"
    with pytest.raises(ValueError, match=message):
        retrofitted(adapter)
    assert "forward" not in vars(adapter.model)
    adapter.reasons = ()
    model, (scene,) = retrofitted(adapter), draw(adapter, Layout([[Shot(1, (1, 1, 2))]]))
    before = model(scene, torch.tensor([0.5]))
    adapter.reasons = ("its cache is on", "its LoRA is fused")  # also where it was set up so after the retrofit
    with pytest.raises(ValueError, match=message):
        model(scene, torch.tensor([0.5]))
    adapter.reasons = ()
    assert worst(model(scene, torch.tensor([0.5])), before) == 0


def test_an_adapter_with_rope_must_give_angles():
    class Silent(ToyBackbone):
        rope = Backbone.rope

    with pytest.raises(NotImplementedError, match=r"^Silent.rope: traits.pairing is 'interleaved'"):
        retrofitted(Silent(Toy()))([given_shot(channels=3, text=(1, 3, 5))], torch.tensor([0.5]))


def test_a_subclass_of_a_known_model_is_handled():
    class Mine(MMDiT):
        pass

    assert isinstance(retrofit(Mine(channels=4, text_width=16, width=48, depth=1, heads=2)).adapter, MMDiTBackbone)
