"""What a run of the demo costs; all of it ours, chosen for minutes on two cores."""

from dataclasses import dataclass, replace

from lct_core.training import Stage


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What a run of the demo costs.

    Args:
        seed: Of all randomness.
        scenes: Scenes in the training set.
        shots: Shots in each of them.
        held_out: Scenes of equally many shots to generate, never seen in training.
        width: The model's.
        depth: The model's.
        heads: The model's.
        single_shot_batch: Shots in a single-shot step.
        scene_batch: Scenes in a scene step.
        single_shot_steps: Of the first stage, at ``single_shot_rate``.
        tuning_steps: Of Long Context Tuning, at ``tuning_rate``.
        causal_steps: Of context-causal tuning, at ``causal_rate``.
        level_mean: Mean of the logit of noise levels in training. Colours are decided where nearly all is noise; at a
            mean of 0 shots learn to agree on them much more slowly. SD3's shift of 3 is a mean of 1.1.
        euler_steps: Of generation (paper, A.2: 32).
        guidance: On the texts, one scale for every mode (paper, A.2: 7.5, for a large model).
        t_c: Noise level of given and of earlier shots, 0-1000 (paper, 4.2: 100-500).
        long_shots: Shots in a row for the errors that accumulate, each seeing the last that fit the trained window; 0
            leaves this out.
        long_t_c: Noise levels of the history to compare there (paper, Fig. 7 and 8).
        composed: Pairs of an identity and an environment image to compose; 0 leaves this out.
    """

    seed: int = 0
    scenes: int = 500
    shots: int = 4
    held_out: int = 32
    width: int = 96
    depth: int = 3
    heads: int = 4
    single_shot_batch: int = 8
    scene_batch: int = 2
    single_shot_steps: int = 2500
    single_shot_rate: float = 6e-3
    tuning_steps: int = 3700
    tuning_rate: float = 4e-3
    causal_steps: int = 3700
    causal_rate: float = 3e-3
    level_mean: float = 1.3
    euler_steps: int = 32
    guidance: float = 2.0
    t_c: float = 100.0
    long_shots: int = 0
    long_t_c: tuple[float, ...] = (0.0, 100.0, 300.0, 500.0, 900.0)
    composed: int = 0

    def stages(self) -> tuple[Stage, Stage, Stage]:
        """The three stages of training."""
        single = Stage(
            name="single_shot",
            steps=self.single_shot_steps,
            learning_rate=self.single_shot_rate,
            scene_share=0.0,
            pattern="own_shot",
            single_shot_batch=self.single_shot_batch,
            scene_batch=self.scene_batch,
            max_shots=self.shots,
            level_mean=self.level_mean,
        )
        tuning = replace(
            single,
            name="bidirectional",
            steps=self.tuning_steps,
            learning_rate=self.tuning_rate,
            scene_share=0.5,
            pattern="bidirectional",
        )
        causal = replace(
            tuning,
            name="causal",
            steps=self.causal_steps,
            learning_rate=self.causal_rate,
            pattern="context_causal",
        )
        return single, tuning, causal


def quick(*, seed: int) -> DemoSettings:
    """About a quarter of the time: the same code, weaker numbers."""
    return DemoSettings(
        seed=seed,
        scenes=120,
        single_shot_steps=800,
        tuning_steps=1300,
        causal_steps=350,
        euler_steps=12,
    )


def full(*, seed: int) -> DemoSettings:
    """Better numbers, errors that accumulate, and composition."""
    usual = DemoSettings(seed=seed)
    return replace(
        usual,
        scenes=1000,
        single_shot_steps=2 * usual.single_shot_steps,
        tuning_steps=2 * usual.tuning_steps,
        causal_steps=2 * usual.causal_steps,
        long_shots=12,
        composed=32,
    )
