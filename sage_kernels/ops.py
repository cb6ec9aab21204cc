"""The torch.library ops: one opaque node each for torch.compile, with what they return spelled out as a fake.

A config crosses as AttentionConfig.encode(); dispatch happens inside, so that nothing of it is traced.
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import reference
from .config import AttentionConfig
from .dispatch import Choice, Request, choose

KERNELS = {"cuda": ".cuda", "triton": ".triton.launch"}  # what serves a call of each backend but the reference


def kernels(backend: str) -> Any:
    """The module of a backend, imported when it is first chosen: not every machine has Triton."""
    return importlib.import_module(KERNELS[backend], __package__)


@torch.library.custom_op("sage_kernels::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float,
    return_lse: bool,
    config: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse); lse is empty [0] unless asked for. Inputs have passed config.check_inputs."""
    return run([q, k, v], attn_mask, tensor_layout, is_causal, sm_scale, return_lse, AttentionConfig.decode(config))


@attention.register_fake
def _(q, k, v, attn_mask, tensor_layout, is_causal, sm_scale, return_lse, config):
    return torch.empty_like(q, memory_format=torch.contiguous_format), _empty_lse(q, tensor_layout, return_lse)


def run(
    qkv: list[Tensor],
    attn_mask: Tensor | None,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float,
    return_lse: bool,
    config: AttentionConfig,
) -> tuple[Tensor, Tensor]:
    """Serve one call. `qkv` is emptied as early as the backend can, so that a caller who let go of them frees memory."""
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in qkv):  # a compiler may have changed what was checked
        raise ValueError("q, k and v must have stride 1 along head_dim")
    choice = accept(Request(config, qkv[0].device))
    if choice.backend in KERNELS:
        serve = kernels(choice.backend).attention
        return serve(qkv, attn_mask, tensor_layout, is_causal, sm_scale, return_lse, choice.config)
    q, k, v = (x if tensor_layout == "HND" else x.transpose(1, 2) for x in qkv)
    qkv.clear()
    out, lse = reference.attention(
        q, k, v, config=choice.config, is_causal=is_causal, sm_scale=sm_scale, attn_mask=attn_mask
    )
    out = out if tensor_layout == "HND" else out.transpose(1, 2)
    return out.contiguous(), lse if return_lse else lse.new_empty(0)


@torch.library.custom_op("sage_kernels::attention_varlen", mutates_args=())
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    sm_scale: float,
    config: str,
) -> Tensor:
    """Packed sequences: q [total_q, heads, d], k and v [total_k, kv_heads, d], int32 cu_seqlens of sequences + 1."""
    choice = accept(Request(AttentionConfig.decode(config), q.device))
    if choice.backend in KERNELS:
        serve = kernels(choice.backend).attention_varlen
        return serve(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, sm_scale, choice.config
        )
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q_ends) - 1):
        rows, cols = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        if rows.start == rows.stop or cols.start == cols.stop:
            continue
        part = [x[None, s].transpose(1, 2) for x, s in ((q, rows), (k, cols), (v, cols))]
        one, _ = reference.attention(*part, config=choice.config, is_causal=is_causal, sm_scale=sm_scale)
        out[rows] = one[0].transpose(0, 1)
    return out


@attention_varlen.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, sm_scale, config):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def accept(request: Request) -> Choice:
    """The choice for a request that can be served; RuntimeError with the reasons for one that cannot."""
    choice = choose(request)
    if choice.refusal is not None:
        raise RuntimeError(choice.refusal)
    if choice.backend == "reference" and request.config.backend == "auto" and request.device.type != "cpu":
        _warn_slow(str(choice))
    return choice


@lru_cache(maxsize=32)
def _warn_slow(choice: str) -> None:
    """Once for each choice: a mode that only the emulation has is asked for on a GPU."""
    logging.getLogger(__name__).warning("this call runs on the emulation, which is slow: %s", choice)


def _empty_lse(q: Tensor, tensor_layout: str, return_lse: bool) -> Tensor:
    b, h, n = (q.shape[0], q.shape[1], q.shape[2]) if tensor_layout == "HND" else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((b, h, n) if return_lse else (0,), dtype=torch.float32)
