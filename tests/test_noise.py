"""Noise levels, single frames, runs of shots, and seeds."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

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
from lct_core.testing.strategies import layouts, levels

SHOT = Shot(text=1, grid=(1, 1, 1))
GLOBAL = Shot(text=1, grid=(1, 1, 1), role="global")
KEY = {"seed": 0, "step": 1, "scene": 2, "shot": 3}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


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
