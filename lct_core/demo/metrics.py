"""Does a scene keep its colours from shot to shot, and does each shot show what its text says?

Two numbers, since each can be had without the other: a grey blur is perfectly consistent, and shots made one by one
follow their texts perfectly. Two more for what is generated from conditions: how far colours drift from the first
shot's, and how far a composed shot's are from those it was given. Texts may come with or without the mark of a cut.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lct_core.demo.world import character_mask

_PURE = 0.99  # a pixel is the character's if it is covered to this part, the background's if it is free to this part
_CONTRAST = 0.2  # RGB distance below which there is no character; true ones are at least 0.5 from their background


class AppearanceError(NamedTuple):
    """How far colours are from those they should have, as RGB distances: 0 is perfect, sqrt(3) the most."""

    character: float
    background: float

    @property
    def total(self) -> float:
        """Sum of both."""
        return self.character + self.background


def appearance(
    frames: Float[Tensor, "3 frames height width"], mask: Float[Tensor, "frames height width"]
) -> tuple[Float[Tensor, "3"], Float[Tensor, "3"]]:
    """Mean RGB of the character and of the background of a shot.

    Only pure pixels count: those that the character covers to at least 99% for the one, at most 1% for the other. Mixed
    pixels at its edge belong to neither.

    Args:
        frames: A shot, RGB in [0, 1].
        mask: How much of every pixel the character covers, from ``character_mask``: the text says where to look.

    Raises:
        ValueError: shapes that don't match, or a mask without a pure pixel (frames too small).
    """
    if frames.shape[1:] != mask.shape:
        raise ValueError(
            f"mask: got shape {list(mask.shape)}, expected {list(frames.shape[1:])} to match frames of shape "
            f"{list(frames.shape)}"
        )
    character, background = mask >= _PURE, mask <= 1 - _PURE
    if not (character.any() and background.any()):
        raise ValueError(
            f"mask: no pixel of {list(mask.shape)} is all {'background' if character.any() else 'character'}; "
            "expected frames large enough to have one"
        )
    return frames[:, character].mean(1), frames[:, background].mean(1)


def appearance_error(
    scene_frames: Sequence[Float[Tensor, "3 frames size size"]], texts: Sequence[str]
) -> AppearanceError:
    """Cross-shot colour error of a scene.

    With ``a_k`` the mean colour of the character in shot k (``appearance``, at the place that the shot's text tells)
    and ``a`` the mean of all ``a_k``, the character's error is the mean over k of ``|a_k - a|`` (Euclidean, RGB in
    [0, 1]). The background's is defined in the same way. A scene of one shot has error 0.

    Args:
        scene_frames: The scene's shots, RGB in [0, 1].
        texts: Their texts.

    Raises:
        ValueError: not one text per shot, no shot, frames of another shape or too small to have a pure pixel, or a text
            that is not a sentence of the world.
    """
    colours = _colours(scene_frames, texts)
    character, background = (colours - colours.mean(0)).norm(dim=2).mean(0).tolist()
    return AppearanceError(character, background)


def drift(scene_frames: Sequence[Float[Tensor, "3 frames size size"]], texts: Sequence[str]) -> list[float]:
    """How far every shot's colours are from the first shot's: what errors that accumulate add up to (paper, Fig. 8).

    For shot k that is ``|a_k - a_1|``, of the character plus of the background, with ``a_k`` as in
    ``appearance_error``. The first is 0.

    Args:
        scene_frames: The scene's shots, RGB in [0, 1], in the order in which they were generated.
        texts: Their texts.

    Raises:
        ValueError: as ``appearance_error`` does.
    """
    colours = _colours(scene_frames, texts)
    return (colours - colours[0]).norm(dim=2).sum(1).tolist()


def composition_error(
    frames: Float[Tensor, "3 frames size size"], text: str, *, identity: Sequence[float], environment: Sequence[float]
) -> AppearanceError:
    """How far a shot's colours are from those of the images it was composed of (paper, 4.3).

    Args:
        frames: The shot, RGB in [0, 1].
        text: Its text.
        identity: The character's colour in the identity image, RGB in [0, 1].
        environment: The mean colour of the environment image.

    Raises:
        ValueError: for frames of another shape or too small to have a pure pixel, or a text that is not a sentence of
            the world.
    """
    colours = appearance(frames, _mask(frames, text))
    character, background = (
        (colour - colour.new_tensor(given)).norm().item()
        for colour, given in zip(colours, (identity, environment), strict=True)
    )
    return AppearanceError(character, background)


def _colours(scene_frames: Sequence[Tensor], texts: Sequence[str]) -> Float[Tensor, "shots 2 3"]:
    """Mean colour of every shot's character and background."""
    if len(scene_frames) != len(texts) or not texts:
        raise ValueError(f"texts: got {len(texts)} for {len(scene_frames)} shots, expected one per shot, at least one")
    shots = [appearance(frames, _mask(frames, text)) for frames, text in zip(scene_frames, texts, strict=True)]
    return torch.stack([torch.stack(colours) for colours in shots])


def adherence(frames: Float[Tensor, "3 frames size size"], text: str) -> float:
    """IoU of the character that the frames show with the character that the text tells: 1 is perfect, 0 is none.

    The character's pixels are found without the text, by ``segment``. The text's are those that it covers by at least
    half. Intersection and union are counted over all frames of the shot together, so a wrong motion costs as a wrong
    place does.

    Args:
        frames: A shot, RGB in [0, 1].
        text: Its text.

    Raises:
        ValueError: for frames of another shape, or a text that is not a sentence of the world.
    """
    shown, told = segment(frames), _mask(frames, text) >= 0.5
    return ((shown & told).sum() / (shown | told).sum()).item()


def segment(frames: Float[Tensor, "3 frames height width"]) -> Bool[Tensor, "frames height width"]:
    """Find the character's pixels by colour alone.

    The background's colour is the median of the outermost pixels of all frames. Every pixel's RGB distance to it is
    split in two clusters (2-means in one dimension, started from the extremes, which ends at a threshold half-way
    between the clusters' means); the far one is the character. If the clusters' means are closer than 0.2 there is no
    character: all is False. So a blank or grey shot shows none.
    """
    border = torch.cat([frames[..., 0, :], frames[..., -1, :], frames[..., 0], frames[..., -1]], dim=-1)
    colour = border.flatten(1).median(dim=1).values
    distance = (frames - colour[:, None, None, None]).norm(dim=0)
    near, far = distance.min(), distance.max()
    for _ in range(100):
        is_far = distance > (near + far) / 2
        if far - near < _CONTRAST or not is_far.any():
            return torch.zeros_like(is_far)
        means = distance[~is_far].mean(), distance[is_far].mean()
        if means == (near, far):
            break
        near, far = means
    return is_far


def _mask(frames: Tensor, text: str) -> Tensor:
    if frames.ndim != 4 or frames.shape[0] != 3 or frames.shape[2] != frames.shape[3]:
        raise ValueError(f"frames: got shape {list(frames.shape)}, expected a shot: [3, frames, size, size]")
    return character_mask(text, size=frames.shape[3], frames=frames.shape[1]).to(frames.device)
