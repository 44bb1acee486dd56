"""The demo's world: scenes whose colours no text tells, so that a shot can only learn them from the other shots.

A scene has a character (a square or a disc of a saturated colour) and a background (a dark colour, a little lighter at
the top). A shot shows that character in one of three framings, at one of three positions, with one of three motions.
A scene's script is in the paper's format (paper, 3.2.1): its global prompt tells who is there, its shots' prompts tell
framing, shape, position and motion, and nothing tells a colour. A model that sees one shot has to guess the colours; a
model that sees the scene does not.

Lengths are fractions of the frame's side, positions run from 0 at the top left to 1 at the bottom right, a shot lasts
from time -1 to 1. All randomness comes from the generator handed in.
"""

from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from lct_core.script import SHOT_CUT, Script, ScriptShot

# sizes at which no pixel of a 24 x 24 frame is nearly half covered, so that masks do not hang on the last bit
_HALF_SIDE = {"Close up": 0.222, "Medium shot": 0.17, "Wide shot": 0.133}
_CENTRE_X = {"on the left": 0.25, "in the middle": 0.5, "on the right": 0.75}
_SPEED_Y = {"moving up": -1 / 3, "standing still": 0.0, "moving down": 1 / 3}

FRAMINGS = tuple(_HALF_SIDE)
SHAPES = ("square", "disc")
POSITIONS = tuple(_CENTRE_X)
MOTIONS = tuple(_SPEED_Y)

_OF_ONE_COLOUR, _WALL, _MOVES_ABOUT = "of one colour", "a wall of another colour", "moves about"

VOCABULARY = (
    SHOT_CUT,
    *(f"{framing} of" for framing in FRAMINGS),
    "Character 1",
    *(f"a {shape}" for shape in SHAPES),
    *POSITIONS,
    *MOTIONS,
    _OF_ONE_COLOUR,
    _WALL,
    _MOVES_ABOUT,
)
"""Every phrase of the world's language, each a token of :class:`~lct_core.codec.LinearCodec`."""

PROMPT_LENGTH = 6
"""Tokens of the longest prompts: a global prompt with its storyline, and a shot's with its mark."""

ENVIRONMENT_TEXT = f"Wide shot of {_WALL}."
"""The prompt of every ``environment_image``; it shows no character, so it is made of phrases but not for ``parse``."""

_SENTENCE = "{framing} of Character 1, a {shape}, {position}, {motion}."
_ATTRIBUTES = {"framing": FRAMINGS, "shape": SHAPES, "position": POSITIONS, "motion": MOTIONS}
_SCANLINES = 16  # per pixel, to antialias edges from above and below; from the sides they are exact
_SHADING = 0.1  # the background is lighter by this part at the top, darker at the bottom
_GREY = (0.3, 0.3, 0.3)  # about the mean of all backgrounds


@dataclass(frozen=True)
class ShotDescription:
    """What a shot's text tells: all of the shot but its colours.

    Args:
        framing: One of ``FRAMINGS``: how large the character is.
        shape: One of ``SHAPES``.
        position: One of ``POSITIONS``: where the character is, from left to right.
        motion: One of ``MOTIONS``: where it goes during the shot; it passes the middle of the frame half-way.

    Raises:
        ValueError: for a value that is not of its list.
    """

    framing: str
    shape: str
    position: str
    motion: str

    def __post_init__(self) -> None:
        for name, values in _ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(repr, values))}")

    @property
    def text(self) -> str:
        """The shot's prompt, without the mark of a cut; ``parse`` is its inverse."""
        return _SENTENCE.format(**vars(self))


_DESCRIPTIONS = {shot.text: shot for shot in (ShotDescription(*values) for values in product(*_ATTRIBUTES.values()))}


@dataclass(frozen=True)
class WorldScene:
    """Shots that share a character and a background.

    Args:
        character: The character's colour, RGB in [0, 1]. Hidden: no text tells it.
        background: The background's mean colour, RGB in [0, 1]. Hidden too.
        shots: What happens, shot by shot; at least one, all of one shape.

    Raises:
        ValueError: no shot, or shots of two shapes.
    """

    character: tuple[float, float, float]
    background: tuple[float, float, float]
    shots: tuple[ShotDescription, ...]

    def __post_init__(self) -> None:
        shapes = sorted({shot.shape for shot in self.shots})
        if len(shapes) != 1:
            got = f"shots of a {' and a '.join(shapes)}" if shapes else "no shot"
            raise ValueError(f"shots: got {got}, expected at least one, all of one shape: they share a character")

    @property
    def shape(self) -> str:
        """The character's, the same in all shots."""
        return self.shots[0].shape

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt of every shot, without the mark of a cut."""
        return tuple(shot.text for shot in self.shots)

    @property
    def script(self) -> Script:
        """What the scene's prompts tell: all but the colours. Every shot begins with a cut."""
        return Script(
            characters={1: f"A {self.shape} {_OF_ONE_COLOUR}."},
            environment=f"{_WALL.capitalize()}.",
            storyline=f"Character 1 {_MOVES_ABOUT}.",
            shots=tuple(ScriptShot(text=text) for text in self.texts),
        )


def sample_scene(num_shots: int, *, generator: torch.Generator) -> WorldScene:
    """Draw a scene: two hues, a shape, and every shot's framing, position and motion, all uniform and independent.

    The character is saturated and bright, the background dull and dark: whatever the hues, their RGB distance is at
    least 0.5.

    Args:
        num_shots: Number of shots, at least 1.
        generator: Source of all randomness, on the CPU.

    Raises:
        ValueError: fewer than one shot.
    """
    if num_shots < 1:
        raise ValueError(f"num_shots: got {num_shots}, expected at least 1")
    hues = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    shape = _choose(SHAPES, generator)
    return WorldScene(
        character=hsv_to_rgb(hues[0], 0.9, 0.95),
        background=hsv_to_rgb(hues[1], 0.6, 0.45),
        shots=tuple(
            ShotDescription(
                framing=_choose(FRAMINGS, generator),
                shape=shape,
                position=_choose(POSITIONS, generator),
                motion=_choose(MOTIONS, generator),
            )
            for _ in range(num_shots)
        ),
    )


def _choose(values: tuple[str, ...], generator: torch.Generator) -> str:
    return values[int(torch.randint(len(values), (), generator=generator))]


def parse(text: str) -> ShotDescription:
    """Read a shot's text, with or without the mark of a cut; the inverse of ``ShotDescription.text``.

    Raises:
        ValueError: for a text that is not a sentence of this world.
    """
    sentence = text.strip().removeprefix(SHOT_CUT).lstrip()
    if sentence not in _DESCRIPTIONS:
        choices = "; ".join(f"{name}: {', '.join(values)}" for name, values in _ATTRIBUTES.items())
        raise ValueError(f"text: got {text!r}, expected {_SENTENCE!r} with {choices}")
    return _DESCRIPTIONS[sentence]


def character_mask(shot: ShotDescription | str, *, size: int, frames: int = 4) -> Float[Tensor, "frames size size"]:
    """Return how much of every pixel the character covers, in [0, 1], where a shot's description or text puts it.

    Args:
        shot: A description, or a text to parse.
        size: Height and width of a frame in pixels.
        frames: Number of frames, spread evenly over the shot; with one, the shot's middle.

    Raises:
        ValueError: for a text that is not a sentence of this world.
    """
    return _coverage(parse(shot) if isinstance(shot, str) else shot, size, frames).clone()


@lru_cache(maxsize=len(_DESCRIPTIONS))
def _coverage(shot: ShotDescription, size: int, frames: int) -> Float[Tensor, "frames size size"]:
    half_side, centre_x = _HALF_SIDE[shot.framing], _CENTRE_X[shot.position]
    centre_y = 0.5 + _SPEED_Y[shot.motion] * _middles(frames, -1, 1)
    # every scanline meets the character in one interval; each pixel counts the part of itself that is inside
    above = (_middles(size * _SCANLINES, 0, 1)[:, None] - centre_y[:, None, None]).abs()
    if shot.shape == "disc":
        half_chord = (half_side**2 - above**2).clamp(min=0).sqrt()
    else:
        half_chord = half_side * (above < half_side)
    middle = _middles(size, 0, 1)
    right = torch.minimum(middle + 0.5 / size, centre_x + half_chord)
    left = torch.maximum(middle - 0.5 / size, centre_x - half_chord)
    return ((right - left) * size).clamp(0, 1).unflatten(1, (size, _SCANLINES)).mean(2)


def render(scene: WorldScene, *, size: int, frames: int = 4) -> Float[Tensor, "shots 3 frames size size"]:
    """Draw every shot of a scene, antialiased: RGB in [0, 1], the same picture at any size.

    Args:
        scene: What to draw.
        size: Height and width of a frame in pixels.
        frames: Frames per shot.
    """
    masks = torch.stack([_coverage(shot, size, frames) for shot in scene.shots])
    return torch.lerp(_wall(scene, size), _pixel(scene.character), masks[:, None])


def identity_text(scene: WorldScene) -> str:
    """Return the prompt of ``identity_image``, a sentence of the world: a close up in the middle, standing still."""
    return _portrait(scene).text


def identity_image(scene: WorldScene, *, size: int) -> Float[Tensor, "3 1 size size"]:
    """Draw a scene's character before a neutral grey wall: who is to appear (paper, 4.3; supplement, C).

    Args:
        scene: Whose character to draw.
        size: Height and width in pixels.
    """
    return render(replace(scene, background=_GREY, shots=(_portrait(scene),)), size=size, frames=1)[0]


def environment_image(scene: WorldScene, *, size: int) -> Float[Tensor, "3 1 size size"]:
    """Draw a scene's bare wall, without a character: where it is to happen; its prompt is ``ENVIRONMENT_TEXT``.

    Args:
        scene: Whose wall to draw.
        size: Height and width in pixels.
    """
    return _wall(scene, size).repeat(1, 1, 1, size)


def _portrait(scene: WorldScene) -> ShotDescription:
    return ShotDescription("Close up", scene.shape, "in the middle", "standing still")


def _wall(scene: WorldScene, size: int) -> Float[Tensor, "3 1 size 1"]:
    return _pixel(scene.background) * (1 - _SHADING * _middles(size, -1, 1))[:, None]


def _pixel(colour: tuple[float, float, float]) -> Float[Tensor, "3 1 1 1"]:
    return torch.tensor(colour, dtype=torch.float32, device="cpu")[:, None, None, None]


def _middles(count: int, start: float, stop: float) -> Float[Tensor, " count"]:
    """Return the middles of ``count`` equal parts of an interval."""
    return start + (torch.arange(count, dtype=torch.float32, device="cpu") + 0.5) * ((stop - start) / count)
