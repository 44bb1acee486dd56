"""The keys and values of shots that are done, addressed by shot (paper, 3.3 and 3.4).

``kv_cache.py`` is the cache of one model, ``expert_cache.py`` that of two experts; ``shot_cache.py`` has the verbs of
both. What a cache holds is the data of ``holdings.py``: ``changes.py`` changes it, ``writing.py`` is a call that writes
to it, and ``arrangement.py`` decides where everything stands. A shot is an entry of ``shots.py``. Its keys and values
stand in one of the ``rows.py``, or in one of the ``tiers.py``, from where ``working.py`` brings them; ``budget.py``
limits the bytes of each tier. ``saved.py`` writes a cache to a folder.
"""

from lct_core.cache.budget import Budget, Policy, SiteSize, Storage, recency, shot_bytes
from lct_core.cache.expert_cache import ExpertCache
from lct_core.cache.kv_cache import KVCache
from lct_core.cache.shots import CachedShot, Space, StagedShots, Tier

__all__ = [
    "Budget",
    "CachedShot",
    "ExpertCache",
    "KVCache",
    "Policy",
    "SiteSize",
    "Space",
    "StagedShots",
    "Storage",
    "Tier",
    "recency",
    "shot_bytes",
]
