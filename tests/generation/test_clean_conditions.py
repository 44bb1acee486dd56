"""Clean conditions inside a shot, such as an image in its first frame: kept in sampling, without loss in training."""

from dataclasses import replace

import pytest
import torch

from lct_core import Layout, Shot, ShotInput, retrofit
from lct_core.generation import causal, conditional, joint
from lct_core.losses import scene_loss, tuning_loss
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.wan import wan

STEPS = 4
FLOAT32 = BOUNDS[torch.float32]


@pytest.fixture(scope="module")
def model():
    return retrofit(wan())


@pytest.fixture(scope="module")
def scene(model):
    """Two shots; the first frame of the second is an image, its other three frames are noise."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout([[Shot(3, (2, 2, 2)), Shot(2, (4, 2, 3))]])
    first, second = (model.adapter.example(s, batch=2, generator=generator, dtype=torch.float32) for s in layout.shots)
    mask = torch.ones_like(second.latents[:, 0])
    mask[:, 0] = 0
    return [ShotInput(latents=first.latents, text=first.text), replace(second, extras={"timestep_mask": mask})]


@torch.no_grad()
def test_sampling_leaves_the_image_and_denoises_the_rest(model, scene):
    shot = scene[1]
    (got,) = joint(model, [shot], steps=STEPS)
    z, mask = shot.latents, shot.extras["timestep_mask"][:, None]
    for step in range(STEPS):
        t = 1 - step / STEPS
        timesteps = (1000 * t * mask[:, 0, :, ::2, ::2]).flatten(1)
        velocity = wan()(z, timesteps, shot.text, return_dict=False)[0]
        z = torch.where(mask.bool(), z - velocity / STEPS, z)
    assert torch.equal(got[:, :, 0], shot.latents[:, :, 0])
    assert error(got, z) <= FLOAT32["definition"].absolute
    assert error(got[:, :, 1:], shot.latents[:, :, 1:]) > 0.1


@torch.no_grad()
def test_so_do_all_modes(model, scene):
    image = scene[1].latents[:, :, 0]
    given = {0: torch.randn(scene[0].latents.shape, generator=torch.Generator().manual_seed(1))}
    for out in (joint(model, scene, steps=2), causal(model, scene, steps=2), conditional(model, scene, given, steps=2)):
        assert torch.equal(out[1][:, :, 0], image)


@torch.no_grad()
def test_the_image_of_a_given_shot_stays_clean(model, scene):
    """The rest of a given shot is noised to t_c, its image is not: the model would be told otherwise."""
    seen, noise = [], scene[1].latents
    clean = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    encode = model.adapter.encode
    model.adapter.encode = lambda inputs, timestep: seen.append(inputs) or encode(inputs, timestep)
    try:
        conditional(model, [scene[1], scene[0]], {0: clean}, t_c=500, steps=1)
    finally:
        del model.adapter.encode
    now, noised = seen[0].latents, 0.5 * clean + 0.5 * noise
    assert torch.equal(now[:, :, 0], clean[:, :, 0])
    assert error(now[:, :, 1:], noised[:, :, 1:]) <= FLOAT32["definition"].absolute


def test_the_image_has_no_loss_and_no_noise(model, scene):
    t, eps = torch.tensor([0.3, 0.6]), [torch.randn_like(shot.latents) for shot in scene]
    got = tuning_loss(model, scene, t, eps)
    mask = scene[1].extras["timestep_mask"][:, None].bool()
    noised = [0.7 * scene[0].latents + 0.3 * eps[0], 0.4 * scene[1].latents + 0.6 * eps[1]]
    noised[1] = torch.where(mask, noised[1], scene[1].latents)
    outputs = model([replace(s, latents=z) for s, z in zip(scene, noised, strict=True)], t)
    targets = [e - s.latents for e, s in zip(eps, scene, strict=True)]
    expected = scene_loss([outputs[0], outputs[1][:, :, 1:]], [targets[0], targets[1][:, :, 1:]])
    assert error(got.shots, expected.shots) <= FLOAT32["definition"].absolute
    assert error(got.shots, scene_loss(outputs, targets).shots) > 1e-3
