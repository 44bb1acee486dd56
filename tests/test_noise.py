import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from lct_core.generation.euler import euler
from lct_core.layout import Layout, Shot
from lct_core.noise import (
    condition_levels,
    joint_levels,
    sample_levels,
    sample_shot_run,
    shot_noise,
    substitute_single_frames,
)
from lct_core.packing import plan_rows
from lct_core.paths import Path, RectifiedFlow, VariancePreserving
from lct_core.testing.strategies import layouts, levels

SHOT = Shot(text=1, grid=(1, 1, 1))
GLOBAL = Shot(text=1, grid=(1, 1, 1), role="global")
KEY = {"seed": 0, "step": 1, "scene": 2, "shot": 3}


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
    def test_at_a_timestep_the_velocity_is_that_of_the_interval_below(self, dtype):
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


class TestLevels:
    row = Layout([[GLOBAL, SHOT, SHOT], [SHOT]])

    @given(layout=layouts(), seed=st.integers(0, 2**31), batch=st.none() | st.integers(1, 3))
    def test_shape_range_and_clean_global_shots(self, layout, seed, batch):
        t = sample_levels(layout, generator=rng(seed), batch=batch)
        assert t.dtype == torch.float32
        assert t.shape == ((layout.num_shots,) if batch is None else (batch, layout.num_shots))
        is_global = torch.tensor([shot.role == "global" for shot in layout.shots])
        assert (t[..., is_global] == 0).all()
        assert ((t[..., ~is_global] > 0) & (t[..., ~is_global] < 1)).all()
        assert torch.equal(t, sample_levels(layout, generator=rng(seed), batch=batch))

    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.0, 1.5)])
    def test_logit_normal(self, mean, std):
        t = sample_levels(Layout([[SHOT] * 4]), generator=rng(), batch=20_000, mean=mean, std=std)
        logits = torch.logit(t.double())
        error = std / math.sqrt(logits.numel())
        assert abs(logits.mean() - mean) < 4 * error
        assert abs(logits.std() - std) < 4 * error
        # the tails too: a normal has 2.275 % beyond two standard deviations on each side
        assert ((logits > mean + 2 * std).double().mean() - 0.02275).abs() < 0.003
        assert ((logits < mean - 2 * std).double().mean() - 0.02275).abs() < 0.003

    def test_shots_are_independent(self):
        t = sample_levels(Layout([[SHOT] * 3, [SHOT] * 2]), generator=rng(), batch=20_000)
        correlation = torch.corrcoef(t.double().T) - torch.eye(5)
        assert correlation.abs().max() < 4 / math.sqrt(20_000)

    def test_a_global_shot_takes_its_draw(self):
        with_global = sample_levels(Layout([[GLOBAL, SHOT, SHOT]]), generator=rng())
        without = sample_levels(Layout([[SHOT, SHOT, SHOT]]), generator=rng())
        assert torch.equal(with_global[1:], without[1:])

    @given(layout=layouts(), t=st.floats(0, 1))
    def test_joint_levels(self, layout, t):
        got = joint_levels(layout, t)
        assert got.dtype == torch.float32
        expected = [0.0 if shot.role == "global" else t for shot in layout.shots]
        assert torch.equal(got, torch.tensor(expected, dtype=torch.float32))

    @given(st.data())
    def test_condition_levels_changes_the_chosen_shots_alone(self, data):
        layout = data.draw(layouts())
        before = data.draw(levels(layout))
        t_c = data.draw(st.dictionaries(st.integers(0, layout.num_shots - 1), st.floats(0, 1000)))
        kept = before.clone()
        after = condition_levels(before, t_c)
        assert torch.equal(before, kept)
        for i in range(layout.num_shots):
            assert after[i] == (torch.tensor(t_c[i] / 1000, dtype=torch.float32) if i in t_c else before[i])

    def test_condition_levels_of_a_batch(self):
        t = condition_levels(sample_levels(self.row, generator=rng(), batch=3), {1: 100, 3: 500})
        assert t[:, [1, 3]].tolist() == torch.tensor([[0.1, 0.5]] * 3).tolist()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch": 0}, "^batch: got 0, expected an int of at least 1"),
            ({"mean": math.inf}, "^mean: got inf, expected a finite mean"),
            ({"std": 0.0}, "^std: got 0.0, expected a positive standard deviation"),
            ({"std": -1.0}, "^std: got -1.0, expected a positive"),
            ({"std": math.nan}, "^std: got nan, expected a positive"),
        ],
    )
    def test_sample_levels_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            sample_levels(self.row, generator=rng(), **options)

    @pytest.mark.parametrize("t", [-0.1, 1.1, 500.0, math.nan])
    def test_joint_levels_refuses(self, t):
        with pytest.raises(ValueError, match=r"^t: got .*expected a level in \[0, 1\]"):
            joint_levels(self.row, t)

    @pytest.mark.parametrize("shot", [-1, 4])
    def test_condition_levels_refuses_shots(self, shot):
        with pytest.raises(ValueError, match=f"^t_c: got shot {shot}, expected 0 to 3: the row has 4 shots"):
            condition_levels(torch.zeros(4), {shot: 100})

    @pytest.mark.parametrize("level", [-1, 1001, math.nan])
    def test_condition_levels_refuses_levels(self, level):
        with pytest.raises(ValueError, match=f"^t_c: got {level} for shot 0, expected a level from 0"):
            condition_levels(torch.zeros(4), {0: level})


class TestSingleFrames:
    def test_never_and_always(self):
        clips = [torch.randn(2, 3, frames, 2, 2) for frames in (1, 4, 7)]
        never = substitute_single_frames(clips, generator=rng(), probability=0.0)
        assert all(got is clip for got, clip in zip(never, clips, strict=True))
        always = substitute_single_frames(clips, generator=rng(), probability=1.0)
        assert [got.shape[-3] for got in always] == [1, 1, 1]

    @given(frames=st.lists(st.integers(1, 9), max_size=6), seed=st.integers(0, 2**31), probability=st.floats(0, 1))
    def test_a_clip_or_one_frame_of_itself(self, frames, seed, probability):
        clips = [torch.arange(n).view(1, n, 1, 1) + 100 * i for i, n in enumerate(frames)]
        got = substitute_single_frames(clips, generator=rng(seed), probability=probability)
        assert len(got) == len(clips)
        for new, clip in zip(got, clips, strict=True):
            assert new is clip or (new.shape == (1, 1, 1, 1) and new.item() in clip)

    def test_rate_and_frames(self):
        count = 20_000
        got = substitute_single_frames([torch.arange(5).view(1, 5, 1, 1)] * count, generator=rng())
        frames = Counter(clip.item() for clip in got if clip.shape[-3] == 1)
        replaced = sum(frames.values())
        assert abs(replaced - 0.1 * count) < 4 * math.sqrt(count * 0.1 * 0.9)
        assert sorted(frames) == [0, 1, 2, 3, 4]
        assert all(abs(n - replaced / 5) < 4 * math.sqrt(replaced * 0.2 * 0.8) for n in frames.values())

    def test_frames_are_views(self):
        clip = torch.zeros(1, 4, 1, 1)
        (frame,) = substitute_single_frames([clip], generator=rng(), probability=1.0)
        frame += 1
        assert clip.sum() == 1

    @pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
    def test_refuses_probability(self, probability):
        with pytest.raises(ValueError, match=r"^probability: got .*expected a probability in \[0, 1\]"):
            substitute_single_frames([], generator=rng(), probability=probability)

    @pytest.mark.parametrize("shape", [(2, 3, 3), (3, 0, 2, 2)])
    def test_refuses_clips(self, shape):
        good = torch.zeros(3, 1, 2, 2)
        with pytest.raises(ValueError, match=r"^clips: clip 1 \(counting from 0\) has shape .*at least 1 frame"):
            substitute_single_frames([good, torch.zeros(shape)], generator=rng())


class TestShotRun:
    @given(available=st.integers(1, 30), max_shots=st.integers(1, 12), seed=st.integers(0, 2**31))
    def test_a_run_of_the_scenes_shots(self, available, max_shots, seed):
        run = sample_shot_run(available, generator=rng(seed), max_shots=max_shots)
        assert run.step == 1
        assert 1 <= len(run) <= max_shots
        assert set(run) <= set(range(available))
        assert run == sample_shot_run(available, generator=rng(seed), max_shots=max_shots)

    def test_more_shots_are_likelier_and_every_count_has_a_chance(self):
        generator, draws = rng(), 18_000
        runs = [sample_shot_run(12, generator=generator) for _ in range(draws)]
        counts = Counter(map(len, runs))
        assert [counts[n] for n in range(1, 10)] == sorted(counts.values())
        assert len(counts) == 9
        for n, seen in counts.items():
            p = n / 45
            assert abs(seen - draws * p) < 4 * math.sqrt(draws * p * (1 - p))

    def test_where_a_run_starts_is_uniform(self):
        generator = rng()
        starts = Counter(sample_shot_run(4, generator=generator, max_shots=1).start for _ in range(4000))
        assert all(abs(starts[i] - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75) for i in range(4))

    @pytest.mark.parametrize("bad", [0, -1, True, 2.0])
    def test_refuses(self, bad):
        with pytest.raises(ValueError, match=f"^available: got {bad}, expected an int of at least 1"):
            sample_shot_run(bad, generator=rng())
        with pytest.raises(ValueError, match=f"^max_shots: got {bad}, expected an int of at least 1"):
            sample_shot_run(3, generator=rng(), max_shots=bad)


class TestShotNoise:
    def test_normal(self):
        noise = shot_noise((200, 1000), **KEY)
        assert noise.dtype == torch.float32
        assert abs(noise.mean()) < 0.01
        assert abs(noise.std() - 1) < 0.01

    def test_keyed_by_all_of_its_key_and_nothing_else(self):
        torch.manual_seed(5)
        state = torch.get_rng_state()
        noise = shot_noise((2, 3), **KEY)
        torch.manual_seed(6)
        assert torch.equal(noise, shot_noise((2, 3), **KEY))
        torch.set_rng_state(state)
        shot_noise((2, 3), **KEY)
        assert torch.equal(torch.get_rng_state(), state)
        others = [shot_noise((2, 3), **(KEY | {name: 7})) for name in KEY]
        others.append(shot_noise((2, 3), seed=0, step=12, scene=3, shot=3))
        others.append(shot_noise((2, 3), seed=0, step=1, scene=23, shot=3))
        assert all(not torch.equal(noise, other) for other in others)

    def test_pinned(self):
        # a change here changes every run that is resumed: the key's hash is part of the contract
        expected = torch.tensor([-1.4665569, 0.9570675, -0.1947365])
        torch.testing.assert_close(shot_noise((3,), **KEY), expected)

    def test_shots_are_uncorrelated(self):
        noise = torch.stack(
            [shot_noise((20_000,), seed=0, step=step, scene=0, shot=k) for step in (0, 1) for k in (0, 1)]
        )
        assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 4 / math.sqrt(20_000)

    def test_dtype_and_device_change_no_draw(self):
        noise = shot_noise((4, 5), **KEY)
        assert torch.equal(shot_noise((4, 5), dtype=torch.bfloat16, **KEY), noise.bfloat16())
        assert torch.equal(shot_noise((4, 5), dtype=torch.float64, **KEY), noise.double())
        assert shot_noise((4, 5), device="meta", **KEY).device.type == "meta"

    @pytest.mark.parametrize("name", list(KEY))
    @pytest.mark.parametrize("value", [1.0, True, "1", torch.tensor(1)])
    def test_refuses_keys(self, name, value):
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected an int$"):
            shot_noise((1,), **(KEY | {name: value}))


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: sample_levels(Layout([[SHOT]]), generator=generator),
        lambda generator: substitute_single_frames([], generator=generator),
        lambda generator: sample_shot_run(3, generator=generator),
        lambda generator: plan_rows([[1]], budget=1, generator=generator),
    ],
)
def test_generators_live_on_the_cpu(draw):
    draw(rng())
    with pytest.raises(ValueError, match=r"^generator: got one on cuda:0, expected one on the CPU, so that a seed"):
        draw(SimpleNamespace(device=torch.device("cuda", 0)))
