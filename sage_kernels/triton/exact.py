"""Unquantised float32 attention for the heads flagged for a NaN, an inf or huge numbers; returns at once for all others.

It exists so that a NaN or inf stands exactly where exact attention has it, so the products that decide are IEEE float32
(no matrix unit, no speed): q . k here, and in p . v the values are finite by construction.
"""

import triton
import triton.language as tl

from .. import quantize as shared
from .attention import LN2, LOG2E, apply_mask
from .quantize import load_tokens, span

STEP = tl.constexpr(32)  # channels of q . k at a time
P_MAX = tl.constexpr(shared.EXACT_P_MAX)


@triton.jit(do_not_specialize=["heads", "group", "nq", "nk"])
def exact_kernel(
    q, k, v, bad, mask, cu_q, cu_k, out, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_ob, stride_oh, stride_on,
    heads, group, nq, nk, sm_scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr, LSE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Programs (row, i) share the query blocks of one head: i, i + programs, ... Rows are on the grid's first axis everywhere,
    for the others end at 65535."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    kv_head = h // group
    if tl.load(bad + b * (heads // group) + kv_head) == 0:
        return
    q_start, q_len = span(cu_q, b, nq, VARLEN)
    k_start, k_len = span(cu_k, b, nk, VARLEN)
    batch = 0 if VARLEN else b
    q += batch * stride_qb + h * stride_qh + q_start * stride_qn
    k += batch * stride_kb + kv_head * stride_kh + k_start * stride_kn
    v += batch * stride_vb + kv_head * stride_vh + k_start * stride_vn
    out += batch * stride_ob + h * stride_oh
    if MASK != "none":
        mask += b * stride_mb + h * stride_mh
    channel = tl.arange(0, D)
    for first in range(tl.program_id(1) * BLOCK, q_len, tl.num_programs(1) * BLOCK):
        m = first + tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK, D], tl.float32)
        up = tl.zeros([BLOCK, D], tl.float32)  # how many +inf or NaN (down: -inf or NaN) values a query sees
        down = tl.zeros([BLOCK, D], tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        stop = tl.minimum(k_len, first + BLOCK) if CAUSAL else k_len
        for start in range(0, stop, BLOCK):
            n = start + tl.arange(0, BLOCK)
            score = tl.zeros([BLOCK, BLOCK], tl.float32)
            for at in range(0, D, STEP):
                query = load_tokens(q, m, stride_qn, q_len, at, STEP, HEAD_DIM).to(tl.float32)
                keys = load_tokens(k, n, stride_kn, k_len, at, STEP, HEAD_DIM).to(tl.float32)
                # scaled before and not after q . k, which may be larger than a float can be where the score is not
                score = tl.dot(query * sm_scale, tl.trans(keys), score, input_precision="ieee")
            score, visible = apply_mask(
                score * LOG2E, m, n, q_len, k_len, mask, stride_mq, stride_mk, CAUSAL, MASK, MASK_ROWS
            )
            new_top = tl.maximum(top, tl.max(score, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.where(visible, tl.exp2(score - base[:, None]) * P_MAX, 0.0)
            shrink = tl.exp2(top - base)
            values = load_tokens(v, n, stride_vn, k_len, 0, D, HEAD_DIM).to(tl.float32)
            finite = tl.abs(values) < float("inf")
            odd = values != values
            seen = visible.to(tl.float16)
            acc = tl.dot(p, tl.where(finite, values, 0.0), acc * shrink[:, None], input_precision="tf32x3")
            up = tl.dot(seen, ((values == float("inf")) | odd).to(tl.float16), up)
            down = tl.dot(seen, ((values == float("-inf")) | odd).to(tl.float16), down)
            total = total * shrink + tl.sum(p, 1)
            top = new_top
        empty = total == 0.0
        acc = acc / total[:, None]
        acc += tl.where(up > 0, float("inf"), 0.0) + tl.where(down > 0, float("-inf"), 0.0)
        acc = tl.where(empty[:, None], 0.0, acc)
        inside = (m < q_len)[:, None] & (channel < HEAD_DIM)[None, :]
        at_row = out + (q_start + m[:, None]) * stride_on
        tl.store(at_row + channel[None, :], acc.to(out.dtype.element_ty), mask=inside)
        if LSE:
            value = tl.where(empty, float("-inf"), (top + tl.log2(total / P_MAX)) * LN2)
            tl.store(lse + row * nq + m, value, mask=m < q_len)
