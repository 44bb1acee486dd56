"""One pass of a scene through a retrofitted model."""

import functools
from collections.abc import Callable, Sequence
from inspect import Signature, signature
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lct_core import patterns as masks
from lct_core.attention import attend, without_autocast
from lct_core.backbone.adapter import QKV, Backbone, Site, State, Tokens
from lct_core.backbone.inputs import ShotInput
from lct_core.cache import KVCache, Space
from lct_core.coordinates import extent, measured_extent, shot_coordinates
from lct_core.engine.explain import check_places
from lct_core.engine.joining import _autocast_dtype, _cat, _joined, _rotates_plainly, _video, _whole, alike, stacked
from lct_core.engine.visibility import _pattern
from lct_core.layout import Layout, Range, Shot
from lct_core.patterns import Pattern
from lct_core.plan import AttentionPlan
from lct_core.rope import Rotation, RowParts, pays_in_pieces, rotate_into
from lct_core.routing import Plans, Router, attend_routed

if TYPE_CHECKING:
    from lct_core.scene_model import SceneModel

_KINDS = 256  # of blocks, sites and shapes of shots that are compiled for


class _Dispatch:
    """The forward of a retrofitted module: its own, unless it is handed a part of the engine's work.

    Every module is still entered through its ``__call__``, so that hooks (sharding, offload) fire, and runs its own
    weights, also after a deep copy or a pickle round trip.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __signature__(self) -> Signature:
        """The module's own, for libraries that look up what a model takes."""
        return signature(MethodType(type(self.module).forward, self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], (_Call, _BlockCall)):
            return args[0](self.module, *args[1:])
        return type(self.module).forward(self.module, *args, **kwargs)


class _Call:
    """One pass over a row: plans and rotations, made once and shared by all blocks. Opaque to hooks on purpose."""

    def __init__(
        self,
        engine: "SceneModel",
        layout: Layout,
        inputs: Sequence[ShotInput],
        levels: Tensor,
        pattern: str | Pattern,
        cache: KVCache | None,
        text_free: bool,
    ) -> None:
        self.adapter, self.kernel, self.cache, self.layout = engine.adapter, engine.kernel, cache, layout
        self.levels = levels  # here, and not an argument of the model: mixed-precision hooks round those
        own_switch = getattr(engine.backbone, "gradient_checkpointing", False)
        self.checkpointing, self.batching = engine.gradient_checkpointing or own_switch, engine.batch_shots
        self.text, self.compile, self.rotary = engine.text, engine.compile, engine.rotary
        self.text_free = text_free
        self.pattern = _pattern(pattern)
        if cache is not None and len(layout.scenes) != 1:
            raise ValueError(
                f"cache: got {len(layout.scenes)} scenes, expected one: a cache is the history of one scene"
            )
        self.whole = layout
        if cache is not None:
            self.whole = Layout([[*(entry.shot for entry in cache.shots), *layout.shots]], layout.text_first)
        self.plans: dict[tuple[str, str], AttentionPlan] = {}
        self.scheme = engine.scheme
        with without_autocast(inputs[0].latents.device):
            self._place(inputs)

    def __call__(self, model: nn.Module, inputs: Sequence[ShotInput]) -> list[Tensor | None]:
        with without_autocast(inputs[0].latents.device):
            self._turn(inputs)
            if self.cache is not None:
                pairing = self.adapter.traits.pairing
                self.cache.begin(self.scheme, self._diagonal(inputs[0].latents.device), pairing)
        timesteps = self.adapter.traits.timestep(self.levels)
        encoded = [
            _without_video(state) if not shot.video else state
            for i, shot in enumerate(self.layout.shots)
            for state in [self.adapter.encode(inputs[i], timesteps[:, i])]
        ]
        self.groups = alike(encoded) if self.batching else [[i] for i in range(len(encoded))]
        states = [stacked([encoded[i] for i in group]) for group in self.groups]
        del encoded  # what the blocks change need not stay
        for index, block in enumerate(self.adapter.blocks):
            states = _updated(states, block(_BlockCall(self, index), states))
        tokens = self.shot_by_shot([self.adapter.head(state) for state in states])
        return [
            None if shot.role == "global" else self.adapter.unpatchify(out, shot)
            for shot, out in zip(self.layout.shots, tokens, strict=True)
        ]

    def shot_by_shot(self, grouped: Sequence[Tensor]) -> list[Tensor]:
        """What was computed group by group, in row order."""
        parts: dict[int, Tensor] = {}
        for group, x in zip(self.groups, grouped, strict=True):
            parts.update(zip(group, x.chunk(len(group)), strict=True))
        return [parts[i] for i in range(len(parts))]

    def plan(self, site: Site) -> AttentionPlan:
        """Who sees whom at a site: this call's queries over the history's keys and its own."""
        key = site.joint, site.tokens
        if key not in self.plans:
            self.plans[key] = self._plan(site)
        return self.plans[key]

    def cached(self, site: Site) -> bool:
        """Whether a site's queries see keys of other shots, so that a cache must hold them."""
        return self.cache is not None and (site.joint == "joined" or (site.joint == "text" and self.text != "own"))

    def attending(self, site: Site, layout: Layout) -> Layout:
        """The tokens that take part in a site's self-attention."""
        return layout if self.space(site) == "tokens" else layout.video_only

    def space(self, site: Site) -> Space:
        """Which tokens of a shot are a site's keys."""
        if site.joint == "text":
            return "text"
        return "tokens" if self.adapter.traits.text == "joint" and site.tokens == "all" else "video"

    def row(self, parts: Sequence[Tensor], by: Rotation | None) -> Tensor | RowParts:
        """Every shot's queries, keys or values in one row: rotated on their way there where that is asked for or pays.

        Else, and where an adapter rotates in its own way or learns its angles, they are joined and rotated first.
        """
        rotary, learned = self.rotary, by is not None and (by.cos.requires_grad or by.sin.requires_grad)
        if rotary is None and not learned and _rotates_plainly(self.adapter) and pays_in_pieces(parts):
            rotary = rotate_into
        if by is None or rotary is None:
            x = _cat(parts, dim=1)
            x = x if by is None else self.adapter.rotate(x, by)
            return x.to(_autocast_dtype(x))
        if learned:
            raise ValueError(
                f"rotary: the angles of this {type(self.adapter.model).__name__} are learned, and a rotary has no "
                "gradient for them; leave it out, freeze them, or call under torch.no_grad()"
            )
        return RowParts(parts, by, _autocast_dtype(parts[0]), rotary)

    def _plan(self, site: Site) -> AttentionPlan:
        if site.joint == "own_shot":
            return masks.own_shot(self.attending(site, self.layout))
        if site.joint == "text" and self.text == "own":
            return masks.own_text(self.layout)
        queries = self.attending(site, self.layout).tokens if site.joint == "joined" else self.layout.video_only.tokens
        if site.joint == "joined":
            plan = self.pattern(self.attending(site, self.whole))
        elif self.text == "own_and_global":
            plan = masks.own_and_global_text(self.whole)
        else:
            plan = masks.seen_text(self.whole, self.pattern(self.whole.video_only))
        return plan if self.cache is None else plan.rows(Range(plan.queries - queries, plan.queries))

    def _place(self, inputs: Sequence[ShotInput]) -> None:
        """Run the diagonal cursor over every scene."""
        traits, joint = self.adapter.traits, self.adapter.traits.text == "joint"
        shots = iter((self.layout if joint else self.layout.video_only).shots)
        unit = torch.tensor(traits.unit, dtype=torch.float64)
        origins, extents = [], []
        self.places: list[Tensor] = []
        remaining = iter(inputs)
        for scene in self.layout.scenes:
            origin = 0 if self.cache is None else self.cache.end
            for _ in scene:
                shot, given = next(shots), next(remaining)
                if self.scheme == "paper":
                    coords = shot_coordinates(shot, scheme=self.scheme, text_first=traits.text_first)
                    coords = F.pad(coords, (0, len(unit) - 3)) * unit  # 0 on axes of the model's own
                    steps = extent(shot, scheme=self.scheme)
                else:
                    coords = self.adapter.coordinates(given, shot)
                    check_places(coords, given)
                    steps = measured_extent(coords, traits.unit)
                origins.append(origin)
                extents.append(steps)
                self.places.append(coords + origin * unit)
                origin += steps
        self.origins, self.extents = tuple(origins), tuple(extents)

    def _turn(self, inputs: Sequence[ShotInput]) -> None:
        """Make the rotations, in float32 at least (and outside autocast).

        Inside the model's forward: angles may be weights of its own, which offloading and sharding hooks bring for it.
        """
        traits, videos = self.adapter.traits, [shot.video for shot in self.layout.shots]
        shots = (self.layout if traits.text == "joint" else self.layout.video_only).shots
        rotations = [self._rotation(*place) for place in zip(self.places, inputs, shots, strict=True)]
        self.rotations: dict[Tokens, Rotation | None] = {
            "all": _joined(rotations),
            "video": _joined([_video(by, n, traits.text_first) for by, n in zip(rotations, videos, strict=True)]),
        }

    def _rotation(self, coords: Tensor, given: ShotInput, shot: Shot) -> Rotation | None:
        if self.adapter.traits.pairing is None:
            return None
        device, dtype = given.latents.device, torch.promote_types(given.latents.dtype, torch.float32)
        return self.adapter.rotation(coords.to(device), shot, dtype=dtype)

    def _diagonal(self, device: torch.device) -> Tensor | None:
        """The angles of one step along the diagonal, by which a cached shot is moved."""
        if self.adapter.traits.pairing is None:
            return None
        unit = torch.tensor([self.adapter.traits.unit], dtype=torch.float64, device=device)
        return (self.adapter.rope(unit) - self.adapter.rope(torch.zeros_like(unit)))[0]


class _BlockCall:
    """One block's share of a pass."""

    def __init__(self, call: _Call, index: int) -> None:
        self.call, self.index = call, index
        self.routes: dict[str, Plans] = {}  # made once: a block that is recomputed must not choose anew

    def __call__(self, block: nn.Module, states: list[State]) -> list[dict[str, Tensor]]:
        if self.call.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, block, states, use_reentrant=False)
        return self._run(block, states)

    def _run(self, block: nn.Module, states: list[State]) -> list[dict[str, Tensor]]:
        """Every site of a block; returns the streams that changed, group by group."""
        changed: list[dict[str, Tensor]] = [{} for _ in states]
        for site in self.call.adapter.sites(block):
            qkv = _compiled(_qkv) if self.call.compile else _qkv
            finish = _compiled(_finish) if self.call.compile else _finish
            parts = [qkv(self.call.adapter, block, site, state) for state in states]
            attended = self._attend(site, parts)
            updates = [
                finish(self.call.adapter, block, site, state, out, part.aux)
                for state, part, out in zip(states, parts, attended, strict=True)
            ]
            states = _updated(states, updates)
            changed = [{**old, **new} for old, new in zip(changed, updates, strict=True)]
        return changed

    def _attend(self, site: Site, parts: Sequence[QKV]) -> Sequence[Tensor]:
        """Join the shots, rotate, attend, and take the groups apart again."""
        call = self.call
        if call.text_free and site.joint == "text":
            return [part.q.new_zeros(*part.q.shape[:3], part.v.shape[3]) for part in parts]
        queries, keys, values = (call.shot_by_shot([part[i] for part in parts]) for i in range(3))
        by = None if site.joint == "text" else call.rotations[site.tokens]
        q, k, v = call.row(queries, by), call.row(keys, by), _whole(call.row(values, None))
        if call.cache is not None and call.cached(site):
            if k.requires_grad or v.requires_grad:
                raise ValueError("cache: a KV cache is for generation; call under torch.no_grad()")
            k, v = call.cache.write((self.index, site.name), call.space(site), k, v)
        outs = self._attended(site, _whole(q), _whole(k), v)
        outs = outs.split([x.shape[1] for x in queries], dim=1)
        # A shot's own tokens lie contiguous whatever surrounds it in the row: a matmul's bits depend on the strides.
        return [_cat([outs[i] for i in group], dim=0).contiguous() for group in call.groups]

    def _attended(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = self.call
        if site.joint != "joined" or not isinstance(call.pattern, Router):
            return attend(q, k, v, call.plan(site), kernel=call.kernel)
        if site.name not in self.routes:
            self.routes[site.name] = call.pattern.route(q, k, call.attending(site, call.whole))
        return attend_routed(q, k, v, self.routes[site.name], kernel=call.kernel)


def _updated(states: Sequence[State], updates: Sequence[dict[str, Tensor]]) -> list[State]:
    return [State({**s.streams, **new}, s.conditioning) for s, new in zip(states, updates, strict=True)]


def _qkv(adapter: Backbone, block: nn.Module, site: Site, state: State) -> QKV:
    return adapter.qkv(block, site, state)


def _finish(
    adapter: Backbone, block: nn.Module, site: Site, state: State, attended: Tensor, aux: Any
) -> dict[str, Tensor]:
    return adapter.finish(block, site, state, attended, aux)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function under ``torch.compile``: here, and not on a model, so that models can be copied and pickled.

    All sites of all models share it, and torch would give up on it after eight kinds.
    """
    compiled = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_KINDS):
            return compiled(*args)

    return run


def _without_video(state: State) -> State:
    """A global prompt where text is cross-attended: it is among the conditioning, and the streams are empty."""
    return State({name: x[:, :0] for name, x in state.streams.items()}, state.conditioning)
