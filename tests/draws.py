"""How much a test draws: little by ``make test``, much by ``make prove``."""

from hypothesis import settings


def draws(short: int, long: int) -> int:
    """``long`` where the chosen profile of hypothesis draws more than CI does, as ``nightly``; ``short`` elsewhere."""
    return long if settings.default.max_examples > settings.get_profile("ci").max_examples else short
