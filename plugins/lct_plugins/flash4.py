"""FlashAttention-4, by its variable-length kernels (:mod:`lct_plugins.varlen`).

Written against flash-attn-4 4.0.0b36, through the two functions that its own autograd calls: they take and give the
log-sum-exp, which rectangles need. Its block-sparse kernels want a mask in CuTe's language; torch writes that for
``flex-flash``. It was not yet run on a GPU: it is opt-in until measured.
"""

from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from lct_core import Kernel, KernelRequest, KernelSpec
from lct_plugins._limits import cute_limits
from lct_plugins.varlen import Provider, Sequences, attention, packed


def forward(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp, as :class:`lct_plugins.varlen.Provider` has it."""
    from flash_attn.cute.interface import _flash_attn_fwd

    with torch.cuda.device_of(q):
        out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True, **packed(sequences))
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients, as :class:`lct_plugins.varlen.Provider` has it."""
    from flash_attn.cute.interface import _flash_attn_bwd

    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.cuda.device_of(q):
        dq, dk, dv = _flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=scale, deterministic=deterministic, **packed(sequences)
        )
    return dq, dk, dv


def refusals(request: KernelRequest) -> list[str]:
    """Every reason why FlashAttention-4 cannot serve a request, whoever calls it."""
    reasons = []
    try:
        version("flash-attn-4")  # not "flash_attn": earlier versions have a package of that name too
    except PackageNotFoundError:
        reasons.append("no package flash-attn-4: pip install --pre flash-attn-4")
    return reasons + cute_limits(request)


def _load() -> Kernel:
    return partial(attention, provider=Provider(forward, backward))


SPEC = KernelSpec(
    name="flash4",
    summary="FlashAttention-4, one launch forward, rectangles backward; opt-in, not yet measured",
    load=_load,
    refusals=refusals,
)
