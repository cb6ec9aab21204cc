"""Attention over packed sequences of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .config import AttentionConfig, check_inputs


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
    The values of cu_seqlens are not read on the host, so a wrong one cannot be reported.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [total_tokens, heads, head_dim]")
    check_inputs(q[None], k[None], v[None], tensor_layout="NHD", sm_scale=sm_scale)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_cu_seqlens(name, cu, q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k has {cu_seqlens_k.numel()} entries but cu_seqlens_q has {cu_seqlens_q.numel()}; they must "
            "describe the same number of sequences"
        )
    for name, length, total in (("max_seqlen_q", max_seqlen_q, q.shape[0]), ("max_seqlen_k", max_seqlen_k, k.shape[0])):
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"{name} is a {type(length).__name__}; it must be an int")
        if not 1 <= length <= total:
            raise ValueError(f"{name} is {length}; it must be the longest sequence, 1 to {total}")
    scale = q.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    config = AttentionConfig(smooth_k=smooth_k).encode()
    return ops.attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, scale, config
    )


def _check_cu_seqlens(name: str, cu: Tensor, q: Tensor) -> None:
    if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
        raise TypeError(f"{name} is {getattr(cu, 'dtype', type(cu).__name__)}; it must be an int32 torch.Tensor")
    if cu.dim() != 1 or cu.numel() < 2 or not cu.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(cu.shape)}; it must be contiguous [sequences + 1]")
    if cu.device != q.device:
        raise ValueError(f"{name} is on {cu.device} but q is on {q.device}; they must be on one device")
