"""The Triton kernels of :mod:`lct_plugins.triton_attention`; :mod:`lct_plugins.triton_naive` says what they compute.

Every program takes one row of a table of tiles: ``own`` (its rows, which are queries, or keys for ``keys_backward``),
``seen`` (what any of them attends to or is attended by) and ``full`` (whole chunks within ``seen`` that all of them
do), six int32 in all. It walks ``seen`` in chunks, in three loops: only those before and after ``full`` know of masks.

Tile bases are int64, since a token's place times its stride passes 2³¹ in long scenes; the offsets within a tile are
int32, which the host sees to. Scores are in units of log 2, since the hardware has exp2 alone.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

# its exp2 is 0; finite, since a row that has seen no key yet must not make inf - inf
_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LENGTHS = ("queries", "keys")  # ragged: no kernel is compiled anew for a multiple of 16


@triton.jit(do_not_specialize=_LENGTHS)
def forward(
    q_in,
    k_in,
    v_in,
    out,
    lse,
    tiles,
    starts,
    stops,
    scale,
    queries,
    heads,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    q_token: tl.constexpr,
    k_token: tl.constexpr,
    v_token: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Output and log-sum-exp of ``ROWS`` queries of one head, over chunks of ``COLUMNS`` keys."""
    tile = tiles + 6 * tl.program_id(0)
    first, last = tl.load(tile), tl.load(tile + 1)
    begin, end = tl.load(tile + 2), tl.load(tile + 3)
    full, masked = tl.load(tile + 4), tl.load(tile + 5)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    dim = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, ROWS)
    inside = first + row < last

    q_base = q_in + batch * q_batch + head * q_head + first.to(tl.int64) * q_token
    q = tl.load(q_base + row[:, None] * q_token + dim[None, :], mask=inside[:, None], other=0.0)
    start = tl.load(starts + first + row, mask=inside, other=0)
    stop = tl.load(stops + first + row, mask=inside, other=2147483647)  # rows past the end see something: no 0 / 0
    k_base = k_in + batch * k_batch + head // GROUP * k_head
    v_base = v_in + batch * v_batch + head // GROUP * v_head
    acc = tl.full([ROWS, HEAD_DIM], 0.0, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    top = tl.full([ROWS], _LOWEST, tl.float32)
    scale *= _LOG2E

    acc, total, top = _attend(
        acc, total, top, q, k_base, v_base, k_token, v_token, start, stop, scale, begin, full, end, COLUMNS // 2, True
    )
    acc, total, top = _attend(
        acc, total, top, q, k_base, v_base, k_token, v_token, start, stop, scale, full, masked, end, COLUMNS, False
    )
    acc, total, top = _attend(
        acc, total, top, q, k_base, v_base, k_token, v_token, start, stop, scale, masked, end, end, COLUMNS // 2, True
    )

    acc = acc / total[:, None]
    out_base = out + ((batch * queries + first) * heads + head) * HEAD_DIM
    offsets = row[:, None] * (heads * HEAD_DIM) + dim[None, :]
    tl.store(out_base + offsets, acc.to(out.dtype.element_ty), mask=inside[:, None])
    lse_base = lse + (batch * heads + head) * queries + first
    tl.store(lse_base + row, (top + tl.log2(total)) * _LN2, mask=inside)


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    k_base,
    v_base,
    k_token: tl.constexpr,
    v_token: tl.constexpr,
    start,
    stop,
    scale,
    first,
    last,
    end,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the chunks of keys from ``first`` to ``last``; with a mask, none from ``end`` on is read."""
    column = tl.arange(0, COLUMNS)
    dim = tl.arange(0, q.shape[1])
    k_base += first.to(tl.int64) * k_token
    v_base += first.to(tl.int64) * v_token
    k_offsets = column[:, None] * k_token + dim[None, :]
    v_offsets = column[:, None] * v_token + dim[None, :]
    for n in range(first, last, COLUMNS):
        if MASKED:
            key = n + column
            seen = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
            k = tl.load(k_base + k_offsets, mask=(key < end)[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            highest = tl.max(tl.where(seen, scores * scale, _LOWEST), 1)
        else:
            k = tl.load(k_base + k_offsets)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            highest = tl.max(scores, 1) * scale
        higher = tl.maximum(top, highest)
        scores = scores * scale - higher[:, None]
        if MASKED:
            scores = tl.where(seen, scores, _LOWEST)
        p = tl.exp2(scores)
        shrink = tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = tl.load(v_base + v_offsets, mask=(key < end)[:, None], other=0.0) if MASKED else tl.load(v_base + v_offsets)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        k_base += COLUMNS * k_token
        v_base += COLUMNS * v_token
    return acc, total, top


@triton.jit(do_not_specialize=_LENGTHS)
def row_sums(
    out,
    dout,
    delta,
    queries,
    heads,
    dout_batch,
    dout_head,
    dout_token: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``delta``, the sum of out · dout over every row, in float32: what the softmax takes off its gradient."""
    first = tl.program_id(0) * ROWS
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    dim = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, ROWS)
    inside = first + row < queries
    out_base = out + ((batch * queries + first) * heads + head) * HEAD_DIM
    dout_base = dout + batch * dout_batch + head * dout_head + first.to(tl.int64) * dout_token
    o = tl.load(out_base + row[:, None] * (heads * HEAD_DIM) + dim[None, :], mask=inside[:, None], other=0.0)
    do = tl.load(dout_base + row[:, None] * dout_token + dim[None, :], mask=inside[:, None], other=0.0)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + (batch * heads + head) * queries + first + row, sums, mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def queries_backward(
    q_in,
    k_in,
    v_in,
    dout,
    lse,
    delta,
    dq,
    tiles,
    starts,
    stops,
    scale,
    queries,
    heads,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    dout_batch,
    dout_head,
    q_token: tl.constexpr,
    k_token: tl.constexpr,
    v_token: tl.constexpr,
    dout_token: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of ``ROWS`` queries of one head, over chunks of ``COLUMNS`` keys."""
    tile = tiles + 6 * tl.program_id(0)
    first, last = tl.load(tile), tl.load(tile + 1)
    begin, end = tl.load(tile + 2), tl.load(tile + 3)
    full, masked = tl.load(tile + 4), tl.load(tile + 5)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    dim = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, ROWS)
    inside = first + row < last

    q_base = q_in + batch * q_batch + head * q_head + first.to(tl.int64) * q_token
    q = tl.load(q_base + row[:, None] * q_token + dim[None, :], mask=inside[:, None], other=0.0)
    do_base = dout + batch * dout_batch + head * dout_head + first.to(tl.int64) * dout_token
    do = tl.load(do_base + row[:, None] * dout_token + dim[None, :], mask=inside[:, None], other=0.0)
    sums = (batch * heads + head) * queries + first
    top = tl.load(lse + sums + row, mask=inside, other=0.0) * _LOG2E
    d = tl.load(delta + sums + row, mask=inside, other=0.0)
    start = tl.load(starts + first + row, mask=inside, other=0)
    stop = tl.load(stops + first + row, mask=inside, other=0)
    k_base = k_in + batch * k_batch + head // GROUP * k_head
    v_base = v_in + batch * v_batch + head // GROUP * v_head
    acc = tl.full([ROWS, HEAD_DIM], 0.0, tl.float32)
    scale2 = scale * _LOG2E

    acc = _over_keys(
        acc, q, do, top, d, k_base, v_base, k_token, v_token, start, stop, scale2, begin, full, end, COLUMNS // 2, True
    )
    acc = _over_keys(
        acc, q, do, top, d, k_base, v_base, k_token, v_token, start, stop, scale2, full, masked, end, COLUMNS, False
    )
    acc = _over_keys(
        acc, q, do, top, d, k_base, v_base, k_token, v_token, start, stop, scale2, masked, end, end, COLUMNS // 2, True
    )

    dq_base = dq + ((batch * queries + first) * heads + head) * HEAD_DIM
    offsets = row[:, None] * (heads * HEAD_DIM) + dim[None, :]
    tl.store(dq_base + offsets, (acc * scale).to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _over_keys(
    acc,
    q,
    do,
    top,
    d,
    k_base,
    v_base,
    k_token: tl.constexpr,
    v_token: tl.constexpr,
    start,
    stop,
    scale,
    first,
    last,
    end,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the chunks of keys from ``first`` to ``last`` add to the gradient of the queries."""
    column = tl.arange(0, COLUMNS)
    dim = tl.arange(0, q.shape[1])
    k_base += first.to(tl.int64) * k_token
    v_base += first.to(tl.int64) * v_token
    k_offsets = column[:, None] * k_token + dim[None, :]
    v_offsets = column[:, None] * v_token + dim[None, :]
    for n in range(first, last, COLUMNS):
        if MASKED:
            key = n + column
            k = tl.load(k_base + k_offsets, mask=(key < end)[:, None], other=0.0)
            v = tl.load(v_base + v_offsets, mask=(key < end)[:, None], other=0.0)
        else:
            k = tl.load(k_base + k_offsets)
            v = tl.load(v_base + v_offsets)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - top[:, None]
        if MASKED:
            scores = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None]), scores, _LOWEST)
        ds = tl.exp2(scores) * (tl.dot(do, tl.trans(v), input_precision="ieee") - d[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
        k_base += COLUMNS * k_token
        v_base += COLUMNS * v_token
    return acc


@triton.jit(do_not_specialize=_LENGTHS)
def keys_backward(
    q_in,
    k_in,
    v_in,
    dout,
    lse,
    delta,
    dk,
    dv,
    tiles,
    starts,
    stops,
    scale,
    queries,
    keys,
    kv_heads,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    dout_batch,
    dout_head,
    q_token: tl.constexpr,
    k_token: tl.constexpr,
    v_token: tl.constexpr,
    dout_token: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of ``ROWS`` keys and values of one head, over chunks of ``COLUMNS`` queries of all its heads."""
    tile = tiles + 6 * tl.program_id(0)
    first, last = tl.load(tile), tl.load(tile + 1)
    begin, end = tl.load(tile + 2), tl.load(tile + 3)
    full, masked = tl.load(tile + 4), tl.load(tile + 5)
    batch, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    batch, kv_head = batch.to(tl.int64), kv_head.to(tl.int64)
    dim = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, ROWS)
    key = first + row
    inside = key < last

    k_base = k_in + batch * k_batch + kv_head * k_head + first.to(tl.int64) * k_token
    k = tl.load(k_base + row[:, None] * k_token + dim[None, :], mask=inside[:, None], other=0.0)
    v_base = v_in + batch * v_batch + kv_head * v_head + first.to(tl.int64) * v_token
    v = tl.load(v_base + row[:, None] * v_token + dim[None, :], mask=inside[:, None], other=0.0)
    dk_acc = tl.full([ROWS, HEAD_DIM], 0.0, tl.float32)
    dv_acc = tl.full([ROWS, HEAD_DIM], 0.0, tl.float32)
    scale2 = scale * _LOG2E

    for g in range(GROUP):
        head = kv_head * GROUP + g
        q_base = q_in + batch * q_batch + head * q_head
        do_base = dout + batch * dout_batch + head * dout_head
        lse_base = lse + (batch * kv_heads * GROUP + head) * queries
        delta_base = delta + (batch * kv_heads * GROUP + head) * queries
        dk_acc, dv_acc = _over_queries(
            dk_acc, dv_acc, k, v, key, q_base, do_base, lse_base, delta_base, q_token, dout_token, starts, stops,
            scale2, begin, full, end, COLUMNS // 2, True,
        )  # fmt: skip
        dk_acc, dv_acc = _over_queries(
            dk_acc, dv_acc, k, v, key, q_base, do_base, lse_base, delta_base, q_token, dout_token, starts, stops,
            scale2, full, masked, end, COLUMNS, False,
        )  # fmt: skip
        dk_acc, dv_acc = _over_queries(
            dk_acc, dv_acc, k, v, key, q_base, do_base, lse_base, delta_base, q_token, dout_token, starts, stops,
            scale2, masked, end, end, COLUMNS // 2, True,
        )  # fmt: skip

    base = ((batch * keys + first) * kv_heads + kv_head) * HEAD_DIM
    offsets = row[:, None] * (kv_heads * HEAD_DIM) + dim[None, :]
    tl.store(dk + base + offsets, (dk_acc * scale).to(dk.dtype.element_ty), mask=inside[:, None])
    tl.store(dv + base + offsets, dv_acc.to(dv.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _over_queries(
    dk,
    dv,
    k,
    v,
    key,
    q_base,
    do_base,
    lse_base,
    delta_base,
    q_token: tl.constexpr,
    do_token: tl.constexpr,
    starts,
    stops,
    scale,
    first,
    last,
    end,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the chunks of queries from ``first`` to ``last`` add to the gradients of keys and values."""
    column = tl.arange(0, COLUMNS)
    dim = tl.arange(0, k.shape[1])
    q_base += first.to(tl.int64) * q_token
    do_base += first.to(tl.int64) * do_token
    q_offsets = column[:, None] * q_token + dim[None, :]
    do_offsets = column[:, None] * do_token + dim[None, :]
    for n in range(first, last, COLUMNS):
        query = n + column
        if MASKED:
            inside = query < end
            start = tl.load(starts + query, mask=inside, other=0)
            stop = tl.load(stops + query, mask=inside, other=0)
            seen = (key[:, None] >= start[None, :]) & (key[:, None] < stop[None, :])
            q = tl.load(q_base + q_offsets, mask=inside[:, None], other=0.0)
            do = tl.load(do_base + do_offsets, mask=inside[:, None], other=0.0)
            top = tl.load(lse_base + query, mask=inside, other=0.0) * _LOG2E
        else:
            q = tl.load(q_base + q_offsets)
            do = tl.load(do_base + do_offsets)
            top = tl.load(lse_base + query) * _LOG2E
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - top[None, :]
        if MASKED:
            scores = tl.where(seen, scores, _LOWEST)
        p = tl.exp2(scores)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        # only here: fewer registers are alive
        d = tl.load(delta_base + query, mask=inside, other=0.0) if MASKED else tl.load(delta_base + query)
        ds = p * (dp - d[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        q_base += COLUMNS * q_token
        do_base += COLUMNS * do_token
    return dk, dv
