"""``python -m lct_core.cli`` is ``lct``."""

import sys

from lct_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
