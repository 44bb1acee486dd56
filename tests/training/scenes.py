"""Data, examples and models that the tests of training share."""

from copy import deepcopy
from functools import cache

import torch

from lct_core import retrofit
from lct_core.codec import LinearCodec
from lct_core.data import VideoScene
from lct_core.demo.world import PROMPT_LENGTH, VOCABULARY, render, sample_scene
from lct_core.plugins import registry
from lct_core.training import (
    Stage,
    TrainingRow,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prompt(shot):
    """The inverse of ``Plain.text``."""
    return "".join(chr(int(c)) for c in shot.text.flatten())


class Learned(torch.nn.Module):
    """A codec with weights of its own, that take gradients."""

    def __init__(self, codec):
        super().__init__()
        self.codec = codec
        self.of_pictures, self.of_text = (torch.nn.Parameter(torch.tensor(1.0)) for _ in range(2))
        self.grad_modes = set()

    def encode(self, frames):
        self.grad_modes.add(torch.is_grad_enabled())
        return self.of_pictures * self.codec.encode(frames)

    def text(self, prompt):
        self.grad_modes.add(torch.is_grad_enabled())
        return self.of_text * self.codec.text(prompt)


def tensors(row):
    """All that a row holds, in order, with its nesting."""
    return [
        [len(scene) for scene in row.scenes],
        row.levels,
        *(value for scene in row.scenes for shot in scene for value in (shot.role, shot.latents, shot.text)),
        *(eps for scene in row.noise for eps in scene),
    ]


def same(a, b):
    if isinstance(a, TrainingRow):
        a, b = tensors(a), tensors(b)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


WIDTH, CHANNELS = len(VOCABULARY), 6


@cache
def initial(seed):
    """Weights none of which is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dit = registry().build("mmdit", channels=CHANNELS, text_width=WIDTH, width=16, depth=2, heads=2, mlp_ratio=2)
        for parameter in dit.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return dit


def make(seed=0, **options):
    return retrofit(deepcopy(initial(seed)), **options)


def weights(model):
    return {name: value.clone() for name, value in model.backbone.state_dict().items()}


@cache
def world(scenes=4, shots=3, seed=0):
    """Scenes of the demo's world, very small, and a codec for them."""
    draws = generator(seed)
    data = []
    for i in range(scenes):
        scene = sample_scene(shots, generator=draws)
        clips = tuple(render(scene, size=8, frames=2))
        data.append(VideoScene(script=scene.script, shots=clips, name=f"scene_{i}"))
    clips = [clip for scene in data for clip in scene.shots]
    codec = LinearCodec.fit(clips, patch=4, channels=CHANNELS, vocabulary=VOCABULARY, length=PROMPT_LENGTH)
    return data, codec


STAGE = Stage(name="first", steps=6, single_shot_batch=2, learning_rate=1e-2, warm_up=0.4, clip=0.05, ema=0.5)


def spoil_gradients(model, *, after, factor):
    """From some step on, the gradient of one weight is not finite; the loss is."""
    steps = []

    def spoilt(gradient):
        steps.append(1)
        return gradient * factor if len(steps) > after else gradient

    return model.backbone.video_out.bias.register_hook(spoilt)


class StoppedError(Exception):
    pass
