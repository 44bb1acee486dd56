"""Rotation fused with what stands beside it, in Triton."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from lct_backbones.mmdit import MMDiTBackbone, tiny
from lct_core import KVCache, Rotation, rotate
from lct_core.testing.tolerances import BOUNDS, error
from lct_plugins import triton_rotary
from lct_plugins.triton_rotary import naive_norm_rotate, norm_rotate
from tests.rotations import PAIRINGS, draw, engine, flat, inside, levels_of, same, scenes_of, shots_of, turn

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EXACT = BOUNDS[torch.float32]["definition"].absolute


@pytest.fixture(scope="module")
def interpreted():
    """Triton reads the environment when a kernel is defined: so too its own sum, which ours calls.

    Its sum made anew as a kernel would leave Triton's language interpreted for all that is compiled later.
    """
    tl = pytest.importorskip("triton.language")
    name = "lct_plugins._triton_rotary"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        add = tl.standard._sum_combine
        patch.setattr(tl, "sum", lambda x, axis, keep_dims: tl.reduce(x, axis, add, keep_dims=keep_dims))
        patch.delitem(sys.modules, name, raising=False)
        yield "cpu"
        sys.modules.pop(name, None)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lct_plugins._triton_rotary import turn

def compiled(dtype, *, norm, pairs, distance, heads=24, head_dim=128):
    strides = {"x": 4, "cos": 3, "sin": 3, "weight": 2, "out": 4}
    types = {name: "*fp32" if name in ("cos", "sin") else f"*{dtype}" for name in strides}
    types |= {f"{name}_strides": ("i32",) * count for name, count in strides.items()} | {"eps": "fp32"}
    constants = {
        "HEADS": heads, "HEAD_DIM": head_dim, "PAIRS": pairs, "DISTANCE": distance, "ROWS": 32, "COLUMNS": 128,
        "NORM": norm, "WEIGHT": norm, "ACROSS": norm, "EXACT": triton.language.float32,
    }
    types |= dict.fromkeys(constants, "constexpr")
    indices = {(turn.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=turn, signature={name: types[name] for name in turn.arg_names}, constexprs=indices)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]

assert compiled("bf16", norm=False, pairs=64, distance=1)
assert compiled("bf16", norm=True, pairs=60, distance=20)
"""


def test_triton_compiles_for_hopper():
    """In a process of its own, where Triton is not the interpreter."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-W", "error", "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=on_gpu)])
def device(request):
    return request.getfixturevalue("interpreted") if request.param == "interpreted" else "cuda"


def on(device, *dtypes):
    """The dtypes to test: on a GPU, bfloat16 too."""
    return dtypes if device == "cpu" else (*dtypes, torch.bfloat16)


def alike(got, expected):
    """To the last bit under the interpreter; on a GPU, to one rounding."""
    return torch.equal(got, expected) or (got.is_cuda and error(got, expected) <= torch.finfo(got.dtype).eps)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("head_dim", [18, 23])
def test_triton_rotates_every_channel_into_its_place(device, pairing, heads, head_dim):
    for dtype in on(device, torch.float32, torch.float16, torch.float64):
        for target in {dtype, torch.float16, torch.float32}:
            (x,) = shots_of((4,), heads=3, head_dim=head_dim, dtype=dtype)
            x, by = x.to(device), turn(pairing, 4, heads=heads, device=device)
            out, beside = inside(4, 2, 3, head_dim, dtype=target, device=device)
            triton_rotary.rotate_into(x, by, out)
            assert alike(out, rotate(x, by).to(target))
            assert bool(beside().isnan().all())


def test_triton_takes_tensors_of_any_strides(device):
    by = turn("interleaved", 4, dtype=torch.float64, device=device)
    by = by._replace(cos=by.cos.repeat_interleave(2, -1)[..., ::2], sin=by.sin.mT.contiguous().mT)
    x = draw(3, 22, 2, 4, device=device).permute(2, 3, 0, 1)
    out = torch.full((4, 3, 22, 2), float("nan"), device=device).permute(3, 0, 1, 2)
    triton_rotary.rotate_into(x, by, out)
    assert alike(out, rotate(x, by))


def test_triton_in_the_engine(interpreted):
    """With gradients, and with a cache."""
    results = []
    for rotary in (triton_rotary.rotate_into, None):
        adapter, cache = MMDiTBackbone(tiny()), KVCache()
        model, scenes, t = engine(adapter, rotary=rotary), scenes_of(adapter), levels_of()
        outs = flat(model(scenes, t, pattern="context_causal"))
        sum(out.square().sum() for out in outs).backward()
        gradients = torch.cat([p.grad.flatten() for p in adapter.model.parameters() if p.grad is not None])
        with torch.no_grad():
            model(scenes[0][:1], t[:1], cache=cache)
            cache.append(0)
            outs += model(scenes[0][1:2], t[1:2], cache=cache)
        results.append((outs, gradients))
    (got, of_got), (expected, of_expected) = results
    assert same(got, expected)
    assert error(of_got, of_expected) <= BOUNDS[torch.float32]["checkpointed"].absolute


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("weights", [None, (23,), (3, 23)])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_triton_norms_and_rotates(device, pairing, weights, across_heads):
    by = turn(pairing, 4, heads=3 if across_heads else 1, dtype=torch.float64, device=device)
    for dtype in on(device, torch.float32, torch.float16, torch.float64):
        (x,) = shots_of((4,), heads=3, head_dim=23, dtype=dtype)
        x, weight = x.to(device), None if weights is None else draw(*weights, seed=3, dtype=dtype, device=device)
        options = {"eps": 1e-3, "across_heads": across_heads}
        exact = dtype == torch.float64
        by_of_x = by if exact else Rotation(by.cos.float(), by.sin.float(), pairing)
        wanted = [tensor for tensor in (x, weight) if tensor is not None]
        gradient, outputs = draw(2, 4, 3, 23, seed=5, dtype=dtype, device=device), []
        for function, to in ((norm_rotate, dtype), (naive_norm_rotate, dtype), (naive_norm_rotate, torch.float64)):
            given = [tensor.to(to).requires_grad_() for tensor in wanted]
            out = function(given[0], by if to == torch.float64 else by_of_x, *given[1:], **options)
            outputs.append([out, *torch.autograd.grad(out, given, gradient.to(to))])
        for got, plain, truth, like in zip(*outputs, [x, *wanted], strict=True):
            assert (got.dtype, got.shape) == (like.dtype, like.shape)
            assert error(got, truth) <= (1e-14 if exact else max(EXACT, 2 * error(plain, truth)))


def test_the_definition_of_the_norm_is_torchs():
    (x,), weight = shots_of((4,), heads=3), draw(22, seed=1)
    got = naive_norm_rotate(x, turn("half", 4), weight, eps=1e-3)
    assert error(got, rotate(F.rms_norm(x, (22,), weight, 1e-3), turn("half", 4))) <= EXACT
    weight = draw(3, 22, seed=1)
    got = naive_norm_rotate(x, turn("half", 4), weight, eps=1e-3, across_heads=True)
    expected = F.rms_norm(x.flatten(2), (66,), weight.flatten(), 1e-3).unflatten(2, (3, 22))
    assert error(got, rotate(expected, turn("half", 4))) <= EXACT


def test_norm_rotate_refuses(interpreted):
    (x,), by = shots_of((3,)), turn("half", 3)
    with pytest.raises(ValueError, match=r"^weight: got \[44\], expected \[22\], or \[2, 22\] where every head"):
        norm_rotate(x, by, torch.ones(44), eps=1e-6)
    with pytest.raises(ValueError, match=r"^by: its angles want gradients, which there are none for; detach them"):
        norm_rotate(x, by._replace(cos=by.cos.requires_grad_()), eps=1e-6)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (x,) = shots_of((3,))
    with pytest.raises(ValueError, match=r"^x: got a tensor on cpu, expected one on cuda, or Triton's interpreter"):
        triton_rotary.rotate_into(x, turn("half", 3), torch.empty_like(x))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^rotary: there is no triton; .* install it, or leave this out"):
        triton_rotary.rotate_into(x, turn("half", 3), torch.empty_like(x))
