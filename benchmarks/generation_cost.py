"""What it costs to generate a scene, in floating point operations: exact, from the plans and the model's own layers.

For N shots of s tokens and K Euler steps, the global shot left out here (but not below):

===========  ======================  ============================
mode         tokens through layers   attended pairs
===========  ======================  ============================
joint        K N s                   K N² s²
cached       (K + 1) N s             (K + 1) N (N + 1) / 2 s²
recomputed   K N (N + 1) / 2 s       K N (N + 1) (N + 2) / 6 s²
independent  K N s                   K N s²
===========  ======================  ============================

Every token costs the linear layers of its stream, every pair 4 · head_dim · heads in each block. So tokens grow
linearly, and quadratically only where the history is run again. Pairs grow linearly where shots do not see one another,
quadratically where they do, half as fast if context-causal, and with the third power where the history is run again. A
cache costs one pass more for each shot, which writes it at the level t_c; the last shot needs none: s tokens and N s²
pairs less.

Guidance runs every pass a second time, in all modes alike, and is left out. So are norms, activations, rotation and
softmax, which are no matrix products.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lct_backbones.mmdit import MMDiT
from lct_core import AttentionPlan, Layout, Shot, bidirectional, context_causal

#: The paper's longest shot: 125 frames of an area of 480 × 480 pixels (A.1). Its VAE and its number of text tokens are
#: not published; ours are 4 frames × 8 × 8 pixels to a latent, as is usual, 2 × 2 latents to a token, and 576.
PAPER_SHOT = Shot(text=576, grid=(32, 30, 30))

#: Euler steps of the paper (A.2).
PAPER_STEPS = 32


class Pass(NamedTuple):
    """Some shots through the model at once, a number of times; they see one another and what is cached as planned."""

    shots: tuple[Shot, ...]
    plan: AttentionPlan
    times: int


@dataclass(frozen=True)
class Cost:
    """Floating point operations, two for a multiplication and its addition."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Both."""
        return self.linear + self.attention


def scene_of(shot: Shot, count: int) -> list[Shot]:
    """A global shot, whose dummy video is one latent frame, and a number of equal shots."""
    return [Shot(shot.text, (1, *shot.grid[1:]), "global"), *[shot] * count]


def joint(scene: Sequence[Shot], steps: int) -> list[Pass]:
    """Bidirectional attention, all shots at once: :func:`lct_core.generation.joint`."""
    layout = Layout([scene])
    return [Pass(layout.shots, bidirectional(layout), steps)]


def cached(scene: Sequence[Shot], steps: int) -> list[Pass]:
    """Context-causal attention, shot after shot behind a KV cache of all earlier ones: the mode ``causal``."""
    passes = []
    for layout in _prefixes(scene):
        shot, is_last = layout.shots[-1], layout.num_shots == len(scene)
        times = 1 if shot.role == "global" else steps + (not is_last)
        passes.append(Pass((shot,), context_causal(layout).rows(layout.spans[-1]), times))
    return passes


def recomputed(scene: Sequence[Shot], steps: int) -> list[Pass]:
    """The same model to the same end without a cache, the whole history in every step: ``autoregressive``."""
    return [
        Pass(layout.shots, context_causal(layout), steps)
        for layout in _prefixes(scene)
        if layout.shots[-1].role == "shot"
    ]


def independent(scene: Sequence[Shot], steps: int) -> list[Pass]:
    """Every shot by itself, without a global prompt: the single-shot model."""
    return [step for shot in scene if shot.role == "shot" for step in joint([shot], steps)]


MODES: dict[str, Callable[[Sequence[Shot], int], list[Pass]]] = {
    "recomputed": recomputed,
    "joint": joint,
    "cached": cached,
    "independent": independent,
}


def label(mode: str, shots: int) -> str:
    """What a mode at a number of shots is called in the results."""
    return f"{mode}, {shots} shot{'s' if shots > 1 else ''}"


def cost(model: MMDiT, passes: Sequence[Pass]) -> Cost:
    """What the passes cost; the model may be on the meta device."""
    per, depth = _linear_flops(model), len(model.blocks)
    return Cost(
        linear=sum(
            step.times * (per["shot"] + per["text"] * shot.text + per["video"] * shot.video)
            for step in passes
            for shot in step.shots
        ),
        attention=sum(
            step.times * depth * step.plan.flops(heads=model.heads, head_dim=model.head_dim) for step in passes
        ),
    )


def _linear_flops(model: MMDiT) -> Counter[str]:
    """Of all linear layers, by what they are applied to: every text token, every video token, or a shot's level."""
    flops: Counter[str] = Counter()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            of_level = name.startswith("time_in") or name.endswith("modulation")
            of = "shot" if of_level else "text" if "text" in name else "video"
            flops[of] += 2 * layer.in_features * layer.out_features
    return flops


def _prefixes(scene: Sequence[Shot]) -> list[Layout]:
    return [Layout([scene[: i + 1]]) for i in range(len(scene))]
