"""Fused quantisation of q, k and v for the attention kernel. docs/algorithm.md, "Quantisation".

Everything is written padded with zeros to whole tiles of BLOCK tokens and D channels, so that the attention kernel loads
without bounds. A kv head that holds a NaN, an inf or a magnitude of LARGEST, or whose mean is inf, is flagged in `bad`;
exact.py then serves it.
"""

import triton
import triton.language as tl

from .. import quantize as shared

BLOCK = tl.constexpr(
    shared.INT8_KEY_TILE
)  # tokens a program quantises; also the int8 PV tile, whose sums of V it writes
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest even integer
TINY = tl.constexpr(shared.TINY)
LARGEST = tl.constexpr(shared.LARGEST)
HASH = tl.constexpr(shared.HASH)


@triton.jit
def span(cu, b, n, VARLEN: tl.constexpr):
    """(first token, number of tokens) of batch entry b: row b of a padded batch, or the packed sequence b. Never more than
    n, the longest that the caller named: all memory is sized by that, and nobody has looked at cu."""
    if VARLEN:
        first = tl.load(cu + b)
        return first.to(tl.int64), tl.minimum(tl.maximum(tl.load(cu + b + 1) - first, 0), n)
    else:
        return tl.zeros((), tl.int64), n


@triton.jit
def rotation(first, ROWS: tl.constexpr, D: tl.constexpr, dtype: tl.constexpr):
    """Rows first .. first + ROWS of quantize.rotation_signs(D)[:, None] * Hadamard(D), made from the bits of the indices."""
    i = first + tl.arange(0, ROWS)
    odd = i[:, None] & tl.arange(0, D)[None, :]
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    sign = (i.to(tl.uint32) * HASH) >> 31
    return (1 - 2 * ((odd ^ sign.to(tl.int32)[:, None]) & 1)).to(dtype)


@triton.jit
def load_tokens(base, tokens, stride_n, n, first, COLS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[tokens, COLS] of channels first .. first + COLS, zero beyond n tokens and HEAD_DIM channels."""
    channel = first + tl.arange(0, COLS)
    inside = (tokens[:, None] < n) & (channel[None, :] < HEAD_DIM)
    return tl.load(base + tokens[:, None].to(tl.int64) * stride_n + channel[None, :], mask=inside, other=0.0)


@triton.jit
def load_rotated(base, tokens, stride_n, n, turn, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROTATE: tl.constexpr):
    """x [BLOCK, D] float32, rotated if asked. turn: the whole rotation where D is at most 128, else made in slices."""
    if not ROTATE:
        x = load_tokens(base, tokens, stride_n, n, 0, D, HEAD_DIM).to(tl.float32)
    elif D <= 128:
        x = tl.dot(load_tokens(base, tokens, stride_n, n, 0, D, HEAD_DIM), turn, input_precision="ieee") * D**-0.5
    else:
        STEP: tl.constexpr = 64
        x = tl.zeros([BLOCK, D], tl.float32)
        for first in range(0, D, STEP):  # not unrolled, so that one slice is in shared memory at a time
            part = load_tokens(base, tokens, stride_n, n, first, STEP, HEAD_DIM)
            x = tl.dot(part, rotation(first, STEP, D, part.dtype), x, input_precision="ieee")
        x *= D**-0.5
    return x


@triton.jit
def int8_groups(x, GROUP: tl.constexpr, SUB: tl.constexpr):
    """(codes int8 [BLOCK, D], scales [BLOCK // GROUP * SUB], 1 if x is not all below LARGEST), by Granularity's groups."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as integers, NaN > inf > every number
    top = tl.max(magnitude, 1)
    top = top.to(tl.float32, bitcast=True)
    bad = tl.max((top < LARGEST).to(tl.int32) ^ 1, 0)
    top = tl.reshape(top, [BLOCK // GROUP, GROUP // 8, SUB, 8 // SUB])
    top = tl.max(tl.max(top, 3), 1)  # [BLOCK // GROUP, SUB]
    inverse = tl.where(top > TINY, tl.math.div_rn(127.0, top), 0.0)
    scale = tl.where(top > TINY, tl.math.div_rn(top, 127.0), 0.0)
    spread = tl.broadcast_to(inverse[:, None, :, None], [BLOCK // GROUP, GROUP // 8, SUB, 8 // SUB])
    codes = (x * tl.reshape(spread, [BLOCK])[:, None] + MAGIC) - MAGIC
    return codes.to(tl.int8), tl.reshape(scale, [BLOCK // GROUP * SUB]), bad


@triton.jit
def store_int8(codes, scales, code_ptr, scale_ptr, block, padded, row, D: tl.constexpr, GROUPS: tl.constexpr):
    """Write block number `block` of a [rows, padded, D] code tensor and its [rows, padded // BLOCK * GROUPS] scales."""
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    offset = (row * padded + tokens[:, None]) * D + tl.arange(0, D)[None, :]
    tl.store(code_ptr + offset, codes)
    tl.store(scale_ptr + row * (padded // BLOCK * GROUPS) + block * GROUPS + tl.arange(0, GROUPS), scales)


@triton.jit(do_not_specialize=["kv_heads", "nk", "chunk"])
def stats_kernel(
    k, v, cu_k, partial, bad,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    kv_heads, nk, chunk,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """partial [chunks, b * kv_heads, 4, D]: sum of k, sum of v, smallest v, largest v, over one chunk of tokens each."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    start, n = span(cu_k, b, nk, VARLEN)
    batch = 0 if VARLEN else b
    k += batch * stride_kb + h * stride_kh + start * stride_kn
    v += batch * stride_vb + h * stride_vh + start * stride_vn
    k_sum = tl.zeros([ROWS, D], tl.float32)
    v_sum = tl.zeros([ROWS, D], tl.float32)
    k_high = tl.zeros([ROWS, D], tl.float32)
    low = tl.full([ROWS, D], float("inf"), tl.float32)
    high = tl.full([ROWS, D], float("-inf"), tl.float32)
    first = tl.program_id(1) * chunk
    for at in range(first, min(first + chunk, n), ROWS):
        tokens = at + tl.arange(0, ROWS)
        values = load_tokens(v, tokens, stride_vn, n, 0, D, HEAD_DIM).to(tl.float32)
        keys = load_tokens(k, tokens, stride_kn, n, 0, D, HEAD_DIM).to(tl.float32)
        k_sum += keys
        k_high = tl.maximum(k_high, tl.abs(keys))
        v_sum += values
        inside = tokens[:, None] < n
        low = tl.minimum(low, tl.where(inside, values, float("inf")))
        high = tl.maximum(high, tl.where(inside, values, float("-inf")))
    k_total = tl.sum(k_sum, 0)
    v_total = tl.sum(v_sum, 0)
    channel = tl.arange(0, D)
    partial += (tl.program_id(1) * tl.num_programs(0) + row) * 4 * D + channel
    tl.store(partial, k_total)
    tl.store(partial + D, v_total)
    low_total, high_total = tl.min(low, 0), tl.max(high, 0)
    tl.store(partial + 2 * D, low_total)
    tl.store(partial + 3 * D, high_total)
    largest = tl.maximum(tl.max(k_high, 0), tl.maximum(tl.abs(low_total), tl.abs(high_total)))
    finite = (tl.abs(k_total) < float("inf")) & (tl.abs(v_total) < float("inf"))  # a NaN or inf reaches its sum
    ordinary = finite & ((largest < LARGEST) | (n <= first))
    tl.store(bad + row, 1, mask=tl.min(ordinary.to(tl.int32), 0) == 0)


@triton.jit(do_not_specialize=["kv_heads", "nk", "chunks"])
def finish_stats_kernel(
    partial, cu_k, k_mean, k_mean_rotated, v_mean, v_scale, bad,
    kv_heads, nk, chunks, v_max,
    D: tl.constexpr, ROTATE: tl.constexpr, SMOOTH_K: tl.constexpr, SMOOTH_V: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Means and V's scale per channel, each [b * kv_heads, D], from the partial sums and extremes."""
    row = tl.program_id(0).to(tl.int64)
    _, n = span(cu_k, row // kv_heads, nk, VARLEN)
    channel = tl.arange(0, D)
    k_sum = tl.zeros([D], tl.float32)
    v_sum = tl.zeros([D], tl.float32)
    low = tl.full([D], float("inf"), tl.float32)
    high = tl.full([D], float("-inf"), tl.float32)
    for c in range(0, chunks):
        at = partial + (c * tl.num_programs(0) + row) * 4 * D + channel
        k_sum += tl.load(at)
        v_sum += tl.load(at + D)
        low = tl.minimum(low, tl.load(at + 2 * D))
        high = tl.maximum(high, tl.load(at + 3 * D))
    k_mean_value = k_sum / n if SMOOTH_K else tl.zeros([D], tl.float32)
    v_mean_value = v_sum / n if SMOOTH_V else tl.zeros([D], tl.float32)
    finite = (tl.abs(k_mean_value) < float("inf")) & (tl.abs(v_mean_value) < float("inf"))
    tl.store(bad + row, 1, mask=(n > 0) & (tl.min(finite.to(tl.int32), 0) == 0))  # each is ordinary, their sum is not
    top = tl.maximum(tl.abs(high - v_mean_value), tl.abs(low - v_mean_value))
    if POWER_OF_TWO:
        scale = tl.exp2(tl.ceil(tl.log2(top / v_max)))
    else:
        scale = tl.math.div_rn(top, tl.zeros([D], tl.float32) + v_max)
    tl.store(v_scale + row * D + channel, tl.where((top > TINY) & (n > 0), scale, 0.0))
    tl.store(k_mean + row * D + channel, k_mean_value)
    tl.store(v_mean + row * D + channel, v_mean_value)
    if ROTATE:
        tl.debug_barrier()  # k_mean is read back below by other threads than wrote it
        turned = tl.zeros([D], tl.float32)
        STEP: tl.constexpr = 64
        for first in tl.static_range(0, D, STEP):
            part = tl.load(k_mean + row * D + first + tl.arange(0, STEP))
            turned += tl.sum(part[:, None] * rotation(first, STEP, D, tl.float32), 0)
        tl.store(k_mean_rotated + row * D + channel, turned * (D**-0.5))


@triton.jit(do_not_specialize=["heads", "group", "n_tokens"])
def quantize_qk_kernel(
    x, cu, k_mean, k_mean_rotated, codes, scales, lse_shift, bad,
    stride_b, stride_h, stride_n,
    heads, group, n_tokens, padded, sm_scale, factor,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr,
    ROTATE: tl.constexpr, IS_K: tl.constexpr, SHIFT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """q * factor (sm_scale * log2 e), or k - mean, to int8. SHIFT: for q, also lse_shift = q . k_mean * sm_scale.

    heads counts those of x, and group how many of them share a kv head. Programs (row, i) take blocks i, i + programs, ...
    """
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    kv_row = b * (heads // group) + h // group
    start, n = span(cu, b, n_tokens, VARLEN)
    x += (0 if VARLEN else b) * stride_b + h * stride_h + start * stride_n
    channel = tl.arange(0, D)
    turn = rotation(0, D, D, x.dtype.element_ty) if ROTATE and D <= 128 else 0
    for block in range(tl.program_id(1), tl.cdiv(n, BLOCK), tl.num_programs(1)):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        value = load_rotated(x, tokens, stride_n, n, turn, HEAD_DIM, D, ROTATE)
        if IS_K:
            mean = tl.load(k_mean_rotated + kv_row * D + channel)
            value = tl.where((tokens < n)[:, None], value - mean[None, :], 0.0)
        else:
            value *= factor
        code, scale, flag = int8_groups(value, GROUP, SUB)
        if not IS_K:  # K was looked at by stats_kernel, and the guard has run when K is quantised
            tl.store(bad + kv_row, 1, mask=flag != 0)
        store_int8(code, scale, codes, scales, block, padded, row, D, BLOCK // GROUP * SUB)
        if SHIFT:
            plain = load_tokens(x, tokens, stride_n, n, 0, D, HEAD_DIM).to(tl.float32)
            mean = tl.load(k_mean + kv_row * D + channel)
            tl.store(lse_shift + row * padded + tokens, tl.sum(plain * mean[None, :], 1) * sm_scale)


@triton.jit(do_not_specialize=["kv_heads", "nk"])
def quantize_v_kernel(
    v, cu_k, v_mean, v_scale, codes, v_sums,
    stride_b, stride_h, stride_n,
    kv_heads, nk, padded,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, INT8_V: tl.constexpr, SUM_V: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """(v - mean) / scale to fp16 [tokens, D] or int8 [D, tokens], and its sums per BLOCK of tokens."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    start, n = span(cu_k, b, nk, VARLEN)
    v += (0 if VARLEN else b) * stride_b + h * stride_h + start * stride_n
    channel = tl.arange(0, D)
    mean = tl.load(v_mean + row * D + channel)[None, :]
    scale = tl.load(v_scale + row * D + channel)[None, :]
    inverse = tl.where(scale > 0, tl.math.div_rn(1.0, scale), 0.0)
    for block in range(tl.program_id(1), tl.cdiv(n, BLOCK), tl.num_programs(1)):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        values = load_tokens(v, tokens, stride_n, n, 0, D, HEAD_DIM).to(tl.float32)
        values = tl.where((tokens < n)[:, None], (values - mean) * inverse, 0.0)
        if INT8_V:
            values = tl.minimum(tl.maximum((values + MAGIC) - MAGIC, -127.0), 127.0)
            tl.store(codes + (row * D + channel[None, :]) * padded + tokens[:, None], values.to(tl.int8))
        else:
            rounded = values.to(tl.float16)
            tl.store(codes + (row * padded + tokens[:, None]) * D + channel[None, :], rounded)
            values = rounded.to(tl.float32)
        if SUM_V:
            tl.store(v_sums + (row * (padded // BLOCK) + block) * D + channel, tl.sum(values, 0))


@triton.jit(do_not_specialize=["kv_heads", "nk", "blocks"])
def put_back_kernel(
    v_sums, v_mean, v_scale, put_back, cu_k, kv_heads, nk, blocks, D: tl.constexpr, VARLEN: tl.constexpr
):
    """put_back [b * kv_heads, D]: the mean of V minus the mean that its codes still have."""
    row = tl.program_id(0).to(tl.int64)
    _, n = span(cu_k, row // kv_heads, nk, VARLEN)
    channel = tl.arange(0, D)
    total = tl.zeros([D], tl.float32)
    for block in range(0, tl.cdiv(n, BLOCK)):
        total += tl.load(v_sums + (row * blocks + block) * D + channel)
    at = row * D + channel
    tl.store(put_back + at, tl.load(v_mean + at) - total / n * tl.load(v_scale + at))
