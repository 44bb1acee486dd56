"""A scene model by its definition: dense masks, explicit loops over shots, nothing of the engine but the adapter.

What the conformance suite compares the engine with. Slow on purpose: read it to know what Long Context Tuning computes.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lct_core.backbone import Backbone, ShotInput, State
from lct_core.backbone.adapter import Joint
from lct_core.layout import Shot


def definition(
    adapter: Backbone,
    scenes: Sequence[Sequence[ShotInput]],
    t: Float[Tensor, "*batch shots"],
    *,
    scheme: str,
    pattern: str,
    text: str = "own",
    text_free: Collection[int] = (),
    exact: bool = True,
) -> list[Tensor]:
    """Predictions of every shot of a row, one after the other (paper, 3.2.2 and 3.3).

    Args:
        adapter: The model's adapter.
        scenes: Scenes of shots; every shot has latents, those of a global prompt without video stand for nothing.
        t: Noise levels in row order.
        scheme: ``"anchored"`` or ``"paper"``.
        pattern: ``"bidirectional"`` or ``"context_causal"``.
        text: Which prompts a shot sees where text is cross-attended: ``"own"``, ``"own_and_global"`` or ``"all"``.
        text_free: Shots, counted in row order, whose cross-attention to text gives zero.
        exact: Whether attention is computed in float64, or eagerly in the model's dtype: the low-precision reference.
    """
    inputs = [adapter.prepare(shot) for scene in scenes for shot in scene]
    shots = [adapter.shot(given) for given in inputs]
    levels = t.expand(len(inputs[0].latents), -1)
    states = [adapter.encode(given, adapter.traits.timestep(levels[:, i])) for i, given in enumerate(inputs)]
    states = [
        state if shot.video else State({name: x[:, :0] for name, x in state.streams.items()}, state.conditioning)
        for state, shot in zip(states, shots, strict=True)
    ]
    tables = _turns(adapter, scenes, inputs, shots, scheme)
    for block in adapter.blocks:
        for site in adapter.sites(block):
            parts = [adapter.qkv(block, site, state) for state in states]
            turns = [None] * len(parts) if site.joint == "text" else tables
            if site.tokens == "video":
                turns = [_of_video(turn, shot.video, adapter) for turn, shot in zip(turns, shots, strict=True)]
            q = torch.cat([_turn(adapter, part.q, turn) for part, turn in zip(parts, turns, strict=True)], dim=1)
            k = torch.cat([_turn(adapter, part.k, turn) for part, turn in zip(parts, turns, strict=True)], dim=1)
            v = torch.cat([part.v for part in parts], dim=1)
            queries, keys = ([getattr(part, x).shape[1] for part in parts] for x in "qk")
            sees = _sees(scenes, site.joint, pattern, text)
            mask = sees.repeat_interleave(torch.tensor(queries), 0).repeat_interleave(torch.tensor(keys), 1)
            out = list(_attention(q, k, v, mask, exact).split(queries, dim=1))
            for i in text_free if site.joint == "text" else ():
                out[i] = torch.zeros_like(out[i])
            states = [
                State({**state.streams, **adapter.finish(block, site, state, o, part.aux)}, state.conditioning)
                for state, o, part in zip(states, out, parts, strict=True)
            ]
    tokens = [adapter.head(state) for state in states]
    return [adapter.unpatchify(x, shot) if shot.video else x for x, shot in zip(tokens, shots, strict=True)]


def _turns(
    adapter: Backbone,
    scenes: Sequence[Sequence[ShotInput]],
    inputs: Sequence[ShotInput],
    shots: Sequence[Shot],
    scheme: str,
) -> list[Float[Tensor, "tokens heads pairs"] | None]:
    """Every shot's angles, from coordinates written down token by token."""
    if adapter.traits.pairing is None:
        return [None] * len(shots)
    unit = torch.tensor(adapter.traits.unit, dtype=torch.float64)
    angles: list[Tensor | None] = []
    # Where text is cross-attended, it has no place among the tokens of self-attention.
    remaining = iter(shots if adapter.traits.text == "joint" else [replace(shot, text=0) for shot in shots])
    prepared = iter(inputs)
    for scene in scenes:
        origin = 0
        for _ in scene:
            shot, given = next(remaining), next(prepared)
            if scheme == "paper":
                start = origin + shot.text
                text = [[origin + i] * 3 for i in range(shot.text)]
                frames, height, width = shot.grid
                video = [
                    [start + f, start + y, start + x]
                    for f in range(frames)
                    for y in range(height)
                    for x in range(width)
                ]
                both = text + video if adapter.traits.text_first else video + text
                coords = torch.zeros(len(both), len(unit), dtype=torch.float64)  # 0 on axes of the model's own
                coords[:, :3] = torch.tensor(both, dtype=torch.float64).reshape(-1, 3) * unit[:3]
                origin = start + max(shot.grid)
            else:
                own = adapter.coordinates(given, shot)
                coords = own + origin * unit
                steps = own[:, unit != 0] / unit[unit != 0]
                origin += 1 + int(torch.ceil(steps.max() - 1e-3)) if len(own) else 0  # coordinates are rounded
            angles.append(adapter.rope(coords))
    return angles


def _of_video(turn: Tensor | None, video: int, adapter: Backbone) -> Tensor | None:
    """The angles of a shot's video tokens alone."""
    return turn if turn is None else turn[len(turn) - video :] if adapter.traits.text_first else turn[:video]


def _turn(adapter: Backbone, x: Tensor, angles: Tensor | None) -> Tensor:
    """RoPE as multiplication of complex numbers, in float64."""
    if angles is None:
        return x
    turned = 2 * angles.shape[-1]
    pairs = x[..., :turned].double()
    shape = {"interleaved": (1, -1, 2), "half": (1, 2, -1), "half_per_axis": (3, 2, -1)}[adapter.traits.pairing or ""]
    pairs = pairs.unflatten(-1, shape)
    if adapter.traits.pairing != "interleaved":
        pairs = pairs.mT
    pairs = pairs.flatten(-3, -2)
    numbers = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles.double()), angles.double())
    out = torch.view_as_real(numbers).unflatten(-2, (shape[0], -1))
    if adapter.traits.pairing != "interleaved":
        out = out.mT
    out = out.flatten(-3)
    return torch.cat([out.to(x.dtype), x[..., turned:]], dim=-1)


def _sees(scenes: Sequence[Sequence[ShotInput]], joint: Joint, pattern: str, text: str) -> Bool[Tensor, "shots shots"]:
    """Which shots' keys a shot's queries see, from every shot's scene, place and role."""
    scene = torch.tensor([s for s, shots in enumerate(scenes) for _ in shots])
    place = torch.arange(len(scene))
    own = place[:, None] == place
    same_scene = scene[:, None] == scene
    if joint == "own_shot" or (joint == "text" and text == "own"):
        return own
    of_scene = same_scene & torch.tensor([shot.role == "global" for shots in scenes for shot in shots])
    if joint == "text" and text == "own_and_global":
        return own | of_scene
    seen = same_scene if pattern == "bidirectional" else same_scene & (place <= place[:, None])
    return seen | of_scene if joint == "text" else seen


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, exact: bool) -> Tensor:
    dtype = torch.float64 if exact else q.dtype
    group = q.shape[2] // k.shape[2]
    queries, keys, values = (x.to(dtype).movedim(2, 1) for x in (q, k, v))
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = queries @ keys.mT * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask.to(q.device), float("-inf")).softmax(dim=-1)
    return (weights @ values).movedim(1, 2).to(q.dtype)
