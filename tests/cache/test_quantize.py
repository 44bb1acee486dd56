import copy
import pickle
from itertools import product

import pytest
import torch
from hypothesis import given, strategies as st

from lct_core.cache import quantize as module
from lct_core.cache.quantize import BLOCK, quantize, relative_error
from lct_core.testing.tolerances import error

pytestmark = pytest.mark.internals

FORMATS = {"int8": (127, torch.int8), "fp8": (448, torch.float8_e4m3fn)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def blocks(x):
    """Every head of every block of a tensor [batch, tokens, heads, head_dim], and where its scale stands."""
    for b, n, h in product(range(x.shape[0]), range(-(-x.shape[1] // BLOCK)), range(x.shape[2])):
        yield (b, n, h), x[b, n * BLOCK : (n + 1) * BLOCK, h]


def allowed(x, format):
    """How far off each entry of one head of one block may be."""
    x, largest = x.double(), x.double().abs().max()
    of_block = largest / 254 if format == "int8" else torch.maximum(x.abs() / 16, largest / 458752)
    return of_block * (1 + 1e-5)  # float32's arithmetic


@st.composite
def tensors(draw):
    shape = draw(st.tuples(st.integers(1, 2), st.integers(0, 150), st.integers(1, 3), st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(shape, generator=generator)
    x = x * 10 ** (8 * torch.rand(shape[:3], generator=generator) - 6)[..., None]  # tokens and heads of any magnitude
    if draw(st.booleans()):
        x = x * (torch.rand(shape, generator=generator) < 0.2)  # many zeros
    return x.to(draw(st.sampled_from(DTYPES)))


@given(tensors(), st.sampled_from(list(FORMATS)))
def test_no_entry_is_further_off_than_said(x, format):
    made = quantize(x, format)
    largest, dtype = FORMATS[format]
    assert (made.values.dtype, made.values.shape, made.dtype) == (dtype, x.shape, x.dtype)
    assert (made.scales.dtype, made.scales.shape) == (torch.float32, (len(x), -(-x.shape[1] // 64), x.shape[2]))
    again = made.dequantize()
    assert (again.dtype, again.shape) == (x.dtype, x.shape)
    rounding = torch.finfo(x.dtype).eps / 2, torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps / 2
    for (place, exact), (_, got) in zip(blocks(x), blocks(again), strict=True):
        last = got.double().abs() * rounding[0] + rounding[1]  # to the tensor's own dtype
        assert bool(((got.double() - exact.double()).abs() <= allowed(exact, format) + last).all())
        scale = exact.float().abs().max() / largest
        assert made.scales[place] == (scale if scale > 0 else torch.finfo(torch.float32).tiny)
        assert bool((got[exact == 0] == 0).all())
    assert torch.equal(quantize(x, format).values.view(torch.uint8), made.values.view(torch.uint8))
    assert relative_error(x, made) == (error(again, x) if x.numel() else 0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 4096, 4096 + 130])
def test_block_by_block_equals_the_definition(tokens, format):
    x = torch.randn(1, tokens, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = quantize(x, format)
    largest, dtype = FORMATS[format]
    for (b, n, h), block in blocks(x):
        scale = block.float().abs().max() / largest
        scaled = block.float() / scale
        values = (scaled.round() if format == "int8" else scaled).to(dtype)
        part = slice(n * BLOCK, (n + 1) * BLOCK)
        assert torch.equal(made.values[b, part, h].float(), values.float())
        assert torch.equal(made.dequantize()[b, part, h], (values.float() * scale).bfloat16())


@pytest.mark.parametrize(("format", "most"), [("int8", 1 / 254), ("fp8", 1 / 16)])
def test_errors_are_relative_to_the_largest(format, most):
    x = torch.randn(2, 200, 2, 16, generator=torch.Generator().manual_seed(0))
    made = quantize(x, format)
    assert 0 < relative_error(x, made) <= most * (1 + 1e-5)
    zeros = torch.zeros(1, 70, 2, 4)
    assert relative_error(zeros, quantize(zeros, format)) == 0
    assert torch.equal(quantize(zeros, format).dequantize(), zeros)


def test_int8_keeps_what_fits():
    x = torch.arange(-127, 129).clamp(max=127).float().reshape(1, 64, 1, 4) * 2.0**-20
    assert torch.equal(quantize(x, "int8").dequantize(), x)


@pytest.mark.parametrize("format", FORMATS)
def test_out_may_be_a_part_of_a_row(format):
    row = torch.full((2, 300, 2, 4), 7.0, dtype=torch.bfloat16)
    x = torch.randn(2, 100, 2, 4).bfloat16()
    made, part = quantize(x, format), row[:, 50:150]
    assert made.dequantize(part) is part
    assert torch.equal(row[:, 50:150], made.dequantize())
    assert bool((row[:, :50] == 7).all() & (row[:, 150:] == 7).all())
    strided = torch.empty(2, 100, 4, 2, dtype=torch.bfloat16).mT
    assert torch.equal(made.dequantize(strided), made.dequantize())
    with pytest.raises(ValueError, match=r"^out: got \[2, 99, 2, 4\] in torch.bfloat16, expected \[2, 100, 2, 4\] in"):
        made.dequantize(row[:, :99])
    with pytest.raises(ValueError, match=r"^out: .* in torch.float32, expected \[2, 100, 2, 4\] in torch.bfloat16"):
        made.dequantize(torch.empty(2, 100, 2, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_gpu_rounds_as_a_cpu_does(format, dtype):
    x = torch.randn(2, 4096 + 130, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = quantize(x, format), quantize(x.cuda(), format)
    assert torch.equal(there.scales.cpu(), here.scales)
    assert torch.equal(there.values.view(torch.int8).cpu(), here.values.view(torch.int8))
    assert torch.equal(there.dequantize().cpu(), here.dequantize())
    assert torch.equal(
        here.dequantize(torch.empty_like(x, device="cuda")).cpu(), here.dequantize()
    )  # brought in pieces
    assert relative_error(x.cuda(), there) == relative_error(x, here)


@pytest.mark.parametrize("format", FORMATS)
def test_any_strides_and_gradients(format):
    x = torch.randn(1, 4, 130, 2, requires_grad=True).transpose(1, 2)
    made = quantize(x, format)
    plain = quantize(x.detach().contiguous(), format)
    assert torch.equal(made.dequantize(), plain.dequantize())
    assert not made.scales.requires_grad
    assert made.values.is_contiguous()
    before = x.detach().clone()
    assert torch.equal(before, x)  # quantizing changes nothing


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_and_copies(format):
    made = quantize(torch.randn(1, 130, 2, 16).bfloat16(), format)
    assert made.nbytes == 130 * 2 * 16 + 4 * 3 * 2
    copies = [copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    assert all(torch.equal(one.dequantize(), made.dequantize()) for one in copies)


def test_memory_is_that_of_a_piece(monkeypatch):
    """However long the row, what is held in float32 at a time is one piece of it."""
    held = []

    def watched(tokens):
        for piece in pieces(tokens):
            held.append(piece[0].size)
            yield piece

    pieces = module._pieces
    monkeypatch.setattr(module, "_pieces", watched)
    quantize(torch.randn(1, 10_000, 1, 2), "int8").dequantize()
    assert sum(held) == 20_000
    assert max(held) == 4096


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_refuses_what_is_not_finite(bad, format):
    x = torch.zeros(1, 100, 2, 4)
    x[0, 70, 1, 2] = bad
    with pytest.raises(ValueError, match=r"^x: got NaN or infinite entries, expected finite keys or values"):
        quantize(x, format)


def test_refuses_other_formats_and_shapes():
    with pytest.raises(ValueError, match=r"^format: got 'int4', expected one of \['int8', 'fp8'\]"):
        quantize(torch.zeros(1, 2, 3, 4), "int4")
    with pytest.raises(ValueError, match=r"^x: got \[2, 3, 4\] in torch.float32, expected .* \[batch, tokens, heads"):
        quantize(torch.zeros(2, 3, 4), "int8")
    with pytest.raises(ValueError, match=r"^x: got \[1, 2, 3, 4\] in torch.int64, expected floating-point keys"):
        quantize(torch.zeros(1, 2, 3, 4, dtype=torch.int64), "int8")
