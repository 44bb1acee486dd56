"""The keys and values of shots that are done, addressed by shot (paper, 3.3 and 3.4).

``kv_cache.py`` is the cache itself; what it holds is the data of ``holdings.py``, and ``arrangement.py`` says where all
of it is to stand. A shot is an entry of ``shots.py``, stands in one of the ``rows.py``, or is kept in one of the
``tiers.py`` and brought through ``working.py``, as the ``budget.py`` allows; ``saved.py`` writes it to a folder.
"""

from lct_core.cache.budget import Budget, Policy, SiteSize, Storage, recency, shot_bytes
from lct_core.cache.kv_cache import KVCache
from lct_core.cache.shots import CachedShot, Space, Stage, Tier

__all__ = [
    "Budget",
    "CachedShot",
    "KVCache",
    "Policy",
    "SiteSize",
    "Space",
    "Stage",
    "Storage",
    "Tier",
    "recency",
    "shot_bytes",
]
