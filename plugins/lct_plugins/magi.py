"""MagiAttention's flex_flash_attn: any plan in one launch, forward and backward, from pairs of ranges.

https://github.com/SandAI-org/MagiAttention, built from source (read at 2c641357). It was not yet run on a GPU: it is
opt-in until measured.
"""

from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lct_core import AttentionPlan, Kernel, KernelRequest, KernelSpec
from lct_plugins._limits import limits


class Pairs(NamedTuple):
    """Queries ``q_ranges[i]`` see keys ``k_ranges[i]``, ``[start, stop)``; those of several pairs see all of theirs."""

    q_ranges: Int[Tensor, "pairs 2"]
    k_ranges: Int[Tensor, "pairs 2"]


def magi(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """One launch for each entry of the batch."""
    from magi_attention.functional import flex_flash_attn_func

    call = partial(
        flex_flash_attn_func,
        softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        disable_fwd_atomic_reduction=plan.form != "gathered",  # no query is in two pairs: nothing is to be added up
    )
    outputs = [call(*entry, *pairs(plan, q.device))[0] for entry in zip(q, k, v, strict=True)]
    return outputs[0][None] if len(outputs) == 1 else torch.stack(outputs)


@lru_cache(maxsize=64)
def pairs(plan: AttentionPlan, device: torch.device) -> Pairs:
    """One pair for every segment and every one of its key ranges."""
    both = [(queries, keys) for queries, ranges in plan.segments for keys in ranges]
    return Pairs(*torch.tensor([*zip(*both, strict=True)], dtype=torch.int32, device=device))


def _load() -> Kernel:
    return magi


def _refusals(request: KernelRequest) -> list[str]:
    reasons = []
    spec = find_spec("magi_attention")
    places = spec.submodule_search_locations or [] if spec else []
    if not any(Path(place, "functional").is_dir() for place in places):
        reasons.append(
            "no magi_attention with its kernels (what the package index has is a placeholder): build it from "
            "https://github.com/SandAI-org/MagiAttention"
        )
    runs, fits = request.hardware == "sm_90", request.head_dim in (64, 128)
    return reasons + limits(request, hardware="sm_90", head_dim="64 or 128", runs=runs, fits=fits)


SPEC = KernelSpec(
    name="magi",
    summary="MagiAttention's flex_flash_attn, one launch for any plan; opt-in, not yet measured",
    load=_load,
    refusals=_refusals,
)
