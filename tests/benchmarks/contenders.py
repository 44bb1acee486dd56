"""A tiny case and kernels of every kind: right, wrong and broken."""

import torch

from benchmarks.cases import CASES, REFERENCE_GEMM, Case, Goal, row
from lct_core import KernelSpec, hookimpl
from lct_core.plugins.torch_kernels import sdpa

GPU = [case for case in CASES if case.device == "cuda"]
TINY = Case(
    name="tiny",
    layout=row([40, 25, 63]),
    pattern="context_causal",
    heads=4,
    kv_heads=2,
    head_dim=16,
    dtype=torch.float32,
    direction="forward",
    goals=(Goal(peer="dense", least=1e-9), Goal(peer="masked"), Goal(peer="good", most=1e9)),
    rounds=3,
)


def spec(name, kernel, *, refusals=(), rank=None):
    return KernelSpec(name=name, summary="", load=lambda: kernel, refusals=lambda request: list(refusals), rank=rank)


class Half(torch.autograd.Function):
    """The identity, with half of its gradient."""

    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, grad: grad / 2)


def crash(*args):
    raise RuntimeError("no such engine\nand much more")


KERNELS = {
    "good": lambda q, k, v, plan, scale: sdpa(q, k, v, plan, scale),
    "off": lambda q, k, v, plan, scale: sdpa(q, k, v, plan, scale) + 1e-4,
    "nan": lambda q, k, v, plan, scale: sdpa(q, k, v, plan, scale) * torch.nan,
    "half": lambda q, k, v, plan, scale: Half.apply(sdpa(q, k, v, plan, scale)),
    "broken": crash,
}


def announce(registry, *specs):
    class Plugin:
        @hookimpl
        def lct_kernels(self):
            return [*specs]

    registry.register(Plugin(), name="+".join(s.name for s in specs))


def mortal(times):
    """A device that answers so many times."""
    answers = iter([True] * times)
    return lambda device: next(answers, False)


def gpu_record(case, *, rate=500.0, gemm=REFERENCE_GEMM, **changes):
    def timed(flops, tflops):
        seconds = flops / tflops / 1e12
        spread = {"seconds": seconds, "low": 0.99 * seconds, "high": 1.01 * seconds}
        return {**spread, "flops": flops, "gflops_per_second": 1e3 * tflops}

    return {
        "name": case.name,
        "date": "2000-01-01T00:00:00",
        "machine": {"cpu": "", "threads": 1, "instructions": "", "gpu": "Some GPU", "driver": "1", "cuda": "1"},
        "versions": {"torch": "1"},
        "source": {"commit": None, "dirty": None, "digest": "abcdef"},
        "device": "cuda",
        "shape": case.shape,
        "rounds": 3,
        "times": {"mine": timed(case.flops, rate), "gemm": timed(1e12, gemm)},
        "comparisons": [
            {"what": "rate / gemm", "median": rate / gemm, "low": 0, "high": 1, "met": rate / gemm >= goal_of(case)}
            | {"least": goal_of(case), "most": None}
        ],
        "auto": "mine",
        "lost": {},
        "refusals": {"picky": ["not today"]},
        "roofline": {"gemm_gflops_per_second": 1e3 * gemm, "copy_gigabytes_per_second": 4000.0},
        "running": {"sm_clock_megahertz": {"median": 1700.0, "low": 1600.0, "high": 1800.0}},
    } | changes


def goal_of(case):
    return case.goals[0].least
