"""``MODULE:FACTORY``: the name of a user's own function, which makes a model."""

import importlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any


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
        raise ValueError(f"MODULE:FACTORY: importing {module_name} raised {error_words(error)}") from error
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
        raise ValueError(f"MODULE:FACTORY: {name}() raised {error_words(error)}") from error


def error_words(error: Exception) -> str:
    """An error in the words of another: its class, and what it says."""
    return f"{type(error).__name__}: {error}"
