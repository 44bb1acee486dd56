"""The training loop: steps, modes of the model, random numbers and precision."""

from copy import deepcopy
from dataclasses import replace
from math import cos, pi

import pytest
import torch

from lct_core import retrofit, tuning_loss
from lct_core.plugins import registry
from lct_core.testing.tolerances import BOUNDS, error
from lct_core.training import (
    Report,
    Stage,
    Training,
    sample_row,
    train,
)
from tests.training.scenes import (
    CHANNELS,
    STAGE,
    WIDTH,
    Learned,
    StoppedError,
    make,
    same,
    spoil_gradients,
    weights,
    world,
)

FLOAT32 = BOUNDS[torch.float32]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Stages.


NAN, INF = float("nan"), float("inf")


# Training.


def trained(stage=STAGE, *, model=None, seed=0, **options):
    """A stage run to its end, and what it said."""
    model = make() if model is None else model
    reports = []
    training = Training(model, stage)
    train(training, *world(), seed=seed, on_step=reports.append, **options)
    return training, reports


@pytest.mark.parametrize("pattern", ["bidirectional", "context_causal"])
def test_training_is_its_steps_written_by_hand(pattern):
    stage, model = replace(STAGE, pattern=pattern), make()
    parameters = list(model.backbone.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    expected = []
    for step in range(stage.steps):
        row = sample_row(stage, step, *world(), seed=3)
        loss = tuning_loss(model, row.scenes, row.levels, row.noise, pattern=pattern)
        model.backbone.zero_grad()
        loss.mean.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters]))
        assert norm > stage.clip  # so that it is clipped
        for parameter in parameters:
            parameter.grad *= torch.clamp(stage.clip / (norm + 1e-6), max=1)
        rate = 1e-2 * min((step + 1) / 2, (1 + cos(pi * step / 6)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        decay = min(0.5, (2 + step) / (11 + step))
        average = [a.lerp(p.detach(), 1 - decay) for a, p in zip(average, parameters, strict=True)]
        kind, shots = ("scene", len(loss.shots)) if step % 2 else ("single_shot", 2)
        expected.append(Report("first", step + 1, kind, shots, loss.mean.item(), rate, norm.item()))
    training, reports = trained(stage, seed=3)
    assert reports == expected
    assert same(training.ema.state_dict()["average"], average)
    assert same([*training.model.backbone.parameters()], average)  # at the end
    assert same(training.optimizer.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_stage_may_be_trained_in_parts():
    whole, reports = trained()
    training = Training(make(), STAGE)
    parts = []
    train(training, *world(), seed=0, steps=4, on_step=parts.append)
    assert training.step == 4
    assert not same([*training.model.backbone.parameters()], training.ema.state_dict()["average"])
    train(training, *world(), seed=0, steps=0, on_step=parts.append)
    train(training, *world(), seed=0, steps=9, on_step=parts.append)
    assert training.step == 6
    assert parts == reports
    assert same(weights(training.model), weights(whole.model))
    before = weights(training.model)
    train(training, *world(), seed=0, on_step=parts.append)  # there is nothing left
    assert len(parts) == 6
    assert same(weights(training.model), before)


def test_a_state_goes_on_in_another_model():
    whole, _ = trained()
    training = Training(make(), STAGE)
    train(training, *world(), seed=0, steps=3)
    other = Training(make(seed=1), STAGE)
    other.load_state_dict(deepcopy(training.state_dict()))
    train(other, *world(), seed=0)
    assert same(other.state_dict(), whole.state_dict())


def test_a_state_of_another_model_is_refused():
    state = Training(make(), STAGE).state_dict()
    wide = registry().build("mmdit", channels=CHANNELS, text_width=WIDTH, width=32, depth=2, heads=2, mlp_ratio=2)
    with pytest.raises(ValueError, match=r"(?s)^state: it is not this model's: .*size mismatch"):
        Training(retrofit(wide), STAGE).load_state_dict(state)
    partly = make()
    next(partly.backbone.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="doesn't match the size"):
        Training(partly, STAGE).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"betas": (0.9, 0.99)}, r"betas = \(0\.9, 0\.95\), not \(0\.9, 0\.99\)"),
        ({"weight_decay": 0.0}, r"weight_decay = 0\.1, not 0\.0"),
        ({"eps": 1e-6, "weight_decay": 0.2}, r"eps = 1e-08, not 1e-06, weight_decay = 0\.1, not 0\.2"),
    ],
)
def test_a_state_of_another_optimizer_is_refused(change, difference):
    state, training = Training(make(), STAGE).state_dict(), Training(make(seed=1), STAGE)
    before = weights(training.model)
    training.optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=f"^state: its optimizer has {difference}; go on with the settings"):
        training.load_state_dict(state)
    assert same(weights(training.model), before)
    state["optimizer"] = torch.optim.SGD(training.model.backbone.parameters(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match=r"^state: its optimizer has betas = None, not "):
        training.load_state_dict(state)


def test_every_seed_trains_on_something_else():
    assert trained()[1] == trained()[1]
    assert {r.loss for r in trained()[1]}.isdisjoint(r.loss for r in trained(seed=1)[1])


def test_single_shots_may_come_from_elsewhere():
    data, _ = world(seed=1)
    there, here = trained(single_shot_data=data)[1], trained()[1]
    assert there[0].loss != here[0].loss
    assert [r.kind for r in there] == [r.kind for r in here] == ["single_shot", "scene"] * 3


def test_frozen_parameters_stay_and_all_others_move():
    model = make()
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_("blocks" in name)
    before = weights(model)
    trained(model=model)
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]) == ("blocks" not in name)


@pytest.mark.internals
def test_recomputing_activations_changes_no_loss():
    (plain, expected), (again, reports) = trained(), trained(model=make(gradient_checkpointing=True))
    assert [r.loss for r in reports] == pytest.approx([r.loss for r in expected], rel=1e-6)
    for a, b in zip(weights(again.model).values(), weights(plain.model).values(), strict=True):
        assert error(a, b) <= 10 * FLOAT32["checkpointed"].absolute  # over six steps


def test_bf16_computes_in_bfloat16_and_keeps_float32():
    stage, model = replace(STAGE, precision="bf16"), make()
    seen = set()
    block = model.backbone.blocks[0].video.to_qkv
    block.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    training, reports = trained(stage, model=model)
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in weights(model).values()} == {torch.float32}
    assert {value.dtype for value in training.ema.state_dict()["average"]} == {torch.float32}
    assert {p.grad.dtype for p in model.backbone.parameters()} == {torch.float32}
    expected = [r.loss for r in trained()[1]]
    losses = [r.loss for r in reports]
    assert losses != expected
    assert losses[0] == pytest.approx(expected[0], rel=2**-6)


NOT_FINITE = r"^first, step 3: the loss is (nan|inf), the norm of its gradient nan; lower learning_rate=0.0075, or look"


def test_a_loss_that_is_not_finite_stops_before_any_update():
    training = Training(make(), STAGE)
    train(training, *world(), seed=0, steps=2)
    with torch.no_grad():
        training.model.backbone.video_out.bias[0] = INF
    state = deepcopy(training.state_dict())
    state["optimizer"].pop("param_groups")  # the rate is that of the step that failed
    with pytest.raises(ValueError, match=NOT_FINITE):
        train(training, *world(), seed=0)
    after = training.state_dict()
    after["optimizer"].pop("param_groups")
    assert same(after, state)


@pytest.mark.parametrize("factor", [INF, NAN])
def test_a_gradient_that_is_not_finite_stops_before_any_update(factor):
    training, states = Training(make(), STAGE), []
    spoil_gradients(training.model, after=2, factor=factor)

    def state():
        found = deepcopy(training.state_dict())
        found["optimizer"].pop("param_groups")
        return found

    message = r"^first, step 3: the loss is [\d.]+, the norm of its gradient (nan|inf); lower learning_rate=0.0075, or"
    with pytest.raises(ValueError, match=message):
        train(training, *world(), seed=0, on_step=lambda report: states.append(state()))
    assert len(states) == 2
    assert same(state(), states[-1])


# The mode of the model, and what draws from the global generators.


def test_training_restores_the_models_mode():
    for mode in (True, False):
        model, seen = make(), set()
        backbone = model.backbone.train(mode)
        part = backbone.blocks[0].eval()  # one that is in another mode than the rest

        def on_step(report, backbone=backbone, seen=seen):
            seen.update(module.training for module in backbone.modules())

        trained(model=model, steps=1)
        train(Training(model, STAGE), *world(), seed=0, steps=2, on_step=on_step)
        assert seen == {True}
        assert not any(module.training for module in part.modules())
        assert {m.training for m in backbone.modules() if m not in set(part.modules())} == {mode}


@pytest.mark.parametrize("fails", ["in the codec", "in the loss", "in on_step"])
def test_an_error_restores_the_models_mode(fails):
    model = make()
    model.backbone.eval()
    data, on_step, error = world()[0], None, ValueError
    if fails == "in the codec":
        data = []
    elif fails == "in the loss":
        spoil_gradients(model, after=0, factor=NAN)
    else:
        error = StoppedError

        def on_step(report):
            raise StoppedError

    before = torch.get_rng_state()
    with pytest.raises(error):
        train(Training(model, STAGE), data, world()[1], seed=0, on_step=on_step)
    assert not any(module.training for module in model.backbone.modules())
    assert torch.equal(torch.get_rng_state(), before)


class Sampling:
    """A codec that draws its latents, as a VAE does, from torch's global generator."""

    def __init__(self, codec):
        self.codec, self.text, self.draws = codec, codec.text, []

    def encode(self, frames):
        mean = self.codec.encode(frames)
        self.draws.append(torch.randn_like(mean))
        return mean + 0.1 * self.draws[-1]


def random_training(*, stage=STAGE, seed=0, **options):
    """A model with dropout in every block; what it drops is kept."""
    model = make(seed, **options)
    dropouts = [m for block in model.backbone.blocks for m in block.modules() if isinstance(m, torch.nn.Dropout)]
    for module in dropouts:
        module.p = 0.25
    model.dropped = []
    dropouts[0].register_forward_hook(lambda module, args, out: model.dropped.append(out.detach() == 0))
    return Training(model, stage)


def test_dropout_and_a_codec_that_samples_go_on_bit_for_bit():
    data, codec = world()[0], Sampling(world()[1])
    whole, reports = random_training(), []
    train(whole, data, codec, seed=0, on_step=reports.append)
    assert whole.model.dropped
    assert all(mask.any() and not mask.all() for mask in whole.model.dropped)
    assert [r.loss for r in reports] != [r.loss for r in trained()[1]]

    first, parts = random_training(), []
    train(first, data, codec, seed=0, steps=3, on_step=parts.append)
    state = deepcopy(first.state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(99)  # another process
        second = random_training(seed=1)
        second.load_state_dict(state)
        for _ in range(3):
            train(second, data, codec, seed=0, steps=1, on_step=parts.append)
            torch.rand(5)
    assert parts == reports
    assert same(second.state_dict(), whole.state_dict())
    assert same(first.model.dropped + second.model.dropped, whole.model.dropped)
    half = len(codec.draws) // 2
    assert same(codec.draws[:half], codec.draws[half:])


def test_the_callers_generator_is_left_alone():
    data, codec = world()[0], Sampling(world()[1])
    before, seen = torch.get_rng_state(), []
    train(random_training(), data, codec, seed=0, on_step=lambda report: seen.append(torch.get_rng_state()))
    assert len(seen) == 6
    assert all(torch.equal(state, before) for state in [*seen, torch.get_rng_state()])


def test_every_step_stage_and_seed_draws_something_else():
    data, codec = world()[0], Sampling(world()[1])
    for stage, seed in ((STAGE, 0), (STAGE, 1), (replace(STAGE, name="other"), 0)):
        train(random_training(stage=stage), data, codec, seed=seed)
    values = torch.cat([eps.flatten() for eps in codec.draws])
    assert len(values.unique()) > 0.99 * len(values)


@pytest.mark.internals
def test_recomputed_activations_drop_the_same():
    data, codec = world()
    losses = []
    for checkpointing in (False, True):
        training = random_training(gradient_checkpointing=checkpointing)
        train(training, data, codec, seed=0, on_step=lambda report: losses.append(report.loss))
    assert losses[6:] == pytest.approx(losses[:6], rel=1e-6)


def test_training_leaves_the_codec_alone():
    data, codec = world()[0], Learned(world()[1])
    reports = []
    train(Training(make(), STAGE), data, codec, seed=0, on_step=reports.append)
    assert [p.grad for p in codec.parameters()] == [None, None]
    assert reports == trained()[1]


# The precision of the weights.


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_not_trained(dtype, precision):
    model = make()
    model.backbone.blocks[0].to(dtype)  # a part is enough
    with pytest.raises(ValueError, match=rf"^model: got trained weights in {dtype}, expected float32: .* call .float"):
        Training(model, replace(STAGE, precision=precision))


def test_frozen_weights_may_be_in_half_precision():
    model = make()
    model.backbone.blocks[0].bfloat16().requires_grad_(False)
    before = weights(model)
    _, reports = trained(replace(STAGE, precision="bf16"), model=model)
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any(name.startswith("blocks.0.") for name in moved)
    assert reports[0].loss == pytest.approx(trained()[1][0].loss, rel=2**-5)


def test_it_learns():
    """Seen on other draws from the same scenes; noise can't be known, so not all of the loss can go."""
    stage = Stage(name="learn", steps=100, single_shot_batch=4, learning_rate=2e-2, text_dropout=0.0)
    model = make()

    @torch.no_grad()
    def loss():
        rows = [sample_row(stage, step, *world(), seed=1) for step in range(20)]
        return sum(tuning_loss(model, r.scenes, r.levels, r.noise).mean.item() for r in rows) / len(rows)

    before = loss()
    trained(stage, model=model)
    assert loss() < 0.7 * before


def test_nothing_to_train_is_said():
    model = make()
    model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="empty parameter list"):
        Training(model, STAGE)
