"""The six names that the papers' package made the convention, with its parameters, so that code written for it runs.

An argument that cannot be honoured is an error. Tensors are as in `attention`: tensor_layout "HND" or "NHD".
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .api import attention
from .config import PV_MODES, AttentionConfig, check_inputs

Result = Tensor | tuple[Tensor, Tensor]


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
) -> Result:
    """The main name: the automatic mode of this machine."""
    config = AttentionConfig(smooth_k=smooth_k)
    return _attention(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, config, attn_mask)


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
) -> Result:
    """INT8 QK per block, fp16 PV, on the Triton backend."""
    if quantization_backend != "triton":
        raise ValueError(
            f"quantization_backend is {quantization_backend!r}; only 'triton' can be honoured: quantisation is part of "
            "each backend here"
        )
    config = AttentionConfig(pv_accum="fp16/fp32", qk_quant_gran="per_block", smooth_k=smooth_k, backend="triton")
    return _attention(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, config, attn_mask)


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
) -> Result:
    """INT8 QK, fp16 PV accumulated as pv_accum_dtype says: "fp32", "fp16" or "fp16+fp32"."""
    config = _config("fp16", pv_accum_dtype, qk_quant_gran, smooth_k, smooth_v)
    return _attention(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, config)


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
) -> Result:
    """INT8 QK, fp8 PV accumulated as pv_accum_dtype says: "fp32", "fp32+fp32" or "fp32+fp16"."""
    config = _config("fp8", pv_accum_dtype, qk_quant_gran, smooth_k, smooth_v)
    return _attention(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, config)


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
) -> Result:
    """The name code written for Hopper uses: fp8 PV without V smoothing."""
    config = _config("fp8", pv_accum_dtype, qk_quant_gran, smooth_k, smooth_v=False)
    return _attention(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, config)


def sageattn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
) -> Tensor:
    """Attention within each packed sequence: out [total_q, heads, d] in q's dtype.

    q [total_q, heads, d]; k and v [total_k, kv_heads, d]. Sequence i owns the tokens from cu_seqlens[i] to
    cu_seqlens[i + 1]; cu_seqlens_q and cu_seqlens_k are int32 [sequences + 1] on q's device, starting at 0 and ending at
    the total. max_seqlen_q and max_seqlen_k are at least the longest lengths. K is smoothed within each sequence.
    The values of cu_seqlens are not read on the host, so a wrong one cannot be reported. Where a sequence is longer than
    max_seqlen_q or max_seqlen_k, a GPU leaves its further tokens out: the queries give 0, and the keys take no part.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [total_tokens, heads, head_dim]")
    check_inputs(q[None], k[None], v[None], tensor_layout="NHD", sm_scale=sm_scale, is_causal=is_causal)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_cu_seqlens(name, cu, q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k has {cu_seqlens_k.numel()} entries but cu_seqlens_q has {cu_seqlens_q.numel()}; they must "
            "describe the same number of sequences"
        )
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"{name} is a {type(length).__name__}; it must be an int")
        if length < 1:
            raise ValueError(f"{name} is {length}; it must be at least the longest sequence, and at least 1")
    scale = q.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    config = AttentionConfig(smooth_k=smooth_k).encode()
    return ops.attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        min(max_seqlen_q, q.shape[0]),
        min(max_seqlen_k, k.shape[0]),
        is_causal,
        scale,
        config,
    )


def _check_cu_seqlens(name: str, cu: Tensor, q: Tensor) -> None:
    if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
        raise TypeError(f"{name} is {getattr(cu, 'dtype', type(cu).__name__)}; it must be an int32 torch.Tensor")
    if cu.dim() != 1 or cu.numel() < 2 or not cu.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(cu.shape)}; it must be contiguous [sequences + 1]")
    if cu.device != q.device:
        raise ValueError(f"{name} is on {cu.device} but q is on {q.device}; they must be on one device")


def _config(pv_dtype: str, accumulator: str, qk_quant_gran: str, smooth_k: bool, smooth_v: bool) -> AttentionConfig:
    allowed = [mode.split("/")[1] for mode in PV_MODES if mode.startswith(pv_dtype + "/")]
    if accumulator not in allowed:
        raise ValueError(f"pv_accum_dtype is {accumulator!r}; it must be one of {', '.join(map(repr, allowed))}")
    return AttentionConfig(
        pv_accum=f"{pv_dtype}/{accumulator}", qk_quant_gran=qk_quant_gran, smooth_k=smooth_k, smooth_v=smooth_v
    )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float | None,
    return_lse: bool,
    config: AttentionConfig,
    attn_mask: Tensor | None = None,
) -> Result:
    return attention(
        q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, sm_scale=sm_scale, attn_mask=attn_mask,
        return_lse=return_lse, config=config,
    )  # fmt: skip
