"""The user's own code, which commands import from the current folder, and what it raises."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from lct_core.checkpoints.factory import error_words

_OURS = ("lct_core", "lct_backbones", "lct_plugins")
_OF_BOTH = ("torch", "einops")  # what they raise, they raise about their caller


@contextmanager
def current_folder_on_path() -> Iterator[None]:
    """Modules of the current folder can be imported inside the ``with``."""
    before = [*sys.path]
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def own_code(name: str | None) -> Iterator[None]:
    """Where the user's model or codec raises inside the ``with``, say so in one line.

    A ValueError says it by itself. What a line of the library's own raises goes through, so that a mistake of ours
    shows as one.

    Args:
        name: The factory's; None where the model is not the user's, and nothing is done.

    Raises:
        ValueError: instead of the error.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # whatever the user's code does
        place = _users_line(error)
        if name is None or place is None:
            raise
        raise ValueError(
            f"MODULE:FACTORY: the model or the codec of {name} raised {error_words(error)} ({place}); mend it there"
        ) from error


def _users_line(error: Exception) -> str | None:
    """The line of the user's code, or of a library of theirs, that raised an error; None where it is of ours."""
    for frame, line in reversed([*walk_tb(error.__traceback__)]):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in _OURS:
            return None
        if package not in _OF_BOTH:
            return f"{frame.f_code.co_filename}:{line}"
    return None
