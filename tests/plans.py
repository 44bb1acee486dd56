"""Attention plans, drawn and written out token by token."""

import torch
from hypothesis import strategies as st

from lct_core.layout import Shot

GLOBAL = Shot(text=2, grid=(1, 1, 2), role="global")
A = Shot(text=1, grid=(1, 2, 1))
B = Shot(text=0, grid=(1, 1, 1))


@st.composite
def histories(draw, layout):
    """For every shot some of the earlier shots of its scene, in any order."""
    chosen = []
    for scene in layout.scene_shots:
        for shot in scene:
            earlier = list(range(scene.start, shot))
            chosen.append(draw(st.lists(st.sampled_from(earlier), max_size=4)) if earlier else [])
    return chosen


def from_varlen(varlen, queries, keys):
    """Who sees whom, as a variable-length kernel reads its arguments."""
    dense = torch.zeros(queries, keys, dtype=torch.int64)
    for i, used in enumerate(varlen.seqused_k.tolist()):
        q = slice(varlen.cu_seqlens_q[i], varlen.cu_seqlens_q[i + 1])
        places = torch.arange(varlen.cu_seqlens_k[i], varlen.cu_seqlens_k[i] + used)
        for k in places if varlen.key_index is None else varlen.key_index[places]:
            dense[q, k] += 1
    return dense


def check_varlen(plan):
    varlen = plan.varlen()
    sequences = len(plan.segments)
    assert torch.equal(from_varlen(varlen, plan.queries, plan.keys), plan.dense().long())  # 1, not 2: no key twice
    sizes = varlen.cu_seqlens_q.diff()
    assert (len(sizes), varlen.seqused_k.shape) == (sequences, (sequences,))
    assert varlen.cu_seqlens_q[0] == 0
    assert varlen.cu_seqlens_q[-1] == plan.queries
    assert (varlen.max_seqlen_q, varlen.max_seqlen_k) == (sizes.max(), varlen.seqused_k.max())
    assert {varlen.cu_seqlens_q.dtype, varlen.cu_seqlens_k.dtype, varlen.seqused_k.dtype} == {torch.int32}
    assert (varlen.key_index is None) == all(len(s.keys) == 1 for s in plan.segments)
    assert varlen.cu_seqlens_k.shape == (sequences + 1,)
    if varlen.key_index is not None:  # end to end
        assert torch.equal(varlen.cu_seqlens_k.diff(), varlen.seqused_k)
        assert varlen.cu_seqlens_k[-1] == len(varlen.key_index)
