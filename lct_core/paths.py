"""The path from data to noise: how latents are noised, what a model predicts, what a step is (paper, Eq. 1)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

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
    linear between (ours). At a knot use the lower interval's slope: samplers step toward t = 0. Near level 0 phi goes
    like the square root of the level, so a sampler's :meth:`step` turns by the angle and does not go straight on: that
    is DDIM (Song et al., arXiv 2010.02502) with the model's v held over the step.

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
