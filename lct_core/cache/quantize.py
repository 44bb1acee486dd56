"""Keys and values in 8 bits, with a scale for every head of every block of tokens."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from lct_core._describe import describe
from lct_core.layout import Range

Format = Literal["int8", "fp8"]

BLOCK = 64  # tokens that share a scale (ours)
_AT_ONCE = 64 * BLOCK  # tokens whose float32 copy is held at a time
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_DTYPES: dict[Format, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Quantized(NamedTuple):
    """A tensor in 8 bits: what :func:`quantize` makes.

    Args:
        values: ``[batch, tokens, heads, head_dim]``, int8 or float8_e4m3fn.
        scales: ``[batch, blocks, heads]``, float32: what a value of each block and head is multiplied by.
        dtype: Of the tensor that it was.
    """

    values: Tensor
    scales: Float32[Tensor, "batch blocks heads"]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self, out: Tensor | None = None) -> Float[Tensor, "batch tokens heads head_dim"]:
        """The tensor again: values times scales in float32, rounded once to its dtype.

        Args:
            out: Where to write it, such as a part of a longer row (default: a new tensor). Where it is on another
                device, some thousand tokens are brought there at a time, still in 8 bits.

        Raises:
            ValueError: for an ``out`` of another shape or dtype.
        """
        if out is None:
            out = torch.empty_like(self.values, dtype=self.dtype)
        if (out.shape, out.dtype) != (self.values.shape, self.dtype):
            expected = f"{describe(self.values)} in {self.dtype}"
            raise ValueError(f"out: got {describe(out)} in {out.dtype}, expected {expected}")
        for tokens, x in self._pieces(out.device):
            out[:, tokens.slice] = x
        return out

    def __reduce__(self) -> tuple[Any, ...]:  # float8 tensors can't be pickled by themselves
        return _as, (self.values.view(torch.int8), self.values.dtype, self.scales, self.dtype)

    def _pieces(self, device: torch.device) -> Iterator[tuple[Range, Tensor]]:
        scales = self.scales.to(device, non_blocking=True)
        for tokens, blocks, size in _pieces(self.values.shape[1]):
            x = self.values[:, tokens.slice].to(device, non_blocking=True).float()
            x.unflatten(1, (-1, size)).mul_(scales[:, blocks.slice, None, :, None])
            yield tokens, x


def _as(values: Tensor, stored: torch.dtype, scales: Tensor, dtype: torch.dtype) -> Quantized:
    return Quantized(values.view(stored), scales, dtype)


@torch.no_grad()
def quantize(x: Float[Tensor, "batch tokens heads head_dim"], format: Format) -> Quantized:
    """Round a tensor to 8 bits, block by block of 64 tokens, each head for itself, around zero.

    The largest magnitude of a block becomes 127 in ``"int8"``, and no entry is then off by more than 1/254 of it; or
    448 in ``"fp8"`` (e4m3fn), where an entry is off by 1/16 of itself at most, or by 1/458752 of the block's largest.
    Both hold beside the last rounding, to the tensor's own dtype. Rounding is to the nearest, ties to even; the
    arithmetic is float32. Zeros stay zeros. Blocks whose largest entry is below 1e-35 lose precision.

    Args:
        x: Keys or values.
        format: ``"int8"`` or ``"fp8"``.

    Raises:
        ValueError: for another format, another shape, or what is not finite.
    """
    if format not in _DTYPES:
        raise ValueError(f"format: got {format!r}, expected one of {list(get_args(Format))}")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x: got {describe(x)} in {x.dtype}, expected floating-point keys or values "
            "[batch, tokens, heads, head_dim]"
        )
    dtype = _DTYPES[format]
    batch, count, heads, _ = x.shape
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(batch, -(-count // BLOCK), heads, dtype=torch.float32, device=x.device)
    smallest = torch.finfo(torch.float32).tiny  # a scale of zeros, by which one can divide
    for tokens, blocks, size in _pieces(count):
        piece = x[:, tokens.slice].to(torch.float32, copy=True)
        whole = piece.unflatten(1, (-1, size))
        scale = (whole.abs().amax(dim=(2, 4)) / _LARGEST[dtype]).clamp(min=smallest)
        scales[:, blocks.slice] = scale
        whole.div_(scale[:, :, None, :, None])
        values[:, tokens.slice] = piece.round_() if dtype == torch.int8 else piece
    if not bool(scales.isfinite().all()):
        raise ValueError("x: got NaN or infinite entries, expected finite keys or values; check the model's outputs")
    return Quantized(values, scales, x.dtype)


def relative_error(x: Float[Tensor, "batch tokens heads head_dim"], quantized: Quantized) -> float:
    """The largest difference from x over its largest magnitude, in float64; 0 for a tensor of nothing."""
    worst = largest = torch.zeros((), dtype=torch.float64, device=x.device)
    for tokens, rounded in quantized._pieces(x.device):
        exact = x[:, tokens.slice].double()
        worst = torch.maximum(worst, (exact - rounded.to(x.dtype).double()).abs().amax())
        largest = torch.maximum(largest, exact.abs().amax())
    return (worst / largest.clamp(min=torch.finfo(torch.float32).tiny)).item()


def _pieces(tokens: int) -> Iterator[tuple[Range, Range, int]]:
    """Tokens to work on at a time, their blocks, and how many tokens each of those has: whole blocks, then the rest."""
    whole = tokens - tokens % BLOCK
    for start in range(0, whole, _AT_ONCE):
        stop = min(start + _AT_ONCE, whole)
        yield Range(start, stop), Range(start // BLOCK, stop // BLOCK), BLOCK
    if tokens > whole:
        yield Range(whole, tokens), Range(whole // BLOCK, whole // BLOCK + 1), tokens - whole
