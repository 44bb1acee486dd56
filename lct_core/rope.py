"""Coordinates to angles to rotation, and moving a rotated shot along the diagonal.

Angles are float64, cosines and sines are cast once, at the end, to at least float32, and the rotation itself runs in
their precision whatever the dtype of what is rotated. RoPE: Su et al., arXiv 2104.09864.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Pairing = Literal["interleaved", "half", "half_per_axis"]


class Rotation(NamedTuple):
    """Cosines and sines, ready to be applied: ``[tokens, heads or 1, pairs]`` each."""

    cos: Float[Tensor, "tokens heads pairs"]
    sin: Float[Tensor, "tokens heads pairs"]
    pairing: Pairing


def axis_frequencies(
    dims: Sequence[int], *, theta: float = 10_000.0, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "axes pairs"]:
    """The frequencies of a RoPE whose head channels are divided among the axes (paper, 3.1).

    Args:
        dims: Channels for each axis, even numbers: ``(frames, height, width)``.
        theta: Base of the geometric series of periods (default: upstream, RoPE).
        dtype: float64 (default: ours), or float32 for a model whose own angles are.

    Returns:
        In radians per coordinate; row ``a`` is zero outside the channels of axis ``a``, so that
        ``coordinates @ frequencies`` are the angles.

    Raises:
        ValueError: for an odd or negative number of channels.
    """
    if any(d < 0 or d % 2 for d in dims):
        raise ValueError(f"dims: got {tuple(dims)}, expected even numbers of channels: a rotation turns pairs")
    series = [1.0 / theta ** (torch.arange(0, d, 2, dtype=dtype) / max(d, 1)) for d in dims]
    return torch.block_diag(*(s[None] for s in series))


def angles(
    coords: Shaped[Tensor, "tokens axes"], frequencies: Float[Tensor, "axes pairs"]
) -> Float[Tensor, "tokens 1 pairs"]:
    """The angle, in radians, by which each pair of channels of each token is turned; one for all heads.

    Arithmetic and result are in the dtype of the frequencies.
    """
    each = coords.to(frequencies.dtype)[..., None] * frequencies.to(coords.device)  # no matmul: those may round more
    return each.sum(-2)[:, None]


def rotation(
    angles: Float[Tensor, "tokens heads pairs"], *, pairing: Pairing, dtype: torch.dtype = torch.float32
) -> Rotation:
    """The cosines and sines of some angles, computed in the angles' own dtype and cast once.

    Args:
        angles: Radians, one for every pair of channels, float32 or float64; a heads axis of 1 serves all heads.
        pairing: Which channels make a pair: ``"interleaved"``, channels 2i and 2i+1; ``"half"``, channels i and
            i + pairs; ``"half_per_axis"``, the same inside each third of the channels. Channels beyond twice the number
            of pairs are left as they are.
        dtype: float32 (default), or float64 to prove something.

    Raises:
        ValueError: for an unknown pairing, or angles or a dtype too coarse for positions.
    """
    if pairing not in get_args(Pairing):
        raise ValueError(f"pairing: got {pairing!r}, expected one of {get_args(Pairing)}")
    if angles.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"angles: got {angles.dtype}, expected torch.float32 or torch.float64: "
            "half-precision angles lose the position of a token in a long scene"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"dtype: got {dtype}, expected torch.float32 or torch.float64: "
            "half-precision cosines lose the position of a token in a long scene"
        )
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype), pairing)


def rotate(
    x: Float[Tensor, "batch tokens heads head_dim"], by: Rotation
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Turn every pair of channels of queries or keys; the inverse is a turn by the negated angles.

    The arithmetic is in the rotation's dtype or that of ``x``, whichever is finer; the result has the dtype of ``x``.

    Raises:
        ValueError: where the rotation has more channels than a head.
    """
    cos, sin, pairing = by
    turned = 2 * cos.shape[-1]
    if turned > x.shape[-1]:
        raise ValueError(f"by: the rotation turns {turned} channels, but the heads of x have {x.shape[-1]}")
    wide = x[..., :turned].to(torch.promote_types(x.dtype, cos.dtype))
    if pairing == "interleaved":
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        parts = 1 if pairing == "half" else 3
        a, b = (half.flatten(-2) for half in wide.unflatten(-1, (parts, 2, -1)).unbind(-2))
        halves = (a * cos - b * sin, a * sin + b * cos)
        out = torch.stack([half.unflatten(-1, (parts, -1)) for half in halves], dim=-2).flatten(-3)
    out = out.to(x.dtype)
    return out if turned == x.shape[-1] else torch.cat((out, x[..., turned:]), dim=-1)


def move(
    x: Float[Tensor, "batch tokens heads head_dim"],
    steps: float,
    *,
    diagonal: Float[Tensor, "heads pairs"],
    pairing: Pairing,
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Move already rotated queries or keys along the space diagonal, as one body: the constant rotation R(steps).

    Equals rotating from the start at coordinates that lie ``steps`` further along the diagonal, to 1e-6 of the largest
    key in float32. Always move from where the keys were written: moves of moves add their roundings up.

    Args:
        x: Rotated queries or keys.
        steps: Diagonal steps, forward or backward.
        diagonal: float64 angles of one diagonal step, in radians: those of the coordinates ``unit``.
        pairing: As in :func:`rotation`.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return rotate(x, rotation((steps * diagonal.double())[None].to(x.device), pairing=pairing, dtype=exact))
