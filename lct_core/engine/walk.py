"""The walk of a row of shots through a model: encoded, block by block and site by site, to the predictions.

The engine runs it with attention between shots, the planner with one that counts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lct_core.backbone import QKV, Backbone, ShotInput, Site, State
from lct_core.engine.joining import Groups, alike, shot_by_shot, stacked
from lct_core.layout import Shot

_KINDS = 256  # of blocks, sites and shapes of shots that are compiled for

Changes = list[dict[str, Tensor]]
"""The streams that a block changed, group by group."""
Through = Callable[[int, nn.Module, Groups, list[State]], Changes]
Attend = Callable[[Site, Sequence[QKV]], Sequence[Tensor]]


def walk(
    adapter: Backbone,
    shots: Sequence[Shot],
    inputs: Sequence[ShotInput],
    timesteps: Tensor,
    through: Through,
    *,
    blocks: Sequence[nn.Module] | None = None,
    batch_shots: bool = False,
) -> list[Tensor | None]:
    """Take a row of shots through a model.

    Args:
        adapter: The model's.
        shots: The shots' token counts.
        inputs: The shots, as :meth:`Backbone.prepare` returns them.
        timesteps: The model's own, ``[batch, shots]``.
        through: Takes the groups' states through one block: ``through(index, block, groups, states)``.
        blocks: Which blocks (default: all of the model's).
        batch_shots: Whether shots of equal shape go through the blocks as one batch.

    Returns:
        The model's prediction for every shot; None for a global shot.
    """
    encoded = [_encoded(adapter, shot, inputs[i], timesteps[:, i]) for i, shot in enumerate(shots)]
    groups = alike(encoded) if batch_shots else [[i] for i in range(len(encoded))]
    states = [stacked([encoded[i] for i in group]) for group in groups]
    del encoded  # what the blocks change need not stay
    for index, block in enumerate(adapter.blocks if blocks is None else blocks):
        states = _updated(states, through(index, block, groups, states))
    tokens = shot_by_shot([adapter.head(state) for state in states], groups)
    return [
        None if shot.role == "global" else adapter.unpatchify(out, shot)
        for shot, out in zip(shots, tokens, strict=True)
    ]


def through_sites(
    adapter: Backbone, block: nn.Module, states: list[State], attend: Attend, *, compile: bool = False
) -> Changes:
    """Take the groups' states through every attention site of a block.

    Args:
        adapter: The model's.
        block: The block.
        states: One for each group.
        attend: From a site and every group's queries, keys and values to every group's outputs.
        compile: Whether what lies between two attentions runs under ``torch.compile``.
    """
    qkv, finish = (_compiled(_qkv), _compiled(_finish)) if compile else (_qkv, _finish)
    changed: Changes = [{} for _ in states]
    for site in adapter.sites(block):
        parts = [qkv(adapter, block, site, state) for state in states]
        attended = attend(site, parts)
        updates = [
            finish(adapter, block, site, state, out, part.aux)
            for state, part, out in zip(states, parts, attended, strict=True)
        ]
        states = _updated(states, updates)
        changed = [{**old, **new} for old, new in zip(changed, updates, strict=True)]
    return changed


def _encoded(adapter: Backbone, shot: Shot, inputs: ShotInput, timestep: Tensor) -> State:
    state = adapter.encode(inputs, timestep)
    if shot.video:
        return state
    # a global prompt where text is cross-attended: it is among the conditioning, and the streams are empty
    return State({name: x[:, :0] for name, x in state.streams.items()}, state.conditioning)


def _updated(states: Sequence[State], updates: Changes) -> list[State]:
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
