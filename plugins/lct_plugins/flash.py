"""FlashAttention on NVIDIA GPUs: FA3, FA2, and the FA2 that torch is built with.

Dao, arXiv 2307.08691; Shah et al., arXiv 2407.08608. All three run the lowering of :mod:`lct_plugins.varlen`, with
arithmetic in float32 on float16 or bfloat16 tensors, and gradients. ``torch.use_deterministic_algorithms`` is honoured.

FA3 is taken from the package ``flash_attn_3`` (built from flash-attention's ``hopper``), else from an xformers that
bundles it (0.0.34 does, 0.0.35 does not). That one wants CUDA 12's runtime library, which ``nvidia-cuda-runtime-cu12``
brings where torch is built for CUDA 13.
"""

import ctypes
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module, metadata
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lct_core import Kernel, KernelRequest, KernelSpec
from lct_plugins._limits import limits
from lct_plugins.varlen import Provider, Sequences, attention, packed

_MOST_SPLITS = 8
_LEAST_KEYS = 4096  # of a split (ours, modelled): the splits' outputs are written, read and merged
_LAST = 2**31 - 1  # what an int32 reaches
_PLAIN2: dict[str, Any] = {  # attention without anything else, as FA2's functions take it
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}
_NO_FLASH3 = (
    "FlashAttention-3 is not installed: build flash_attn_3 from flash-attention's hopper folder, "
    "or install an xformers that bundles it (0.0.34)"
)


def forward3(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, scale: float) -> tuple[Tensor, Tensor]:
    """FA3's forward pass, as :class:`lct_plugins.varlen.Provider` has it; needs its operators to be loaded."""
    ranges = splits(q, k.shape[1]) if sequences is None else 1
    out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, **packed(sequences), softmax_scale=scale, num_splits=ranges)
    return out, lse


def splits(q: Tensor, keys: int) -> int:
    """Into how many ranges FA3 is to split the keys of a dense call.

    A short shot behind a long history has few tiles of queries, whose last wave leaves many processors idle. This is
    the smallest number with which the waves are at least 85 % as full as with the best one, as FA3's own heuristic has
    it, which however gives up where the tiles fill 80 % of a first wave. Modelled, not measured.

    Args:
        q: ``[batch, queries, heads, head_dim]``.
        keys: Number of keys, all of which every query sees.
    """
    most = min(_MOST_SPLITS, keys // _LEAST_KEYS)
    if most < 2:
        return 1
    rows = 192 if q.shape[3] <= 96 else 128  # of FA3's tiles
    waves = q.shape[0] * ceil(q.shape[1] / rows) * q.shape[2] / _processors(q.device)
    full = [waves * n / ceil(waves * n) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(full, start=1) if share >= 0.85 * max(full))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def backward3(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """FA3's backward pass, likewise."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))  # versions differ in what they return, not in what they fill
    one_by_one = sequences is None and max(map(_accumulated, (q, k))) > _LAST
    parts = (x.split(1 if one_by_one else len(x)) for x in (dout, q, k, v, out, lse, dq, dk, dv))
    deterministic = torch.are_deterministic_algorithms_enabled()
    for part in zip(*parts, strict=True):
        torch.ops.flash_attn_3.bwd(*part, **packed(sequences), softmax_scale=scale, deterministic=deterministic)
    return dq, dk, dv


def _accumulated(x: Tensor) -> int:
    """At most how far apart the entries of a batch are in FA3's accumulators, which it computes in int32.

    It pads tokens to its tiles, of 128 at most, and heads to 256 at most.
    """
    return (x.shape[1] + 128) * x.shape[2] * 256


def _forward2(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, scale: float) -> tuple[Tensor, Tensor]:
    flash = import_module("flash_attn.flash_attn_interface")
    call = flash._flash_attn_forward if sequences is None else flash._flash_attn_varlen_forward
    out, lse, *_ = call(q, k, v, **packed(sequences), **_PLAIN2, softmax_scale=scale, return_softmax=False)
    return out, lse


def _backward2(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    flash = import_module("flash_attn.flash_attn_interface")
    call = flash._flash_attn_backward if sequences is None else flash._flash_attn_varlen_backward
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    tables = {name: value for name, value in packed(sequences).items() if name != "seqused_k"}
    deterministic = torch.are_deterministic_algorithms_enabled()
    call(dout, q, k, v, out, lse, dq, dk, dv, **tables, **_PLAIN2, softmax_scale=scale, deterministic=deterministic)
    return dq, dk, dv


def _forward_torch(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, scale: float) -> tuple[Tensor, Tensor]:
    cu_q, cu_k, used, max_q, max_k = sequences or (None, None, None, q.shape[1], k.shape[1])
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, False, False, scale=scale, seqused_k=used
    )
    return out, lse


def _backward_torch(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    cu_q, cu_k, _, max_q, max_k = sequences or (None, None, None, q.shape[1], k.shape[1])
    unread = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of dropout, of which there is none
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, False, unread, unread, scale=scale
    )
    return dq, dk, dv


def _load_flash3() -> Kernel:
    """Register FA3's operators, unless they are, from the first library found that has them."""
    if not _has_flash3():
        library = _flash3_library()
        if library is None:
            raise ImportError(_NO_FLASH3)
        for runtime in _installed("nvidia", "cuda_runtime/lib/libcudart.so.12"):
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(library)
    return partial(attention, provider=Provider(forward3, backward3))


def _has_flash3() -> bool:
    return hasattr(torch.ops.flash_attn_3, "fwd")


def _flash3_library() -> Path | None:
    places = (("flash_attn_3", "_C*.so"), ("xformers", "flash_attn_3/_C*.so"))
    return next((library for package, pattern in places for library in _installed(package, pattern)), None)


def _installed(package: str, pattern: str) -> list[Path]:
    """Files of a package, which is not imported for that."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return [path for folder in folders or () for path in Path(folder).glob(pattern)]


def _load_flash2() -> Kernel:
    import_module("flash_attn.flash_attn_interface")
    return partial(attention, provider=Provider(_forward2, _backward2))


def _load_flash_torch() -> Kernel:
    return partial(attention, provider=Provider(_forward_torch, _backward_torch))


def _refusals3(request: KernelRequest) -> list[str]:
    reasons = _limits(request, request.hardware == "sm_90", "a Hopper GPU (sm_90)")
    if request.grad and request.head_dim > 192 and torch.are_deterministic_algorithms_enabled():
        reasons.append(
            f"head_dim {request.head_dim}: expected at most 192 for deterministic gradients; use flash2 or sdpa"
        )
    if not _has_flash3() and _flash3_library() is None:
        reasons.append(_NO_FLASH3)
    return reasons or _trouble(_load_flash3)


def _refusals2(request: KernelRequest) -> list[str]:
    reasons = _limits(request, _is_ampere(request), "an NVIDIA GPU from sm_80 on")
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        reasons.append("flash-attn is not installed: pip install lct-core[flash-attn]")
    else:
        if [int(part) for part in version.split(".")[:2]] < [2, 8]:
            reasons.append(f"flash-attn {version}: expected 2.8 or newer; pip install -U flash-attn")
    return reasons or _trouble(_load_flash2)


def _refusals_torch(request: KernelRequest) -> list[str]:
    reasons = _limits(request, _is_ampere(request), "an NVIDIA GPU from sm_80 on")
    if not torch.backends.cuda.is_flash_attention_available():
        reasons.append(f"torch {torch.__version__} is built without FlashAttention: install one for CUDA")
    return reasons


def _limits(request: KernelRequest, served: bool, hardware: str) -> list[str]:
    """What all three refuse."""
    fits = request.head_dim % 8 == 0 and request.head_dim <= 256
    return limits(request, hardware=hardware, head_dim="a multiple of 8, at most 256", runs=served, fits=fits)


def _is_ampere(request: KernelRequest) -> bool:
    """Whether the hardware is an NVIDIA GPU of the Ampere generation or a later one."""
    name, _, capability = request.hardware.partition("_")
    return name == "sm" and int(capability) >= 80


def _trouble(load: Callable[[], Kernel]) -> list[str]:
    """Why a kernel that is installed cannot be loaded: most often it was built for another torch or CUDA."""
    try:
        load()
    except Exception as error:  # whatever a build for another torch makes of it
        cause = error.__cause__ or error
        return [
            f"it cannot be loaded: {type(cause).__name__}: {cause}; install what is missing, "
            f"or a build for torch {torch.__version__}"
        ]
    return []


FLASH3 = KernelSpec(
    name="flash3",
    summary="FlashAttention-3, on Hopper; one launch forward, rounds of rectangles backward",
    load=_load_flash3,
    refusals=_refusals3,
)
FLASH2 = KernelSpec(
    name="flash2",
    summary="FlashAttention-2 of the package flash-attn; one launch forward, rounds of rectangles backward",
    load=_load_flash2,
    refusals=_refusals2,
)
FLASH_TORCH = KernelSpec(
    name="flash-torch",
    summary="the FlashAttention-2 that torch is built with; one launch forward, rounds of rectangles backward",
    load=_load_flash_torch,
    refusals=_refusals_torch,
)
