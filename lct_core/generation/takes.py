"""A take: one run of the loop, and what it sees (paper, Fig. 4)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lct_core.backbone import ShotInput
from lct_core.generation.euler import Latents
from lct_core.generation.history import last_before, recent
from lct_core.layout import Shot
from lct_core.patterns import Pattern, context_causal


@dataclass(frozen=True)
class Take:
    """Which shots of a scene are made together, and from what.

    Every mode of generation is a list of takes, and a scene may mix them. Shots are named by their index in the scene,
    counting from 0 (a global shot counts)::

        Take((0, 1, 2), cached=False, pattern="bidirectional")  # joint: all at once, at one noise level
        Take((1, 2), history=(0,), cached=False, pattern="bidirectional")  # conditional: shot 0 is given or made
        Take((3,), history=(0, 2), cached=False, pattern="bidirectional")  # auto-regressive, the history run again
        Take((3,), history=(0, 2))  # auto-regressive, from cached keys and values

    An extension without a cut is a take like any other: its prompt alone, of a ``ScriptShot(cut=False)``, has no
    "[SHOT CUT]" (paper, 4.3). So is a composition: what is to be seen is given, as clips or images of one frame, and
    the take sees it (paper, 4.3 and supplement, C)::

        director.give(1, identity)
        director.give(2, environment)
        take = Take((3,), history=(1, 2))

    Args:
        shots: The shots to make together, in the scene's order.
        history: The done shots that they see, in this order (default: the last ones before them that fit the director's
            window with them). The global shot is always seen, and not among them.
        cached: Whether the history is seen through its keys and values, each shot's as it was written; else it is in
            the row at its level and runs again in every step. There a shot that is made stands before the first later
            one of the history.
        pattern: Who sees whom among these shots and, where it runs again, the history; as :class:`SceneModel` takes it.

    Raises:
        ValueError: for no shots, shots out of order, or a shot twice.
    """

    shots: tuple[int, ...]
    history: tuple[int, ...] | None = None
    cached: bool = True
    pattern: str | Pattern = "context_causal"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shots", _indices("shots", self.shots))
        if not self.shots or list(self.shots) != sorted(set(self.shots)):
            raise ValueError(f"shots: got {list(self.shots)}, expected at least one, in the scene's order, each once")
        if self.history is None:
            return
        object.__setattr__(self, "history", _indices("history", self.history))
        if len({*self.history, *self.shots}) != len(self.history) + len(self.shots):
            raise ValueError(
                f"history: got {list(self.history)} for shots {list(self.shots)}, expected every shot once, and none "
                "of those that are made"
            )


@dataclass(frozen=True, kw_only=True)
class DoneShot:
    """A shot that is done, and what stands for it in what is made from it.

    Args:
        latents: The clean shot.
        shot: Its prompt and noise, as it was made.
        level: Its noise level as a condition and as history, 0-1000.
        history: The shots visible when its keys and values are written.
        beside: The shots made with it that it saw.
        pattern: The pattern that it was made with.
        given: Whether it was given, not made.
    """

    latents: Latents
    shot: ShotInput
    level: float
    history: tuple[int, ...]
    beside: frozenset[int]
    pattern: str | Pattern
    given: bool


def in_order(pattern: str | Pattern) -> bool:
    """Whether a pattern is context-causal, by its name or itself: no shot sees a later one."""
    return pattern in ("context_causal", context_causal)


def _indices(name: str, shots: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shots, Sequence) or any(type(i) is not int or i < 0 for i in shots):
        raise ValueError(f"{name}: got {shots!r}, expected shots by their index in the scene from 0, such as (0, 2)")
    return tuple(shots)


Mode = Literal["joint", "conditional", "autoregressive", "causal"]


def takes_of(
    mode: Mode,
    scene: Sequence[Shot],
    *,
    window: int = 9,
    given: Collection[int] = (),
    pattern: str | Pattern = "bidirectional",
) -> list[Take]:
    """A mode of :mod:`lct_core.generation` as takes.

    Args:
        mode: Which of them.
        scene: The shots' token counts, a global shot first where there is one.
        window: Shot after shot: most shots that are seen, the current one counted (paper, 4: nine).
        given: Shots that are not to be generated, by index.
        pattern: Who sees whom in a row; the mode ``causal`` is context-causal.

    Raises:
        ValueError: for another mode, a shot that is not the scene's, and where nothing is left to generate.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode: got {mode!r}, expected one of {get_args(Mode)}")
    shots = shots_of(scene)
    left = tuple(i for i in shots if i not in given)
    if not left or not set(given) <= set(shots):
        raise ValueError(f"given: got {sorted(given)}, expected some of {shots}, and one left to generate")
    if mode in ("joint", "conditional"):
        return [Take(left, tuple(sorted(given)), cached=False, pattern=pattern)]
    recent(window)  # refuses one without a shot
    takes = [Take((i,), last_before((i,), shots, window=window)) for i in left]
    return takes if mode == "causal" else [replace(take, cached=False, pattern=pattern) for take in takes]


def shots_of(scene: Sequence[Shot] | Sequence[ShotInput]) -> list[int]:
    """Indices of a scene's shots, the global one left out.

    Raises:
        ValueError: for no shots, and a global shot that is not the first.
    """
    roles = [shot.role for shot in scene]
    if "global" in roles[1:] or "shot" not in roles:
        raise ValueError(f"scene: got roles {roles}, expected shots, and before them at most one global shot")
    return [i for i, role in enumerate(roles) if role == "shot"]
