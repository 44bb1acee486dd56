"""Which tile sizes our own Triton kernel should take: every candidate is checked, then timed, direction by direction.

    python -m benchmarks.tiles [--out FILE]

The best go into ``TILES`` of ``plugins/lct_plugins/triton_attention.py``. Needs a CUDA device.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness, provenance
from benchmarks.cases import RAGGED, row
from lct_core import AttentionPlan
from lct_core.patterns import context_causal
from lct_core.plugins.torch_kernels import reference
from lct_core.testing.tolerances import BOUNDS, error
from lct_plugins import triton_attention
from lct_plugins.triton_attention import TILES, Direction, Tiling

DTYPE = torch.bfloat16

#: Context-causal scenes by name: the shots' tokens, heads and head_dim (cases B1, B2 and B5).
SHAPES = {
    "B1": ([1800] * 9, 24, 128),
    "B2": ([round(1000 * length) for length in RAGGED], 24, 128),
    "B5": ([round(1000 * length) for length in RAGGED], 32, 64),
}

#: Matrix products of the size of the scores times head_dim that each direction makes, recomputed ones included.
PRODUCTS: dict[Direction, int] = {"forward": 2, "queries backward": 3, "keys backward": 4}

CANDIDATES = [
    Tiling(rows, columns, warps, stages)
    for rows, columns, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3))
    if rows * columns >= 64 * 64
]


def runs(plan: AttentionPlan, heads: int, head_dim: int) -> dict[Direction, Callable[[], tuple[Tensor | None, ...]]]:
    """One call of each direction's kernel, on tensors from the normal distribution."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, plan.queries, heads, head_dim)
    q, k, v, dout = (torch.randn(shape, dtype=DTYPE, device="cuda", generator=generator) for _ in range(4))
    scale = head_dim**-0.5
    out, lse = triton_attention.triton_attention_lse(q, k, v, plan, scale)

    def backward(*, for_q: bool) -> tuple[Tensor | None, ...]:
        return triton_attention._backward(q, k, v, out, lse, dout, plan, scale, for_q=for_q, for_kv=not for_q)

    return {
        "forward": lambda: triton_attention.triton_attention_lse(q, k, v, plan, scale),
        "queries backward": lambda: backward(for_q=True),
        "keys backward": lambda: backward(for_q=False),
    }


def right(heads: int, head_dim: int) -> bool:
    """Whether outputs and gradients on a small ragged scene are within the table of tolerances, as TILES stands."""
    plan = context_causal(row([150, 211, 1, 175, 97]))
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (1, plan.queries, heads, head_dim)
    q, k, v, dout = (torch.randn(shape, dtype=DTYPE, device="cuda", generator=generator) for _ in range(4))
    mask, scale = plan.dense(device="cuda"), head_dim**-0.5

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)

    def outputs(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q.detach(), k.detach(), v.detach())]
        out = attention(*inputs)
        return [out, *torch.autograd.grad(out, inputs, dout.to(dtype))]

    exact = outputs(lambda *x: reference(*x, plan, scale), torch.float64)
    plain = outputs(masked, DTYPE)
    got = outputs(lambda *x: triton_attention.triton_attention(*x, plan, scale), DTYPE)
    kinds = ("kernel", *["kernel gradients"] * 3)
    return all(
        error(g, e) <= BOUNDS[DTYPE][kind].given(error(p, e))
        for g, p, e, kind in zip(got, plain, exact, kinds, strict=True)
    )


def sweep() -> Iterator[dict[str, Any]]:
    """Every candidate for every shape and direction: its rate, or why it has none."""
    from triton.testing import do_bench

    for shape, (shots, heads, head_dim) in SHAPES.items():
        plan = context_causal(row(shots))
        kernels = runs(plan, heads, head_dim)
        for direction, tiling in product(PRODUCTS, CANDIDATES):
            found: dict[str, Any] = {"shape": shape, "direction": direction, "tiling": tiling._asdict()}
            found["current"] = TILES[head_dim, direction] == tiling
            with patch.dict(TILES, {(head_dim, direction): tiling}):
                try:
                    if right(2, head_dim):
                        median, low, high = do_bench(kernels[direction], warmup=100, rep=500, quantiles=[0.5, 0.2, 0.8])
                        flops = 2 * PRODUCTS[direction] * plan.pairs * heads * head_dim
                        rates = {"tflops": flops / median / 1e9, "low": flops / high / 1e9, "high": flops / low / 1e9}
                        found |= {"milliseconds": median, **rates}
                    else:
                        found["why not"] = "wrong"
                except Exception as problem:  # too large for the GPU, or whatever else its compiler refuses
                    if not harness.alive("cuda"):
                        raise
                    found["why not"] = harness.in_words(problem)
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(description="Time tile sizes of our own Triton kernel.")
    parser.add_argument("--out", type=Path, default=harness.QUICK_RESULTS / "tiles.json", help="where the JSON goes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "tiles: there is no CUDA device here, and tile sizes are timed on one; nothing was run\n")
    print(f"{'shape':6}{'direction':18}{'rows':>5}{'columns':>9}{'warps':>7}{'stages':>8}{'ms':>10}{'TFLOP/s*':>10}")
    record = {
        "versions": provenance.versions("cuda"),
        "machine": provenance.machine("cuda"),
        "source": provenance.source(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for found in sweep():
        results.append(found)
        arguments.out.write_text(json.dumps({**record, "dtype": str(DTYPE), "results": results}, indent=1) + "\n")
        rows, columns, warps, stages = found["tiling"].values()
        rate = found.get("why not") or f"{found['milliseconds']:10.3f}{found['tflops']:10.0f}"
        print(
            f"{found['shape']:6}{found['direction']:18}{rows:5}{columns:9}{warps:7}{stages:8}{rate}"
            f"{'  (current)' if found['current'] else ''}",
            flush=True,
        )
    print("* on all products that the direction's kernel makes; the row sums are part of both backward directions")


if __name__ == "__main__":
    main()
