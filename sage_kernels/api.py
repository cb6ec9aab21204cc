"""The package's own face: attention on [b, h, n, d] or [b, n, h, d] tensors, and what a call would get."""

from __future__ import annotations

import torch
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
    attn_mask: bool (True = may attend) or floating (added to the scores), broadcastable to [b, heads, nq, nk]. Keys it
    hides have no weight, but they share means and scales with the others: what pads should be of ordinary size.
    Returns out in q's dtype and layout; with return_lse also the log-sum-exp of the scores (natural log, float32
    [b, heads, nq]). A query that sees no key gives 0 and -inf. Where q, k or v of a kv head holds a NaN, an inf
    or a magnitude above 1e36, or where their mean would be inf, that head is computed without quantisation, so that NaN
    stands only where exact float32 attention has it. Magnitudes below 1e-35 count as 0.
    Raises TypeError or ValueError for bad arguments, RuntimeError where no backend of this machine can run the config.
    """
    problem = check_inputs(
        q,
        k,
        v,
        tensor_layout=tensor_layout,
        sm_scale=sm_scale,
        attn_mask=attn_mask,
        is_causal=is_causal,
        return_lse=return_lse,
        config=config,
    )
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
    problem = check_inputs(
        *qkv,
        tensor_layout=tensor_layout,
        sm_scale=sm_scale,
        attn_mask=attn_mask,
        is_causal=is_causal,
        return_lse=return_lse,
        config=config,
    )
    scale = problem.head_dim**-0.5 if sm_scale is None else float(sm_scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in qkv):
        raise RuntimeError("q, k or v wants a gradient, and there is no backward pass: use torch.no_grad()")
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
        check_inputs(
            q,
            k,
            v,
            tensor_layout=tensor_layout,
            sm_scale=sm_scale,
            attn_mask=attn_mask,
            is_causal=is_causal,
            return_lse=return_lse,
            config=config,
        )
    except (TypeError, ValueError) as error:
        return Choice(str(error))
    return chosen(config.encode(), str(q.device))
