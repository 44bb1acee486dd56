"""``MODULE:FACTORY``: functions of a user's own that commands call."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from traceback import walk_tb
from typing import Any

_OURS = ("lct_core", "lct_backbones", "lct_plugins")
_OF_BOTH = ("torch", "einops")  # what they raise, they raise about their caller


def load(name: str) -> Callable[[], Any]:
    """Import ``MODULE:FACTORY``.

    Raises:
        ValueError: where there is no such module, no such attribute, or it cannot be called.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and all(part.isidentifier() for part in (*module_name.split("."), *attribute.split(".")))):
        raise ValueError(f"MODULE:FACTORY: got {name!r}, expected a module and a function in it, like my_adapter:make")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"MODULE:FACTORY: got {name!r}, but there is no module {error.name!r} here or installed"
            ) from error
        raise ValueError(f"MODULE:FACTORY: importing {module_name} raised {_described(error)}") from error
    try:
        factory = attrgetter(attribute)(module)
    except AttributeError:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"MODULE:FACTORY: got {name!r}, but {module_name} has no {attribute!r}; what it has to call: {public}"
        ) from None
    if not callable(factory):
        raise ValueError(
            f"MODULE:FACTORY: {name} is a {type(factory).__name__}, expected a function that takes no argument"
        )
    return factory


def call(factory: Callable[[], Any], name: str) -> Any:
    """What a factory makes.

    Raises:
        ValueError: where it fails.
    """
    try:
        return factory()
    except Exception as error:  # whatever the factory does
        raise ValueError(f"MODULE:FACTORY: {name}() raised {_described(error)}") from error


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
            f"MODULE:FACTORY: the model or the codec of {name} raised {_described(error)} ({place}); mend it there"
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


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
