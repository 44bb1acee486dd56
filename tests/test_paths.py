"""Paths from data to noise: rectified flow and variance preserving."""

import math

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from lct_core.generation.euler import euler
from lct_core.paths import Path, RectifiedFlow, VariancePreserving


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(batch=3, dtype=torch.float32):
    z0, noise = torch.randn(2, batch, 4, 2, 3, 5, generator=rng(), dtype=torch.float64).to(dtype)
    return z0, noise


class TestRectifiedFlow:
    path = RectifiedFlow()

    def test_is_a_path(self):
        assert isinstance(self.path, Path)
        assert self.path == RectifiedFlow()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_ends_are_exact(self, dtype):
        z0, noise = latents(dtype=dtype)
        assert torch.equal(self.path.add_noise(z0, noise, torch.zeros(3)), z0)
        assert torch.equal(self.path.add_noise(z0, noise, torch.ones(3)), noise)

    def test_equation_1_with_a_level_per_entry(self):
        z0, noise = latents(dtype=torch.float64)
        t = torch.tensor([0.0, 0.25, 0.9], dtype=torch.float64)
        z = self.path.add_noise(z0, noise, t)
        for i in range(3):
            torch.testing.assert_close(z[i], (1 - t[i]) * z0[i] + t[i] * noise[i], rtol=0, atol=0)

    def test_target_is_the_velocity_of_the_path(self):
        z0, noise = latents(dtype=torch.float64)
        t = torch.tensor([0.1, 0.5, 0.7], dtype=torch.float64)
        velocity = (self.path.add_noise(z0, noise, t + 0.125) - self.path.add_noise(z0, noise, t)) / 0.125
        torch.testing.assert_close(self.path.target(z0, noise, t), velocity)

    def test_one_euler_step_along_the_target_returns_the_data(self):
        z0, noise = latents(dtype=torch.float64)
        t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
        z = self.path.add_noise(z0, noise, t)
        velocity = self.path.to_velocity(self.path.target(z0, noise, t), z, t)
        torch.testing.assert_close(z - t.view(-1, 1, 1, 1, 1) * velocity, z0)

    def test_low_precision_is_rounded_once(self):
        z0, noise = latents(dtype=torch.bfloat16)
        t = torch.tensor([0.1, 0.5, 0.9])
        exact = self.path.add_noise(z0.float(), noise.float(), t)
        got = self.path.add_noise(z0, noise, t)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, exact.bfloat16())
        assert torch.equal(self.path.target(z0, noise, t), (noise.float() - z0.float()).bfloat16())

    def test_velocity_is_the_output_itself(self):
        z, out = latents()
        assert self.path.to_velocity(out, z, torch.zeros(3)) is out


def scheduler(shift=3.0):
    """As CogVideoX's pipelines configure it: a shift of 3 for the 2B model, of 1 for the others."""
    made = CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=shift,
        timestep_spacing="trailing",
    )
    made.set_timesteps(1000)
    return made


class TestVariancePreserving:
    path = VariancePreserving(scheduler().alphas_cumprod.tolist())

    def test_is_a_path(self):
        assert isinstance(self.path, Path)
        same = VariancePreserving(scheduler().alphas_cumprod)
        assert self.path == same
        assert hash(self.path) == hash(same)
        assert self.path != VariancePreserving(scheduler(shift=1.0).alphas_cumprod)
        assert repr(self.path) == "VariancePreserving()"

    @pytest.mark.parametrize("shift", [3.0, 1.0])
    def test_is_the_schedule_at_its_timesteps(self, shift):
        made, n = scheduler(shift), torch.tensor([0, 1, 99, 500, 998, 999])
        path = VariancePreserving(made.alphas_cumprod)
        z0, noise = latents(batch=6, dtype=torch.float64)
        for t, exact in (((n + 1).double() / 1000, 1e-12), ((n + 1).float() / 1000, 1e-6)):
            for got, expected in (
                (path.add_noise(z0, noise, t), made.add_noise(z0, noise, n)),
                (path.target(z0, noise, t), made.get_velocity(z0, noise, n)),
            ):
                torch.testing.assert_close(got, expected, rtol=0, atol=exact)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_ends_are_exact(self, dtype):
        z0, noise = latents(dtype=dtype)
        zero, one = torch.zeros(3), torch.ones(3)
        assert torch.equal(self.path.add_noise(z0, noise, zero), z0)
        assert torch.equal(self.path.add_noise(z0, noise, one), noise)
        assert torch.equal(self.path.target(z0, noise, zero), noise)
        assert torch.equal(self.path.target(z0, noise, one), -z0)

    def test_velocity_is_the_derivative(self):
        z0, noise = latents(batch=5, dtype=torch.float64)
        t, step = torch.tensor([0.0004, 0.0107, 0.2503, 0.7775, 0.9996], dtype=torch.float64), 1e-6
        above, below = (self.path.add_noise(z0, noise, t + sign * step) for sign in (1, -1))
        velocity = self.path.to_velocity(self.path.target(z0, noise, t), self.path.add_noise(z0, noise, t), t)
        torch.testing.assert_close(velocity, (above - below) / (2 * step), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_velocity_at_a_timestep_is_of_the_interval_below(self, dtype):
        z0, noise = latents(batch=1000, dtype=torch.float64)
        t = torch.arange(1, 1001, dtype=dtype) / 1000
        z, step = self.path.add_noise(z0, noise, t), 1e-7
        below = self.path.add_noise(z0, noise, t.double() - step)
        velocity = self.path.to_velocity(self.path.target(z0, noise, t), z, t)
        torch.testing.assert_close(velocity, (z - below) / step, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("shift", [3.0, 1.0])
    def test_many_euler_steps_are_ddim(self, shift):
        made, (_, z) = scheduler(shift), latents(dtype=torch.float64)
        path, level = VariancePreserving(made.alphas_cumprod), torch.ones(3, dtype=torch.float64)
        made.set_timesteps(10)
        gaps = []
        for substeps in (500, 1000):
            ddim = euler = z
            for n in made.timesteps.tolist():
                v = torch.sin(3 * ddim) - ddim  # a model of no particular kind
                alpha = made.alphas_cumprod[n]
                noise = alpha.sqrt() * v + (1 - alpha).sqrt() * ddim
                ddim, clean = made.step(v, n, ddim, return_dict=False)
                # DDIM holds what the model says of data and noise for a whole step, from timestep n to n - 100
                for i in range(substeps, 0, -1):
                    t = level * (n - 99 + 100 * i / substeps) / 1000
                    euler = euler - path.to_velocity(path.target(clean, noise, t), euler, t) / (10 * substeps)
            gaps.append((euler - ddim).abs().max() / ddim.abs().max())
        assert gaps[1] < 2e-3
        assert gaps[1] < 0.55 * gaps[0]

    @pytest.mark.parametrize("shift", [3.0, 1.0])
    @pytest.mark.parametrize("steps", [1, 8, 50])
    def test_sampling_is_ddim(self, shift, steps):
        made, (_, noise) = scheduler(shift), latents(dtype=torch.float64)
        path = VariancePreserving(made.alphas_cumprod)
        made.set_timesteps(steps)
        expected = noise
        for n in made.timesteps.tolist():
            expected, _ = made.step(torch.sin(3 * expected) - expected, n, expected, return_dict=False)

        def velocity(states, t):
            (z,) = states
            return [path.to_velocity(torch.sin(3 * z) - z, z, torch.full((len(z),), t, dtype=torch.float64))]

        (got,) = euler(velocity, [noise], path=path, steps=steps)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)

    def test_low_precision_is_rounded_once(self):
        z0, noise = latents(dtype=torch.bfloat16)
        t = torch.tensor([0.1, 0.5, 0.9])
        z = self.path.add_noise(z0, noise, t)
        assert torch.equal(z, self.path.add_noise(z0.float(), noise.float(), t).bfloat16())
        out = self.path.target(z0, noise, t)
        assert torch.equal(out, self.path.target(z0.float(), noise.float(), t).bfloat16())
        velocity = self.path.to_velocity(out, z, t)
        assert torch.equal(velocity, self.path.to_velocity(out.float(), z.float(), t).bfloat16())

    @pytest.mark.parametrize(
        ("alphas", "came"),
        [
            ([], "none"),
            ([0.9, 0.5], "2 from 0.9 to 0.5"),
            ([1.0, 0.0], "2 from 1 to 0"),
            ([0.5, 0.5, 0.0], "3 from 0.5 to 0"),
            ([0.5, math.nan], "2 from 0.5 to nan"),
        ],
    )
    def test_refuses_schedules(self, alphas, came):
        with pytest.raises(
            ValueError, match=f"^alphas_cumprod: got {came}, expected values that fall from below 1 to 0"
        ):
            VariancePreserving(alphas)


@pytest.mark.parametrize("path", [RectifiedFlow(), TestVariancePreserving.path], ids=lambda path: type(path).__name__)
class TestPathsRefuse:
    @pytest.mark.parametrize("method", ["add_noise", "target"])
    def test_shapes(self, path, method):
        z0, noise = latents()
        call = getattr(path, method)
        with pytest.raises(ValueError, match=r"^noise: got shape \(1, 4, 2, 3, 5\), expected \(3, 4, 2, 3, 5\)"):
            call(z0, noise[:1], torch.zeros(3))
        with pytest.raises(ValueError, match=r"^t: got shape \(1,\), expected \(3,\): one level for each entry"):
            call(z0, noise, torch.zeros(1))

    def test_velocity_shapes(self, path):
        z, out = latents()
        with pytest.raises(ValueError, match=r"^out: got shape \(2, 4, 2, 3, 5\), expected \(3, 4, 2, 3, 5\)"):
            path.to_velocity(out[:2], z, torch.zeros(3))
        with pytest.raises(ValueError, match=r"^t: got shape \(\), expected \(3,\)"):
            path.to_velocity(out, z, torch.tensor(0.5))
