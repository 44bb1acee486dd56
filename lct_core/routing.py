"""Sparse history: attention plans that data decides, for each layer and call.

A scene's attention grows with the square of its shots, though a shot needs little of most others (paper, "Discussion":
token routing). A router looks at the queries and keys of a site, after RoPE, and makes the plans of that one call; any
kernel runs them. It has no parameters, and there is no gradient through its choice.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import groupby
from operator import itemgetter

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lct_core._describe import describe
from lct_core.attention import attend, without_autocast
from lct_core.layout import Layout, Range, consecutive
from lct_core.patterns import bidirectional, context_causal
from lct_core.plan import AttentionPlan, Segment, merged

__all__ = ["Plans", "Router", "Tally", "TopK", "attend_routed"]

Plans = Sequence[Sequence[AttentionPlan]]
"""For every entry of the batch, a plan for each of as many equal groups of heads as there are plans."""


class Router(ABC):
    """A pattern that data decides. It goes wherever a scene model takes a pattern, with and without a cache.

    As a function of a layout it gives the plan of all that it may choose from, which cross-attended text follows.
    """

    @abstractmethod
    def __call__(self, layout: Layout) -> AttentionPlan:
        """All that may be seen, whatever the data."""

    @abstractmethod
    def route(
        self,
        q: Float[Tensor, "batch queries heads head_dim"],
        k: Float[Tensor, "batch keys kv_heads head_dim"],
        layout: Layout,
    ) -> Plans:
        """Who sees whom in one call.

        Args:
            q: Queries as they are attended, after RoPE: of all shots or, behind a cached history, of the last ones.
            k: Keys as they are attended, after RoPE, those of the history included.
            layout: That of the keys.
        """


@dataclass(frozen=True)
class TopK(Router):
    """A shot sees itself, the global shot and, of the earlier shots, the chunks whose keys are most like its queries.

    Queries and keys are cut into chunks, and each chunk stands for itself by its mean. Every chunk of queries, in every
    group of heads, sees the k chunks of keys of the largest inner product with it, averaged over the group's heads; of
    equal ones the earliest. After Mixture of Contexts (Cai et al., arXiv 2508.21058), where every query chooses by
    itself. With k at least the number of chunks it is exactly context-causal attention.

    Args:
        k: How many chunks of other shots are seen; 0 for none.
        chunk: Latent frames in a chunk of keys, a shot's text being a chunk of its own; None for whole shots (default:
            ours).
        queries: The same for queries (default: ours, 1).
        head_groups: How many groups of heads choose for themselves, a divisor of the number of key heads (default:
            ours, 1).
        causal: Whether earlier shots alone are chosen from (default), or all of the scene.

    Raises:
        ValueError: for anything but such numbers.
    """

    k: int
    _: KW_ONLY
    chunk: int | None = None
    queries: int | None = 1
    head_groups: int = 1
    causal: bool = True

    def __post_init__(self) -> None:
        for name, least, or_none in (
            ("k", 0, False),
            ("chunk", 1, True),
            ("queries", 1, True),
            ("head_groups", 1, False),
        ):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not is_count and not (or_none and value is None):
                also = ", or None for whole shots" if or_none else ""
                raise ValueError(f"{name}: got {describe(value)}, expected an int of at least {least}{also}")

    def __call__(self, layout: Layout) -> AttentionPlan:
        """All that is chosen from: context-causal or, with ``causal=False``, bidirectional."""
        return context_causal(layout) if self.causal else bidirectional(layout)

    @torch.no_grad()
    def route(
        self,
        q: Float[Tensor, "batch queries heads head_dim"],
        k: Float[Tensor, "batch keys kv_heads head_dim"],
        layout: Layout,
    ) -> Plans:
        """The plans, of as few segments and key ranges as they have.

        Arithmetic is float32 at least, and shot by shot: what a shot chooses does not depend, to the last bit, on what
        it may not choose.

        Raises:
            ValueError: where the keys are not the layout's, the queries are not those of its last shots, or the head
                groups do not divide the heads.
        """
        first = _first_routed(q, k, layout, self.head_groups)
        scenes = [scene for scene in layout.scene_shots for _ in scene]
        others = [self._others(layout, shot, scenes[shot]) for shot in range(first, layout.num_shots)]
        keys = [_chunks(layout, shot, self.chunk) for shot in range(layout.num_shots)]
        queries = [_chunks(layout, shot, self.queries) for shot in range(first, layout.num_shots)]
        offset, kv_heads = layout.tokens - q.shape[1], k.shape[2]
        with without_autocast(q.device):
            chosen_from = {shot for shots in others for shot in shots}
            means = {shot: _by_group(_means(k, keys[shot]), kv_heads, self.head_groups) for shot in chosen_from}
            best = []
            for chunks, shots in zip(queries, others, strict=True):
                mean = _by_group(_means(q, chunks, offset=offset), kv_heads, self.head_groups)
                scores = mean @ torch.cat([mean[:, :, :0], *(means[shot] for shot in shots)], dim=2).mT
                best.append(scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.k])
        chosen = _listed(best)

        def plan(entry: int, group: int) -> AttentionPlan:
            sees = []  # for every chunk of queries
            for i, shot in enumerate(range(first, layout.num_shots)):
                anchors = [layout.spans[s] for s in (shot, scenes[shot].start) if s == shot or _is_global(layout, s)]
                options = [chunk for other in others[i] for chunk in keys[other]]
                for chunk, picks in zip(queries[i], chosen[i][entry][group], strict=True):
                    sees.append((chunk, merged([*anchors, *(options[n] for n in picks)])))
            segments = []
            for seen, run in groupby(sees, key=itemgetter(1)):
                chunks = [chunk for chunk, _ in run]
                segments.append(Segment(Range(chunks[0].start - offset, chunks[-1].stop - offset), seen))
            return AttentionPlan(q.shape[1], layout.tokens, tuple(segments))

        return [[plan(entry, group) for group in range(self.head_groups)] for entry in range(len(q))]

    def _others(self, layout: Layout, shot: int, scene: range) -> list[int]:
        """The shots of its scene that a shot chooses from, in row order."""
        others = range(scene.start, shot) if self.causal else scene
        return [other for other in others if other != shot and not _is_global(layout, other)]


class Tally(Router):
    """A router, and the count of what it keeps.

    Args:
        router: The router.

    Attributes:
        pairs: How many (query, key) pairs were attended in all calls so far, over entries, averaged over head groups.
        full: How many would have been, had all been chosen that may be seen.
    """

    def __init__(self, router: Router) -> None:
        self.router, self.pairs, self.full = router, 0.0, 0

    @property
    def kept(self) -> float:
        """The share of all pairs that was attended; 1 before the first call."""
        return self.pairs / self.full if self.full else 1.0

    def __call__(self, layout: Layout) -> AttentionPlan:
        """As the router."""
        return self.router(layout)

    def route(self, q: Tensor, k: Tensor, layout: Layout) -> Plans:
        """As the router; counted."""
        plans = self.router.route(q, k, layout)
        full = self.router(layout).rows(Range(layout.tokens - q.shape[1], layout.tokens))
        self.pairs += sum(sum(plan.pairs for plan in groups) / len(groups) for groups in plans)
        self.full += full.pairs * len(plans)
        return plans


def attend_routed(
    q: Float[Tensor, "batch queries heads head_dim"],
    k: Float[Tensor, "batch keys kv_heads head_dim"],
    v: Float[Tensor, "batch keys kv_heads head_dim"],
    plans: Plans,
    *,
    kernel: str = "auto",
) -> Float[Tensor, "batch queries heads head_dim"]:
    """:func:`lct_core.attend`, every entry of the batch and every group of its heads by a plan of its own.

    Raises:
        ValueError: for plans of another number of entries; and as ``attend`` does.
    """
    if len(plans) != len(q):
        raise ValueError(f"plans: got those of {len(plans)} entries for q {describe(q)}, expected {len(q)}")
    outs = [
        attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], groups[0] if len(groups) == 1 else groups, kernel=kernel)
        for i, groups in enumerate(plans)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _first_routed(q: Tensor, k: Tensor, layout: Layout, head_groups: int) -> int:
    """The first shot that has queries."""
    first = next((i for i, span in enumerate(layout.spans) if span.start == layout.tokens - q.shape[1]), None)
    if first is None or k.shape[1] != layout.tokens:
        raise ValueError(
            f"q, k: got {describe(q)} and {describe(k)} for a layout of {layout.tokens} tokens, expected all of its "
            "keys, and the queries of all shots or of the last ones"
        )
    if k.shape[2] % head_groups or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"head_groups: got {head_groups} for q {describe(q)} and k {describe(k)}, expected a divisor of the number "
            "of key heads (the third axis)"
        )
    return first


def _is_global(layout: Layout, shot: int) -> bool:
    return layout.shots[shot].role == "global"


def _chunks(layout: Layout, shot: int, frames: int | None) -> list[Range]:
    """The tokens of a shot in row order: the text and some frames at a time, or all as one; none of them empty."""
    own, span = layout.shots[shot], layout.spans[shot]
    if frames is None or not own.video:
        return [span] if span.size else []
    size = own.video // own.grid[0]
    lengths = [min(frames, own.grid[0] - frame) * size for frame in range(0, own.grid[0], frames)]
    lengths = [own.text, *lengths] if layout.text_first else [*lengths, own.text]
    return [Range(span.start + r.start, span.start + r.stop) for r in consecutive(lengths) if r.size]


def _means(
    x: Float[Tensor, "batch tokens heads head_dim"], chunks: Sequence[Range], *, offset: int = 0
) -> Float[Tensor, "batch chunks heads head_dim"]:
    """The mean of every chunk of consecutive ones, float32 at least; the first token of x is at the offset."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    means = [x[:, :0].to(dtype)]
    for size, run in groupby(chunks, key=lambda chunk: chunk.size):
        alike = list(run)
        tokens = x[:, alike[0].start - offset : alike[-1].stop - offset].unflatten(1, (len(alike), size))
        means.append(tokens.mean(2, dtype=dtype))
    return torch.cat(means, dim=1)


def _by_group(
    means: Float[Tensor, "batch chunks heads head_dim"], kv_heads: int, groups: int
) -> Float[Tensor, "batch groups chunks channels"]:
    """All channels of a group of heads side by side; query heads that share a key head are added up."""
    shared = means.unflatten(2, (kv_heads, -1)).sum(3)
    return shared.unflatten(2, (groups, -1)).flatten(3).transpose(1, 2)


def _listed(choices: Sequence[Int[Tensor, "batch groups chunks picks"]]) -> list[list[list[list[list[int]]]]]:
    """Tensors as lists, brought to the host at once."""
    flat = torch.cat([x.flatten() for x in choices]).cpu().split([x.numel() for x in choices])
    return [numbers.view(x.shape).tolist() for numbers, x in zip(flat, choices, strict=True)]
