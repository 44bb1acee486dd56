"""Plans, inputs and definitions that the tests of attention share."""

import torch

from lct_core import attention
from lct_core.layout import Layout, Shot
from lct_core.patterns import selected_history
from lct_core.plugins.hooks import KernelSpec, hookimpl
from lct_core.plugins.registry import Registry
from lct_core.plugins.torch_kernels import sdpa
from lct_core.testing import kernels

SCENE = Layout([[Shot(3, (1, 2, 2)), Shot(0, (2, 3, 3)), Shot(5, (1, 1, 1)), Shot(1, (1, 4, 3))], [Shot(2, (1, 3, 3))]])
GAPS = selected_history(SCENE, [[], [0], [0], [0, 2], []])


def draw(plan, heads=2, kv_heads=2, head_dim=8, *, batch=2, dtype=torch.float32, grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, n, h, head_dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
        for n, h in ((plan.queries, heads), (plan.keys, kv_heads), (plan.keys, kv_heads))
    ]


def use(monkeypatch, *specs):
    """Let ``attend`` look its kernels up in a registry of its own: torch's, and these."""

    class Plugin:
        @hookimpl
        def lct_kernels(self):
            return list(specs)

    own = Registry()
    own.register(Plugin(), name="test")
    monkeypatch.setattr(attention, "registry", lambda: own)
    monkeypatch.setattr(kernels, "registry", lambda: own)
    return own


def kernel_spec(name, kernel=sdpa, *, refusals=lambda request: [], rank=None):
    return KernelSpec(name=name, summary="for a test", load=lambda: kernel, refusals=refusals, rank=rank)
