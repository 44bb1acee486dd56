"""How a generated shot's keys and values come about: in a pass of its own, or in a step of its take."""

from collections.abc import Sequence
from typing import Literal

from lct_core.backbone import Backbone
from lct_core.denoiser import Denoiser
from lct_core.engine.visibility import TextScope
from lct_core.generation.guidance import Guidance

Write = Literal["pass", "nearest"]
NEAREST_SHARED = (
    'write: got "nearest", the keys of one denoising step, which depend on its prompt; a shared history is written '
    'without any; expected "pass"'
)


def nearest(levels: Sequence[float], level: float) -> int:
    """Which call of a loop is nearest to a level; the last of them where several are."""
    return min(range(len(levels)), key=lambda n: (abs(levels[n] - level), -n))


def check_write(write: Write, model: Denoiser, guidance: Guidance | None) -> None:
    """Refuse what the model does not allow with its guidance.

    Raises:
        ValueError: for the keys of a denoising step with two experts or a shared history, and a shared history where
            the branches need different ones.
    """
    shared = guidance is not None and guidance.shared_history
    if write == "nearest" and shared:
        raise ValueError(NEAREST_SHARED)
    if write == "nearest" and model.several:
        raise ValueError(
            'write: got "nearest", the keys of one denoising step, which runs one expert; both need the keys of a '
            'shot; expected "pass"'
        )
    if shared:
        check_shared_history(model.adapter, model.text)


def check_shared_history(adapter: Backbone, text: TextScope) -> None:
    """Refuse one history for both branches of guidance, where a prompt is in what a model keeps of it.

    Raises:
        ValueError: saying where.
    """
    traits, name = adapter.traits, type(adapter.model).__name__
    reasons = {
        f"the text of {name} takes part in self-attention, and is in every key": traits.text == "joint",
        'with text="all" a shot hears the prompts of its history': text == "all",
        f"{name} takes more of a prompt than text that is cross-attended": any(
            extra.prompt and x != traits.text_mask for x, extra in traits.extras.items()
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"shared_history: got True, but {reason}; one history cannot serve both branches, expected False"
            )
