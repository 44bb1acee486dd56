"""The static description of a single-shot DiT, and the check of what a shot brings against it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from lct_core._describe import describe
from lct_core.backbone.inputs import ShotInput
from lct_core.paths import Path, RectifiedFlow
from lct_core.rope import Pairing

TextPath = Literal["joint", "cross"]

_OF_LATENTS = ("frames", "height", "width")


class Extra(NamedTuple):
    """One of the further inputs that a model takes for a shot.

    Args:
        shape: Its axes after the batch: a size, ``"frames"``, ``"height"`` or ``"width"`` for that of the latents, or
            any other word for an axis of any size. None for a plain number.
        required: Whether a shot must have it; a global shot need not where it is an image condition or follows the
            latents: it is then zero, as its dummy video is, or left out.
        image: Whether it is an image condition.
        prompt: Whether it belongs to the prompt, as its pooled embedding does: a negative prompt has one of its own.
        positive: Whether a plain number must be more than 0, as a frame rate must; else 0 is allowed too.
    """

    shape: tuple[int | str, ...] | None
    required: bool = False
    image: bool = False
    prompt: bool = False
    positive: bool = False

    @property
    def follows_latents(self) -> bool:
        """Whether one of its axes is one of the latents'."""
        return bool(set(_OF_LATENTS).intersection(self.shape or ()))

    @property
    def has_channels(self) -> bool:
        """Whether one of its axes has a size of the model's own, so that it is in floating point."""
        return any(isinstance(axis, int) for axis in self.shape or ())

    def axes(self, latents: Tensor) -> list[int | str]:
        """Its axes after the batch, beside some latents: sizes, and the names of those that may have any size."""
        sizes = dict(zip(_OF_LATENTS, latents.shape[2:], strict=True))
        return [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in self.shape or ()]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The static description of a single-shot DiT.

    Args:
        latent_channels: Channels of the latents.
        patch: Latent frames, rows and columns that make one token.
        text_width: Channels of the encoded prompt.
        text_tokens: Least and most tokens of a prompt, padding included where the model attends to it; None for any.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Channels of a head.
        text: ``"joint"`` where text tokens take part in self-attention, ``"cross"`` where it is cross-attended.
        text_first: Whether text tokens come before video tokens in self-attention.
        pairing: How RoPE pairs channels; None for a model without RoPE.
        unit: Native coordinates, ``(frames, height, width)`` and any further axes of the model's own, that make one
            step along the diagonal; 0 on an axis along which shots do not move.
        timesteps: The model's own timestep at noise level 0 (clean) and 1 (noise); linear between.
        path: Noising and training target.
        extras: What ``ShotInput.extras`` may hold, by name.
        text_mask: The extra that marks which text tokens are there and which are padding, ``[batch, tokens]``: padding
            is cut off before the model sees it (default: the model takes no such mask).
        noisy_mask: The extra that marks which tokens are at the shot's noise level, 1, and which are a clean condition,
            0: ``[batch, frames]`` or ``[batch, frames, height, width]`` of the latents, alike in every patch (default:
            the model takes no such mask).

    Raises:
        ValueError: naming the trait, for a value that none of its kind can have.
    """

    latent_channels: int
    patch: tuple[int, int, int]
    text_width: int
    heads: int
    kv_heads: int
    head_dim: int
    text: TextPath
    text_first: bool = True
    text_tokens: tuple[int, int | None] = (0, None)
    pairing: Pairing | None = "interleaved"
    unit: tuple[float, ...] = (1.0, 1.0, 1.0)
    timesteps: tuple[float, float] = (0.0, 1000.0)
    path: Path = field(default_factory=RectifiedFlow)
    extras: Mapping[str, Extra] = field(default_factory=dict)
    text_mask: str | None = None
    noisy_mask: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (("text", TextPath), ("pairing", Pairing)):
            if (value := getattr(self, name)) not in (*get_args(kind), *((None,) if name == "pairing" else ())):
                raise ValueError(f"{name}: got {value!r}, expected one of {get_args(kind)}")
        for name in ("latent_channels", "text_width", "heads", "kv_heads", "head_dim"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a positive int; is it in the model's configuration?")
        for name, extra in self.extras.items():
            if any(not isinstance(axis, int | str) for axis in extra.shape or ()):
                raise ValueError(f"extras: {name} has the shape {extra.shape}, expected sizes and names of axes")
        for name in ("text_mask", "noisy_mask"):
            if (mask := getattr(self, name)) is not None and mask not in self.extras:
                raise ValueError(f"{name}: got {mask!r}, expected one of the extras, {sorted(self.extras)}, or None")
        if not isinstance(self.path, Path):
            raise ValueError(f"path: got {self.path!r}, expected a lct_core.paths.Path, with all of its methods")

    def timestep(self, level: Tensor) -> Tensor:
        """The model's own timestep at a noise level between 0, clean, and 1, noise."""
        clean, noise = self.timesteps
        return clean + (noise - clean) * level


def check_inputs(inputs: ShotInput, traits: Traits, *, model: str) -> None:
    """Refuse a shot whose latents, text or extras do not fit the traits of a model, called ``model`` in errors.

    Raises:
        ValueError: naming what came, what was expected, and the fix.
    """
    latents, text = inputs.latents, inputs.text
    for name, value, source in (("latents", latents, "VAE"), ("text", text, "text encoder")):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            came = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else describe(value)
            raise ValueError(f"{name}: got {came}, expected a floating-point tensor of the model's {source}")
    if latents.ndim != 5 or latents.shape[1] != traits.latent_channels or not len(latents):
        others = [name for name, extra in traits.extras.items() if extra.has_channels and extra.follows_latents]
        fix = f"; other channels are extras: {others}" if others else ""
        raise ValueError(
            f"latents: got {describe(latents)}, expected [batch, {traits.latent_channels}, frames, height, width], "
            f"a batch of 1 or more{fix}"
        )
    if text.ndim != 3 or text.shape[2] != traits.text_width or len(text) != len(latents):
        raise ValueError(
            f"text: got {describe(text)}, expected [{len(latents)}, tokens, {traits.text_width}]: "
            "one encoded prompt for every entry of the batch"
        )
    _check_device("text", text, latents)
    least, most = traits.text_tokens
    if text.shape[1] < least or (most is not None and text.shape[1] > most):
        wanted = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(
            f"text: got {text.shape[1]} tokens, expected {wanted}; encode and pad the prompt as the model's own "
            "pipeline does, an empty prompt too"
        )
    if any(size % patch or not size for size, patch in zip(latents.shape[2:], traits.patch, strict=True)):
        raise ValueError(
            f"latents: got frames, height, width {tuple(latents.shape[2:])}, expected positive multiples "
            f"of the patch {traits.patch}; crop or pad the video"
        )
    check_extras(inputs, traits, model=model)


def check_extras(inputs: ShotInput, traits: Traits, *, model: str) -> None:
    """Refuse extras that a model does not take, that have another shape than it takes, or that are missing.

    Raises:
        ValueError: naming the extra, what came and what was expected.
    """
    takes, latents = traits.extras, inputs.latents
    if unknown := set(inputs.extras) - set(takes):
        raise ValueError(
            f"extras: got {sorted(unknown, key=str)}, which {model} does not take; it takes {sorted(takes) or 'none'}"
        )
    missing = [
        name
        for name, extra in takes.items()
        if extra.required and name not in inputs.extras and name != traits.text_mask  # cut off by then
        if inputs.role == "shot" or not (extra.image or extra.follows_latents)
    ]
    if missing:
        shapes = [f"{name} {_words(('batch', *(takes[name].shape or ())))}" for name in missing]
        raise ValueError(
            f"extras: got {sorted(inputs.extras) or 'none'}, but this {model} also needs "
            f"{', '.join(shapes)}; pass them as ShotInput(extras={{...}})"
        )
    for name, value in inputs.extras.items():
        if takes[name].shape is None:
            _check_number(name, value, positive=takes[name].positive)
            continue
        axes = [len(latents), *takes[name].axes(latents)]
        if (
            not isinstance(value, Tensor)
            or value.ndim != len(axes)
            or any(isinstance(axis, int) and axis != size for axis, size in zip(axes, value.shape, strict=True))
        ):
            raise ValueError(f"extras: {name} is {describe(value)}, expected a tensor {_words(axes)}")
        if value.is_complex() or (takes[name].has_channels and not value.is_floating_point()):
            kind = "floating-point" if takes[name].has_channels else "real"
            raise ValueError(f"extras: {name} is {value.dtype}, expected a {kind} tensor; call .to(latents.dtype)")
        # a text mask may stay on the CPU, where its values are read without waiting for the device
        if name != traits.text_mask or value.is_meta:
            _check_device(f"extras: {name}", value, latents)


def _check_number(name: str, value: Any, *, positive: bool) -> None:
    is_number = isinstance(value, int | float) and not (positive and isinstance(value, bool))
    if not is_number or not 0 <= value <= sys.float_info.max or (positive and not value):
        came = f"a tensor of shape {describe(value)}" if isinstance(value, Tensor) else describe(value)
        kind = "above 0" if positive else "not negative"
        raise ValueError(f"extras: {name} is {came}, expected a number, an int or a float, that is {kind}")


def _check_device(name: str, value: Tensor, latents: Tensor) -> None:
    if value.device != latents.device:
        raise ValueError(
            f"{name} is on {value.device}, expected {latents.device} as the latents are; move all of a shot with "
            "ShotInput.to(device)"
        )


def _words(axes: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, axes))}]"
