"""A value in the words of an error message."""

from jaxtyping import Shaped
from torch import Tensor

_LONG = 100  # characters of a value in an error message


def describe(value: Shaped[Tensor, "..."] | object) -> str:
    """A value as an error message shows it: a tensor by its shape, anything else in one line that is not long."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    words = " ".join(repr(value).split())
    return words if len(words) <= _LONG else f"{words[:_LONG]}..."
