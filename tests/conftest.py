"""What all tests share: asserts of helpers that say what they compared, and how many examples hypothesis tries.

``dev`` is the default, ``ci`` (chosen where CI is set) prints what repeats a failure, ``nightly`` tries many more.
Choose with HYPOTHESIS_PROFILE or pytest's ``--hypothesis-profile``.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

HERE = Path(__file__).parent
HELPERS = [path.relative_to(HERE.parent).with_suffix("") for path in HERE.rglob("*.py") if path.stem[:5] != "test_"]
pytest.register_assert_rewrite(*(".".join(path.parts) for path in HELPERS if path.stem != "conftest"))

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None, print_blob=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))
