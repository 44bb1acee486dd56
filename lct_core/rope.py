"""Coordinates to angles to rotation, and moving a rotated shot along the diagonal.

Angles are float64, cosines and sines are cast once, at the end, to at least float32, and the rotation itself runs in
their precision whatever the dtype of what is rotated. RoPE: Su et al., arXiv 2104.09864.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

Pairing = Literal["interleaved", "half", "half_per_axis"]

_PIECE = 2**18  # elements that one thread rotates at a time: with all that is computed of them, they fit in its cache
_LARGE = 2**23  # elements of a row from which on pieces pay: what it takes no longer fits in the cache of all threads


class Rotation(NamedTuple):
    """Cosines and sines, ready to be applied: ``[tokens, heads or 1, pairs]`` each."""

    cos: Float[Tensor, "tokens heads pairs"]
    sin: Float[Tensor, "tokens heads pairs"]
    pairing: Pairing

    @property
    def distance(self) -> int:
        """How far apart the two channels of a pair are; twice as many, side by side, hold both of all their pairs."""
        pairs = self.cos.shape[-1]
        return {"interleaved": 1, "half": pairs, "half_per_axis": pairs // 3}[self.pairing]


class Rotary(Protocol):
    """What rotates queries or keys into their place, ``rotary(x, by, out)``: as :func:`rotate_into`, in any way."""

    def __call__(self, x: Tensor, by: Rotation, out: Tensor, /) -> None:
        """Fill ``out`` with ``x``, rotated, in the dtype of ``x`` and then in its own."""
        ...


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
    turned = _turned(x, by)
    wide = x[..., :turned].to(torch.promote_types(x.dtype, by.cos.dtype))
    a, b = (half.flatten(-2) for half in wide.unflatten(-1, (-1, 2, by.distance)).unbind(-2))
    halves = a * by.cos - b * by.sin, a * by.sin + b * by.cos
    first, second = (half.unflatten(-1, (-1, by.distance)) for half in halves)
    if by.distance > 1 or first.requires_grad:  # neighbours are slow to stack, what is filled in place to differentiate
        stack = torch.stack((first, second), dim=-2).flatten(-3).to(x.dtype)
        return stack if turned == x.shape[-1] else torch.cat((stack, x[..., turned:]), dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    pairs = out[..., :turned].unflatten(-1, (-1, 2, by.distance))
    pairs[..., 0, :], pairs[..., 1, :] = first, second
    out[..., turned:] = x[..., turned:]
    return out


def rotate_into(
    x: Float[Tensor, "batch tokens heads head_dim"],
    by: Rotation,
    out: Float[Tensor, "batch tokens heads head_dim"],
) -> None:
    """Rotate queries or keys into their place: a slice of a packed row, or of a cache's buffer.

    What ``rotate(x, by)`` and then a copy give, to the last bit, but in pieces that stay in the processor's cache. Has
    no gradient.

    Args:
        x: Queries or keys, with any strides.
        by: A rotation for every token.
        out: Where they go, with any strides and any dtype.

    Raises:
        ValueError: for an ``out`` of another shape, or a rotation for other tokens or more channels.
    """
    check_into(x, by, out)
    tokens = max(1, _PIECE * torch.get_num_threads() // max(1, x[:, :1].numel()))
    pieces = (split.split(tokens, dim) for split, dim in ((x, 1), (by.cos, 0), (by.sin, 0), (out, 1)))
    for part, cos, sin, place in zip(*pieces, strict=True):
        place.copy_(rotate(part, Rotation(cos, sin, by.pairing)))


def check_into(x: Tensor, by: Rotation, out: Tensor) -> None:
    """What every :class:`Rotary` must be given: ``ValueError`` for anything else."""
    _turned(x, by)
    if x.shape != out.shape or len(by.cos) != x.shape[1] or by.cos.shape[1] not in (1, x.shape[2]):
        raise ValueError(
            f"x, by, out: got {list(x.shape)}, a rotation {list(by.cos.shape)} and {list(out.shape)}, expected x and "
            "out [batch, tokens, heads, head_dim] and a rotation [tokens, heads or 1, pairs]"
        )


def _turned(x: Tensor, by: Rotation) -> int:
    """How many channels are turned."""
    turned = 2 * by.cos.shape[-1]
    if turned > x.shape[-1]:
        raise ValueError(f"by: the rotation turns {turned} channels, but the heads of x have {x.shape[-1]}")
    return turned


def pays_in_pieces(parts: Sequence[Tensor]) -> bool:
    """Whether :func:`rotate_into` is faster than to join and rotate: where a row is large, and on a CPU."""
    return parts[0].device.type == "cpu" and sum(part.numel() for part in parts) > _LARGE


class RowParts(NamedTuple):
    """The shots' queries or keys on their way into one row: joined, rotated and cast in one go.

    Args:
        parts: Every shot's own, ``[batch, tokens, heads, head_dim]``, in row order.
        by: A rotation for every token of the row; without gradients.
        dtype: What they are cast to, once rotated in their own.
        rotary: What rotates each of them into its place.
    """

    parts: Sequence[Float[Tensor, "batch tokens heads head_dim"]]
    by: Rotation
    dtype: torch.dtype
    rotary: Rotary = rotate_into

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole row."""
        batch, _, *rest = self.parts[0].shape
        return batch, sum(self.lengths), *rest

    @property
    def lengths(self) -> list[int]:
        """Every shot's number of tokens."""
        return [part.shape[1] for part in self.parts]

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.parts[0].device

    @property
    def requires_grad(self) -> bool:
        """Whether :meth:`joined` has a gradient."""
        return torch.is_grad_enabled() and any(part.requires_grad for part in self.parts)

    def into(self, out: Float[Tensor, "batch tokens heads head_dim"]) -> None:
        """Fill ``out``, of the row's shape and with any strides; without gradients."""
        splits = ((self.by.cos, 0), (self.by.sin, 0), (out, 1))
        places = (split.split(self.lengths, dim) for split, dim in splits)
        for part, cos, sin, place in zip(self.parts, *places, strict=True):
            self.rotary(part, Rotation(cos, sin, self.by.pairing), place)

    def joined(self) -> Float[Tensor, "batch tokens heads head_dim"]:
        """The row as one tensor, with gradients."""
        out: Tensor = _Joined.apply(self, *self.parts)
        return out


class _Joined(torch.autograd.Function):
    """A rotated row; its gradient is rotated back, all of it at once."""

    @staticmethod
    def forward(ctx: Any, row: RowParts, *parts: Tensor) -> Tensor:
        ctx.row = row._replace(parts=(), dtype=parts[0].dtype)
        ctx.lengths = row.lengths
        return _filled(row._replace(parts=parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse = ctx.row.by._replace(sin=-ctx.row.by.sin)
        back = _filled(ctx.row._replace(parts=[grad.to(ctx.row.dtype)], by=inverse))
        return None, *back.split(ctx.lengths, dim=1)


def _filled(row: RowParts) -> Tensor:
    out = torch.empty(row.shape, dtype=row.dtype, device=row.device)
    row.into(out)
    return out


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
    return rotate(x, diagonal_rotation(steps, x, diagonal=diagonal, pairing=pairing))


def diagonal_rotation(
    steps: float, like: Tensor, *, diagonal: Float[Tensor, "heads pairs"], pairing: Pairing
) -> Rotation:
    """The constant rotation R(steps), for one token, on the device of a tensor that is to be rotated."""
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    return rotation((steps * diagonal.double())[None].to(like.device), pairing=pairing, dtype=exact)


_ANGLES = 1e-5  # of the largest: how far devices may differ in computing them (ours)


def same_angles(then: Tensor | None, now: Tensor | None) -> bool:
    """Whether angles are the same but for what devices make of the last bits; those on ``meta`` are any."""
    if then is None or now is None:
        return then is now
    if then.is_meta or now.is_meta:
        return True
    return close_angles(*(x.double().flatten().tolist() for x in (then, now)))


def close_angles(then: Sequence[float], now: Sequence[float]) -> bool:
    """Whether lists of angles are equal to 1e-5 of the largest."""
    most = _ANGLES * max(map(abs, now), default=0.0)
    return len(then) == len(now) and all(abs(a - b) <= most for a, b in zip(then, now, strict=True))
