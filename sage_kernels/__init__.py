"""Quantised attention: INT8 QK with smoothing and rotation, PV in fp16, fp8 or int8. Works without ComfyUI.

    out = sage_kernels.attention(q, k, v)                       # the best this machine has
    out = sage_kernels.attention(q, k, v, config=AttentionConfig(pv_accum="int8/int32", qk_quant_gran="per_thread"))
    print(sage_kernels.explain(q, k, v))                        # what the call would get, and why

The algorithm is that of SageAttention (arXiv 2410.02367), SageAttention2 (2411.10958) and SageAttention2++ (2505.21136);
docs/algorithm.md says what is different here. Forward only.
"""

from __future__ import annotations

from torch import Tensor

from . import ops
from .config import AUTO, PV_MODES, QK_GRANULARITIES, AttentionConfig, check_inputs
from .dispatch import Choice, availability, chosen
from .varlen import sageattn_varlen

__all__ = [
    "PV_MODES",
    "QK_GRANULARITIES",
    "AttentionConfig",
    "Choice",
    "attention",
    "attention_consuming",
    "availability",
    "explain",
    "sageattn",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_varlen",
]


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


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    attn_mask: Tensor | None = None,
    smooth_k: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """The convention's main name: `attention` at its automatic mode."""
    config = AttentionConfig(smooth_k=smooth_k)
    return attention(
        q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, attn_mask=attn_mask,
        return_lse=return_lse, config=config,
    )  # fmt: skip


def sageattn_qk_int8_pv_fp16_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """INT8 QK per block, fp16 PV, on the Triton backend."""
    if quantization_backend != "triton":
        raise ValueError(
            f"quantization_backend is {quantization_backend!r}; only 'triton' can be honoured: quantisation is part of "
            "each backend here"
        )
    config = AttentionConfig(pv_accum="fp16/fp32", qk_quant_gran="per_block", smooth_k=smooth_k, backend="triton")
    return attention(
        q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, attn_mask=attn_mask,
        return_lse=return_lse, config=config,
    )  # fmt: skip


def sageattn_qk_int8_pv_fp16_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """INT8 QK, fp16 PV accumulated as pv_accum_dtype says ("fp32", "fp16" or "fp16+fp32")."""
    config = AttentionConfig(
        pv_accum=_pv_mode("fp16", pv_accum_dtype), qk_quant_gran=qk_quant_gran, smooth_k=smooth_k, smooth_v=smooth_v
    )
    return attention(
        q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, return_lse=return_lse,
        config=config,
    )  # fmt: skip


def sageattn_qk_int8_pv_fp8_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """INT8 QK, fp8 PV accumulated as pv_accum_dtype says ("fp32", "fp32+fp32" or "fp32+fp16")."""
    config = AttentionConfig(
        pv_accum=_pv_mode("fp8", pv_accum_dtype), qk_quant_gran=qk_quant_gran, smooth_k=smooth_k, smooth_v=smooth_v
    )
    return attention(
        q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, return_lse=return_lse,
        config=config,
    )  # fmt: skip


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The name code written for Hopper uses: `sageattn_qk_int8_pv_fp8_cuda` without V smoothing."""
    return sageattn_qk_int8_pv_fp8_cuda(
        q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, pv_accum_dtype, smooth_k, False, return_lse
    )


def _pv_mode(pv_dtype: str, accumulator: str) -> str:
    allowed = [mode.split("/")[1] for mode in PV_MODES if mode.startswith(pv_dtype + "/")]
    if accumulator not in allowed:
        raise ValueError(f"pv_accum_dtype is {accumulator!r}; it must be one of {', '.join(map(repr, allowed))}")
    return f"{pv_dtype}/{accumulator}"
