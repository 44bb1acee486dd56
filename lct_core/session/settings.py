"""What holds for all of a session."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from lct_core._describe import describe
from lct_core.generation import Sampling

# As session.json has them, in one row.
_SAMPLED = ("steps", "shift", "guidance", "negative", "negative_global", "shared_history", "t_c", "window")
_FLAT = ("size", "seed", *_SAMPLED, "pattern", "fps", "reading", "storage")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What holds for all of a session; :meth:`lct_core.session.Session.create` says what each of them means.

    Raises:
        ValueError: for a sampling that ``session.json`` can't keep, or keys that are not written in a pass of their
            own.
    """

    size: tuple[int, int, int]
    seed: int
    sampling: Sampling
    pattern: str
    fps: float
    reading: Mapping[str, Any]

    def __post_init__(self) -> None:
        sampling = self.sampling
        if sampling.write != "pass":
            raise ValueError(
                f'write: got "{sampling.write}", but a session writes keys and values again wherever they were not '
                'saved, in a pass of their own; expected "pass"'
            )
        plain = {
            "steps": (int, "a number"),
            "guidance": (float | int | None, "a scale"),
            "t_c": (float | int, "one level"),
        }
        for name, (kind, expected) in plain.items():
            value = getattr(sampling, name)
            if not isinstance(value, kind):
                raise ValueError(f"{name}: got {describe(value)}, expected {expected}: a session keeps it on disk")
        # No guidance is a scale of 1; a budget is the machine's, not the session's.
        scale = 1.0 if sampling.guidance is None else sampling.guidance
        object.__setattr__(self, "sampling", replace(sampling, guidance=scale, budget=None))

    @property
    def steps(self) -> int:
        """Euler steps of a take."""
        assert isinstance(self.sampling.steps, int)
        return self.sampling.steps

    @property
    def t_c(self) -> float:
        """Level, 0-1000, at which shots are seen by later ones, where a take does not say."""
        assert not isinstance(self.sampling.t_c, Mapping)
        return self.sampling.t_c

    @classmethod
    def of(cls, flat: Mapping[str, Any]) -> Self:
        """The settings that :meth:`flat` tells of."""
        own = {name: value for name, value in flat.items() if name not in (*_SAMPLED, "storage")}
        sampling = Sampling(**{name: flat[name] for name in (*_SAMPLED, "storage")})
        return cls(**{**own, "size": tuple(own["size"]), "sampling": sampling})

    def flat(self) -> dict[str, Any]:
        """The settings as ``session.json`` has them: those of the sampling beside the others."""
        values = {**vars(self), **vars(self.sampling)}
        return {name: values[name] for name in _FLAT}
