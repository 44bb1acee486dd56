"""Keys on their way into a cache's slot, or queries into their row: rotated in place, and join, rotate, copy."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import provenance, timing
from lct_core import Rotation, rotate, rotation
from lct_core.rope import Pairing, Rotary, RowParts, rotate_into
from lct_plugins import triton_rotary

Publish = Callable[[dict[str, Any]], None]

HEADS, HEAD_DIM = 24, 128
WARMUP, ROUNDS = 3, 20


def _shots(tokens: int, shots: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The keys among what some shots' projections gave."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, tokens // shots, 3, HEADS, HEAD_DIM)
    return [torch.randn(shape, dtype=dtype, device=device, generator=generator)[:, :, 1] for _ in range(shots)]


def _rotation(tokens: int, pairing: Pairing, device: str) -> Rotation:
    return rotation(torch.rand(tokens, 1, HEAD_DIM // 2, dtype=torch.float64, device=device), pairing=pairing)


def _joined(parts: list[Tensor], by: Rotation) -> Tensor:
    return rotate(torch.cat(parts, dim=1), by)


def _gradients(out: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, of, out.detach())


def _contenders(
    parts: list[Tensor], by: Rotation, rotary: Rotary, direction: str
) -> tuple[dict[str, timing.Contender], float]:
    """Both ways, and the largest difference of their results."""
    row = RowParts(parts, by, parts[0].dtype, rotary)
    slot = torch.empty(row.shape, dtype=row.dtype, device=row.device)
    if direction == "forward":
        runs = {"in place": lambda: row.into(slot), "joined": lambda: slot.copy_(_joined(parts, by))}
        results = []
        for run in runs.values():
            run()
            results.append([slot.clone()])
    else:
        for part in parts:
            part.requires_grad_()
        runs = {
            "in place": lambda: _gradients(row.joined(), *parts),
            "joined": lambda: _gradients(_joined(parts, by), *parts),
        }
        results = [list(run()) for run in runs.values()]
    worst = max(float((a.double() - b.double()).abs().max()) for a, b in zip(*results, strict=True))
    return {name: timing.Contender(lambda run=run: run) for name, run in runs.items()}, worst


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_on_a_cpu(
    pairing: Pairing,
    direction: str,
    dtype: torch.dtype,
    quick: bool,
    benchmark: BenchmarkFixture,
    publish: Publish,
) -> None:
    tokens, shots = (900 if quick else 5400), 3
    parts, by = _shots(tokens, shots, dtype, "cpu"), _rotation(tokens, pairing, "cpu")
    contenders, difference = _contenders(parts, by, rotate_into, direction)
    assert difference == 0
    _measure(f"rotary-{pairing}-{direction}-{dtype}", contenders, benchmark, publish, tokens=tokens, shots=shots)


@pytest.mark.gpu
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_triton(pairing: Pairing, direction: str, benchmark: BenchmarkFixture, publish: Publish) -> None:
    tokens, shots, dtype = 16_200, 9, torch.bfloat16
    parts, by = _shots(tokens, shots, dtype, "cuda"), _rotation(tokens, pairing, "cuda")
    contenders, difference = _contenders(parts, by, triton_rotary.rotate_into, direction)
    assert difference <= 2**-6  # one rounding of keys of up to 8
    name = f"gpu-rotary-{pairing}-{direction}-{dtype}"
    _measure(name, contenders, benchmark, publish, device="cuda", tokens=tokens, shots=shots)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_triton_with_the_norm(direction: str, benchmark: BenchmarkFixture, publish: Publish) -> None:
    tokens, dtype = 16_200, torch.bfloat16
    (x,), by = _shots(tokens, 1, dtype, "cuda"), _rotation(tokens, "interleaved", "cuda")
    weight = torch.rand(HEAD_DIM, dtype=dtype, device="cuda")
    ways = {"in place": triton_rotary.norm_rotate, "joined": triton_rotary.naive_norm_rotate}
    exact = triton_rotary.naive_norm_rotate(x.double(), by, weight, eps=1e-6)
    errors = [float((way(x, by, weight, eps=1e-6).double() - exact).abs().max()) for way in ways.values()]
    assert errors[0] <= 2 * errors[1]
    given = (x.requires_grad_(), weight.requires_grad_()) if direction == "both" else (x, weight)

    def run(way: Callable[..., Tensor]) -> object:
        out = way(given[0], by, given[1], eps=1e-6)
        return _gradients(out, *given) if direction == "both" else out

    contenders = {name: timing.Contender(lambda way=way: lambda: run(way)) for name, way in ways.items()}
    _measure(
        f"gpu-norm-rotary-{direction}-{dtype}", contenders, benchmark, publish, device="cuda", tokens=tokens, shots=1
    )


def _measure(
    name: str,
    contenders: Mapping[str, timing.Contender],
    benchmark: BenchmarkFixture,
    publish: Publish,
    *,
    device: str = "cpu",
    **shape: int,
) -> None:
    times = timing.interleave(contenders, warmup=WARMUP, rounds=ROUNDS, device=device)
    benchmark.pedantic(contenders["in place"].prepare(), rounds=3)
    ratio = timing.ratio(times["in place"], times["joined"])
    publish(
        provenance.record(
            name.replace("torch.", ""),
            device=device,
            shape={"heads": HEADS, "head_dim": HEAD_DIM, **shape},
            warmup=WARMUP,
            rounds=ROUNDS,
            times=timing.measured(times, contenders),
            comparisons=[timing.Comparison("time / joined", ratio, most=1.0)],
        )
    )
