"""One pass of a scene through a retrofitted model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lct_core.attention import attend, without_autocast
from lct_core.backbone import QKV, Backbone, ShotInput, Site, State
from lct_core.cache import KVCache, StagedShots
from lct_core.cache.writing import WriteKeys
from lct_core.coordinates import Scheme
from lct_core.engine.dispatch import Work
from lct_core.engine.joining import Groups, across_shots, place, rotations, row, whole
from lct_core.engine.visibility import TextScope, Visibility, sees_others
from lct_core.engine.walk import Changes, through_sites, walk
from lct_core.layout import Layout
from lct_core.patterns import Pattern, named
from lct_core.rope import Rotary
from lct_core.routing import Plans, Router, attend_routed


class Retrofitted(Protocol):
    """What a pass reads of a scene model."""

    adapter: Backbone
    scheme: Scheme
    text: TextScope
    kernel: str
    gradient_checkpointing: bool
    batch_shots: bool
    compile: bool
    rotary: Rotary | None


class Call(Work):
    """One pass over a row: plans and rotations, made once and shared by all blocks.

    Args:
        model: The scene model.
        layout: The row's shots.
        inputs: The shots, as :meth:`Backbone.prepare` returns them.
        levels: Every shot's noise level, ``[batch, shots]``.
        pattern: Who sees whom, as :class:`lct_core.SceneModel` takes it.
        cache: The history, which the shots are written behind.
        text_free: Whether to leave the prompts out, see :class:`lct_core.SceneModel`.

    Raises:
        ValueError: for an unknown pattern, several scenes with a cache, and places that are not finite.
    """

    def __init__(
        self,
        model: Retrofitted,
        layout: Layout,
        inputs: Sequence[ShotInput],
        levels: Tensor,
        pattern: str | Pattern,
        cache: KVCache | None,
        text_free: bool,
    ) -> None:
        self.model, self.adapter, self.cache, self.text_free = model, model.adapter, cache, text_free
        self.layout, self.pattern = layout, named(pattern)
        self.levels = levels  # here, and not an argument of the model: mixed-precision hooks round those
        own_switch = getattr(model.adapter.model, "gradient_checkpointing", False)
        self.checkpointing = model.gradient_checkpointing or own_switch
        if cache is not None and len(layout.scenes) != 1:
            raise ValueError(
                f"cache: got {len(layout.scenes)} scenes, expected one: a cache is the history of one scene"
            )
        history = None if cache is None else [entry.shot for entry in cache.shots]
        self.sees = Visibility(self.adapter.traits, layout, pattern=self.pattern, text=model.text, history=history)
        with without_autocast(inputs[0].latents.device):
            start = 0 if cache is None else cache.end
            self.places = place(self.adapter, layout, inputs, scheme=model.scheme, start=start)

    def __call__(self, module: nn.Module, inputs: Sequence[ShotInput]) -> list[Tensor | None]:
        """Run it, inside the model's forward."""
        with without_autocast(inputs[0].latents.device):
            self.rotations = rotations(self.adapter, self.layout, inputs, self.places.coordinates)
            writing = self._writing(inputs[0].latents.device)
        with writing as self.write:
            return walk(
                self.adapter,
                self.layout.shots,
                inputs,
                self.adapter.traits.timestep(self.levels.to(inputs[0].latents.device)),
                lambda index, block, groups, states: block(BlockCall(self, index, groups), states),
                batch_shots=self.model.batch_shots,
            )

    def _writing(self, device: torch.device) -> AbstractContextManager[WriteKeys | None]:
        """Where the shots' keys and values go: behind the cached history, or nowhere."""
        if self.cache is None:
            return nullcontext()
        kept = self.layout.video_only if self.text_free else self.layout
        staged = StagedShots(kept.shots, self.levels, self.places.origins, self.places.extents)
        pairing = self.adapter.traits.pairing
        return self.cache.writing(
            staged, scheme=self.model.scheme, diagonal=self.adapter.diagonal(device), pairing=pairing
        )


class BlockCall(Work):
    """One block's share of a pass."""

    def __init__(self, of: Call, index: int, groups: Groups) -> None:
        self.of, self.index, self.groups = of, index, groups
        self.routes: dict[str, Plans] = {}  # made once: a block that is recomputed must not choose anew

    def __call__(self, block: nn.Module, states: list[State]) -> Changes:
        """Every site of the block."""
        if self.of.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, block, states, use_reentrant=False)
        return self._run(block, states)

    def _run(self, block: nn.Module, states: list[State]) -> Changes:
        return through_sites(self.of.adapter, block, states, self._attend, compile=self.of.model.compile)

    def _attend(self, site: Site, parts: Sequence[QKV]) -> Sequence[Tensor]:
        if self.of.text_free and site.joint == "text":
            return [part.q.new_zeros(*part.q.shape[:3], part.v.shape[3]) for part in parts]

        def attention(queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
            adapter, rotary = self.of.adapter, self.of.model.rotary
            by = None if site.joint == "text" else self.of.rotations[site.tokens]
            q, k, v = (
                row(queries, by, adapter, rotary),
                row(keys, by, adapter, rotary),
                whole(row(values, None, adapter)),
            )
            if self.of.write is not None and sees_others(site, self.of.model.text):
                if k.requires_grad or v.requires_grad:
                    raise ValueError("cache: a KV cache is for generation; call under torch.no_grad()")
                k, v = self.of.write((self.index, site.name), self.of.sees.space(site), k, v)
            return self._attended(site, whole(q), whole(k), v)

        return across_shots(parts, self.groups, attention)

    def _attended(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kernel, pattern, sees = self.of.model.kernel, self.of.pattern, self.of.sees
        if site.joint != "joined" or not isinstance(pattern, Router):
            return attend(q, k, v, sees.plan(site), kernel=kernel)
        if site.name not in self.routes:
            self.routes[site.name] = pattern.route(q, k, sees.keys(site))
        return attend_routed(q, k, v, self.routes[site.name], kernel=kernel)
