"""Noise: a level for every shot, and draws that any process can repeat.

Everywhere here a level ``t`` is in [0, 1], 0 clean and 1 noise (paper, Eq. 1), and every draw comes from an explicit
generator on the CPU, so that it is the same whatever device the model runs on.
"""

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from lct_core.layout import Layout

__all__ = [
    "condition_levels",
    "joint_levels",
    "sample_levels",
    "sample_shot_run",
    "shot_noise",
    "substitute_single_frames",
]


def sample_levels(
    layout: Layout, *, generator: torch.Generator, batch: int | None = None, mean: float = 0.0, std: float = 1.0
) -> Float32[Tensor, "*batch shots"]:
    """Draw an independent level for every shot of a row, for training: sigmoid(mean + std n), n normal (paper, 3.4).

    Args:
        layout: The row; its global shots get level 0, as their dummy video is clean (ours; the paper is silent).
        generator: CPU generator; takes one draw for every shot, global shots too.
        batch: Number of rows of this layout; None for one row without a batch dimension.
        mean: Mean of the levels' logit (upstream, SD3: 0).
        std: Standard deviation of the levels' logit (upstream, SD3: 1).

    Returns:
        ``[num_shots]`` or ``[batch, num_shots]`` in row order, on the CPU.

    Raises:
        ValueError: for a batch below 1, a non-finite mean, an std that is not positive, or a generator off the CPU.
    """
    check_generator(generator)
    if batch is not None:
        _check_int("batch", batch, least=1)
    if not math.isfinite(mean):
        raise ValueError(f"mean: got {mean!r}, expected a finite mean of the levels' logit")
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"std: got {std!r}, expected a positive standard deviation of the levels' logit")
    shape = (layout.num_shots,) if batch is None else (batch, layout.num_shots)
    normal = torch.randn(shape, generator=generator, dtype=torch.float32)
    return torch.sigmoid(mean + std * normal) * _is_noisy(layout)


def joint_levels(layout: Layout, t: float) -> Float32[Tensor, " shots"]:
    """Give all shots of a row the same level, for joint generation (paper, 3.2.3); global shots stay at 0.

    Args:
        layout: The row.
        t: The level, in [0, 1].

    Returns:
        ``[num_shots]`` in row order, on the CPU.

    Raises:
        ValueError: for a level outside [0, 1].
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t: got {t!r}, expected a level in [0, 1], 0 clean and 1 noise; divide 0-1000 steps by 1000")
    return t * _is_noisy(layout)


def condition_levels(levels: Float[Tensor, "*batch shots"], t_c: Mapping[int, float]) -> Float[Tensor, "*batch shots"]:
    """Hold chosen shots at a low level, so that the other shots are generated from them (paper, 3.2.3 and 4.2).

    Args:
        levels: Levels in row order, as `sample_levels` and `joint_levels` return them.
        t_c: For each conditioning shot, by its index in the row counting from 0 (global shots count), its level on the
            paper's scale of 0 to 1000. The paper uses 100 to 500: lower keeps more of the condition, higher
            accumulates fewer errors.

    Returns:
        A copy of the levels with ``t_c / 1000`` at the chosen shots.

    Raises:
        ValueError: for a shot that the row doesn't have or a level outside 0 to 1000.
    """
    levels = levels.clone()
    shots = levels.shape[-1]
    for shot, level in t_c.items():
        if shot not in range(shots):
            raise ValueError(f"t_c: got shot {shot!r}, expected 0 to {shots - 1}: the row has {shots} shots")
        if not 0 <= level <= 1000:
            raise ValueError(f"t_c: got {level!r} for shot {shot}, expected a level from 0 (clean) to 1000 (noise)")
        levels[..., shot] = level / 1000
    return levels


def substitute_single_frames(
    clips: Sequence[Tensor], *, generator: torch.Generator, probability: float = 0.1
) -> list[Tensor]:
    """Replace each shot, with some probability, by one random frame of itself (paper, 3.4 and A.1).

    This is what teaches a scene model to generate images and to be conditioned on them. Apply it to pixels, before the
    video is encoded: a latent frame of a causal video autoencoder stands for several frames and is no image.

    Args:
        clips: The shots, each ``[..., channels, frames, height, width]``.
        generator: CPU generator; takes two draws for every clip, whatever becomes of it.
        probability: Chance that a clip is replaced, each for itself (paper, A.1: 0.1).

    Returns:
        The clips as they are, or views of one frame ``[..., channels, 1, height, width]``.

    Raises:
        ValueError: for a clip without frames, a probability outside [0, 1], or a generator that is not on the CPU.
    """
    check_generator(generator)
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: got {probability!r}, expected a probability in [0, 1]")
    for i, clip in enumerate(clips):
        if clip.ndim < 4 or clip.shape[-3] == 0:
            raise ValueError(
                f"clips: clip {i} (counting from 0) has shape {tuple(clip.shape)}, "
                "expected [..., channels, frames, height, width] with at least 1 frame"
            )
    draws = torch.rand(len(clips), 2, generator=generator, dtype=torch.float64).tolist()
    return [
        clip.narrow(-3, int(place * clip.shape[-3]), 1) if chance < probability else clip
        for clip, (chance, place) in zip(clips, draws, strict=True)
    ]


def sample_shot_run(available: int, *, generator: torch.Generator, max_shots: int = 9) -> range:
    """Choose how many, and which consecutive, shots of a scene to train on.

    The paper (A.1) favours as many shots as possible while still allowing fewer, and gives no weights. Ours: a count n
    has probability proportional to n, up to the most that fit; where the run starts is uniform.

    Args:
        available: Number of shots in the scene.
        generator: CPU generator; takes two draws.
        max_shots: Most shots in a run (paper, 4: a window of nine).

    Returns:
        Indices of the chosen shots in their scene.

    Raises:
        ValueError: for a count below 1 or a generator that is not on the CPU.
    """
    check_generator(generator)
    _check_int("available", available, least=1)
    _check_int("max_shots", max_shots, least=1)
    counts = torch.arange(1, min(available, max_shots) + 1, dtype=torch.float64)
    count = 1 + int(torch.multinomial(counts, 1, generator=generator))
    start = int(torch.randint(available - count + 1, (), generator=generator))
    return range(start, start + count)


def shot_noise(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    scene: int,
    shot: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the standard normal noise of one whole shot, named by what it is for and never by who draws it.

    The same key gives the same noise in every process, on every rank and device, and whatever else is in the batch:
    ranks that share a shot need not communicate to agree on it. Drawn on the CPU in float32 from a generator seeded by
    a hash of the key, then cast and moved once. PyTorch's CPU generator uses 32 bits of a seed, so two keys share their
    noise with a chance of 2^-32.

    Args:
        shape: Shape of the shot's latents, ``[batch, channels, frames, height, width]`` at the library's face.
        seed: Seed of the run.
        step: Training step, or 0 for sampling.
        scene: Index of the scene in the data set, not in the batch.
        shot: Index of the shot in its scene.
        dtype: What the noise is cast to (ours: float32).
        device: What the noise is moved to (ours: the CPU).

    Returns:
        Noise of the given shape.

    Raises:
        ValueError: for a key that is not made of ints; 1, 1.0 and a tensor of 1 would be three keys.
    """
    key = {"seed": seed, "step": step, "scene": scene, "shot": shot}
    for name, value in key.items():
        _check_int(name, value)
    generator = keyed_generator(*key.values())
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(device, dtype)


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator that is the same for the same key, in any process (its seed is a hash of the key, 32 bits)."""
    digest = blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def check_generator(generator: torch.Generator) -> None:
    """Refuse a generator that is not on the CPU: each kind of device draws other numbers from the same seed.

    Raises:
        ValueError: if it is on another device.
    """
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator: got one on {generator.device}, expected one on the CPU, so that a seed gives the same draws "
            "on every device: torch.Generator().manual_seed(...)"
        )


def _is_noisy(layout: Layout) -> Float32[Tensor, " shots"]:
    return torch.tensor([float(shot.role != "global") for shot in layout.shots], dtype=torch.float32)


def _check_int(name: str, value: object, *, least: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        raise ValueError(f"{name}: got {value!r}, expected an int" + (f" of at least {least}" if least else ""))
