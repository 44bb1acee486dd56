"""The correctness check before every measurement: a kernel that is wrong is not timed.

``check`` compares a kernel with float64 on a small case of the same kind; ``check_difference`` two contenders' results
at full size. ``passes_of`` is how both, and the harness, run a kernel or a baseline.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case, row
from lct_core import attend, registry


class Wrong(Exception):
    """A kernel's error is above its bound."""


class Passes(NamedTuple):
    """An attention: ``forward(q, k, v)`` gives the output, first, and what else its backward pass takes.

    ``backward(saved, (q, k, v), dout)``, with what that gave, is the three gradients.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., Sequence[Tensor]]


def check(case: Case, name: str) -> dict[str, float]:
    """The gate: a kernel's error against float64, at most twice that of SDPA with a dense mask in the same dtype.

    On a small ragged scene of the same kind. Outputs, and where the case has a direction backward all gradients, each
    relative to its largest entry.

    Returns:
        The error that is closest to its bound, and that bound.

    Raises:
        Wrong: for a kernel that is; nothing of it is then timed.
    """
    _, error, bound = max(_check(case_for(case, name).gate, name), key=lambda found: found[1] / found[2])
    return {"error": error, "bound": bound}


@cache
def _check(case: Case, name: str) -> list[tuple[str, float, float]]:
    """What comes out, with its error and bound: the output and, where the case has a direction backward, gradients."""
    tensors, plan = attention_tensors(case), case.plan
    definition = _by_autograd(lambda q, k, v: attend(q, k, v, plan, kernel="reference"))
    exact = _outputs(tensors, definition, double=True)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        plain = _outputs(tensors, passes_of(case, "masked"))  # cuDNN's gradients with a mask can be NaN
    torch.compiler.reset()
    ours = _outputs(tensors, passes_of(case, name))
    found = []
    for what, want, reference, got in zip(("out", "dq", "dk", "dv"), exact, plain, ours, strict=False):
        error, bound = _error(got, want), 2 * _error(reference, want)
        if not error <= bound:
            raise Wrong(f"the error of {what} is {error:.2e}, more than {bound:.2e}")
        found.append((what, error, bound))
    return found


def _outputs(tensors: Sequence[Tensor], passes: Passes, *, double: bool = False) -> list[Tensor]:
    """The output, and the gradients where the tensors want them."""
    grad = tensors[0].requires_grad
    given = [x.detach().to(torch.float64 if double else x.dtype).requires_grad_(grad) for x in tensors]
    saved = passes.forward(*given)
    return [saved[0].detach(), *(passes.backward(saved, given, given[0].detach()) if grad else ())]


def check_difference(case: Case, got: tuple[str, Sequence[Tensor]], want: tuple[str, Sequence[Tensor]]) -> float:
    """The largest difference of two contenders' results at full size, each relative to its largest entry.

    Raises:
        Wrong: where one is more than both gates allow.
    """
    bounds = (_check(case.gate, name)[-len(results) :] for name, results in (got, want))
    worst = 0.0
    for (what, _, bound), (*_, other), ours, theirs in zip(*bounds, got[1], want[1], strict=True):
        difference = float((ours - theirs).abs_().max() / theirs.abs().max())
        if not difference <= bound + other:
            raise Wrong(
                f"at full size {what} differs from that of {want[0]} by {difference:.2e}, more than {bound + other:.2e}"
            )
        worst = max(worst, difference)
    return worst


def _error(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want).abs().max() / want.abs().max()
    return float(error.nan_to_num(nan=float("inf")))


def attention_tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from the normal distribution: constants would flatter a GPU's clock."""
    generator = torch.Generator(case.device).manual_seed(0)
    grad, plan = case.direction != "forward", case.plan
    return tuple(  # type: ignore[return-value]
        torch.randn(
            1, tokens, heads, case.head_dim, dtype=case.dtype, device=case.device, generator=generator
        ).requires_grad_(grad)
        for tokens, heads in ((plan.queries, case.heads), (plan.keys, case.kv_heads), (plan.keys, case.kv_heads))
    )


def inputs(case: Case) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Queries, keys and values, and the gradient of the output where there is a direction backward."""
    if case.direction == "forward":
        return attention_tensors(case), None
    generator = torch.Generator(case.device).manual_seed(1)
    shape = 1, case.plan.queries, case.heads, case.head_dim
    return attention_tensors(case), torch.randn(shape, dtype=case.dtype, device=case.device, generator=generator)


def case_for(case: Case, name: str) -> Case:
    """What a contender is asked for: a raw one, where it has no call for the case, for a square of as many pairs."""
    whole = ("dense", "packed") if name == "raw-flash3" else ("dense",)
    if not name.startswith("raw-") or case.plan.form in whole:
        return case
    tokens = 128 * max(1, round(math.sqrt(case.plan.pairs) / 128))
    return replace(case, layout=row([tokens]), pattern="bidirectional", last_shot=False)


def passes_of(case: Case, name: str, *, keep: bool = False) -> Passes:
    """A kernel of the registry, or a peer; with `keep`, its backward pass can be run again."""
    plan = case.plan
    if name == "raw-flash3":
        return _raw_flash3(case)
    peers = {"dense": _sdpa, "raw-cudnn": _raw_cudnn}
    if name == "masked":
        peers["masked"] = partial(_sdpa, mask=plan.dense(device=case.device))
    return _by_autograd(peers.get(name, lambda q, k, v: attend(q, k, v, plan, kernel=name)), keep=keep)


def _by_autograd(run: Callable[[Tensor, Tensor, Tensor], Tensor], *, keep: bool = False) -> Passes:
    return Passes(
        lambda *tensors: (run(*tensors),),
        lambda saved, tensors, dout: torch.autograd.grad(saved[0], tensors, dout, retain_graph=keep),
    )


def _raw_flash3(case: Case) -> Passes:
    """FA3's own functions, without autograd and without a plan; scenes that lie side by side are its sequences."""
    registry().kernels["flash3"].load()  # and with it the library
    flash, scale, sequences = import_module("lct_plugins.flash"), case.head_dim**-0.5, None
    if case.plan.form == "packed":
        sizes = [segment.queries.size for segment in case.plan.segments]
        ends = torch.tensor([*accumulate(sizes, initial=0)], dtype=torch.int32, device=case.device)
        sequences = flash.Sequences(ends, ends, None, max(sizes), max(sizes))

    def shaped(*tensors: Tensor) -> list[Tensor]:
        return [x.detach() if sequences is None else x.detach()[0] for x in tensors]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = flash.forward3(*shaped(q, k, v), sequences, scale)
        return out.view(q.shape), lse

    def backward(saved: Sequence[Tensor], tensors: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
        out, lse = saved
        shares = flash.backward3(*shaped(dout, *tensors, out), lse, sequences, scale)
        return [share.view(x.shape) for share, x in zip(shares, tensors, strict=True)]

    return Passes(forward, backward)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2]
    ).transpose(1, 2)


def _raw_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)
