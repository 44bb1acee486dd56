"""Plans that the tests of the Triton kernel share."""

import torch

from lct_core.layout import Layout, Shot
from lct_core.patterns import context_causal

# two packed scenes; shots of one token, and none a multiple of a tile
SCENES = Layout(
    [[Shot(3, (1, 4, 5)), Shot(0, (1, 1, 1)), Shot(5, (2, 3, 4)), Shot(0, (1, 1, 1))], [Shot(2, (1, 3, 7))]]
)
CAUSAL = context_causal(SCENES)


def lse_of(q, k, plan, scale):
    keys = k.double().repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q.double(), keys)
    return scores.masked_fill(~plan.dense(device=q.device), float("-inf")).logsumexp(-1)


def draw(plan, heads=2, kv_heads=1, head_dim=16, *, batch=2, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((plan.queries, heads), (plan.keys, kv_heads), (plan.keys, kv_heads), (plan.queries, heads))
    return [torch.randn(batch, n, h, head_dim, generator=generator).to(device, dtype) for n, h in shapes]
