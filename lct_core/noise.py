"""Noise: the path from data to noise, a level for every shot, and draws that any process can repeat.

Everywhere here a level ``t`` is in [0, 1], 0 clean and 1 noise (paper, Eq. 1), and every draw comes from an explicit
generator on the CPU, so that it is the same whatever device the model runs on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from lct_core.layout import Layout

__all__ = [
    "Path",
    "RectifiedFlow",
    "VariancePreserving",
    "condition_levels",
    "joint_levels",
    "sample_levels",
    "sample_shot_run",
    "shot_noise",
    "substitute_single_frames",
]

Latents = Float[Tensor, " batch *rest"]
Level = Float[Tensor, " batch"]


@runtime_checkable
class Path(Protocol):
    """How a model's latents go from data to noise, and what its output means; an adapter names its own.

    Latents are ``[batch, *rest]`` and ``t`` is ``[batch]``, the level of the one shot that they are.
    """

    def add_noise(self, z0: Latents, noise: Latents, t: Level) -> Latents:
        """Clean latents at level ``t``: ``z0`` where t is 0, pure noise where t is 1."""
        ...

    def target(self, z0: Latents, noise: Latents, t: Level) -> Latents:
        """What the model's own output should be at ``add_noise(z0, noise, t)``, for the training loss."""
        ...

    def to_velocity(self, out: Latents, z: Latents, t: Level) -> Latents:
        """The model's output ``out`` at latents ``z`` of level ``t`` as the velocity dz/dt, for samplers."""
        ...

    def step(self, z: Latents, velocity: Latents, t: float, s: float) -> Latents:
        """Latents at level ``s`` from those at level ``t``, along the path: what an Euler step is on this one."""
        ...


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path (paper, 3.1, Eq. 1): z_t = (1 - t) z_0 + t eps, whose velocity eps - z_0 the model predicts.

    Args:
        toward_data: Whether the model predicts the velocity's opposite, z_0 - eps, as Mochi does.

    Arithmetic is in float32 (float64 for float64 latents) and cast to the dtype of ``z0`` once, at the end. All methods
    raise a ValueError where shapes don't fit: broadcasting would hide it.
    """

    toward_data: bool = False

    def add_noise(self, z0: Latents, noise: Latents, t: Level) -> Latents:
        """Interpolate: (1 - t) z_0 + t eps."""
        _check_like(z0, "noise", noise)
        _check_t(t, z0)
        wide, t = _wide(z0), _like(t.to(z0.device), z0)
        return ((1 - t) * z0.to(wide) + t * noise.to(wide)).to(z0.dtype)

    def target(self, z0: Latents, noise: Latents, t: Level) -> Latents:
        """Subtract: eps - z_0, the same at every level; its opposite where the model predicts that."""
        _check_like(z0, "noise", noise)
        _check_t(t, z0)
        wide = _wide(z0)
        velocity = (noise.to(wide) - z0.to(wide)).to(z0.dtype)
        return -velocity if self.toward_data else velocity

    def to_velocity(self, out: Latents, z: Latents, t: Level) -> Latents:
        """Return ``out`` itself, or its opposite where the model predicts that."""
        _check_like(z, "out", out)
        _check_t(t, z)
        return -out if self.toward_data else out

    def step(self, z: Latents, velocity: Latents, t: float, s: float) -> Latents:
        """Go straight on: z + (s - t) dz/dt."""
        _check_like(z, "velocity", velocity)
        return z - (t - s) * velocity


@dataclass(frozen=True)
class VariancePreserving:
    """The circle from data to noise, z = cos(phi) z_0 + sin(phi) eps, with v-prediction.

    The model predicts v = cos(phi) eps - sin(phi) z_0 (Salimans and Ho, arXiv 2202.00512, appendix D), which is
    dz/dphi; so dz/dt = phi'(t) v. The schedule that the model was trained with, N discrete timesteps, gives the angles:
    level (n + 1) / N is its timestep n, where cos(phi) squared is ``alphas_cumprod[n]``; level 0 is clean, and phi is
    linear between (ours). Where the slope of phi jumps, at the timesteps, it is that of the interval below: samplers go
    down. Near level 0 phi goes like the square root of the level, so a sampler's :meth:`step` turns by the angle and
    does not go straight on: that is DDIM (Song et al., arXiv 2010.02502) with the model's v held over the step.

    Args:
        alphas_cumprod: The schedule's share of data in the variance at every timestep, from cleanest to noisiest: it
            falls from below 1 to 0, so that level 1 is pure noise (zero terminal SNR, arXiv 2305.08891).

    Tables are float64, arithmetic as in :class:`RectifiedFlow`. All methods raise a ValueError where shapes don't fit;
    so does a schedule that does not fall from below 1 to 0.
    """

    alphas_cumprod: Sequence[float] = field(repr=False)

    def __post_init__(self) -> None:
        alphas = tuple(float(alpha) for alpha in self.alphas_cumprod)
        object.__setattr__(self, "alphas_cumprod", alphas)  # a tuple, so that it is hashable
        falls = all(before > after for before, after in zip((1.0, *alphas), alphas, strict=False))
        if not alphas or not falls or alphas[-1] != 0:
            came = f"{len(alphas)} from {alphas[0]:g} to {alphas[-1]:g}" if alphas else "none"
            raise ValueError(
                f"alphas_cumprod: got {came}, expected values that fall from below 1 to 0: the last timestep must be "
                "pure noise; make the schedule with rescale_betas_zero_snr=True"
            )

    def add_noise(self, z0: Latents, noise: Latents, t: Level) -> Latents:
        """Turn from the data to the noise: cos(phi) z_0 + sin(phi) eps."""
        _check_like(z0, "noise", noise)
        cos, sin = self._circle(t, z0)
        return (cos * z0.to(cos.dtype) + sin * noise.to(cos.dtype)).to(z0.dtype)

    def target(self, z0: Latents, noise: Latents, t: Level) -> Latents:
        """The tangent: cos(phi) eps - sin(phi) z_0."""
        _check_like(z0, "noise", noise)
        cos, sin = self._circle(t, z0)
        return (cos * noise.to(cos.dtype) - sin * z0.to(cos.dtype)).to(z0.dtype)

    def to_velocity(self, out: Latents, z: Latents, t: Level) -> Latents:
        """Multiply by the slope of phi."""
        _check_like(z, "out", out)
        return (_like(self._slope(t, z), out) * out.to(_wide(out))).to(out.dtype)

    def step(self, z: Latents, velocity: Latents, t: float, s: float) -> Latents:
        """Turn by the angle between the levels: cos(d) z + sin(d) v, with d = phi(s) - phi(t)."""
        _check_like(z, "velocity", velocity)
        start, stop = (torch.full((len(z),), level, dtype=torch.float64) for level in (t, s))
        turn = self._phi(stop, z) - self._phi(start, z)
        v = velocity.to(_wide(z)) / _like(self._slope(start, z), z)
        return (_like(turn.cos(), z) * z.to(_wide(z)) + _like(turn.sin(), z) * v).to(z.dtype)

    @cached_property
    def _angles(self) -> Tensor:
        """Phi at level 0 and at every timestep."""
        alphas = torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64)
        return torch.atan2((1 - alphas).sqrt(), alphas.sqrt())

    def _place(self, t: Level, z: Latents) -> Tensor:
        """Levels counted in intervals between timesteps."""
        _check_t(t, z)
        return t.to(z.device, torch.float64) * (len(self._angles) - 1)

    def _circle(self, t: Level, z: Latents) -> tuple[Tensor, Tensor]:
        """Cosine and sine of phi, against the latents."""
        phi = self._phi(t, z)
        return _like((self._angles[-1].to(z.device) - phi).sin(), z), _like(phi.sin(), z)  # so the cosine is 0 at 1

    def _phi(self, t: Level, z: Latents) -> Tensor:
        place, angles = self._place(t, z), self._angles.to(z.device)
        below = place.floor().clamp(0, len(angles) - 2).long()
        return torch.lerp(angles[below], angles[below + 1], place - below)

    def _slope(self, t: Level, z: Latents) -> Tensor:
        """Radians per level, of the interval below; a level in float32 may lie just above the timestep meant."""
        below = ((self._place(t, z) - 1e-3).ceil() - 1).clamp(0, len(self._angles) - 2).long()
        angles = self._angles.to(z.device)
        return (angles[below + 1] - angles[below]) * (len(angles) - 1)


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


def _like(value: Tensor, z: Tensor) -> Tensor:
    """A value for each entry of the batch, as latents and as wide as their arithmetic."""
    return value.to(_wide(z)).reshape(-1, *[1] * (z.ndim - 1))


def _wide(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def _check_like(z: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.shape != z.shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(z.shape)} like the latents")


def _check_t(t: Tensor, z: Tensor) -> None:
    if t.shape != z.shape[:1]:
        raise ValueError(
            f"t: got shape {tuple(t.shape)}, expected {tuple(z.shape[:1])}: one level for each entry of the batch; "
            "expand a level that all share"
        )


def _check_int(name: str, value: object, *, least: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        raise ValueError(f"{name}: got {value!r}, expected an int" + (f" of at least {least}" if least else ""))
