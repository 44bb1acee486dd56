"""Classifier-free guidance, on the texts alone (paper, A.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lct_core.backbone import ShotInput, describe


@dataclass(frozen=True, eq=False, kw_only=True)
class Guidance:
    """How far to go from what negative prompts give to what the prompts give: v = v_neg + scale (v_pos - v_neg).

    In the negative branch every shot's text takes the negative prompt, that of the history and of given shots included.
    What these shots look like stays in both branches: consistency is not guided, and not weakened.

    Args:
        text: The negative prompt of shots, encoded, ``[1 or batch, tokens, width]`` (paper: a concise one).
        global_text: The negative prompt of the global shot (paper: a comprehensive one; default: ours, ``text``).
        extras: What the negative prompt puts in place of a shot's extras of these names: its pooled embedding, where
            the model takes one, and the mask of its padding.
        global_extras: The same for the global shot (default: ours, ``extras``).
        scale: How far (paper, A.2: 7.5). 1 is no guidance, and spares the negative branch.

    Raises:
        ValueError: for a scale that is not finite.
    """

    text: Float[Tensor, "batch tokens width"]
    global_text: Float[Tensor, "batch tokens width"] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    global_extras: Mapping[str, Any] | None = None
    scale: float = 7.5

    def __post_init__(self) -> None:
        if not isfinite(self.scale):
            raise ValueError(f"scale: got {self.scale}, expected a finite number; 1 is no guidance")

    def negative(self, scene: Sequence[ShotInput], *, text_mask: str | None = None) -> list[ShotInput]:
        """The scene with its texts replaced.

        Args:
            scene: The shots.
            text_mask: The extra that marks padding in a text, and goes with it: ``Traits.text_mask``.

        Raises:
            ValueError: for a negative prompt that is not encoded for one entry of the batch, or for each.
        """
        others = {"shot": self.extras, "global": self.extras if self.global_extras is None else self.global_extras}
        kept = [{name: x for name, x in shot.extras.items() if name != text_mask} for shot in scene]
        return [
            replace(shot, text=self._text(shot), extras={**extras, **others[shot.role]})
            for shot, extras in zip(scene, kept, strict=True)
        ]

    def _text(self, shot: ShotInput) -> Tensor:
        name = "global_text" if shot.role == "global" and self.global_text is not None else "text"
        text, batch = getattr(self, name), len(shot.text)
        if not isinstance(text, Tensor) or text.ndim != 3 or len(text) not in (1, batch):
            raise ValueError(
                f"{name}: got {describe(text)}, expected [1 or {batch}, tokens, width]: one encoded negative prompt "
                "for all entries of the batch, or one for each"
            )
        return text.to(shot.text).expand(batch, -1, -1)

    def combine(self, positive: Sequence[Tensor], negative: Sequence[Tensor]) -> list[Tensor]:
        """The guided velocity of every shot, in its dtype: at a scale of 0 the negative's, at 1 the positive's."""
        return [n + self.scale * (p - n) for p, n in zip(positive, negative, strict=True)]


def branches(
    scene: Sequence[ShotInput], guidance: Guidance | None, *, text_mask: str | None = None
) -> list[list[ShotInput]]:
    """The scene as it is and, where guidance has an effect, with negative prompts."""
    scene = list(scene)
    return (
        [scene] if guidance is None or guidance.scale == 1 else [scene, guidance.negative(scene, text_mask=text_mask)]
    )
