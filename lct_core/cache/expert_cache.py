"""The history of a scene for two experts, a cache for each."""

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import ClassVar

from lct_core.cache.kv_cache import KVCache
from lct_core.cache.shot_cache import ShotCache


class ExpertCache(ShotCache):
    """The history of a scene, once for each expert: their keys and values are never mixed.

    Every change is made to both; an error leaves both as they were. Bytes are those of both together, errors the larger
    of the two. The bytes of a budget are halved between them.

    Args:
        capacity: As :class:`KVCache` takes it.
        storage: As :class:`KVCache` takes it.
        budget: As :class:`KVCache` takes it, for both together.
        branch: As :class:`KVCache` takes it.

    Raises:
        ValueError: as :class:`KVCache` does.
    """

    _names: ClassVar[tuple[str, ...]] = ("high", "low")
    written_by_both = False

    @cached_property
    def high(self) -> KVCache:
        """The cache of the expert of high noise levels."""
        return KVCache._of(self._holdings[:1])

    @cached_property
    def low(self) -> KVCache:
        """The cache of the expert of low noise levels."""
        return KVCache._of(self._holdings[1:])

    def append(self, *ids: Hashable, prompts: Sequence[str] = ()) -> None:
        """Keep the shots of the last call as history, under these ids.

        Raises:
            ValueError: where only one expert has written them since, and as :meth:`KVCache.append` does.
        """
        if self._holdings[0].hold is None:
            self._check_written("append")
        super().append(*ids, prompts=prompts)
        self.written_by_both = False

    def hold(self) -> None:
        """Keep a copy of what both experts wrote in the last call, see :meth:`KVCache.hold`.

        Raises:
            ValueError: where only one expert has written, and as :meth:`KVCache.hold` does.
        """
        self._check_written("hold")
        super().hold()

    def _check_written(self, what: str) -> None:
        if not self.written_by_both and any(part.staged for part in self._holdings):
            raise ValueError(
                f"{what}: one expert alone has written these shots last; both need them: pass them once more, at their "
                "level as history, with denoised=()"
            )
