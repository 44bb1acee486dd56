"""The history of a scene for one model."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lct_core.cache.shot_cache import ShotCache
from lct_core.cache.shots import StagedShots
from lct_core.cache.writing import WriteKeys, write
from lct_core.coordinates import Scheme
from lct_core.rope import Pairing, same_angles


class KVCache(ShotCache):
    """History for shot-after-shot generation: pass it to a scene model, then keep what the call wrote.

    Every call with the cache sees the selected history and writes its own shots' keys and values in place behind it, so
    that no step copies the history; the next call overwrites them, unless :meth:`append` has kept them. A shot is best
    kept after a pass of its own at the conditioning noise level t_c (paper, 4.2)::

        with torch.no_grad():
            for step in steps:
                velocity = model([shot], t, pattern="context_causal", cache=cache)
                ...
            model([noised_result], t_c, pattern="context_causal", cache=cache)
        cache.append("shot-1")

    While all selected shots are on the device as the model wrote them, they stand in one row for every attention site.
    Otherwise (in 8 bits, in host memory, on disk) each site's history is copied into a working row just before its
    attention, on a GPU one site ahead; the model attends to the same values, so its output is the same to the last bit.

    An error leaves the cache as it was.

    Args:
        capacity: Tokens of selected history and current shots that rows are made for. A call that needs more copies the
            rows once, at the first step of its shot. Without effect where the budget limits the device.
        storage: How shots are kept: ``"native"`` (default), as the model wrote them, or in 8 bits, ``"int8"`` or
            ``"fp8"``, with a scale for every head of 64 tokens; see :attr:`errors`.
        budget: How many bytes may be held where (default: all that is selected on the device, the rest where it is).
        branch: The guidance branch that it is the history of; only recorded.

    Raises:
        ValueError: for an unknown storage, a capacity that is no number of tokens, and a budget that is none.
    """

    _names: ClassVar[tuple[str, ...]] = ("history",)

    @contextmanager
    def writing(
        self,
        staged: StagedShots,
        *,
        scheme: Scheme,
        diagonal: Float[Tensor, "heads pairs"] | None,
        pairing: Pairing | None,
    ) -> Iterator[WriteKeys]:
        """One call of the model, which writes its shots behind the history: ``with cache.writing(...) as write``.

        ``write(key, space, k, v)`` takes an attention site's keys ``[batch, tokens, heads, head_dim]``, rotated, or as
        :class:`lct_core.rope.RowParts`, which are rotated in place, and its values. It returns the history's and these,
        as views that hold until the next site is written. It raises ValueError where the batch, heads, dtype or device
        differ from the history's, or the budget has no room.

        Entering gives up what an earlier call staged. At the end without an error the call's own shots are staged, so
        that :meth:`append` can keep them; after an error nothing is.

        Args:
            staged: The shots of the call.
            scheme: The model's coordinates.
            diagonal: Angles of one step along the diagonal; None without RoPE.
            pairing: Which channels are rotated together; None without RoPE.

        Raises:
            ValueError: where the history was written in another scheme, or with other RoPE angles.
        """
        here = self._holdings[0]
        if here.kept and scheme != here.scheme:
            raise ValueError(
                f"cache: its shots were written in scheme {here.scheme!r}, this model's is {scheme!r}; use another "
                "cache"
            )
        if here.kept and not (pairing == here.pairing and same_angles(here.diagonal, diagonal)):
            raise ValueError(
                "cache: its shots were written by a model with other RoPE angles than this one; use another cache, or "
                "the model that wrote it"
            )
        here.last_call, here.scheme, here.diagonal, here.pairing = None, scheme, diagonal, pairing
        for site in here.sites.values():
            site.current_tokens = 0
        yield partial(write, here)
        here.last_call = staged
