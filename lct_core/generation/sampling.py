"""How a generation is set: one value that Python, commands, session files, the planner and generation share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Integral
from typing import Any, TypedDict, get_args

import torch

from lct_core._describe import describe
from lct_core.cache import Budget, Storage
from lct_core.cache.budget import STORAGES
from lct_core.codec import Codec
from lct_core.generation.common import Levels, check_levels
from lct_core.generation.euler import levels_of
from lct_core.generation.guidance import Guidance
from lct_core.generation.history import recent
from lct_core.generation.scene import negative_texts
from lct_core.generation.schedulers import Scheduler, Steps
from lct_core.generation.write import Write


class PlanOptions(TypedDict, total=False):
    """The fields of :class:`Sampling` that a plan takes as keywords: all but prompts, of which it knows the length."""

    steps: Steps
    shift: float
    guidance: Guidance | float | None
    shared_history: bool
    t_c: Levels
    window: int
    write: Write
    storage: Storage
    budget: Budget | None


class SamplingOptions(PlanOptions, total=False):
    """The fields of :class:`Sampling` as keywords, for functions that take them one by one too."""

    negative: str
    negative_global: str


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a generation is set.

    Functions that take one take its fields as keywords too: ``joint(model, scene, steps=8)`` is
    ``joint(model, scene, sampling=Sampling(steps=8))``, and a keyword beside a Sampling replaces its field. A function
    may have other defaults of its own, such as ``Session.create``; a Sampling replaces all of them.

    Args:
        steps: Euler steps of every take (paper, A.2: 32), or their noise levels, as :func:`euler` takes them; or a
            flow-matching scheduler of diffusers, after its ``set_timesteps``.
        shift: Of a number of steps, see :func:`schedule` (paper: none, 1).
        guidance: Guidance on the texts: encoded, a :class:`Guidance`; or its scale (paper, A.2: 7.5), for
            :meth:`encoded` to encode ``negative`` and ``negative_global`` (default: none).
        negative: Negative prompt of shots, where guidance is a scale.
        negative_global: Negative prompt of the global shot, where guidance is a scale.
        shared_history: Whether both branches of guidance share one history, where guidance is a scale; see
            :class:`Guidance`.
        t_c: Noise level of shots as conditions and history, 0-1000, for all or by index (paper, 4.2: 100-500; 100 where
            none is named). Low keeps more of them, high accumulates fewer errors.
        window: Most shots in a take and its history, where the take does not say (paper, 4: nine). Caches are made with
            room for as many; a longer history makes room when it comes.
        write: How a generated shot's keys and values come about: ``"pass"``, in a pass of its own at exactly t_c
            (paper, 4.2); ``"nearest"``, as the step of its own take whose level is nearest to t_c wrote them, which
            spares the pass (ours). The latter where one shot was made alone, through the cache, and what is kept is
            the take made last; all others are written in a pass.
        storage: How the KV cache keeps its shots, see :class:`lct_core.KVCache`. A ``new_cache`` beside it wins: the
            caches that it makes are as it makes them.
        budget: How many bytes the KV cache of each branch of guidance may hold where (default: all on the device); a
            ``new_cache`` beside it wins, too.

    Raises:
        ValueError: naming the field, for a value that none of its kind can have.
    """

    steps: Steps = 32
    shift: float = 1.0
    guidance: Guidance | float | None = None
    negative: str = ""
    negative_global: str = ""
    shared_history: bool = False
    t_c: Levels = 100.0
    window: int = 9
    write: Write = "pass"
    storage: Storage = "native"
    budget: Budget | None = None

    @classmethod
    def of(cls, sampling: "Sampling | None", options: Mapping[str, Any]) -> "Sampling":
        """A sampling, with some of its fields replaced.

        Args:
            sampling: The sampling (default: all defaults).
            options: Fields to replace, by name.

        Raises:
            TypeError: for a name that is no field.
        """
        return replace(sampling or cls(), **options) if options or sampling is None else sampling

    def __post_init__(self) -> None:
        check_levels(self.t_c)
        recent(self.window)
        if self.write not in get_args(Write):
            raise ValueError(f"write: got {self.write!r}, expected one of {get_args(Write)}")
        if self.storage not in STORAGES:
            raise ValueError(f"storage: got {self.storage!r}, expected one of {list(STORAGES)}")
        if not isinstance(self.guidance, Guidance | float | int | None):
            raise ValueError(f"guidance: got {describe(self.guidance)}, expected a scale, a Guidance or None")
        if isinstance(self.guidance, float | int) and not isfinite(self.guidance):
            raise ValueError(f"guidance: got {self.guidance!r}, expected a finite scale; 1 is no guidance")
        if isinstance(self.guidance, Guidance) and (beside := self._beside):
            raise ValueError(
                f"{beside[0]}: got {beside[1]!r} beside a Guidance, which has its own; give it to that one"
            )
        if isinstance(self.steps, Integral) and not isinstance(self.steps, bool):
            object.__setattr__(self, "steps", int(self.steps))  # of numpy
        if self.shift != 1 and not isinstance(self.steps, int):
            raise ValueError(
                f"shift: got {describe(self.shift)} beside steps that are {describe(self.steps)}, expected 1: noise "
                "levels and schedulers have their own; a number of steps is shifted"
            )
        _ = self.schedule  # refuses fewer than one step, and levels that do not go down from 1 to 0

    @property
    def schedule(self) -> Steps:
        """The steps as a loop takes them: noise levels, or a scheduler."""
        return self.steps if isinstance(self.steps, Scheduler) else levels_of(self.steps, shift=self.shift)

    @property
    def on_texts(self) -> Guidance | None:
        """The guidance, its negative prompts encoded; None where it is none, or a scale of 1.

        Raises:
            ValueError: where it is another scale, and for what belongs to guidance without any.
        """
        if isinstance(self.guidance, Guidance):
            return self.guidance
        if self.guidance is None and (beside := self._beside):
            raise ValueError(f"{beside[0]}: got {beside[1]!r} without guidance, where it has no effect; give a scale")
        if self.guidance in (None, 1):
            return None
        raise ValueError(
            f"guidance: got the scale {self.guidance}, whose negative prompts are not encoded; call "
            "sampling.encoded(codec) first, or give a Guidance"
        )

    @property
    def guided(self) -> bool:
        """Whether guidance has an effect, and runs every pass a second time, with negative prompts."""
        scale = self.guidance.scale if isinstance(self.guidance, Guidance) else self.guidance
        return scale not in (None, 1)

    @property
    def shares_history(self) -> bool:
        """Whether both branches of guidance share one history, as the guidance says where its prompts are encoded."""
        return self.guidance.shared_history if isinstance(self.guidance, Guidance) else self.shared_history

    @torch.no_grad()
    def encoded(self, codec: Codec) -> "Sampling":
        """The same with its negative prompts encoded."""
        if self.guidance is None or isinstance(self.guidance, Guidance):
            return self
        texts = negative_texts(codec, shot=self.negative, overall=self.negative_global)
        guidance = Guidance(scale=self.guidance, shared_history=self.shared_history, **texts)
        return replace(self, guidance=guidance, negative="", negative_global="", shared_history=False)

    @property
    def _beside(self) -> tuple[str, Any] | None:
        """The first field of guidance by scale that is given, and its value."""
        given = ((name, getattr(self, name)) for name in ("negative", "negative_global", "shared_history"))
        return next((field for field in given if field[1]), None)
