"""What a training step sees: single shots or scenes, drawn from a data set as the paper does (3.4 and A.1)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lct_core.backbone import ShotInput, collate_shots
from lct_core.codec import Codec
from lct_core.data import VideoScene
from lct_core.layout import Layout, Shot
from lct_core.noise import keyed_generator, sample_levels, sample_shot_run, shot_noise, substitute_single_frames
from lct_core.training.stage import Stage


class Example(NamedTuple):
    """One scene, or one single shot, of a step: clean, with the noise of every shot, None for a global one."""

    shots: list[ShotInput]
    noise: list[Tensor | None]


class TrainingRow(NamedTuple):
    """What :func:`lct_core.tuning_loss` takes: clean scenes side by side, a level for each shot, and noise."""

    scenes: list[list[ShotInput]]
    levels: Float[Tensor, "batch shots"]
    noise: list[list[Tensor | None]]

    def to(self, device: torch.device) -> "TrainingRow":
        """The same on a device; noise levels stay where they are."""
        return TrainingRow(
            [[shot.to(device) for shot in scene] for scene in self.scenes],
            self.levels,
            [[None if eps is None else eps.to(device) for eps in scene] for scene in self.noise],
        )


@torch.no_grad()
def sample_row(
    stage: Stage,
    step: int,
    data: Sequence[VideoScene],
    codec: Codec,
    *,
    seed: int,
    single_shot_data: Sequence[VideoScene] | None = None,
) -> TrainingRow:
    """Draw what a step trains on. The same arguments give the same row, in any process: a run can be resumed anywhere.

    Args:
        stage: How to draw.
        step: The step, counting from 0.
        data: Scenes.
        codec: Encodes pictures and prompts.
        seed: Of the run.
        single_shot_data: Where single shots come from (paper, A.1: pre-training data; default: the scenes' own shots).

    Returns:
        The row, all in float32; no gradient is recorded in the codec.

    Raises:
        ValueError: for no data, and as the codec does.
    """
    generator = keyed_generator(seed, stage.name, step)
    if stage.is_scene_step(step):
        examples = scene_examples(stage, data, codec, generator=generator)
    else:
        source = data if single_shot_data is None else single_shot_data
        examples = single_shots(
            source, codec, count=stage.single_shot_batch, dropout=stage.text_dropout, generator=generator
        )
    return to_row(examples, generator=generator, mean=stage.level_mean, std=stage.level_std)


@torch.no_grad()
def single_shots(
    data: Sequence[VideoScene], codec: Codec, *, count: int, dropout: float = 0.1, generator: torch.Generator
) -> list[Example]:
    """Draw single shots: a random shot of a random scene each, with its own prompt, without the mark of a cut.

    Args:
        data: Scenes.
        codec: Encodes pictures and prompts.
        count: How many.
        dropout: Probability that a prompt is left empty, each for itself (ours: 0.1).
        generator: Source of all randomness, on the CPU.
    """
    examples = []
    for _ in range(count):
        scene = _choose(data, generator)
        i = _below(len(scene.shots), generator)
        prompt = "" if _chance(dropout, generator) else scene.script.shots[i].text
        examples.append(_example([_shot(scene.shots[i], prompt, codec)], generator))
    return examples


@torch.no_grad()
def scene_examples(
    stage: Stage, data: Sequence[VideoScene], codec: Codec, *, generator: torch.Generator
) -> list[Example]:
    """Draw scenes: a run of shots with the global prompt, some shots as single frames, some prompts left empty.

    Args:
        stage: How many scenes and shots, and with which probabilities.
        data: Scenes.
        codec: Encodes pictures and prompts.
        generator: Source of all randomness, on the CPU.
    """
    examples = []
    for _ in range(stage.scene_batch):
        scene = _choose(data, generator)
        run = sample_shot_run(len(scene.shots), generator=generator, max_shots=stage.max_shots)
        clips = substitute_single_frames(
            [scene.shots[i] for i in run], generator=generator, probability=stage.single_frame
        )
        with_story = not _chance(stage.storyline_dropout, generator)
        no_global, no_shots = (_chance(stage.text_dropout, generator) for _ in range(2))
        prompts = scene.script.shot_prompts()
        shots = [_shot(clip, "" if no_shots else prompts[i], codec) for i, clip in zip(run, clips, strict=True)]
        if scene.script.global_prompt():
            overall = "" if no_global else scene.script.global_prompt(storyline=with_story)
            shots.insert(0, ShotInput(text=codec.text(overall)[None].float(), role="global"))
        examples.append(_example(shots, generator))
    return examples


def to_row(
    examples: Sequence[Example], *, generator: torch.Generator, mean: float = 0.0, std: float = 1.0
) -> TrainingRow:
    """Put examples in one row: as a batch where they are all of one layout, else side by side.

    Args:
        examples: At least one.
        generator: Source of the noise levels, on the CPU: every shot has its own (paper, 3.4).
        mean: Mean of the levels' logit (upstream, SD3: 0).
        std: Its standard deviation (upstream, SD3: 1).

    Raises:
        ValueError: for no example.
    """
    if not examples:
        raise ValueError("examples: got none, expected at least one")
    levels = [
        sample_levels(
            Layout([[Shot(text=0, grid=(1, 1, 1), role=shot.role) for shot in example.shots]]),
            generator=generator,
            mean=mean,
            std=std,
        )
        for example in examples
    ]
    if len({_layout(example) for example in examples}) > 1:
        return TrainingRow([e.shots for e in examples], torch.cat(levels)[None], [e.noise for e in examples])
    columns = zip(*(example.shots for example in examples), strict=True)
    noise = zip(*(example.noise for example in examples), strict=True)
    return TrainingRow(
        [[collate_shots(shots) for shots in columns]], torch.stack(levels), [[_cat(draws) for draws in noise]]
    )


def _example(shots: list[ShotInput], generator: torch.Generator) -> Example:
    """With the noise of every shot, drawn whole and apart from the others'."""
    key = int(torch.randint(2**62, (), generator=generator))
    return Example(
        shots,
        [
            None if shot.role == "global" else shot_noise(shot.latents.shape, seed=key, step=0, scene=0, shot=i)
            for i, shot in enumerate(shots)
        ],
    )


def _shot(clip: Tensor, prompt: str, codec: Codec) -> ShotInput:
    return ShotInput(latents=codec.encode(clip)[None].float(), text=codec.text(prompt)[None].float())


def _layout(example: Example) -> tuple[Any, ...]:
    """What shots must have in common to be batched."""
    return tuple(
        (shot.role, shot.text.shape, None if shot.latents is None else shot.latents.shape) for shot in example.shots
    )


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.cat([t for t in tensors if t is not None])


def _choose(data: Sequence[VideoScene], generator: torch.Generator) -> VideoScene:
    if not len(data):
        raise ValueError("data: got no scene, expected at least one to draw from")
    return data[_below(len(data), generator)]


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))


def _chance(probability: float, generator: torch.Generator) -> bool:
    """True with a probability; takes one draw in any case."""
    return bool(torch.rand((), generator=generator, dtype=torch.float64) < probability)
