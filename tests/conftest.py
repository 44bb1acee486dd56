"""What all tests share: how many examples hypothesis tries.

``dev`` is the default, ``ci`` (chosen where CI is set) is never looser, ``nightly`` tries many more.
Choose with HYPOTHESIS_PROFILE or pytest's ``--hypothesis-profile``.
"""

import os

from hypothesis import settings

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None, print_blob=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))
