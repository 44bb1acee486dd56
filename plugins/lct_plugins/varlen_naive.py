"""The readable reference of what :mod:`lct_plugins.varlen` asks of a provider: plain torch, on any device and dtype.

It is as unkind as real kernels are allowed to be. It takes no other strides than the lowering promises. What no
sequence writes holds NaN: outputs of queries without keys, gradients in a sequence that lacks queries or keys.
Gradients are stored and not added up, so sequences with overlapping keys are right forward and wrong backward.
Arithmetic is float32, or float64 for float64.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lct_plugins.varlen import Provider, Sequences


def forward(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp."""
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    out = torch.full_like(q, torch.nan)
    lse = torch.full(q.shape[:-1], torch.nan, dtype=_wide(q), device=q.device).transpose(-1, -2).contiguous()
    for queries, keys in _tokens(q, k, sequences):
        scores = _scores(q[queries], k[keys], scale)
        here = scores.logsumexp(dim=-1)
        out[queries] = torch.einsum("hqk,khd->qhd", (scores - here[..., None]).exp(), _shared(v[keys], q)).to(q.dtype)
        lse.transpose(-1, -2)[queries] = here.T
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, given the output and the log-sum-exp of a softmax over these keys or more."""
    assert all(x.stride(-1) == 1 for x in (dout, q, k, v, out))
    assert lse.is_contiguous()
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    for queries, keys in _tokens(q, k, sequences):
        weights = (_scores(q[queries], k[keys], scale) - lse.transpose(-1, -2)[queries].T[..., None]).exp()
        gradient = dout[queries].to(weights.dtype)
        pull = torch.einsum("qhd,khd->hqk", gradient, _shared(v[keys], q))
        center = (gradient * out[queries]).sum(dim=-1).T[..., None]
        dscores = scale * weights * (pull - center)
        dq[queries] = torch.einsum("hqk,khd->qhd", dscores, _shared(k[keys], q)).to(q.dtype)
        dk[keys] = _summed(torch.einsum("hqk,qhd->khd", dscores, q[queries].to(weights.dtype)), k)
        dv[keys] = _summed(torch.einsum("hqk,qhd->khd", weights, gradient), v)
    return dq, dk, dv


PROVIDER = Provider(forward, backward)


def _tokens(q: Tensor, k: Tensor, sequences: Sequences | None) -> Iterator[tuple[tuple[int | slice, ...], ...]]:
    """Indices of the queries and the keys of every sequence that has both."""
    if sequences is None:
        yield from (((entry, slice(None)),) * 2 for entry in range(q.shape[0]))
        return
    used = sequences.cu_seqlens_k.diff() if sequences.seqused_k is None else sequences.seqused_k
    cuts, starts = pairwise(sequences.cu_seqlens_q.tolist()), sequences.cu_seqlens_k[:-1].tolist()
    for (start, stop), keys, size in zip(cuts, starts, used.tolist(), strict=True):
        if start < stop and size:
            yield (slice(start, stop),), (slice(keys, keys + size),)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("qhd,khd->hqk", q.to(_wide(q)), _shared(k, q))


def _shared(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values, one for each of q's heads."""
    return x.to(_wide(x)).repeat_interleave(q.shape[-2] // x.shape[-2], dim=-2)


def _summed(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of keys or values, summed over the heads that share them."""
    return gradient.unflatten(-2, (x.shape[-2], -1)).sum(dim=-2).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
