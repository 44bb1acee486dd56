"""The director's session: a scene made shot by shot, on disk (paper, 3.4 and 4.3).

:class:`Session` is a :class:`lct_core.generation.Director` whose every take is on disk before the call that makes it
returns. ``lct direct`` is the same in a terminal.
"""

from lct_core.session.book import Book, BranchState, SessionTake, ShotRow
from lct_core.session.session import Session
from lct_core.session.settings import Settings

__all__ = ["Book", "BranchState", "Session", "SessionTake", "Settings", "ShotRow"]
