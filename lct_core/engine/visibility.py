"""Who sees whom at every attention site."""

from typing import Literal, get_args

from lct_core.backbone.adapter import Backbone
from lct_core.patterns import PATTERNS, Pattern

TextScope = Literal["own", "own_and_global", "all"]


def _text_scope(text: TextScope, adapter: Backbone) -> TextScope:
    if text not in get_args(TextScope):
        raise ValueError(f"text: got {text!r}, expected one of {get_args(TextScope)}")
    if text != "own" and adapter.traits.text == "joint":
        raise ValueError(
            f"text: got {text!r}, but the text of {type(adapter.model).__name__} takes part in self-attention and is "
            'seen with its shot; expected "own", the default'
        )
    return text


def _pattern(pattern: str | Pattern) -> Pattern:
    if callable(pattern):
        return pattern
    if pattern not in PATTERNS:
        raise ValueError(
            f"pattern: got {pattern!r}, expected one of {list(PATTERNS)} or a function from a layout to a plan"
        )
    return PATTERNS[pattern]
