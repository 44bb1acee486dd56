"""Attention patterns: which shots a shot sees, as functions from a layout to an attention plan (paper, 3.2.1 and 3.3).

The first ones are of self-attention; those that end on ``_text`` are of cross-attention, from video to text.
"""

from collections.abc import Callable, Iterable, Sequence

from lct_core.layout import Layout, Range, consecutive
from lct_core.plan import AttentionPlan, Segment, merged

Pattern = Callable[[Layout], AttentionPlan]


def bidirectional(layout: Layout) -> AttentionPlan:
    """Every token sees its whole scene (paper, 3.2.2: full attention)."""
    return _plan(layout, layout.scene_spans, [(scene,) for scene in layout.scene_spans])


def context_causal(layout: Layout) -> AttentionPlan:
    """Bidirectional inside a shot; a shot sees the earlier shots of its scene (paper, 3.3)."""
    starts = [scene.start for scene, shots in zip(layout.scene_spans, layout.scene_shots, strict=True) for _ in shots]
    return _plan(
        layout, layout.spans, [(Range(start, shot.stop),) for start, shot in zip(starts, layout.spans, strict=True)]
    )


def own_shot(layout: Layout) -> AttentionPlan:
    """Every shot sees itself alone: the base model."""
    return _plan(layout, layout.spans, [(shot,) for shot in layout.spans])


def selected_history(layout: Layout, history: Sequence[Iterable[int]]) -> AttentionPlan:
    """Every shot sees itself and the earlier shots chosen for it: by relevance rather than recency (paper, 3.4).

    Args:
        layout: The row's scenes of shots.
        history: For every shot of the row, the shots it sees besides itself, counted from 0 in row order. A global shot
            is one of them: name it where it should be seen.

    Raises:
        ValueError: for a history of the wrong length, or one that holds a shot of another scene or a later shot.
    """
    chosen = [sorted(set(shots)) for shots in history]
    if len(chosen) != layout.num_shots:
        raise ValueError(f"history: got {len(chosen)} entries, expected one for each of the {layout.num_shots} shots")
    for scene in layout.scene_shots:
        for shot in scene:
            for other in chosen[shot]:
                if not scene.start <= other < shot:
                    raise ValueError(
                        f"history: shot {shot} is to see shot {other}, expected earlier shots of its own "
                        f"scene: {list(range(scene.start, shot))}"
                    )
    return _plan(
        layout,
        layout.spans,
        [[layout.spans[s] for s in (*others, own)] for own, others in enumerate(chosen)],
    )


def first_frames(layout: Layout, *, causal: bool = False) -> AttentionPlan:
    """Every shot sees itself, the global shot, and the first latent frame of every other shot of its scene.

    After HoloCine (Meng et al., arXiv 2510.20822), where a shot's first frame stands for it. Of another shot only video
    is seen, not its text.

    Args:
        layout: The row's scenes of shots.
        causal: Whether a shot sees the earlier shots alone (default: all of its scene).
    """
    keys = [
        [layout.spans[own], *(_summary(layout, shot) for shot in (range(scene.start, own) if causal else scene))]
        for scene in layout.scene_shots
        for own in scene
    ]
    return _plan(layout, layout.spans, keys)


def own_text(layout: Layout) -> AttentionPlan:
    """Cross-attention from every shot's video tokens to its own text; both spaces are in row order."""
    return _text_plan(layout, with_global=False)


def own_and_global_text(layout: Layout) -> AttentionPlan:
    """Cross-attention from every shot's video tokens to its own text and its scene's global prompt."""
    return _text_plan(layout, with_global=True)


def seen_text(layout: Layout, plan: AttentionPlan) -> AttentionPlan:
    """Cross-attention to the texts of all shots of which a plan shows some video, and to the global prompt.

    Args:
        layout: The row's scenes of shots, with their texts.
        plan: Who sees whom in the self-attention of ``layout.video_only``.

    Raises:
        ValueError: where a shot sees no text at all.
    """
    videos = consecutive(shot.video for shot in layout.shots)
    texts = consecutive(shot.text for shot in layout.shots)
    scenes = list(zip(layout.video_only.scene_spans, layout.scene_shots, strict=True))
    segments = []
    for queries, keys in plan.segments:
        shown = [
            text
            for video, text in zip(videos, texts, strict=True)
            if video.size and any(video.start < r.stop and r.start < video.stop for r in keys)
        ]
        for span, shots in scenes:
            part = Range(max(queries.start, span.start), min(queries.stop, span.stop))
            if part.start >= part.stop:
                continue
            # A global prompt without video is shown by no plan: its whole scene sees it.
            prompt = [texts[shots.start]] if layout.shots[shots.start].role == "global" else []
            seen = merged([*shown, *prompt])
            if not seen:
                own = next(i for i, video in enumerate(videos) if video.start <= part.start < video.stop)
                raise ValueError(
                    f"layout: shot {own} (in row order) has no text to attend to, expected text > 0 in a shot that it "
                    "sees or a global shot in its scene"
                )
            segments.append(Segment(part, seen))
    return AttentionPlan(plan.queries, texts[-1].stop, tuple(segments))


PATTERNS: dict[str, Pattern] = {"bidirectional": bidirectional, "context_causal": context_causal, "own_shot": own_shot}


def named(pattern: str | Pattern) -> Pattern:
    """A pattern by its name in :data:`PATTERNS`; a function is returned as it is.

    Raises:
        ValueError: for an unknown name.
    """
    if callable(pattern):
        return pattern
    if pattern not in PATTERNS:
        raise ValueError(
            f"pattern: got {pattern!r}, expected one of {list(PATTERNS)} or a function from a layout to a plan"
        )
    return PATTERNS[pattern]


def _plan(layout: Layout, queries: Iterable[Range], keys: Iterable[Iterable[Range]]) -> AttentionPlan:
    segments = tuple(Segment(q, tuple(k)) for q, k in zip(queries, keys, strict=True) if q.size)
    return AttentionPlan(layout.tokens, layout.tokens, segments)


def _summary(layout: Layout, shot: int) -> Range:
    """The tokens that stand for a shot: the first frame of its video, or all of a global shot."""
    own, span = layout.shots[shot], layout.spans[shot]
    if own.role == "global":
        return span
    start = span.start + (own.text if layout.text_first else 0)
    return Range(start, start + own.video // own.grid[0])


def _text_plan(layout: Layout, *, with_global: bool) -> AttentionPlan:
    videos = consecutive(shot.video for shot in layout.shots)
    texts = consecutive(shot.text for shot in layout.shots)
    segments = []
    for scene in layout.scene_shots:
        shared = [texts[scene.start]] if with_global and layout.shots[scene.start].role == "global" else []
        for shot in scene:
            if not layout.shots[shot].video:
                continue
            keys = merged([*shared, texts[shot]])
            if not keys:
                raise ValueError(
                    f"layout: shot {shot} (in row order) has no text to attend to, expected text > 0"
                    + (" or a global shot in its scene" if with_global else "")
                )
            segments.append(Segment(videos[shot], keys))
    return AttentionPlan(videos[-1].stop, texts[-1].stop, tuple(segments))
