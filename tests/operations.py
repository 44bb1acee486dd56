"""Floating point operations while a model runs, counted by the tests themselves.

torch's ``FlopCounterMode`` counts the CPU's flash attention from torch 2.15 on; before, it takes it for nothing.
"""

from collections import Counter
from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def product(a, b):
    return 2 * a.numel() * b.shape[-1]


def convolution(x, weight, bias, stride, padding, dilation, transposed, *_, out):
    return 2 * len(x) * prod((x if transposed else out).shape[2:]) * weight.numel()


def pairs(q, k):
    return prod(q.shape[:-1]) * k.shape[-2]


def attention(q, k, v):
    """Of every query with every key, whatever the mask: the scores, and the values' sum."""
    return 2 * pairs(q, k) * (q.shape[-1] + v.shape[-1])


def attention_backward(q, k, v):
    """The scores once more, and the gradients of scores, values, queries and keys."""
    return 2 * pairs(q, k) * (3 * q.shape[-1] + 2 * v.shape[-1])


ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
ATTENTION_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
)
COUNTED = {
    aten.mm: lambda a, b, *_, out: product(a, b),
    aten.addmm: lambda _, a, b, *__, out: product(a, b),
    aten.bmm: lambda a, b, *_, out: product(a, b),
    aten.baddbmm: lambda _, a, b, *__, out: product(a, b),
    aten.convolution: convolution,
    **dict.fromkeys(ATTENTION, lambda q, k, v, *_, out: attention(q, k, v)),
    **dict.fromkeys(ATTENTION_BACKWARD, lambda _, q, k, v, *__, out: attention_backward(q, k, v)),
}


class Operations(TorchDispatchMode):
    """Counts what matrix products take, two operations for a multiplication and its addition, as torch does.

    Other operations are nothing, but an attention or a convolution that this has no formula for is an error.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    @property
    def total(self):
        return self.counts.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, op = kwargs or {}, func._overloadpacket
        if op not in COUNTED:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            assert not any(name in str(op) for name in ("attention", "convolution")), f"{op} has no formula"
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self.counts[op] += COUNTED[op](*args, out=out)
        return out
