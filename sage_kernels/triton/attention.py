"""The attention kernel: INT8 QK and PV in fp16 or int8, one program for BLOCK_M queries of a head.

Scores are in base 2 with every scale folded in; docs/algorithm.md explains the online softmax and the two ways P is kept.
"""

import math

import triton
import triton.language as tl

from .. import quantize as shared
from .quantize import MAGIC, span

P_MAX_LOG2 = tl.constexpr(int(math.log2(shared.PV["fp16/fp32"].p_max)))  # P's factor, in the exponent
LOG2E = tl.constexpr(shared.LOG2E)
MASK_LIMIT = tl.constexpr(shared.MASK_LIMIT)
LN2 = tl.constexpr(math.log(2.0))
KEY_GROUP = tl.constexpr(
    shared.GRANULARITIES["per_thread"].k_block
)  # keys of one K scale (interleaved four ways if SUB_K is 4)


@triton.jit
def apply_mask(
    score, m, n, nq, nk, mask, stride_q, stride_k, CAUSAL: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr
):
    """(score with -inf where hidden, visible). MASK: "none", "bool" or "add" (in natural log, as callers give it).

    ROWS False: the mask is the same for every query, and one row of it is read.
    """
    inside = (n < nk)[None, :] & (m < nq)[:, None]
    visible = inside
    if CAUSAL:
        visible &= n[None, :] <= m[:, None]
    if MASK != "none":
        at = mask + n[None, :].to(tl.int64) * stride_k
        if ROWS:
            value = tl.load(at + m[:, None].to(tl.int64) * stride_q, mask=inside, other=0)
        else:
            value = tl.load(at, mask=(n < nk)[None, :], other=0)
        if MASK == "bool":
            visible &= value != 0
        else:
            bias = value.to(tl.float32)
            visible &= bias != float("-inf")
            # a finite value, such as a dtype's smallest, must not become an inf in base 2
            near = tl.minimum(tl.maximum(bias, -MASK_LIMIT), MASK_LIMIT)
            bias = tl.where(tl.abs(bias) < float("inf"), near, bias) * LOG2E
            score += tl.where(visible, bias, 0.0)
    return tl.where(visible, score, float("-inf")), visible


@triton.jit
def attend(
    state, q, q_scale, lo, hi, m, nq, nk, k_codes, k_scale, v_codes, v_sums, mask, stride_mq, stride_mk, padded,
    D: tl.constexpr, BLOCK_N: tl.constexpr, SUB_K: tl.constexpr, INT8_V: tl.constexpr, CHECK: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from lo to hi. CHECK: a key of these tiles may be hidden from a query. WIDE: a head's keys reach past
    what 32-bit offsets do; the others keep them, for 64-bit ones cost 10 % of the time (docs/triton.md)."""
    acc, total, top = state
    channel = tl.arange(0, D)
    wide_channel = channel.to(tl.int64) if WIDE else channel
    for start in tl.range(lo, hi, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        n = start + tl.arange(0, BLOCK_N)
        at = n.to(tl.int64) if WIDE else n
        keys = tl.load(k_codes + at[None, :] * D + channel[:, None])
        score = tl.dot(q, keys).to(tl.float32)
        if SUB_K == 1 and BLOCK_N == KEY_GROUP:  # one K scale: rows carry it, so no score is multiplied twice
            scale = q_scale * tl.load(k_scale + start // KEY_GROUP)
        else:
            scale = q_scale
            score *= tl.load(k_scale + n // KEY_GROUP * SUB_K + n % 8 * SUB_K // 8)[None, :]
        if CHECK or MASK != "none":
            score, _ = apply_mask(
                score * scale[:, None], m, n, nq, nk, mask, stride_mq, stride_mk, CAUSAL, MASK, MASK_ROWS
            )
            tile_top = tl.max(score, 1)
            new_top = tl.maximum(top, tile_top)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            tile_base = tl.where(tile_top == float("-inf"), 0.0, tile_top)
            scale = tl.full(scale.shape, 1.0, tl.float32)
        else:
            tile_top = tl.max(score, 1) * scale
            new_top = tl.maximum(top, tile_top)
            base = new_top
            tile_base = tile_top
        shrink = tl.exp2(top - base)
        if INT8_V:
            # P in 0..255 at the tile's own maximum; the matrix unit takes int8, so 128 is taken off each code and
            # given back through the tile's sum of V.
            # at most 1: a rounded exponent may lift a large score above its own maximum, and a code of 256 would be one of 0
            p = tl.minimum(tl.exp2(score * scale[:, None] - tile_base[:, None]), 1.0)
            codes = ((p * 255.0 + (MAGIC - 128.0)).to(tl.int32, bitcast=True) & 0xFF).to(tl.int8)
            values = tl.load(v_codes + wide_channel[:, None] * padded + at[None, :])  # [D, BLOCK_N]
            offset = tl.load(v_sums + start // BLOCK_N * D + channel) * 128.0
            part = tl.dot(codes, tl.trans(values)).to(tl.float32) + offset[None, :]
            grow = tl.exp2(tile_top - base)
            acc = acc * shrink[:, None] + part * grow[:, None]
            total = total * shrink + tl.sum(p, 1) * grow
        else:
            if CHECK or MASK != "none":  # a mask may say -1e8, beside which 15 is rounded away
                p = tl.exp2((score - base[:, None]) + P_MAX_LOG2)
            else:
                # at most P's largest, for the same reason: fp16 has only one octave above it
                p = tl.minimum(tl.exp2(score * scale[:, None] - (base - P_MAX_LOG2)[:, None]), 2.0**P_MAX_LOG2)
            values = tl.load(v_codes + at[:, None] * D + channel[None, :])
            acc = tl.dot(p.to(tl.float16), values, acc * shrink[:, None])
            total = total * shrink + tl.sum(p, 1)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["heads", "group", "nq", "nk", "blocks"])
def attention_kernel(
    q_codes, q_scales, k_codes, k_scales, v_codes, v_scale, v_sums, put_back, lse_shift, bad, mask, cu_q, cu_k, out, lse,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ob, stride_oh, stride_on,
    heads, group, nq, nk, q_padded, k_padded, blocks,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP_Q: tl.constexpr, SUB_Q: tl.constexpr, SUB_K: tl.constexpr, INT8_V: tl.constexpr, SMOOTH_V: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, LSE: tl.constexpr, SHIFT: tl.constexpr,
    VARLEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [b, nq, d] of one head and, with LSE, its log-sum-exp; heads flagged in `bad` are left alone."""
    pid = tl.program_id(0)
    block = pid % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest rows first
    row = (pid // blocks).to(tl.int64)
    b, h = row // heads, row % heads
    kv_row = b * (heads // group) + h // group
    q_start, q_len = span(cu_q, b, nq, VARLEN)
    _, k_len = span(cu_k, b, nk, VARLEN)
    first = block * BLOCK_M
    if (first >= q_len) | (tl.load(bad + kv_row) != 0):
        return

    m = first + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, D)
    q = tl.load(q_codes + (row * q_padded + m[:, None]) * D + channel[None, :])
    q_scale = tl.load(q_scales + row * (q_padded // GROUP_Q * SUB_Q) + m // GROUP_Q * SUB_Q + m % 8 * SUB_Q // 8)
    k_codes += kv_row * k_padded * D
    v_codes += kv_row * k_padded * D
    k_scales += kv_row * (k_padded // KEY_GROUP * SUB_K)
    v_sums += kv_row * (k_padded // BLOCK_N) * D
    if MASK != "none":
        mask += b * stride_mb + h * stride_mh

    if CAUSAL:
        hi = tl.minimum(k_len, first + BLOCK_M)
        whole = tl.minimum(k_len, first + 1) // BLOCK_N * BLOCK_N
    else:
        hi = k_len
        whole = k_len // BLOCK_N * BLOCK_N
    state = (
        tl.zeros([BLOCK_M, D], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
    )
    state = attend(
        state, q, q_scale, 0, whole, m, q_len, k_len, k_codes, k_scales, v_codes, v_sums, mask, stride_mq, stride_mk,
        k_padded, D, BLOCK_N, SUB_K, INT8_V, False, CAUSAL, MASK, MASK_ROWS, WIDE,
    )  # fmt: skip
    state = attend(
        state, q, q_scale, whole, hi, m, q_len, k_len, k_codes, k_scales, v_codes, v_sums, mask, stride_mq, stride_mk,
        k_padded, D, BLOCK_N, SUB_K, INT8_V, True, CAUSAL, MASK, MASK_ROWS, WIDE,
    )  # fmt: skip
    acc, total, top = state

    empty = total == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / total)
    if INT8_V:
        inverse = inverse * (1.0 / 255.0)
    acc = acc * inverse[:, None] * tl.load(v_scale + kv_row * D + channel)[None, :]
    if SMOOTH_V:
        acc += tl.where(empty[:, None], 0.0, tl.load(put_back + kv_row * D + channel)[None, :])
    out += (0 if VARLEN else b) * stride_ob + h * stride_oh + (q_start + m[:, None]) * stride_on
    inside = (m < q_len)[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(out + channel[None, :], acc.to(out.dtype.element_ty), mask=inside)
    if LSE:
        value = top + tl.log2(total)
        if not INT8_V:
            value -= P_MAX_LOG2
        value *= LN2
        if SHIFT:
            value += tl.load(lse_shift + row * q_padded + m)
        tl.store(lse + row * nq + m, tl.where(empty, float("-inf"), value), mask=m < q_len)
