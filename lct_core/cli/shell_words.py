"""What is typed after a command of ``lct direct``."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

# What may follow generate: a value, if it takes one, and what it means.
WORDS = {
    "from": ("1 3 | none | recent", "what it sees: shots in this order, none, or the last that fit the window"),
    "prompt": ('"..."', "what is to be seen, in place of what the script says"),
    "seed": ("7", "of the noise"),
    "t_c": ("300", "noise level, 0 to 1000, at which later shots see it"),
    "continues": ("", "goes on from the shot before, without a cut"),
    "cut": ("", "begins with a cut, where the script has none"),
    "recompute": ("", "runs what it sees again in every step, in place of the KV cache"),
}


class Wish(NamedTuple):
    """What ``generate`` is asked for: the shots, and arguments of :meth:`Session.generate`."""

    shots: tuple[int, ...]
    arguments: dict[str, Any]


def read_wish(words: Sequence[str], known: Sequence[str] = (*WORDS,)) -> Wish:
    """Read what stands after a command: shots, then words with their values.

    Args:
        words: What is typed.
        known: Words that may stand there (default: those of ``generate``).

    Raises:
        ValueError: for anything else.
    """
    left, arguments = list(words), dict[str, Any]()
    shots = _leading(left) if "from" in known else ()
    while left:
        given = left.pop(0)
        word = given.replace("-", "_")
        if word not in known:
            raise ValueError(
                f"got {given!r}, expected {'shots, or ' if 'from' in known else ''}one of {', '.join(known)}"
            )
        if word == "from":
            several = [left.pop(0)] if left and left[0] in ("none", "recent") else [str(n) for n in _leading(left)]
            arguments["history"] = read_history(several)
        elif word in ("continues", "cut"):
            arguments["continues"] = word == "continues"
        elif word == "recompute":
            arguments["cached"] = False
        elif not left:
            raise ValueError(f"{word}: expected a value after it")
        elif word == "prompt":
            arguments["prompt"] = left.pop(0)
        else:
            arguments[word] = _number(word, left.pop(0), int if word == "seed" else float)
    return Wish(shots, arguments)


def _leading(words: list[str]) -> tuple[int, ...]:
    """The numbers that words begin with, taken off."""
    numbers = []
    while words and words[0].isdecimal():
        numbers.append(int(words.pop(0)))
    return tuple(numbers)


def read_shots(words: list[str]) -> tuple[int, ...]:
    """Numbers of shots, and nothing else."""
    left = list(words)
    numbers = _leading(left)
    if left:
        raise ValueError(f"got {left[0]!r}, expected numbers of shots")
    return numbers


def read_history(words: list[str]) -> tuple[int, ...] | Literal["recent"]:
    """Shots to see: numbers, none or recent."""
    if words in (["none"], ["recent"]):
        return () if words == ["none"] else "recent"
    if not words:
        raise ValueError("from: expected shots after it, such as 1 3; none; or recent, the last that fit the window")
    return read_shots(words)


def _number(name: str, word: str, kind: type) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{name}: got {word!r}, expected a {'whole ' * (kind is int)}number") from None


def read_name(words: list[str]) -> str:
    """One name, and nothing else."""
    if len(words) != 1:
        raise ValueError("expected one name after the command, such as close-up")
    return words[0]


def read_nothing(words: list[str]) -> None:
    """Refuse words where none are expected."""
    if words:
        raise ValueError(f"got {words[0]!r} after the command, expected nothing")
