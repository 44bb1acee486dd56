"""CogVideoX: what the tests of all families cannot see."""

from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline

from lct_core import Shot, ShotInput, VariancePreserving, registry, retrofit
from lct_core.generation import joint
from lct_core.testing.tolerances import error
from tests.backbones.families.cogvideox import cogvideox

FIVE = {"use_rotary_positional_embeddings": True}
LEARNED = {**FIVE, "in_channels": 8, "use_learned_positional_embeddings": True}
ONE_AND_A_HALF = {**FIVE, "in_channels": 8, "patch_size_t": 2, "ofs_embed_dim": 16}


def rng():
    return torch.Generator().manual_seed(0)


def drawn(model, grid=(2, 3, 4)):
    return model.adapter.example(Shot(3, grid), batch=2, generator=rng(), dtype=torch.float32)


@pytest.mark.parametrize("pipeline", [CogVideoXPipeline, CogVideoXImageToVideoPipeline])
@pytest.mark.parametrize("trained", [(8, 12), (12, 8), (60, 90)])
@pytest.mark.parametrize("deep", [None, 2])
def test_positions_are_those_of_the_pipeline(pipeline, trained, deep):
    height, width = trained
    model = cogvideox(**FIVE, sample_height=height, sample_width=width, patch_size_t=deep)
    adapter, halves = retrofit(model).adapter, SimpleNamespace(vae_scale_factor_spatial=8, transformer=model)
    sizes = [(1, 1), (2, 3), (3, 2), (1, 6), (4, 1), (5, 5), (4, 6), (30, 45), (45, 30), (7, 45), (60, 90)]
    for rows, columns in sizes:
        if deep and (rows > height // 2 or columns > width // 2):
            continue  # its pipeline goes no further
        for frames in (2, 6, 14):
            size = (frames, 2 * rows, 2 * columns)
            shot = ShotInput(latents=torch.zeros(1, 4, *size), text=torch.zeros(1, 3, 12))
            got = adapter.arguments(shot, torch.tensor([500.0]))["image_rotary_emb"]
            expected = pipeline._prepare_rotary_positional_embeddings(halves, 16 * rows, 16 * columns, frames, "cpu")
            for mine, theirs in zip(got, expected, strict=True):
                assert torch.equal(mine, theirs), (size, error(mine, theirs))


def test_text_stands_at_the_origin():
    adapter = retrofit(cogvideox(**FIVE)).adapter
    shot = ShotInput(latents=torch.zeros(1, 4, 2, 2, 4), text=torch.zeros(1, 3, 12))
    coords = adapter.coordinates(shot, adapter.shot(shot))
    assert coords.tolist() == [[0, 0, 0]] * 3 + [[0, 0, 0], [0, 0, 3], [1, 0, 0], [1, 0, 3]]


def test_larger_than_the_trained_grid_1_5_counts_on():
    model = retrofit(cogvideox(**ONE_AND_A_HALF))
    shot = drawn(model, (1, 5, 8))
    coords = model.adapter.coordinates(shot, model.adapter.shot(shot))
    assert coords[-1].tolist() == [0, 4, 7]
    assert model([shot], torch.ones(2, 1))[0].shape == shot.latents.shape


def test_time_stays_above_the_least_trained_noise():
    model = retrofit(cogvideox())
    shot, given = drawn(model), model.adapter.arguments
    for level, timestep in ((0.0, 0.0), (0.0005, 0.0), (0.001, 0.0), (0.5, 499.0), (1.0, 999.0)):
        timesteps = given(shot, model.adapter.traits.timestep(torch.tensor([level])))["timestep"]
        torch.testing.assert_close(timesteps, torch.tensor([timestep]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("config", "shift"), [({}, 3.0), (FIVE, 1.0), (ONE_AND_A_HALF, 1.0)])
def test_path_is_the_schedule_of_the_checkpoints(config, shift):
    schedule = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=shift, timestep_spacing="trailing"
    )
    traits = retrofit(cogvideox(**config)).adapter.traits
    z0, noise, n = *torch.randn(2, 3, 4, 1, 2, 2, generator=rng()), torch.tensor([0, 400, 999])
    level = (n + 1) / 1000
    torch.testing.assert_close(traits.timestep(level), n.float())
    torch.testing.assert_close(traits.path.add_noise(z0, noise, level), schedule.add_noise(z0, noise, n))
    torch.testing.assert_close(traits.path.target(z0, noise, level), schedule.get_velocity(z0, noise, n))


@torch.no_grad()
def test_another_schedule_is_another_path():
    model = retrofit(cogvideox())
    schedule = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=2.0, timestep_spacing="trailing"
    )
    path = VariancePreserving(schedule.alphas_cumprod.tolist())
    model.adapter.traits = replace(model.adapter.traits, path=path)
    shot = drawn(model)
    (got,) = joint(model, [shot], steps=4)
    schedule.set_timesteps(4)
    z = shot.latents
    for n in schedule.timesteps:
        v = model.adapter.single_shot(replace(shot, latents=z), n.expand(2).float())
        z = schedule.step(v, n, z).prev_sample
    assert error(got, z) <= 1e-5


@torch.no_grad()
def test_conditions_matter():
    model, t = retrofit(cogvideox(**ONE_AND_A_HALF)), torch.full((2, 1), 0.5)
    shot = drawn(model)
    (out,) = model([shot], t)
    for name, other in (("ofs", shot.extras["ofs"] + 1), ("condition", torch.zeros_like(shot.extras["condition"]))):
        changed = replace(shot, extras={**shot.extras, name: other})
        assert error(model([changed], t)[0], out) > 1e-3
    # as its pipeline gives it
    two, none = ({**shot.extras, "ofs": torch.full((2,), 2.0)}, {"condition": shot.extras["condition"]})
    (given,), (left_out,) = (model([replace(shot, extras=extras)], t) for extras in (two, none))
    assert torch.equal(given, left_out)


@torch.no_grad()
def test_absolute_positions_need_their_text_length():
    model = retrofit(cogvideox())
    shot = drawn(model)
    short = replace(shot, text=shot.text[:, :4])
    with pytest.raises(ValueError, match=r"^text: got 4 tokens, expected 6; encode and pad"):
        model([short], torch.ones(2, 1))
    with pytest.raises(RuntimeError, match="must match the size"):  # so does the class
        model.backbone(shot.latents.transpose(1, 2), short.text, torch.ones(2))


@pytest.mark.parametrize("size", [(2, 8, 8), (2, 10, 12), (1, 8, 12), (3, 8, 12)])
def test_learned_positions_need_their_size(size):
    model = retrofit(cogvideox(**LEARNED))
    latents = torch.zeros(2, 4, *size)
    shot = replace(drawn(model), latents=latents, extras={"condition": latents})
    with pytest.raises(ValueError, match=rf"^latents: got \({size[0]}, .* patches, expected \(2, 4, 6\)"):
        model([shot], torch.ones(2, 1))


@torch.no_grad()
def test_learned_positions_need_a_dummy_frame():
    model = retrofit(cogvideox(**LEARNED))
    shot = drawn(model)
    prompt = ShotInput(text=shot.text.flip(1), role="global")
    t = torch.tensor([0.0, 0.7])
    _, out = model([prompt, shot], t)
    assert error(out, model([shot], t[1:])[0]) > 1e-3


def test_refuses_image_to_video_without_an_image():
    model = retrofit(cogvideox(**ONE_AND_A_HALF))
    shot = replace(drawn(model), extras={})
    with pytest.raises(
        ValueError, match=r"^extras: got none, but this CogVideoXTransformer3DModel also needs condition"
    ):
        model([shot], torch.ones(2, 1))


def test_refuses_fused_projections():
    model = cogvideox()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"its attention runs \['FusedCogVideoXAttn.*set that processor"):
        retrofit(model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("ConsisIDTransformer3DModel", "between the blocks"), ("LatteTransformer3DModel", "factorised")],
)
def test_refuses_its_siblings(name, reason):
    model = getattr(diffusers, name).__new__(getattr(diffusers, name))
    with pytest.raises(ValueError, match=rf"^model: .*\.{name} cannot be served: .*{reason}"):
        registry().adapter(model)
