"""The Triton kernel of :mod:`lct_plugins.triton_rotary`, whose functions in plain torch say what it computes."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def turn(
    x,
    cos,
    sin,
    weight,
    out,
    eps,
    x_strides,
    cos_strides,
    sin_strides,
    weight_strides,
    out_strides,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    DISTANCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    ACROSS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One token of all heads, normed, turned and written; ``ROWS`` and ``COLUMNS`` are powers of two that hold them.

    Every channel adds up itself times the cosine and its partner, read once more, times the sine: so both what is read
    first and what is written lie contiguous, whatever the pairing. Channels that are not turned have cosine 1 and sine
    0. Offsets are int64 down to the head: a row may pass 2³¹ elements.
    """
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.arange(0, ROWS)[:, None].to(tl.int64)
    channel = tl.arange(0, COLUMNS)[None, :]
    pair = channel // (2 * DISTANCE) * DISTANCE + channel % DISTANCE
    first = channel // DISTANCE % 2 == 0
    partner = tl.where(first, channel + DISTANCE, channel - DISTANCE)
    inside = (head < HEADS) & (channel < HEAD_DIM)
    turned = (head < HEADS) & (channel < 2 * PAIRS)

    x += batch * x_strides[0] + token * x_strides[1] + head * x_strides[2]
    a = tl.load(x + channel * x_strides[3], mask=inside, other=0.0).to(EXACT)
    b = tl.load(x + partner * x_strides[3], mask=turned, other=0.0).to(EXACT)
    if NORM:
        squares, count = tl.sum(a * a, axis=1, keep_dims=True), HEAD_DIM
        if ACROSS:
            squares, count = tl.sum(squares, axis=0, keep_dims=True), HEADS * HEAD_DIM
        scale = 1.0 / tl.sqrt(squares / count + eps)
        a, b = a * scale, b * scale
    if WEIGHT:
        weight += head * weight_strides[0]
        a *= tl.load(weight + channel * weight_strides[1], mask=inside, other=0.0).to(EXACT)
        b *= tl.load(weight + partner * weight_strides[1], mask=turned, other=0.0).to(EXACT)
    cos += token * cos_strides[0] + head * cos_strides[1]
    sin += token * sin_strides[0] + head * sin_strides[1]
    c = tl.load(cos + pair * cos_strides[2], mask=turned, other=1.0)
    s = tl.load(sin + pair * sin_strides[2], mask=turned, other=0.0)
    a = a * c + b * tl.where(first, -s, s)
    out += batch * out_strides[0] + token * out_strides[1] + head * out_strides[2]
    tl.store(out + channel * out_strides[3], a.to(x.dtype.element_ty), mask=inside)
