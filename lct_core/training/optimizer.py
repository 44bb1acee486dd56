"""AdamW, cosine decay and the moving average of the weights (paper, A.1)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

_SETTINGS = ("betas", "eps", "weight_decay")  # of AdamW beside the learning rate, which is set at every step


def adamw(parameters: Iterable[nn.Parameter], *, learning_rate: float = 1e-4) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95) and weight decay 0.1 (paper, A.1), for the parameters that are trained.

    Args:
        parameters: Those without gradient are left out.
        learning_rate: Its peak (paper, A.1: 1e-4).
    """
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def check_settings(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Refuse the saved state of an optimiser with other settings: loading it would put them in place of these.

    Raises:
        ValueError: naming the settings that differ.
    """
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=False):
        names = [name for name in _SETTINGS if saved.get(name) != own[name]]
        differences = [f"{name} = {saved.get(name)!r}, not {own[name]!r}" for name in names]
        if differences:
            raise ValueError(
                f"state: its optimizer has {', '.join(differences)}; go on with the settings that it began with, or "
                "start another run"
            )


def cosine(step: int, steps: int, *, warm_up: float = 0.0) -> float:
    """What the learning rate's peak is multiplied with at a step: half a cosine from 1 to 0 (paper, A.1).

    Args:
        step: Counting from 0.
        steps: Their number.
        warm_up: Share of the steps in which it rises linearly instead, at least one step (ours).
    """
    rising = (step + 1) / max(1, int(steps * warm_up))
    return min(rising, 0.5 * (1 + cos(pi * step / steps)))


class EMA:
    """The moving average of a model's weights (paper, A.1: decay 0.996), in float32 at least.

    After n updates the decay is the smaller of the one asked for and (1 + n) / (10 + n): a young average would else
    consist of the weights that it began with (ours).

    Args:
        model: Its trained parameters are averaged; what they are now is the first average.
        decay: Of the average.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.996) -> None:
        self.decay, self.updates = decay, 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._average = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self._parameters
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's weights in."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.to(a.dtype) for p, a in zip(self._parameters, self._average, strict=True)]
        torch._foreach_lerp_(self._average, current, 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Let the model have the average."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average inside the ``with``, and its own weights again afterwards."""
        own = [p.detach().clone() for p in self._parameters]
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weights in zip(self._parameters, own, strict=True):
                    parameter.copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        """For :meth:`load_state_dict`."""
        return {"updates": self.updates, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved average.

        Raises:
            ValueError: for the average of another model.
        """
        average: list[Tensor] = state["average"]
        if [a.shape for a in average] != [a.shape for a in self._average]:
            raise ValueError("state: its average has other shapes than this model's parameters; is it another model's?")
        self.updates = state["updates"]
        for mine, saved in zip(self._average, average, strict=True):
            mine.copy_(saved)
