from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, strategies as st

import lct_core as lct
from lct_backbones.mmdit import MMDiTBackbone, tiny
from lct_core import Layout, Shot, ShotInput, retrofit, scene_loss, tuning_loss
from lct_core.testing.strategies import layouts
from lct_core.testing.tolerances import BOUNDS, error

FLOAT32 = BOUNDS[torch.float32]
LAYOUT = Layout([[Shot(2, (1, 2, 2), role="global"), Shot(1, (2, 2, 2)), Shot(3, (1, 1, 1))], [Shot(0, (1, 1, 3))]])


@cache
def model():
    return retrofit(tiny())


def draw(layout, *, batch=2, seed=0):
    """Clean scenes and noise nested alike; nothing at all for the dummy video of a global shot."""
    generator = torch.Generator().manual_seed(seed)
    scenes, noise = [], []
    for scene in layout.scenes:
        given = [model().adapter.example(s, batch=batch, generator=generator, dtype=torch.float32) for s in scene]
        shots = [
            ShotInput(latents=None if s.role == "global" else x.latents, text=x.text, role=s.role)
            for s, x in zip(scene, given, strict=True)
        ]
        scenes.append(shots)
        noise.append([None if s.latents is None else randn(s.latents, generator) for s in shots])
    t = torch.rand(batch, layout.num_shots, generator=generator)
    t[:, [i for i, shot in enumerate(layout.shots) if shot.role == "global"]] = 0
    return scenes, t, noise


def randn(like, generator):
    return torch.randn(like.shape, generator=generator)


def flat(scenes):
    return [item for scene in scenes for item in scene]


def plain_mean(values):
    values = list(values)
    return sum(values) / len(values)


# The loss of predictions.


@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=3),
    nested=st.booleans(),
    seed=st.integers(0, 99),
)
def test_scene_loss_is_a_mean_of_means(sizes, nested, seed):
    generator = torch.Generator().manual_seed(seed)
    outputs, targets = ([[torch.randn(2, n, generator=generator) for n in scene] for scene in sizes] for _ in range(2))
    expected = [
        sum((o - g) ** 2 for o, g in zip(out.flatten().tolist(), target.flatten().tolist(), strict=True)) / out.numel()
        for out, target in zip(flat(outputs), flat(targets), strict=True)
    ]
    loss = scene_loss(outputs, targets) if nested else scene_loss(flat(outputs), flat(targets))
    assert error(loss.shots, torch.tensor(expected)) <= FLOAT32["definition"].absolute
    assert error(loss.mean, torch.tensor(plain_mean(expected))) <= FLOAT32["definition"].absolute


def test_every_shot_weighs_the_same_whatever_its_length():
    short, long = torch.zeros(1, 2), torch.zeros(1, 2000)
    assert scene_loss([short, long], [short + 2, long]).mean == scene_loss([short, long], [short, long + 2]).mean == 2
    gradients = []
    for n in (2, 2000):
        out = [torch.zeros(1, n, requires_grad=True), torch.zeros(1, 7)]
        scene_loss(out, [torch.ones(1, n), torch.zeros(1, 7)]).mean.backward()
        gradients.append(out[0].grad.sum().item())
    assert gradients[0] == pytest.approx(gradients[1], rel=FLOAT32["definition"].absolute)


def test_global_shots_are_left_out():
    out, target = torch.zeros(1, 3), torch.ones(1, 3)
    for ignored in (None, torch.full((5,), float("nan"))):
        loss = scene_loss([[None, out], [out, out]], [[ignored, target], [target, out]])
        assert loss.shots.tolist() == [1, 1, 0]
        assert error(loss.mean, torch.tensor(2 / 3)) <= FLOAT32["definition"].absolute


def test_arithmetic_is_in_float32():
    out = torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16)  # 1 and one step of bfloat16
    loss = scene_loss([out], [torch.zeros_like(out)])
    assert loss.mean.dtype == loss.shots.dtype == torch.float32
    assert loss.mean == 1.0078125**2


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        ([], [], "^outputs: got no shot with a prediction"),
        (
            [None],
            [None],
            "^outputs: got no shot with a prediction, expected at least one that is neither global nor a clean",
        ),
        ([[None], [None]], [[None], [None]], "^outputs: got no shot with a prediction"),
        ([torch.zeros(1)], [], "^targets: got 0 entries for 1 outputs, expected the two nested alike"),
        ([[torch.zeros(1)], [torch.zeros(1)]], [[torch.zeros(1)]], "^targets: got 1 entries for 2 outputs"),
        ([[torch.zeros(1)]], [[torch.zeros(1), torch.zeros(1)]], "^targets: got 2 entries for 1 outputs"),
        ([[torch.zeros(1)]], [torch.zeros(1)], r"^targets: got \[1\] for .*, expected the two nested alike"),
        ([torch.zeros(1)], [[torch.zeros(1)]], r"^targets: got .* for \[1\], expected the two nested alike"),
        ([[torch.zeros(1)]], [None], r"^targets: got None for .*, expected the two nested alike"),
        ([torch.zeros(1)], [None], "^targets: target 0 is None, expected a tensor shaped like its prediction"),
        ([torch.zeros(2, 1)], [torch.zeros(1, 2)], r"^targets: target 0 has shape \[1, 2\], expected \[2, 1\]"),
        ([torch.zeros(2, 1)], [torch.zeros(1)], r"^targets: target 0 has shape \[1\], expected \[2, 1\]"),
    ],
)
def test_scene_loss_refuses(outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        scene_loss(outputs, targets)


# The loss of a model.


@given(
    layout=layouts(max_scenes=2, max_shots=3, max_grid=(2, 2, 2), text_first=True),
    pattern=st.sampled_from(["bidirectional", "context_causal"]),
)
@torch.no_grad()
def test_tuning_loss_by_hand(layout, pattern):
    scenes, t, noise = draw(layout)
    noisy, expected, i = [], [], 0
    for scene, draws in zip(scenes, noise, strict=True):
        noisy.append([])
        for shot, eps in zip(scene, draws, strict=True):
            level = t[:, i].view(-1, 1, 1, 1, 1)
            mixed = None if eps is None else (1 - level) * shot.latents + level * eps  # Eq. 1
            noisy[-1].append(ShotInput(latents=mixed, text=shot.text, role=shot.role))
            i += 1
    for out, shot, eps in zip(flat(model()(noisy, t, pattern=pattern)), flat(scenes), flat(noise), strict=True):
        if out is not None:
            expected.append((out.double() - (eps.double() - shot.latents.double())).square().mean())
    loss = tuning_loss(model(), scenes, t, noise, pattern=pattern)
    assert error(loss.shots, torch.stack(expected)) <= FLOAT32["definition"].absolute
    assert error(loss.mean, plain_mean(expected)) <= FLOAT32["definition"].absolute
    if len(scenes) == 1:
        alone = tuning_loss(model(), scenes[0], t, noise[0], pattern=pattern)
        assert torch.equal(alone.shots, loss.shots)


@torch.no_grad()
def test_packed_scenes_have_the_loss_they_have_alone():
    scenes, t, noise = draw(LAYOUT)
    row = tuning_loss(model(), scenes, t, noise)
    alone = [
        tuning_loss(model(), scene, t[:, list(places)], eps).shots
        for scene, places, eps in zip(scenes, LAYOUT.scene_shots, noise, strict=True)
    ]
    assert torch.equal(row.shots, torch.cat(alone))


@torch.no_grad()
def test_levels_for_all_entries_or_for_each():
    scenes, t, noise = draw(LAYOUT)
    same = t[:1].expand(2, -1)
    assert torch.equal(tuning_loss(model(), scenes, t[0], noise).shots, tuning_loss(model(), scenes, same, noise).shots)
    assert not torch.equal(
        tuning_loss(model(), scenes, t, noise).shots, tuning_loss(model(), scenes, same, noise).shots
    )


@torch.no_grad()
def test_the_adapters_own_path_makes_noise_and_target():
    class Backwards(lct.RectifiedFlow):
        """Noise at level 0 and data at 1, and the data are what is predicted."""

        def add_noise(self, z0, noise, t):
            return lct.RectifiedFlow().add_noise(noise, z0, t)

        def target(self, z0, noise, t):
            return z0

    adapter = MMDiTBackbone(tiny())
    adapter.traits = replace(adapter.traits, path=Backwards())
    other = retrofit(adapter.model, backbone=adapter)
    ((shot,),), t, ((eps,),) = draw(Layout([[Shot(1, (1, 2, 2))]]))
    mixed = ShotInput(latents=lct.RectifiedFlow().add_noise(eps, shot.latents, t[:, 0]), text=shot.text)
    expected = (other([mixed], t)[0] - shot.latents).square().mean()
    assert error(tuning_loss(other, [shot], t, [eps]).mean, expected) <= FLOAT32["definition"].absolute


def test_a_given_dummy_video_changes_no_loss():
    scenes, t, noise = draw(LAYOUT)
    expected = tuning_loss(model(), scenes, t, noise).shots
    first = scenes[0][1].latents
    scenes[0][0] = ShotInput(latents=torch.zeros_like(first[:, :, :1]), text=scenes[0][0].text, role="global")
    for eps in (None, torch.full_like(scenes[0][0].latents, float("nan"))):
        noise[0][0] = eps
        assert torch.equal(tuning_loss(model(), scenes, t, noise).shots, expected)


def test_a_global_shot_has_no_loss_of_its_own():
    """No loss of its own: its text is reached through the other shots of its scene, and through nothing else."""
    scenes, t, noise = draw(LAYOUT)
    for pattern, reached in (("bidirectional", True), ("context_causal", True), ("own_shot", False)):
        text = scenes[0][0].text.clone().requires_grad_()
        scene = [ShotInput(text=text, role="global"), *scenes[0][1:]]
        loss = tuning_loss(model(), [scene, scenes[1]], t, noise, pattern=pattern)
        assert len(loss.shots) == 3
        (alone,) = torch.autograd.grad(loss.shots[2], text, retain_graph=True, allow_unused=True)
        assert alone is None or not alone.any()  # another scene does not see it
        (gradient,) = torch.autograd.grad(loss.mean, text, allow_unused=True)
        assert (gradient is not None and bool(gradient.any())) == reached


def test_gradients_are_the_average_of_the_shots():
    scenes, t, noise = draw(LAYOUT)
    parameters = list(model().backbone.parameters())
    loss = tuning_loss(model(), scenes, t, noise)
    whole = torch.autograd.grad(loss.mean, parameters, retain_graph=True)
    parts = [torch.autograd.grad(shot, parameters, retain_graph=True) for shot in loss.shots]
    for got, *each in zip(whole, *parts, strict=True):
        assert error(got, plain_mean(each)) <= FLOAT32["checkpointed"].absolute * 10  # thrice summed in float32


def shot_of(batch=2, size=(1, 2, 2), **options):
    return ShotInput(latents=torch.zeros(batch, 4, *size), text=torch.zeros(batch, 1, 16), **options)


GLOBAL = ShotInput(text=torch.zeros(2, 1, 16), role="global")
EPS = torch.zeros(2, 4, 1, 2, 2)


@pytest.mark.parametrize(
    ("shots", "t", "noise", "message"),
    [
        ([], [0.5], [], r"^shots: got \[\], expected one scene"),
        ([shot_of()], [0.5], [], "^noise: it is not nested like shots"),
        ([shot_of()], [0.5], [[EPS]], r"^shots, noise: got latents \[2, 4, 1, 2, 2\] and noise \[tensor"),
        ([[shot_of()]], [0.5], [EPS], "^noise: it is not nested like shots"),
        ([[shot_of()]], [0.5], [None], "^noise: it is not nested like shots"),
        ([[shot_of()], [shot_of()]], [0.5, 0.5], [[EPS, EPS]], "^noise: it is not nested like shots"),
        ([[shot_of()], [shot_of()]], [0.5, 0.5], [[EPS, EPS], []], "^noise: it is not nested like shots"),
        (
            [shot_of()],
            [0.5],
            [None],
            r"^shots, noise: got latents \[2, 4, 1, 2, 2\] and noise None, expected tensors alike",
        ),
        (
            [shot_of()],
            [0.5],
            [EPS[:1]],
            r"^noise: got shape \(1, 4, 1, 2, 2\), expected \(2, 4, 1, 2, 2\) like the latents",
        ),
        ([ShotInput(text=torch.zeros(2, 1, 16))], [0.5], [EPS], "^shots, noise: got latents None"),
        ([shot_of()], [0.5, 0.5], [EPS], r"^t: got \[2\], expected floating-point noise levels \[1\] or \[2, 1\]"),
        (
            [shot_of(), shot_of()],
            [0.5],
            [EPS, EPS],
            r"^t: got \[1\], expected floating-point noise levels \[2\] or \[2, 2\]",
        ),
        ([shot_of()], [[0.5], [0.5], [0.5]], [EPS], r"^t: got \[3, 1\], expected floating-point noise levels"),
        ([shot_of()], [2.0], [EPS], r"^t: got levels from 2 to 2, expected \[0, 1\]"),
        ([GLOBAL, shot_of()], [0.5, 0.5], [None, EPS], r"^t: .*expected 0 for a global shot"),
        ([GLOBAL], [0.0], [None], "^shots: a global shot without latents needs a shot with latents"),
        ([shot_of(role="global")], [0.0], [None], "^outputs: got no shot with a prediction"),
    ],
)
def test_tuning_loss_refuses(shots, t, noise, message):
    with pytest.raises(ValueError, match=message):
        tuning_loss(model(), shots, torch.tensor(t), noise)
