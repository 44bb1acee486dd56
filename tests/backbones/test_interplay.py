"""What else people do with a diffusers model, done with a retrofitted one: saving, LoRA, offloading, compiling, ..."""

from contextlib import suppress
from dataclasses import replace

import accelerate
import diffusers
import peft
import pytest
import torch
from diffusers.models.attention import AttentionModuleMixin

from lct_core import retrofit
from lct_core.losses import tuning_loss
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.test_families import FIRST, FLOAT32, Scene, family, worst

every_family = pytest.mark.parametrize("case", FIRST, ids=str)


def bound(case, name="one shot"):
    return FLOAT32["masked" if case.masks_padding and name == "one shot" else name].absolute


def one_shot_error(scene, model):
    """The largest difference between a scene of one shot and the model's own forward, as the model is now."""
    got = [model([shot], scene.t[:, i : i + 1])[0] for i, shot in enumerate(scene.shots)]
    return worst(got, [scene.alone(model.backbone, i) for i in range(len(scene.shots))])


@every_family
@torch.no_grad()
def test_a_tuned_model_is_saved_and_loads_in_plain_diffusers(case, tmp_path):
    scene, model = Scene(case), retrofit(case.model())
    for parameter in model.backbone.parameters():
        parameter.mul_(1.1)
    expected = model(scene.shots, scene.t)
    model.backbone.save_pretrained(tmp_path)
    plain = type(model.backbone).from_pretrained(tmp_path).eval()
    assert list(plain.state_dict()) == list(model.backbone.state_dict())
    assert torch.equal(scene.alone(plain, 0), scene.alone(model.backbone, 0))
    assert worst(retrofit(plain)(scene.shots, scene.t), expected) == 0


@every_family
def test_the_models_own_checkpointing_switch_works(case):
    scene, model = Scene(case), retrofit(case.model())
    if not model.backbone._supports_gradient_checkpointing:
        pytest.skip("diffusers gives this class no such switch")
    noise = [torch.ones_like(shot.latents) for shot in scene.shots]
    qkv, calls = model.adapter.qkv, []
    model.adapter.qkv = lambda *given: calls.append(switch) or qkv(*given)
    together, alone = [], []
    for switch in (model.backbone.disable_gradient_checkpointing, model.backbone.enable_gradient_checkpointing):
        switch()
        for gradients, loss in (
            (together, lambda: tuning_loss(model, scene.shots, scene.t, noise).mean),
            (alone, lambda: scene.alone(model.backbone, 0).square().mean()),
        ):
            model.backbone.zero_grad()
            loss().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.backbone.parameters() if p.grad is not None]))
    for plain, checkpointed in (together, alone):
        assert error(checkpointed, plain) <= FLOAT32["checkpointed"].absolute
    off, on = model.backbone.disable_gradient_checkpointing, model.backbone.enable_gradient_checkpointing
    assert calls.count(on) == 2 * calls.count(off) > 0  # every block is run again in the backward pass


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of the model's own norms
@every_family
@torch.no_grad()
def test_autocast(case):
    scene, model = Scene(case), retrofit(case.model())
    exact = scene.alone(model.backbone, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = scene.alone(model.backbone, 0)
        (got,) = model(scene.shots[:1], scene.t[:, :1])
        together = model(scene.shots, scene.t)
    assert got.dtype == own.dtype
    assert error(got, own) <= BOUNDS[torch.bfloat16]["one shot"].given(error(own, exact))
    assert all(out.isfinite().all() for out in together)


@every_family
@torch.no_grad()
def test_offloading_hooks_fire_around_every_block(case):
    scene, model = Scene(case), retrofit(case.model())
    expected = model(scene.shots, scene.t)
    accelerate.cpu_offload(model.backbone, execution_device=torch.device("cpu"))
    assert {p.device.type for p in model.backbone.parameters()} == {"meta"}
    assert worst(model(scene.shots, scene.t), expected) == 0
    assert {p.device.type for p in model.backbone.parameters()} == {"meta"}


@every_family
@torch.no_grad()
def test_layerwise_casting_of_weights(case):
    scene, (own, model) = Scene(case), (case.model(), retrofit(case.model()))
    for network in (own, model.backbone):
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.float8_e4m3fn in {weight.dtype for weight in model.backbone.parameters()}
    (got,) = model(scene.shots[:1], scene.t[:, :1])
    assert error(got, scene.alone(own, 0)) <= bound(case)


def test_offloading_first_and_retrofitting_after_is_refused():
    model = FIRST[0].model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="retrofit first, add such hooks afterwards"):
        retrofit(model)


@every_family
@pytest.mark.parametrize("after", [False, True], ids=["LoRA first", "retrofit first"])
def test_lora_through_peft(case, after):
    scene, model = Scene(case), case.model()
    scene_model = retrofit(model) if after else None
    targets = [name for name, module in model.named_modules() if name.endswith(("to_q", "add_k_proj"))]
    targets = [name for name in targets if "audio" not in name]  # of LTX-2's audio the video knows nothing
    assert targets
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.add_adapter(config) if hasattr(model, "add_adapter") else peft.inject_adapter_in_model(config, model)
    model.eval()
    scene_model = scene_model or retrofit(model)
    with torch.no_grad():
        assert one_shot_error(scene, scene_model) <= bound(case)
        before = case.model()
        assert error(scene.alone(model, 0), scene.alone(before, 0)) > 1e-4  # the adapter does something
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    noise = [torch.ones_like(shot.latents) for shot in scene.shots]
    tuning_loss(scene_model, scene.shots, scene.t, noise).mean.backward()
    assert all((p.grad is not None and bool(p.grad.any())) == ("lora" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if family(case) == "wan" else pytest.mark.prove) for case in FIRST],
    ids=str,
)
@torch.no_grad()
def test_compiled(case):
    scene = Scene(case)
    plain, compiled = retrofit(case.model()), retrofit(case.model(), compile=True)
    assert one_shot_error(scene, compiled) <= FLOAT32["compiled"].absolute
    expected = plain(scene.shots, scene.t, pattern="context_causal")
    assert worst(compiled(scene.shots, scene.t, pattern="context_causal"), expected) <= FLOAT32["compiled"].absolute


@every_family
def test_features_that_would_be_passed_over_are_refused(case):
    scene, model = Scene(case), retrofit(case.model())
    own = model.backbone
    attention = next(iter(model.adapter.attentions()))

    def refused(fix):
        with pytest.raises(ValueError, match=f"^model: this {type(own).__name__} cannot be served: .*{fix}"):
            model(scene.shots, scene.t)

    processor = attention.processor
    attention.processor = type("Foreign", (), {"__call__": lambda *_: None})()
    refused(r"'Foreign'.*set that processor")
    attention.processor = processor
    if isinstance(attention, AttentionModuleMixin):
        attention.fuse_projections()
        refused(r"unfuse_qkv_projections")
        attention.unfuse_projections()
    elif hasattr(own, "fuse_qkv_projections"):  # an older kind of attention, which gets another processor
        own.fuse_qkv_projections()
        if attention.processor is not processor:  # some have the switch and nothing to fuse
            refused(r"Fused.*set that processor")
        own.unfuse_qkv_projections()
    if hasattr(own, "enable_cache"):
        with suppress(ValueError):  # diffusers gives every class the switch, but knows the blocks of some only
            own.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        if own.is_cache_enabled:
            refused(r"disable_cache")
            own.disable_cache()
    if hasattr(processor, "_attention_backend"):
        own.set_attention_backend("native")
        refused(r"reset_attention_backend")
        own.reset_attention_backend()
    model(scene.shots, scene.t)


@every_family
def test_wrong_input_names_what_came_and_what_was_expected(case):
    scene, model = Scene(case), retrofit(case.model())
    shot, t = scene.shots[0], scene.t[:, :1]
    traits = model.adapter.traits
    batch, channels = shot.latents.shape[:2]
    cases = {
        rf"^latents: got \[{batch}, {channels + 1},": replace(shot, latents=shot.latents[:, [*range(channels), 0]]),
        r"^latents: got .*, expected": replace(shot, latents=shot.latents[0]),
        rf"^text: got .*{traits.text_width + 1}\], expected": replace(
            shot, text=torch.zeros(batch, shot.text.shape[1], traits.text_width + 1)
        ),
        r"^extras: got \['no_such_image'\], which .* does not take": replace(
            shot, extras={**shot.extras, "no_such_image": torch.zeros(batch, 3)}
        ),
    }
    for name, extra in traits.extras.items():
        if extra.shape is None or name == traits.text_mask:
            continue
        cases[rf"^extras: {name} is \[1\], expected"] = replace(shot, extras={**shot.extras, name: torch.zeros(1)})
        if extra.required:
            without = {n: x for n, x in shot.extras.items() if n != name}
            cases[rf"^extras: got .* also needs .*{name}"] = replace(shot, extras=without)
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            model([wrong], t)
    with pytest.raises(ValueError, match=r"^t: got levels from .* expected \[0, 1\]"):
        model([shot], 1000 * t)
