"""Who sees whom at every attention site."""

from collections.abc import Sequence
from typing import Literal, get_args

from lct_core.backbone import Backbone, Site, Traits
from lct_core.cache import Space
from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import Pattern, own_and_global_text, own_shot, own_text, seen_text
from lct_core.plan import AttentionPlan

TextScope = Literal["own", "own_and_global", "all"]


class Visibility:
    """The attention plan of every site, for one pass over a row of shots.

    Args:
        traits: The model's.
        layout: The shots of the row.
        pattern: Who sees whom, from the layout of the history and the row.
        text: Which prompts a shot cross-attends to.
        history: The shots that the row sees besides, from a cache (default: there is no cache).
    """

    def __init__(
        self,
        traits: Traits,
        layout: Layout,
        *,
        pattern: Pattern,
        text: TextScope,
        history: Sequence[Shot] | None = None,
    ) -> None:
        self._traits, self._layout, self._pattern, self._text = traits, layout, pattern, text
        self._behind_history = history is not None
        self._whole = layout if history is None else Layout([[*history, *layout.shots]], layout.text_first)
        self._plans: dict[tuple[str, str], AttentionPlan] = {}

    def plan(self, site: Site) -> AttentionPlan:
        """Who sees whom at a site: the row's queries over the history's keys and its own."""
        key = site.joint, site.tokens
        if key not in self._plans:
            self._plans[key] = self._made(site)
        return self._plans[key]

    def keys(self, site: Site) -> Layout:
        """The tokens whose keys a joined site's queries see, the history's included."""
        return self._attending(site, self._whole)

    def space(self, site: Site) -> Space:
        """Which tokens of a shot are a site's keys."""
        return key_space(site, self._traits)

    def _attending(self, site: Site, layout: Layout) -> Layout:
        return layout if self.space(site) == "tokens" else layout.video_only

    def _made(self, site: Site) -> AttentionPlan:
        if site.joint == "own_shot":
            return own_shot(self._attending(site, self._layout))
        if site.joint == "text" and self._text == "own":
            return own_text(self._layout)
        queries = (self._attending(site, self._layout) if site.joint == "joined" else self._layout.video_only).tokens
        if site.joint == "joined":
            plan = self._pattern(self.keys(site))
        elif self._text == "own_and_global":
            plan = own_and_global_text(self._whole)
        else:
            plan = seen_text(self._whole, self._pattern(self._whole.video_only))
        return plan.rows(Range(plan.queries - queries, plan.queries)) if self._behind_history else plan


def key_space(site: Site, traits: Traits) -> Space:
    """Which tokens of a shot are the keys of a site: all, the video's or the text's."""
    if site.joint == "text":
        return "text"
    return "tokens" if traits.text == "joint" and site.tokens == "all" else "video"


def sees_others(site: Site, text: TextScope) -> bool:
    """Whether a site's queries see keys of other shots, so that a cache must hold them."""
    return site.joint == "joined" or (site.joint == "text" and text != "own")


def check_text_scope(text: TextScope, adapter: Backbone) -> TextScope:
    """The scope, where the model has it.

    Raises:
        ValueError: for an unknown one, and one that leaves a choice where text takes part in self-attention.
    """
    if text not in get_args(TextScope):
        raise ValueError(f"text: got {text!r}, expected one of {get_args(TextScope)}")
    if text != "own" and adapter.traits.text == "joint":
        raise ValueError(
            f"text: got {text!r}, but the text of {type(adapter.model).__name__} takes part in self-attention and is "
            'seen with its shot; expected "own", the default'
        )
    return text
