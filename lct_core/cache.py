"""The keys and values of shots that are done, addressed by shot (paper, 3.3 and 3.4)."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lct_core.coordinates import Scheme
from lct_core.layout import Range, Shot, consecutive
from lct_core.rope import Pairing, RowParts, move

Space = Literal["tokens", "video", "text"]


@dataclass(frozen=True, kw_only=True)
class CachedShot:
    """What a cache knows of one shot.

    Args:
        id: The name it was appended under.
        shot: Its token counts.
        level: The noise level it was written at, 0 to 1; one number for every entry of the batch.
        written: Where on the diagonal its keys were written.
        origin: Where on the diagonal its keys stand now.
        extent: How many diagonal steps it takes; a successor starts at ``origin + extent``.
    """

    id: Hashable
    shot: Shot
    level: tuple[float, ...]
    written: int
    origin: int
    extent: int


class Stage(NamedTuple):
    """The shots that a call writes behind the history: what :meth:`KVCache.append` keeps."""

    shots: tuple[Shot, ...]
    levels: Float[Tensor, "batch shots"]
    origins: tuple[int, ...]
    extents: tuple[int, ...]


@dataclass
class _Store:
    """The keys and values of one attention site of one block: unselected shots, history, staged shots, spare room."""

    space: Space
    k: Tensor
    v: Tensor
    originals: dict[Hashable, Tensor] = field(default_factory=dict)  # moved shots' keys as they were written


class KVCache:
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

    Args:
        capacity: Tokens to make room for at the first call. Beyond it room is made when a longer shot is begun, by one
            copy, and never during its steps.
    """

    def __init__(self, *, capacity: int = 0) -> None:
        self._capacity = capacity
        self._stores: dict[tuple[int, str], _Store] = {}
        self._parked: list[CachedShot] = []
        self._history: list[CachedShot] = []
        self._stage: Stage | None = None
        self._scheme: Scheme | None = None
        self._diagonal: Tensor | None = None
        self._pairing: Pairing | None = None

    @property
    def shots(self) -> tuple[CachedShot, ...]:
        """The selected history, in the order in which it is seen."""
        return tuple(self._history)

    @property
    def ids(self) -> tuple[Hashable, ...]:
        """The ids of every shot that the cache holds, the selected history first."""
        return tuple(entry.id for entry in (*self._history, *self._parked))

    @property
    def end(self) -> int:
        """Where on the diagonal the next shot starts."""
        return max((entry.origin + entry.extent for entry in self._history), default=0)

    @property
    def staged(self) -> Stage | None:
        """What the last call wrote and :meth:`append` would keep."""
        return self._stage

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, spare room included."""
        return sum(t.nbytes for store in self._stores.values() for t in (store.k, store.v, *store.originals.values()))

    def append(self, *ids: Hashable) -> None:
        """Keep the shots of the last call as history, under these ids, in the call's order.

        Raises:
            ValueError: where no call has written since, the number of ids differs, or an id is taken.
        """
        if self._stage is None:
            raise ValueError(
                "append: no call has written to this cache since the last append, select or reposition; "
                "call the scene model with cache=cache first"
            )
        if len(ids) != len(self._stage.shots):
            raise ValueError(
                f"ids: got {len(ids)}, {list(ids)}, expected {len(self._stage.shots)}, "
                "one for each shot of the last call"
            )
        if unhashable := [i for i in ids if not isinstance(i, Hashable)]:
            raise ValueError(f"ids: got {unhashable}, expected hashable names, such as strings or numbers")
        if taken := [i for n, i in enumerate(ids) if i in self.ids or i in ids[:n]]:
            raise ValueError(f"ids: {taken} are taken; the cache holds {list(self.ids)}")
        shots, levels, origins, extents = self._stage
        self._history += [
            CachedShot(id=i, shot=shot, level=tuple(level), written=origin, origin=origin, extent=extent)
            for i, shot, level, origin, extent in zip(ids, shots, levels.T.tolist(), origins, extents, strict=True)
        ]
        self._stage = None

    def select(self, ids: Iterable[Hashable], *, reposition: bool = True) -> None:
        """Choose the shots that later calls see, in this order: by relevance rather than recency (paper, 3.4).

        The others stay in the cache, unseen, and can be selected again. The buffers are put in order once, here.

        Args:
            ids: Shots of this cache.
            reposition: Let the chosen shots follow one another on the diagonal from 0 (default: ours), see
                :meth:`reposition`; False leaves every shot where it stands.

        Raises:
            ValueError: for an unknown or repeated id.
        """
        held = {entry.id: entry for entry in (*self._parked, *self._history)}
        chosen = list(ids)
        if unknown := [i for i in chosen if i not in held]:
            raise ValueError(f"ids: {unknown} are not in the cache; it holds {list(self.ids)}")
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"ids: got {chosen}, expected every shot once")
        history = [held[i] for i in chosen]
        if any(entry.shot.role == "global" for entry in history[1:]):
            raise ValueError(f"ids: got {chosen}, expected a global shot to come first, as in its scene")
        parked = [entry for i, entry in held.items() if i not in set(chosen)]
        for store in self._stores.values():
            spans = self._spans(store.space)
            order = [torch.arange(*spans[e.id], device=store.k.device) for e in (*parked, *history)]
            if order:
                index = torch.cat(order)
                store.k[:, : len(index)] = store.k[:, index]
                store.v[:, : len(index)] = store.v[:, index]
        self._parked, self._history, self._stage = parked, history, None
        if reposition:
            self.reposition()

    def reposition(self, origins: Sequence[int] | None = None) -> None:
        """Move the history's shots along the diagonal, each as one body, by the constant rotation R(steps).

        Equals having rotated the same keys at the new places from the start, to 1e-6 of the largest key in float32; in
        bfloat16 a moved key has one rounding more. Always one rotation from where a shot was written: its keys as they
        were written are kept until it is back there.

        Args:
            origins: For every selected shot, where on the diagonal it is to start (default: end to end from 0).

        Raises:
            ValueError: for the wrong number of origins.
        """
        extents = [entry.extent for entry in self._history]
        targets = list(accumulate(extents, initial=0))[:-1] if origins is None else list(origins)
        if len(targets) != len(self._history):
            raise ValueError(f"origins: got {len(targets)}, expected {len(self._history)}, one for each selected shot")
        for store in self._stores.values():
            if store.space == "text" or self._diagonal is None or self._pairing is None:
                continue  # cross-attended text and models without RoPE have no place on the diagonal
            spans = self._spans(store.space)
            for entry, origin in zip(self._history, targets, strict=True):
                if origin == entry.origin:
                    continue
                keys = store.k[:, spans[entry.id].slice]
                if entry.id not in store.originals:
                    store.originals[entry.id] = keys.clone()
                original = store.originals[entry.id]
                if origin == entry.written:
                    keys.copy_(original)
                    del store.originals[entry.id]
                else:
                    keys.copy_(move(original, origin - entry.written, diagonal=self._diagonal, pairing=self._pairing))
        self._history = [replace(e, origin=origin) for e, origin in zip(self._history, targets, strict=True)]
        self._stage = None

    # What follows is the engine's side.

    def begin(self, scheme: Scheme, diagonal: Float[Tensor, "heads pairs"] | None, pairing: Pairing | None) -> None:
        """Start a call: the staged shots of the last one are given up.

        Raises:
            ValueError: where the history was written under another coordinate scheme.
        """
        if self.ids and scheme != self._scheme:
            raise ValueError(
                f"cache: its shots were written in scheme {self._scheme!r}, this model's is {scheme!r}; "
                "use another cache"
            )
        self._stage, self._scheme, self._diagonal, self._pairing = None, scheme, diagonal, pairing

    def write(
        self, key: tuple[int, str], space: Space, k: Tensor | RowParts, v: Tensor
    ) -> tuple[Float[Tensor, "batch keys heads head_dim"], Float[Tensor, "batch keys heads head_dim"]]:
        """Write the current shots' rotated keys and values behind the history; return both with it, as views.

        Keys that come as :class:`lct_core.rope.RowParts` are rotated right there, without a copy in between.

        Raises:
            ValueError: where the batch, heads or dtype differ from the history's.
        """
        hidden = sum(getattr(entry.shot, space) for entry in self._parked)
        start = hidden + sum(getattr(entry.shot, space) for entry in self._history)
        stop = start + k.shape[1]
        store = self._stores.get(key)
        if store is None:
            if start:
                raise ValueError(
                    f"cache: it holds {len(self.ids)} shots, but nothing for block {key[0]}, site {key[1]!r}; "
                    "a cache belongs to the model and branch that filled it"
                )
            room = stop if space == "text" else max(stop, self._capacity)
            store = self._stores[key] = _Store(space, _buffer(k, room), _buffer(v, room))
        if (store.k.shape[0], *store.k.shape[2:], store.k.dtype) != (k.shape[0], *k.shape[2:], k.dtype):
            raise ValueError(
                f"cache: it holds keys of batch {store.k.shape[0]}, heads and channels {list(store.k.shape[2:])}, "
                f"{store.k.dtype}; this call has {k.shape[0]}, {list(k.shape[2:])}, {k.dtype}; use another cache"
            )
        if stop > store.k.shape[1]:
            store.k, store.v = _room(store.k, start, stop), _room(store.v, start, stop)
        if isinstance(k, RowParts):
            k.into(store.k[:, start:stop])
        else:
            store.k[:, start:stop] = k
        store.v[:, start:stop] = v
        return store.k[:, hidden:stop], store.v[:, hidden:stop]

    def stage(self, stage: Stage) -> None:
        """End a call: what it wrote can be kept with :meth:`append`."""
        self._stage = stage

    def _spans(self, space: Space) -> dict[Hashable, Range]:
        entries = [*self._parked, *self._history]
        return dict(zip((e.id for e in entries), consecutive(getattr(e.shot, space) for e in entries), strict=True))


def _buffer(x: Tensor | RowParts, tokens: int) -> Tensor:
    """A buffer like x for a number of tokens."""
    return torch.empty(x.shape[0], tokens, *x.shape[2:], dtype=x.dtype, device=x.device)


def _room(x: Tensor, keep: int, tokens: int) -> Tensor:
    """A buffer like x for a number of tokens that begins with the first ``keep`` of x."""
    buffer = _buffer(x, tokens)
    buffer[:, :keep] = x[:, :keep]
    return buffer
