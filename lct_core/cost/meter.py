"""What a model costs, taken on torch's meta device: no weights are read, nothing is computed."""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lct_core.attention import attend
from lct_core.backbone import QKV, Backbone, ShotInput, Site, State
from lct_core.backbone.adapter import Tokens
from lct_core.cache import SiteSize
from lct_core.cost.live import Live
from lct_core.cost.passes import Pass
from lct_core.engine.joining import Groups, across_shots, cat
from lct_core.engine.visibility import TextScope, Visibility, key_space, sees_others
from lct_core.engine.walk import Changes, Through, through_sites, walk
from lct_core.layout import Layout, Shot
from lct_core.patterns import Pattern
from lct_core.rope import Rotation, pays_in_pieces
from lct_core.scene_model import SceneModel


@dataclass(frozen=True)
class Cost:
    """What passes through a model take.

    Norms, activations, rotation and softmax are no matrix products, and left out.

    Args:
        linear: Floating point operations, two for a multiplication and its addition, in the model's own layers: all
            that a shot takes by itself.
        attention: Those of the attention between shots: 4 · head_dim · heads for every attended pair, in each block.
        calls: Passes.
        shots: Those that went through the layers, each counted as often as it did.
        together: Of the attention, what passes of several shots take: longer calls, which kernels run faster.
    """

    linear: int = 0
    attention: int = 0
    calls: int = 0
    shots: int = 0
    together: int = 0

    @property
    def total(self) -> int:
        """All floating point operations."""
        return self.linear + self.attention

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> "Cost":
        return Cost(*(times * count for count in astuple(self)))


class _Attention(NamedTuple):
    """One attention of a block: its site, its query heads, its keys."""

    block: int
    site: Site
    heads: int
    keys: SiteSize


class _OneShot(NamedTuple):
    linear: int
    attentions: tuple[_Attention, ...]


class Meter:
    """Counts what a model's passes take, from its own layers; every shape of a shot is looked at once.

    Args:
        model: A scene model; or an adapter, whose model may be without weights (made on the meta device). It stays as
            it is.
        text: Which prompts a shot cross-attends to, for an adapter; a scene model says so itself.

    Raises:
        ValueError: for anything else.
    """

    def __init__(self, model: SceneModel | Backbone, *, text: TextScope = "own") -> None:
        if not isinstance(model, SceneModel | Backbone):
            raise ValueError(
                f"model: got a {type(model).__name__}, expected a SceneModel, as retrofit makes it, or an adapter; of "
                "two experts, plan with one: together they have twice its weights and cache"
            )
        adapter, self.text = (model.adapter, model.text) if isinstance(model, SceneModel) else (model, text)
        self._batching = isinstance(model, SceneModel) and model.batch_shots
        twins: dict[int, Any] = {id(b): b.to("meta") for b in adapter.model.buffers()}
        twins |= {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in adapter.model.parameters()}
        self.adapter = copy.deepcopy(adapter, twins)
        self._angles = None if adapter.traits.pairing is None else _angles(adapter).shape[1:]
        self._shots: dict[Shot, _OneShot] = {}
        self._activations: dict[object, tuple[Pattern, int]] = {}  # by a pattern's id, so it is kept

    @property
    def weights(self) -> int:
        """Bytes of the model's weights and buffers."""
        return sum(t.nbytes for t in {*self.adapter.model.parameters(), *self.adapter.model.buffers()})

    def cost(self, scene: Sequence[Shot], passes: Sequence[Pass]) -> Cost:
        """What some passes of a scene take, for one entry of a batch.

        Raises:
            ValueError: for a shot that the model does not take, and a model that cannot be run without values.
        """
        return sum((self._cost(scene, step) * step.times for step in passes), Cost())

    def sites(self, shot: Shot) -> dict[tuple[int, str], SiteSize]:
        """The attentions whose keys and values a cache holds, by block and name, and what a token takes there.

        Raises:
            ValueError: as :meth:`cost` does.
        """
        attentions = self._one(shot).attentions
        return {(each.block, each.site.name): each.keys for each in attentions if sees_others(each.site, self.text)}

    def activations(self, scene: Sequence[Shot], step: Pass, *, device: str = "cpu") -> int:
        """Most bytes that are alive at once in a pass, beside weights and cache, for one entry of a batch.

        As torch allocates them with its own attention; what a kernel allocates and frees by itself is not known.

        Args:
            scene: The shots.
            step: The pass.
            device: The kind of device that it is run on: on a CPU, large rows are rotated in pieces.

        Raises:
            ValueError: as :meth:`cost` does.
        """
        shots = [scene[i] for i in step.row]
        key = *shots, id(step.pattern), step.cached, device
        if key not in self._activations:
            self._activations[key] = step.pattern, self._live(shots, step, device)
        return self._activations[key][1]

    def _live(self, shots: Sequence[Shot], step: Pass, device: str) -> int:
        blocks = self._blocks_of_each_kind()
        sees = self._sees(shots, step.pattern)  # a cached history is seen in place
        rows: dict[Site, tuple[Tensor, Tensor]] = {}

        def through(index: int, block: nn.Module, groups: Groups, states: list[State]) -> Changes:
            def attend_to(site: Site, parts: Sequence[QKV]) -> Sequence[Tensor]:
                def attention(queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
                    by = None if site.joint == "text" else turns[site.tokens]
                    q, k, v = self._row(queries, by, device), self._row(keys, by, device), cat(values, dim=1)
                    if step.cached and sees_others(site, self.text):
                        k, v = rows.setdefault(site, (k, v))
                    return attend(q, k, v, sees.plan(site), kernel="sdpa")

                return across_shots(parts, groups, attention)

            return through_sites(self.adapter, block, states, attend_to)

        with _explained(self.adapter), torch.no_grad(), _WithoutScores():
            inputs = self._inputs(shots)
            if step.cached:  # so that its rows are there before
                turns = self._rotations(shots)
                self._walk(shots, inputs, through, blocks=blocks)
            with Live() as live:
                turns = self._rotations(shots)
                self._walk(shots, inputs, through, blocks=blocks)
        return live.peak

    def _cost(self, scene: Sequence[Shot], step: Pass) -> Cost:
        shots = [scene[i] for i in step.row]
        sees = self._sees(shots, step.pattern, history=[scene[i] for i in step.behind])
        attention = sum(
            2 * each.heads * sum(each.keys.channels) * sees.plan(each.site).pairs
            for each in self._one(shots[0]).attentions
            if not (step.text_free and each.site.joint == "text")
        )
        together = attention if len(shots) > 1 else 0
        return Cost(sum(self._one(shot).linear for shot in shots), attention, 1, len(shots), together)

    def _sees(self, shots: Sequence[Shot], pattern: Pattern, *, history: Sequence[Shot] | None = None) -> Visibility:
        layout = Layout([shots], self.adapter.traits.text_first)
        return Visibility(self.adapter.traits, layout, pattern=pattern, text=self.text, history=history)

    def _one(self, shot: Shot) -> _OneShot:
        """One shot through all layers, its attention left out."""
        if shot not in self._shots:
            attentions: list[_Attention] = []

            def through(index: int, block: nn.Module, groups: Groups, states: list[State]) -> Changes:
                def skip(site: Site, parts: Sequence[QKV]) -> Sequence[Tensor]:
                    ((q, k, v, _),) = parts
                    space = key_space(site, self.adapter.traits)
                    keys = SiteSize(space, 1, k.shape[2], (k.shape[3], v.shape[3]), k.dtype)
                    attentions.append(_Attention(index, site, q.shape[2], keys))
                    return [torch.empty_like(q)]

                return through_sites(self.adapter, block, states, skip)

            with _explained(self.adapter), torch.no_grad(), FlopCounterMode(display=False) as counter:
                self._walk([shot], self._inputs([shot]), through)
            self._shots[shot] = _OneShot(counter.get_total_flops(), tuple(attentions))
        return self._shots[shot]

    def _blocks_of_each_kind(self) -> list[nn.Module]:
        """Two of each: the second has what it was given beside what the first was."""
        kinds: dict[Any, list[nn.Module]] = {}
        for block in self.adapter.blocks:
            kinds.setdefault((type(block), tuple(self.adapter.sites(block))), []).append(block)
        return [block for alike in kinds.values() for block in alike[:2]]

    def _walk(
        self,
        shots: Sequence[Shot],
        inputs: Sequence[ShotInput],
        through: Through,
        *,
        blocks: Sequence[nn.Module] | None = None,
    ) -> None:
        timesteps = torch.zeros(1, len(shots), device="meta")
        walk(self.adapter, shots, inputs, timesteps, through, blocks=blocks, batch_shots=self._batching)

    def _inputs(self, shots: Sequence[Shot]) -> list[ShotInput]:
        return [self.adapter.prepare(self._example(shot)) for shot in shots]

    def _row(self, parts: Sequence[Tensor], by: Rotation | None, device: str) -> Tensor:
        """All shots' queries or keys in one row, rotated as the engine does it."""
        stands_in = [torch.empty((), device=device).expand(part.shape) for part in parts] if by else []
        if by is not None and pays_in_pieces(stands_in):
            return parts[0].new_empty(len(parts[0]), sum(part.shape[1] for part in parts), *parts[0].shape[2:])
        x = cat(parts, dim=1)
        return x if by is None else self.adapter.rotate(x, by)

    def _rotations(self, shots: Sequence[Shot]) -> dict[Tokens, Rotation | None]:
        """Cosines and sines of a row, of its video apart where there are several shots; of any place."""
        joint, shape = self.adapter.traits.text == "joint", self._angles
        if shape is None:
            return {"all": None, "video": None}
        dtype = torch.promote_types(self.dtype, torch.float32)

        def turn(tokens: int) -> Rotation:
            cos, sin = (torch.empty(tokens, *shape, dtype=dtype, device="meta") for _ in range(2))
            return Rotation(cos, sin, self.adapter.traits.pairing or "half")

        video = sum(shot.video for shot in shots)
        everything = turn(video + joint * sum(shot.text for shot in shots))
        alone = Rotation(everything.cos[:video], everything.sin[:video], everything.pairing)
        return {"all": everything, "video": alone if len(shots) == 1 else turn(video)}

    def _example(self, shot: Shot) -> ShotInput:
        """A shot without values; a prompt alone has the latents of one token."""
        given = example(self.adapter, shot, dtype=self.dtype)
        if not shot.video:
            traits = self.adapter.traits
            given = replace(given, latents=torch.empty(1, traits.latent_channels, *traits.patch, dtype=self.dtype))
        given = given.to("meta")
        made = self.adapter.shot(given)
        if made != shot:
            raise ValueError(
                f"scene: got a shot of {shot.text} text tokens and the grid {shot.grid}, expected {made.text} and "
                f"{made.grid}, as {type(self.adapter.model).__name__} takes them"
            )
        return given

    @property
    def dtype(self) -> torch.dtype:
        """What most of the model's weights are in."""
        sizes: Counter[torch.dtype] = Counter()
        for weight in self.adapter.model.parameters():
            sizes[weight.dtype] += weight.numel()
        return max(sizes, key=sizes.__getitem__)


def example(adapter: Backbone, shot: Shot, *, dtype: torch.dtype) -> ShotInput:
    """A shot of noise with those extras alone that it must have, every time the same.

    Args:
        adapter: Whose model takes it.
        shot: Its token counts; a prompt alone, without video, has no latents.
        dtype: Of latents and text.
    """
    sized = shot if shot.video else replace(shot, grid=(1, 1, 1))
    given = adapter.example(sized, batch=1, generator=torch.Generator().manual_seed(0), dtype=dtype)
    extras = {name: x for name, x in given.extras.items() if adapter.traits.extras[name].required}
    return replace(given, extras=extras) if shot.video else ShotInput(text=given.text, extras=extras, role=given.role)


def _angles(adapter: Backbone) -> Tensor:
    """The angles of one token: where they are learned, they can be had where the weights are alone."""
    place = torch.zeros(1, len(adapter.traits.unit), dtype=torch.float64)
    device = next(adapter.model.parameters()).device
    with torch.no_grad():
        try:
            return adapter.rope(place)
        except RuntimeError:
            return adapter.rope(place.to(device))


class _WithoutScores(TorchFunctionMode):
    """Attention as a fused kernel has it: torch's own on the meta device would make a matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        return query.transpose(1, 2).new_empty(query.transpose(1, 2).shape).transpose(1, 2)


@contextmanager
def _explained(adapter: Backbone) -> Iterator[None]:
    """Where a model asks for a value, which a tensor on the meta device does not have, say so."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"model: {type(adapter.model).__name__} cannot be run on the meta device, as a plan needs it: {error}; "
            f"let its layers and {type(adapter).__name__} take the shape of a tensor alone, never its values"
        ) from error
