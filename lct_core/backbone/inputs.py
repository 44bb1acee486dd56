"""What a model takes for one shot, and several of them as a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lct_core._describe import describe
from lct_core.layout import Role


@dataclass(frozen=True, eq=False, kw_only=True)
class ShotInput:
    """One shot, as the model takes it.

    Args:
        latents: ``[batch, channels, frames, height, width]``. A global shot may leave them out where a shot follows it
            in the same call: its dummy video is then one frame of zeros of that shot's height and width. Where the
            model cross-attends its text, a global shot has none: it is a prompt alone.
        text: Encoded prompt, ``[batch, tokens, width]``, of any length, 0 included.
        extras: What else the model takes (``Traits.extras``): further arguments of its own forward under its own names,
            and image conditions.
        role: ``"shot"``, or ``"global"`` for the global prompt, which has no output and no loss.

    Raises:
        ValueError: for extras that are no mapping.
    """

    text: Float[Tensor, "batch tokens width"]
    latents: Float[Tensor, "batch channels frames height width"] = None  # type: ignore[assignment]  # of a global shot
    extras: Mapping[str, Any] = field(default_factory=dict)
    role: Role = "shot"

    def __post_init__(self) -> None:
        if not isinstance(self.extras, Mapping):
            raise ValueError(
                f"extras: got {describe(self.extras)}, expected a mapping from names to values; {{}} for none"
            )

    def to(self, device: torch.device | str) -> "ShotInput":
        """The same shot on a device, extras that are tensors included."""
        return replace(
            self,
            latents=None if self.latents is None else self.latents.to(device),
            text=self.text.to(device),
            extras={name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.extras.items()},
        )


def collate_shots(shots: Sequence[ShotInput]) -> ShotInput:
    """One shot of several scenes as a batch.

    Args:
        shots: Of one role, with latents of one shape (or all without) and texts of one length; extras that are tensors
            are joined too, others must be equal.

    Raises:
        ValueError: for shots that don't fit in one batch.
    """
    if not shots:
        raise ValueError("shots: got none, expected at least one")
    first = shots[0]
    kinds = {
        (s.role, s.text.shape[1:], None if s.latents is None else s.latents.shape[1:], *sorted(s.extras)) for s in shots
    }
    if len(kinds) != 1:
        raise ValueError(
            f"shots: got roles, shapes of texts and latents, and names of extras {sorted(map(str, kinds))}, expected "
            "all alike: entries of a batch share one layout; put others side by side in a row"
        )
    return replace(
        first,
        latents=None if first.latents is None else torch.cat([s.latents for s in shots]),
        text=torch.cat([s.text for s in shots]),
        extras={name: _batched(name, [s.extras[name] for s in shots]) for name in first.extras},
    )


def _batched(name: str, values: Sequence[Any]) -> Any:
    if all(isinstance(value, Tensor) for value in values) and len({value.shape[1:] for value in values}) == 1:
        return torch.cat(list(values))
    if any(isinstance(value, Tensor) or value != values[0] for value in values):
        values = [describe(value) for value in values]
        raise ValueError(f"extras: {name} is {values}, expected one value for all entries of a batch")
    return values[0]
