"""What ``lct plan`` is asked about: a model, and a script's scene for it."""

from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from typing import NamedTuple

import torch

from lct_core import generation
from lct_core.backbone import Backbone, ShotInput
from lct_core.checkpoints import Tuned
from lct_core.cli.asked import as_taken, refuse, script_layout
from lct_core.cli.sampling import parse_size
from lct_core.codec import Codec
from lct_core.cost import Meter, Mode, example
from lct_core.engine.scene import with_dummy_video
from lct_core.engine.visibility import TextScope
from lct_core.generation import Guidance, Sampling
from lct_core.layout import Shot
from lct_core.noise import shot_noise
from lct_core.scene_model import SceneModel, retrofit
from lct_core.script import Script
from lct_core.session.archive import check_size


class Subject(NamedTuple):
    """A model and a scene for it.

    Args:
        meter: Counts what the model takes.
        model: The model itself, where it has weights.
        scene: The shots' token counts.
        negative: The same with the negative prompts; None without guidance.
        inputs: The shots, where the model has weights.
        sampling: How it is generated, the negative prompts encoded where the model has weights.
        pattern: Who sees whom where the history is run again.
    """

    meter: Meter
    model: SceneModel | None
    scene: list[Shot]
    negative: list[Shot] | None
    inputs: list[ShotInput]
    sampling: Sampling
    pattern: str = "bidirectional"

    def given(self, mode: Mode) -> tuple[int, ...]:
        """Conditional generation begins with a shot that is there."""
        first = next(i for i, shot in enumerate(self.scene) if shot.role == "shot")
        return (first,) if mode == "conditional" else ()


class Wanted(NamedTuple):
    """What the command line says of it, whatever the model.

    Args:
        script: The script, as long as it is to be.
        size: ``--size``.
        text: ``--text``.
        sampling: How it is to be generated.
        dtype: Of the weights; None as they are.
        device: Where the model runs.
        seed: Of noise and random prompts.
    """

    script: Script
    size: str | None
    text: int | None
    sampling: Sampling
    dtype: str | None
    device: torch.device
    seed: int


def of_checkpoint(tuned: Tuned, wanted: Wanted) -> Subject:
    """Of a tuned model, and the codec that it names.

    Raises:
        ValueError: for a size that the codec does not take, and ``--text``.
    """
    model, codec = tuned.build(wanted.device)
    pixels = parse_size(wanted.size, tuned.card.size)
    even = lcm(2, tuned.card.multiple)
    check_size(pixels, codec, name="--size", fix=f"; choose another size, for example multiples of {even}")
    subject = _of_codec(model, codec, pixels, wanted)
    return subject._replace(pattern="context_causal" if tuned.pattern == "context_causal" else "bidirectional")


def of_model(adapter: Backbone, codec: Codec | None, wanted: Wanted, *, asking: str) -> Subject:
    """Of an adapter: with its codec, or else with shots of noise and random prompts, of sizes in latents and tokens.

    Args:
        adapter: Its model may be without weights.
        codec: What came with it.
        wanted: What the command line says.
        asking: The option that named the model.

    Raises:
        ValueError: where a size is missing, or the model does not take it.
    """
    without_weights = next(adapter.model.parameters()).is_meta
    if not without_weights:
        adapter.model.to(wanted.device).eval()
    overall = adapter.traits.text == "cross" and bool(wanted.script.global_prompt())
    scope: TextScope = "own_and_global" if overall else "own"
    if codec is not None and not without_weights:
        model = retrofit(adapter.model, backbone=adapter, text=scope)
        if wanted.size is None:
            raise ValueError(f"{asking}: got it without --size, expected frames, height and width in pixels")
        pixels = parse_size(wanted.size, (0, 0, 0))
        check_size(pixels, codec, name="--size", as_video=False)
        return _of_codec(model, codec, pixels, wanted)
    if wanted.dtype is not None:
        adapter.cast(getattr(torch, wanted.dtype))
    layout = script_layout(lambda: wanted.script, wanted.size, wanted.text, adapter, asking=asking)
    counts = [*as_taken(adapter, layout, given=None).shots]
    if without_weights:
        negative = None if wanted.sampling.guidance is None else counts
        return Subject(Meter(adapter, text=scope), None, counts, negative, [], wanted.sampling)
    model = retrofit(adapter.model, backbone=adapter, text=scope)
    scene = [_noise(adapter, shot, i, wanted.seed).to(wanted.device) for i, shot in enumerate(counts)]
    prompt = {name: x for name, x in scene[-1].extras.items() if adapter.traits.extras[name].prompt}
    sampling = wanted.sampling
    if sampling.guidance is not None:
        guidance = Guidance(text=scene[-1].text, extras=prompt, shared_history=sampling.shared_history)
        sampling = replace(sampling, guidance=guidance, shared_history=False)
    return _subject(model, scene, sampling)


def _of_codec(model: SceneModel, codec: Codec, pixels: tuple[int, int, int], wanted: Wanted) -> Subject:
    refuse({"--text": wanted.text}, "with a codec, which encodes the prompts", "leave it out")
    if wanted.dtype is not None:
        model.adapter.cast(getattr(torch, wanted.dtype))
    dtype = next(model.backbone.parameters()).dtype
    scene = generation.start_scene(wanted.script, codec, pixels, seed=wanted.seed, device=wanted.device, dtype=dtype)
    return _subject(model, scene, wanted.sampling.encoded(codec))


def _subject(model: SceneModel, scene: list[ShotInput], sampling: Sampling) -> Subject:
    adapter = model.adapter

    def counts(shots: Sequence[ShotInput]) -> list[Shot]:
        return [
            Shot(shot.text.shape[1], (0, 0, 0), shot.role)
            if shot.latents is None
            else adapter.shot(adapter.prepare(shot))
            for shot in with_dummy_video(shots, adapter)
        ]

    guidance = sampling.on_texts
    negative = None if guidance is None else counts(guidance.negative(scene, adapter.traits))
    return Subject(Meter(model), model, counts(scene), negative, scene, sampling)


def _noise(adapter: Backbone, shot: Shot, i: int, seed: int) -> ShotInput:
    """A random prompt and the noise that a shot starts from; a global shot is left to the director."""
    given = example(adapter, shot, dtype=next(adapter.model.parameters()).dtype)
    if shot.role == "global":
        return ShotInput(text=given.text, extras=given.extras, role="global")
    noise = shot_noise(tuple(given.latents.shape), seed=seed, step=0, scene=0, shot=i)
    return replace(given, latents=noise.to(given.latents.dtype))
