"""The package's own face: attention on [b, h, n, d] or [b, n, h, d] tensors, and what a call would get."""

from __future__ import annotations

from torch import Tensor

from . import ops
from .config import AUTO, AttentionConfig, check_inputs
from .dispatch import Choice, chosen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    attn_mask: Tensor | None = None,
    return_lse: bool = False,
    config: AttentionConfig = AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * sm_scale + mask) v, quantised as `config` says.

    q [b, heads, nq, d], k and v [b, kv_heads, nk, d] for tensor_layout "HND"; tokens before heads for "NHD". float16,
    bfloat16 or float32, last dimension contiguous, d from 1 to 256, heads a multiple of kv_heads.
    is_causal: query i sees keys j <= i, counted from the first token of both (as torch's scaled_dot_product_attention).
    sm_scale: None means d ** -0.5.
    attn_mask: bool (True = may attend) or floating (added to the scores), broadcastable to [b, heads, nq, nk].
    Returns out in q's dtype and layout; with return_lse also the log-sum-exp of the scores (natural log, float32
    [b, heads, nq]). A query that sees no key gives 0 and -inf. Where q, k or v of a kv head holds a NaN or inf, that
    head is computed without quantisation, so that NaN stands only where exact attention has it.
    Raises TypeError or ValueError for bad arguments, RuntimeError where no backend of this machine can run the config.
    """
    problem = check_inputs(q, k, v, tensor_layout=tensor_layout, sm_scale=sm_scale, attn_mask=attn_mask, config=config)
    scale = problem.head_dim**-0.5 if sm_scale is None else float(sm_scale)
    out, lse = ops.attention(q, k, v, attn_mask, tensor_layout, is_causal, scale, return_lse, config.encode())
    return (out, lse) if return_lse else out


def attention_consuming(
    qkv: list[Tensor],
    *,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    attn_mask: Tensor | None = None,
    return_lse: bool = False,
    config: AttentionConfig = AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` on a list [q, k, v] that it empties: tensors nobody else holds are freed once they are quantised."""
    problem = check_inputs(*qkv, tensor_layout=tensor_layout, sm_scale=sm_scale, attn_mask=attn_mask, config=config)
    scale = problem.head_dim**-0.5 if sm_scale is None else float(sm_scale)
    out, lse = ops.run(qkv, attn_mask, tensor_layout, is_causal, scale, return_lse, config)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    attn_mask: Tensor | None = None,
    return_lse: bool = False,
    config: AttentionConfig = AUTO,
) -> Choice:
    """Which backend and mode `attention` with these arguments would get, and why not the others. Runs nothing."""
    try:
        check_inputs(q, k, v, tensor_layout=tensor_layout, sm_scale=sm_scale, attn_mask=attn_mask, config=config)
    except (TypeError, ValueError) as error:
        return Choice(str(error))
    return chosen(config.encode(), str(q.device))
