"""The engine: it joins the shots of a scene inside every block of a single-shot DiT."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import Signature, signature, unwrap
from types import MethodType
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lct_core import masks
from lct_core._wrong_input import check_finite, check_places, explained
from lct_core.attention import attend, without_autocast
from lct_core.backbone import QKV, Backbone, ShotInput, Site, State, Tokens, describe
from lct_core.cache import KVCache, Space, Stage
from lct_core.coordinates import Scheme, check_scheme, extent, measured_extent, shot_coordinates
from lct_core.layout import Layout, Range, Role, Shot
from lct_core.masks import PATTERNS, AttentionPlan, Pattern
from lct_core.plugins import registry
from lct_core.rope import Rotary, Rotation, RowParts, pays_in_pieces, rotate_into
from lct_core.routing import Plans, Router, attend_routed

_KINDS = 256  # of blocks, sites and shapes of shots that are compiled for

Scene = Sequence[ShotInput]
TextScope = Literal["own", "own_and_global", "all"]


def retrofit(
    model: nn.Module,
    *,
    scheme: Scheme = "anchored",
    text: TextScope = "own",
    kernel: str = "auto",
    gradient_checkpointing: bool = False,
    batch_shots: bool = False,
    compile: bool = False,
    rotary: Rotary | None = None,
    backbone: str | Backbone | None = None,
) -> "SceneModel":
    """Make a scene model of a single-shot DiT, in place and without a new parameter.

    The model keeps its weights, its ``state_dict`` keys and its own forward: called as before, it does as before.

    Args:
        model: A model that an installed backbone handles (``lct backbones`` lists them), or that of ``backbone``.
        scheme: ``"anchored"`` (default: ours; exact for one shot) or ``"paper"``, see :func:`lct_core.coordinates`.
        text: Where the model cross-attends its text, which prompts a shot sees: its ``"own"`` (default: ours; exact for
            one shot), its ``"own_and_global"``, or ``"all"``, those of every shot that it sees. Text that takes part in
            self-attention is seen with its shot (paper, 3.2.2), and leaves no choice.
        kernel: Attention kernel, see :func:`lct_core.attend`.
        gradient_checkpointing: Whether training recomputes every block's activations in the backward pass; so does the
            model's own switch, ``model.gradient_checkpointing``.
        batch_shots: Whether shots of equal shape go through the blocks as one batch, apart from their attention: faster
            where shots are many and small, and the same but for the last bits (2e-6 in float32; default: one by one).
        compile: Whether what lies between two attentions runs under ``torch.compile`` (2e-6 in float32; default: no).
        rotary: What rotates queries and keys into their places, instead of torch's own operations: a function like
            :func:`lct_core.rope.rotate_into`, for models whose adapter rotates as :func:`lct_core.rotate` does.
        backbone: Name of the backbone to use, or an adapter of one's own; by default found by the model's class.

    Raises:
        ValueError: where no backbone, or more than one, handles the model, or it cannot be served as it is set up; for
            an unknown scheme, and a choice of text or rotary that the model does not have.
    """
    adapter = backbone if isinstance(backbone, Backbone) else registry().adapter(model, backbone)
    if adapter.model is not model:
        raise ValueError("backbone: this adapter adapts another model, expected one made with this model")
    return SceneModel(
        adapter,
        scheme=scheme,
        text=text,
        kernel=kernel,
        gradient_checkpointing=gradient_checkpointing,
        batch_shots=batch_shots,
        compile=compile,
        rotary=rotary,
    )


class SceneModel:
    """A single-shot DiT that sees whole scenes (paper, 3.2). Made by :func:`retrofit`.

    Not a module: ``backbone`` is, and is what one trains, saves and moves between devices.
    """

    def __init__(
        self,
        adapter: Backbone,
        *,
        scheme: Scheme,
        text: TextScope = "own",
        kernel: str,
        gradient_checkpointing: bool = False,
        batch_shots: bool = False,
        compile: bool = False,
        rotary: Rotary | None = None,
    ) -> None:
        self.adapter = adapter
        self.scheme: Scheme = check_scheme(scheme)
        self.text = _text_scope(text, adapter)
        self.compile = compile
        self.rotary = _rotary(rotary, adapter)
        _check_served(adapter)
        self.kernel = registry().check_kernel(kernel)
        self.gradient_checkpointing = gradient_checkpointing
        self.batch_shots = batch_shots
        for module in (adapter.model, *adapter.blocks):
            own = module.__dict__.get("forward")
            if own is None:
                module.forward = _Dispatch(module)
            elif not isinstance(unwrap(own), _Dispatch):
                raise ValueError(
                    f"model: this {type(module).__name__}'s forward was replaced on the instance, by an offloading "
                    "hook for example, and would be lost; retrofit first, add such hooks afterwards"
                )

    @property
    def backbone(self) -> nn.Module:
        """The single-shot model itself."""
        return self.adapter.model

    def __call__(
        self,
        shots: Scene | Sequence[Scene],
        t: Float[Tensor, "*batch num_shots"],
        *,
        pattern: str | Pattern = "bidirectional",
        cache: KVCache | None = None,
        text_free: bool = False,
    ) -> list[Any]:
        """Predict for all shots of a scene at once, each at its own noise level.

        Args:
            shots: One scene, a sequence of shots; or several scenes, packed in one row, that do not see one another.
            t: Noise level of every shot in row order, 0 = clean, 1 = noise: ``[num_shots]`` or ``[batch, num_shots]``.
                A global shot is clean.
            pattern: ``"bidirectional"``, ``"context_causal"`` or ``"own_shot"``, or a function from a layout to a plan;
                with a cache, that layout begins with the history. A :class:`lct_core.routing.Router` makes its plans
                in every block, from queries and keys.
            cache: History that the shots also see; their own keys and values are written behind it. Takes one scene.
            text_free: Whether the shots hear no prompt: what their cross-attention to text gives is put to zero, and a
                cache gets no text of theirs, so that what it keeps serves any prompt.

        Returns:
            Nested like ``shots``: the backbone's own prediction in the shape of each shot's latents; None for a global
            shot.

        Raises:
            ValueError: naming the argument, for anything that does not fit the model, the batch or the cache.
        """
        scenes, nested = as_scenes(shots)
        _check_served(self.adapter)
        if text_free and self.adapter.traits.text == "joint":
            raise ValueError(
                f"text_free: got True, but the text of {type(self.backbone).__name__} takes part in self-attention and "
                "cannot be left out of it; expected False, the default"
            )
        given = [shot for scene in scenes for shot in _complete(scene, self.adapter)]
        for shot in given:
            self.adapter.shot(shot)  # refuses what came; then the same without padding
        with explained(self.adapter, given):
            inputs = [self.adapter.prepare(shot) for shot in given]
        check_finite(inputs)
        counts = [self.adapter.shot(shot) for shot in inputs]
        if self.text == "own" and self.adapter.traits.text == "cross" and "global" in [shot.role for shot in counts]:
            raise ValueError(
                'shots: got a global shot, which nobody sees: this model cross-attends its text, and text="own"; '
                'expected none, or retrofit(model, text="own_and_global")'
            )
        batch = len(inputs[0].latents)
        for i, shot in enumerate(inputs):
            if len(shot.latents) != batch:
                raise ValueError(
                    f"shots: shot {i} has a batch of {len(shot.latents)}, expected {batch} like the first: "
                    "entries of a batch share one layout; put other scenes side by side in a row"
                )
        levels = noise_levels(t, [shot.role for shot in counts], batch)
        flat = iter(counts)
        layout = Layout([[next(flat) for _ in scene] for scene in scenes], self.adapter.traits.text_first)
        call = _Call(self, layout, inputs, levels.to(inputs[0].latents.device), pattern, cache, text_free)
        with explained(self.adapter, inputs):
            outputs = iter(self.backbone(call, inputs))
        if cache is not None:
            kept = layout.video_only if text_free else layout
            cache.stage(Stage(kept.shots, levels, call.origins, call.extents))
        return [[next(outputs) for _ in scene] for scene in scenes] if nested else list(outputs)


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
        engine: SceneModel,
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


def alike(states: Sequence[State]) -> list[list[int]]:
    """Shots whose states can be stacked, by their indices in the row."""
    groups: dict[Any, list[int]] = {}
    for i, state in enumerate(states):
        tensors = {**state.streams, **state.conditioning}
        groups.setdefault(tuple((n, x.shape, x.dtype) for n, x in tensors.items()), []).append(i)
    return list(groups.values())


def stacked(states: Sequence[State]) -> State:
    """Some shots as one batch."""
    first, *rest = states
    return State(
        {name: _cat([x, *(state.streams[name] for state in rest)], dim=0) for name, x in first.streams.items()},
        {name: _cat([x, *(s.conditioning[name] for s in rest)], dim=0) for name, x in first.conditioning.items()},
    )


def _updated(states: Sequence[State], updates: Sequence[dict[str, Tensor]]) -> list[State]:
    return [State({**s.streams, **new}, s.conditioning) for s, new in zip(states, updates, strict=True)]


def _joined(rotations: Sequence[Rotation | None]) -> Rotation | None:
    """The rotations of all shots, each made by itself: a cosine's bits depend on where it stands in a tensor."""
    made = [by for by in rotations if by is not None]
    if not made:
        return None
    return Rotation(_cat([by.cos for by in made], dim=0), _cat([by.sin for by in made], dim=0), made[0].pairing)


def _cat(parts: Sequence[Tensor], *, dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Under autocast, what torch's own attention casts its inputs to; here, so that the cache holds the same."""
    device = x.device.type
    kept = x.dtype == torch.float64 or not torch.is_autocast_enabled(device)
    return x.dtype if kept else torch.get_autocast_dtype(device)


def _whole(row: Tensor | RowParts) -> Tensor:
    return row.joined() if isinstance(row, RowParts) else row


def _rotates_plainly(adapter: Backbone) -> bool:
    return getattr(adapter.rotate, "__func__", None) is Backbone.rotate


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


def _video(by: Rotation | None, video: int, text_first: bool) -> Rotation | None:
    """The video tokens' share of a shot's rotation."""
    if by is None:
        return None
    tokens = slice(len(by.cos) - video, None) if text_first else slice(video)
    return Rotation(by.cos[tokens], by.sin[tokens], by.pairing)


def _text_scope(text: TextScope, adapter: Backbone) -> TextScope:
    if text not in get_args(TextScope):
        raise ValueError(f"text: got {text!r}, expected one of {get_args(TextScope)}")
    if text != "own" and adapter.traits.text == "joint":
        raise ValueError(
            f"text: got {text!r}, but the text of {type(adapter.model).__name__} takes part in self-attention and is "
            'seen with its shot; expected "own", the default'
        )
    return text


def _rotary(rotary: Rotary | None, adapter: Backbone) -> Rotary | None:
    if rotary is not None and not (adapter.traits.pairing and _rotates_plainly(adapter)):
        has = "rotates in a way of its own" if adapter.traits.pairing else "has no RoPE"
        raise ValueError(f"rotary: got one, but this {type(adapter.model).__name__} {has}; expected None, the default")
    return rotary


def _check_served(adapter: Backbone) -> None:
    if reasons := adapter.refusals():
        raise ValueError(f"model: this {type(adapter.model).__name__} cannot be served: {'; '.join(reasons)}")


def _pattern(pattern: str | Pattern) -> Pattern:
    if callable(pattern):
        return pattern
    if pattern not in PATTERNS:
        raise ValueError(
            f"pattern: got {pattern!r}, expected one of {list(PATTERNS)} or a function from a layout to a plan"
        )
    return PATTERNS[pattern]


def as_scenes(shots: Scene | Sequence[Scene]) -> tuple[list[Scene], bool]:
    """Scenes, and whether there were several to begin with.

    Raises:
        ValueError: for anything but a scene or a sequence of scenes, none of them empty.
    """

    def is_scene(items: Any) -> bool:
        return isinstance(items, Sequence) and len(items) > 0 and all(isinstance(item, ShotInput) for item in items)

    if is_scene(shots):
        return [cast(Scene, shots)], False
    if isinstance(shots, Sequence) and len(shots) > 0 and all(map(is_scene, shots)):
        return list(cast(Sequence[Scene], shots)), True
    raise ValueError(
        f"shots: got {_kinds(shots)}, expected one scene, a sequence of ShotInput, or a sequence of such scenes; "
        "none of them empty"
    )


def _kinds(shots: object) -> str:
    """What was given, by types alone: latents are too large for a message."""
    return f"[{', '.join(map(_kinds, shots))}]" if isinstance(shots, list | tuple) else type(shots).__name__


def noise_levels(t: Tensor, roles: Sequence[Role], batch: int) -> Float[Tensor, "batch num_shots"]:
    """Every shot's noise level for every entry of the batch, float32 at least.

    Raises:
        ValueError: for another number of shots or entries, levels outside [0, 1], or a global shot that is not clean.
    """
    shots = len(roles)
    shapes = (shots,), (batch, shots)
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.is_meta or t.shape not in shapes:
        kind = f"; it is {t.dtype} on {t.device}" if isinstance(t, Tensor) and t.shape in shapes else ""
        raise ValueError(
            f"t: got {describe(t)}, expected floating-point noise levels [{shots}] or [{batch}, {shots}], one for "
            f"every shot in row order{kind}"
        )
    levels = t.to(torch.promote_types(t.dtype, torch.float32)).expand(batch, -1)
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(
            f"t: got levels from {levels.min().item():g} to {levels.max().item():g}, expected [0, 1], 0 = "
            "clean and 1 = noise; divide a 0-1000 timestep by 1000"
        )
    if any(role == "global" and bool(levels[:, i].any()) for i, role in enumerate(roles)):
        raise ValueError(f"t: got {t.tolist()}, expected 0 for a global shot: its dummy video is clean")
    return levels


def with_dummy_video(scene: Scene, adapter: Backbone) -> list[ShotInput]:
    """The scene with its global shot's dummy video filled in: one frame of zeros, as large as the first shot's.

    Where text is cross-attended, a global shot has no video, and the scene stays as it is.
    """
    first, *rest = scene
    if first.role != "global" or first.latents is not None or adapter.traits.text == "cross":
        return list(scene)
    if not rest or not isinstance(rest[0].latents, Tensor) or rest[0].latents.ndim != 5:
        raise ValueError(
            "shots: a global shot without latents needs a shot with latents [batch, channels, frames, height, width] "
            "after it, whose size its dummy video takes; alone in a call, give it latents of one frame of zeros"
        )
    return [replace(first, latents=torch.zeros_like(rest[0].latents[:, :, : adapter.traits.patch[0]])), *rest]


def _complete(scene: Scene, adapter: Backbone) -> list[ShotInput]:
    """The scene with latents everywhere; those of a global prompt without video stand for a size only."""
    first, *rest = with_dummy_video(scene, adapter)
    if first.role != "global" or adapter.traits.text == "joint":
        return [first, *rest]
    if first.latents is not None:
        raise ValueError(
            f"shots: the global shot has latents {describe(first.latents)}, expected none: this model cross-attends "
            "its text, so that a global prompt needs no dummy video"
        )
    if not isinstance(first.text, Tensor):
        return [first, *rest]  # which the adapter refuses
    like = rest[0].latents if rest and isinstance(rest[0].latents, Tensor) else first.text
    size = (len(first.text), adapter.traits.latent_channels, *adapter.traits.patch)
    return [replace(first, latents=like.new_zeros(size)), *rest]
