"""The static description of a single-shot DiT, and the check of what a shot brings against it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from lct_core._describe import describe
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
        if not isinstance(self.path, Path):
            raise ValueError(f"path: got {self.path!r}, expected a lct_core.paths.Path, with all of its methods")

    def timestep(self, level: Tensor) -> Tensor:
        """The model's own timestep at a noise level between 0, clean, and 1, noise."""
        clean, noise = self.timesteps
        return clean + (noise - clean) * level


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
