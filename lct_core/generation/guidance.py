"""Classifier-free guidance, on the texts alone (paper, A.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lct_core._describe import describe
from lct_core.backbone import ShotInput, Traits


@dataclass(frozen=True, eq=False, kw_only=True)
class Guidance:
    """How far to go from what negative prompts give to what the prompts give: v = v_neg + scale (v_pos - v_neg).

    In the negative branch every shot's text takes the negative prompt, that of the history and of given shots included.
    What these shots look like stays in both branches: consistency is not guided, and not weakened.

    Args:
        text: The negative prompt of shots, encoded, ``[1 or batch, tokens, width]`` (paper: a concise one).
        global_text: The negative prompt of the global shot (paper: a comprehensive one; default: ours, ``text``).
        extras: What the negative prompt puts in place of a shot's extras of these names: its pooled embedding, where
            the model takes one, and the mask of its padding, if it has any.
        global_extras: The same for the global shot (default: ours, ``extras``).
        scale: How far (paper, A.2: 7.5). 1 is no guidance, and spares the negative branch.
        shared_history: Whether one cached history serves both branches, in half the memory, where a model cross-attends
            its text: its keys and values are written without any prompt (ours; the default, False: each branch has its
            own history, written with its own prompts).

    Raises:
        ValueError: for a scale that is not finite, and extras that are no mapping.
    """

    text: Float[Tensor, "batch tokens width"]
    global_text: Float[Tensor, "batch tokens width"] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    global_extras: Mapping[str, Any] | None = None
    scale: float = 7.5
    shared_history: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int | float) or not isfinite(self.scale):
            raise ValueError(f"scale: got {self.scale!r}, expected a finite number; 1 is no guidance")
        for name, extras in (("extras", self.extras), ("global_extras", self.global_extras or {})):
            if not isinstance(extras, Mapping):
                raise ValueError(f"{name}: got {describe(extras)}, expected a mapping from names to values")

    def negative(self, scene: Sequence[ShotInput], traits: Traits) -> list[ShotInput]:
        """The scene with its prompts replaced: on the device, in the dtype and for the batch of every shot.

        Args:
            scene: The shots.
            traits: The model's, which say what belongs to a prompt.

        Raises:
            ValueError: for a negative prompt that is not encoded for one entry of the batch, or for each, and one that
                lacks an extra which belongs to a shot's prompt.
        """
        return [self._negative(shot, traits) for shot in scene]

    def _negative(self, shot: ShotInput, traits: Traits) -> ShotInput:
        of_global = shot.role == "global"
        name = "global_text" if of_global and self.global_text is not None else "text"
        further = "global_extras" if of_global and self.global_extras is not None else "extras"
        text, extras, batch = getattr(self, name), getattr(self, further), len(shot.text)
        if not isinstance(text, Tensor) or text.ndim != 3 or len(text) not in (1, batch):
            raise ValueError(
                f"{name}: got {describe(text)}, expected [1 or {batch}, tokens, width]: one encoded negative prompt "
                "for all entries of the batch, or one for each"
            )
        own = {x for x, extra in traits.extras.items() if extra.prompt or x == traits.text_mask}
        if missing := sorted(x for x in own - set(extras) if traits.extras[x].required):
            raise ValueError(
                f"{further}: the negative prompt has {sorted(extras) or 'none'}, but the model also takes {missing} of "
                f"every prompt; encode the negative prompt to them too: Guidance({further}={{...}})"
            )
        kept = {x: value for x, value in shot.extras.items() if x not in own}
        return replace(
            shot,
            text=_like(text, shot.text),
            extras={**kept, **{x: _like(value, shot.extras.get(x, shot.text)) for x, value in extras.items()}},
        )

    def combine(self, positive: Sequence[Tensor], negative: Sequence[Tensor]) -> list[Tensor]:
        """The guided velocity of every shot, in its dtype: at a scale of 0 the negative's, at 1 the positive's."""
        return [n + self.scale * (p - n) for p, n in zip(positive, negative, strict=True)]


def branches(scene: Sequence[ShotInput], guidance: Guidance | None, traits: Traits) -> list[list[ShotInput]]:
    """The scene as it is and, where guidance has an effect, with negative prompts."""
    scene = list(scene)
    return [scene] if guidance is None or guidance.scale == 1 else [scene, guidance.negative(scene, traits)]


def _like(value: Any, positive: Any) -> Any:
    """A negative prompt's tensor on the device, in the dtype and for as many entries of the batch as the positive's."""
    if not isinstance(value, Tensor) or not isinstance(positive, Tensor):
        return value
    same_kind = value.is_floating_point() and positive.is_floating_point()
    value = value.to(positive.device, positive.dtype if same_kind else value.dtype)
    return value.expand(len(positive), *value.shape[1:]) if value.ndim and len(value) == 1 else value
