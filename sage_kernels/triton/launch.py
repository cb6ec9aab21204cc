"""One attention call on Triton: allocate, quantise, guard, attend. Nothing here waits for the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..config import AttentionConfig
from ..dispatch import interpreting
from ..quantize import GRANULARITIES, INT8_KEY_TILE, LOG2E, PV, Granularity, padded_head_dim, v_range
from . import attention as attention_kernels
from . import exact, quantize

BLOCK = quantize.BLOCK.value
SMALLEST_SHARED_MEMORY = 101376  # of the GPUs we name: compute capability 8.6, 8.9 and 12.0
PROGRAMS = 2048  # programs that fill a GPU: more than this many only repeat each program's set-up


@dataclass(frozen=True)
class Tiles:
    """What one attention program works on. Chosen by (head_dim, int8 PV); docs/triton.md lists what else was tried."""

    block_m: int
    block_n: int
    warps: int
    stages: int  # tiles of keys on their way at once; fewer where the GPU's shared memory is smaller


TILES = {
    (64, False): Tiles(128, 64, 8, 3),
    (128, False): Tiles(128, 64, 4, 3),
    (256, False): Tiles(128, 64, 8, 3),
    (64, True): Tiles(64, INT8_KEY_TILE, 4, 4),
    (128, True): Tiles(64, INT8_KEY_TILE, 4, 3),
    (256, True): Tiles(64, INT8_KEY_TILE, 4, 1),
}


def tiles_for(dim: int, int8_v: bool, mask_bytes: int, shared_memory: int) -> Tiles:
    """The tiles of a head_dim with as many stages as fit into `shared_memory` bytes a program.

    mask_bytes: of one element of a mask that differs from query to query; else 0.
    """
    tiles = TILES[dim, int8_v]
    stage = tiles.block_n * (dim * (2 if int8_v else 3) + tiles.block_m * mask_bytes)  # K int8, V int8 or fp16
    free = shared_memory - tiles.block_m * dim - 4096  # what Triton keeps Q, barriers and reductions in
    # A tile of the mask and its addresses take the registers of twice the warps.
    return replace(tiles, stages=max(1, min(tiles.stages, free // stage)), warps=8 if mask_bytes else tiles.warps)


@lru_cache(maxsize=32)
def _shared_memory(device: torch.device) -> int:
    """Bytes a program may have; in the interpreter there is no limit, and an older torch does not tell."""
    if device.type != "cuda":
        return 1 << 20
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SMALLEST_SHARED_MEMORY)


@dataclass(frozen=True)
class Call:
    """Everything about a call that is not tensor data. For packed sequences nq and nk are the longest lengths."""

    batch: int
    heads: int
    kv_heads: int
    nq: int
    nk: int
    head_dim: int
    is_causal: bool
    sm_scale: float
    return_lse: bool
    config: AttentionConfig
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def dim(self) -> int:
        return padded_head_dim(self.head_dim)

    @property
    def granularity(self) -> Granularity:
        return GRANULARITIES[self.config.qk_quant_gran]

    @property
    def int8_v(self) -> bool:
        return PV[self.config.pv_accum].p_dtype == "u8"

    @property
    def varlen(self) -> bool:
        return self.cu_q is not None


@dataclass(frozen=True)
class Statistics:
    """What is known of K and V before they are quantised, each [b * kv_heads, dim] float32."""

    k_mean: Tensor
    k_mean_rotated: Tensor
    v_mean: Tensor
    v_scale: Tensor
    bad: Tensor  # int32 [b * kv_heads]: 1 where q, k or v holds a NaN, an inf or a magnitude of LARGEST, or a mean is inf


@dataclass(frozen=True)
class Codes:
    """Q or K as the attention kernel eats it, padded to whole BLOCKs of tokens and to `dim` channels."""

    values: Tensor  # int8 [b * heads, padded, dim]
    scale: Tensor  # float32 [b * heads, groups]
    lse_shift: Tensor  # float32 [b * heads, padded], for q where it is needed


@dataclass(frozen=True)
class Values:
    """V likewise."""

    values: Tensor  # fp16 [b * kv_heads, padded, dim] or int8 [b * kv_heads, dim, padded]
    sums: Tensor  # float32 [b * kv_heads, padded // BLOCK, dim], where needed
    put_back: Tensor  # float32 [b * kv_heads, dim], where needed


def attention(
    qkv: list[Tensor],
    attn_mask: Tensor | None,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float,
    return_lse: bool,
    config: AttentionConfig,
) -> tuple[Tensor, Tensor]:
    """One padded call; see sage_kernels.attention. `qkv` is emptied one by one as its tensors are quantised."""
    like = qkv[0]
    b, heads, nq, d = like.shape if tensor_layout == "HND" else like.transpose(1, 2).shape
    kv_heads, nk = qkv[1].shape[1:3] if tensor_layout == "HND" else qkv[1].shape[2:0:-1]
    call = Call(b, heads, kv_heads, nq, nk, d, is_causal, sm_scale, return_lse, config)
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    del like
    lse = torch.empty((b, heads, nq) if return_lse else (0,), dtype=torch.float32, device=out.device)

    def hnd(x: Tensor) -> Tensor:
        return _readable(x if tensor_layout == "HND" else x.transpose(1, 2))

    _run(call, qkv, hnd, out if tensor_layout == "HND" else out.transpose(1, 2), lse, attn_mask)
    return out, lse


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
    config: AttentionConfig,
) -> Tensor:
    """Packed sequences; see sage_kernels.sageattn_varlen. The quantised copies are padded to the longest sequence."""
    batch = cu_seqlens_q.numel() - 1
    call = Call(
        batch, q.shape[1], k.shape[1], max_seqlen_q, max_seqlen_k, q.shape[2], is_causal, sm_scale, False, config,
        cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # tokens that belong to no sequence stay 0
    lse = torch.empty(0, dtype=torch.float32, device=q.device)

    def hnd(x: Tensor) -> Tensor:
        return _readable(x.transpose(0, 1).unsqueeze(0))  # [1, heads, total, d]

    _run(call, [q, k, v], hnd, out.transpose(0, 1).unsqueeze(0), lse, None)
    return out


def _run(
    call: Call, qkv: list[Tensor], hnd: Callable[[Tensor], Tensor], out: Tensor, lse: Tensor, attn_mask: Tensor | None
) -> None:
    """The order keeps memory low: the guard comes as early as it can, and each input goes once it is quantised."""
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        mask = Mask.of(attn_mask, call, out)
        known = _statistics(call, hnd(qkv[1]), hnd(qkv[2]))
        q = _quantise_qk(call, hnd(qkv[0]), known, is_k=False)
        _guard(call, hnd(qkv[0]), hnd(qkv[1]), hnd(qkv[2]), known.bad, mask, out, lse)
        del qkv[0]
        k = _quantise_qk(call, hnd(qkv[0]), known, is_k=True)
        del qkv[0]
        v = _quantise_v(call, hnd(qkv[0]), known)
        del qkv[0]
        _attend(call, q, k, v, known, mask, out, lse)


@dataclass(frozen=True)
class Mask:
    """The mask as the kernels take it: a pointer, its kind, four strides (0 where it broadcasts), one row or many."""

    tensor: Tensor
    kind: str
    strides: tuple[int, ...]
    rows: bool

    @staticmethod
    def of(mask: Tensor | None, call: Call, unused: Tensor) -> Mask:
        if mask is None:
            return Mask(unused, "none", (0, 0, 0, 0), False)
        full = mask.expand(call.batch, call.heads, call.nq, call.nk)
        kind = "bool" if mask.dtype == torch.bool else "add"
        strides = tuple(0 if size == 1 else stride for size, stride in zip(full.shape, full.stride(), strict=True))
        return Mask(full.view(torch.uint8) if kind == "bool" else full, kind, strides, strides[2] != 0)


def _readable(x: Tensor) -> Tensor:
    """Triton's interpreter cannot multiply bfloat16; on a GPU this returns x itself."""
    return x.float() if interpreting() and x.dtype == torch.bfloat16 else x


def _programs(blocks: int, rows: int) -> int:
    """How many programs share the `blocks` blocks of one row."""
    return min(blocks, -(-PROGRAMS // rows))


def _statistics(call: Call, k: Tensor, v: Tensor) -> Statistics:
    config, kv_rows, dim = call.config, call.batch * call.kv_heads, call.dim
    k_mean, k_mean_rotated, v_mean, v_scale = (_new(k, (kv_rows, dim), torch.float32) for _ in range(4))
    known = Statistics(
        k_mean=k_mean,
        k_mean_rotated=k_mean_rotated if config.rotate else k_mean,
        v_mean=v_mean,
        v_scale=v_scale,
        bad=torch.zeros(kv_rows, dtype=torch.int32, device=k.device),
    )
    blocks = -(-call.nk // BLOCK)
    chunk = -(-blocks // _programs(blocks, kv_rows)) * BLOCK
    chunks = -(-call.nk // chunk)
    partial = _new(k, (chunks, kv_rows, 4, dim), torch.float32)
    quantize.stats_kernel[(kv_rows, chunks)](
        k, v, call.cu_k, partial, known.bad, *k.stride()[:3], *v.stride()[:3], call.kv_heads, call.nk, chunk,
        HEAD_DIM=call.head_dim, D=dim, ROWS=4096 // dim, VARLEN=call.varlen,
    )  # fmt: skip
    quantize.finish_stats_kernel[(kv_rows,)](
        partial, call.cu_k, k_mean, k_mean_rotated, v_mean, v_scale, known.bad, call.kv_heads, call.nk, chunks,
        v_range(config.pv_accum, call.nk), D=dim, VARLEN=call.varlen, ROTATE=config.rotate,
        SMOOTH_K=config.smooth_k, SMOOTH_V=config.smooth_v, POWER_OF_TWO=not call.int8_v,
    )  # fmt: skip
    return known


def _quantise_qk(call: Call, x: Tensor, known: Statistics, is_k: bool) -> Codes:
    gran = call.granularity
    heads, group, tokens, cu = (
        (call.kv_heads, 1, call.nk, call.cu_k) if is_k else (call.heads, call.group, call.nq, call.cu_q)
    )
    size, sub = (gran.k_block, gran.k_sub) if is_k else (gran.q_block, gran.q_sub)
    rows, blocks = call.batch * heads, -(-tokens // BLOCK)
    shifts = call.return_lse and bool(call.config.smooth_k) and not is_k
    codes = Codes(
        values=_new(x, (rows, blocks * BLOCK, call.dim), torch.int8),
        scale=_new(x, (rows, blocks * BLOCK // size * sub), torch.float32),
        lse_shift=_new(x, (rows, blocks * BLOCK) if shifts else (1,), torch.float32),
    )
    quantize.quantize_qk_kernel[(rows, _programs(blocks, rows))](
        x, cu, known.k_mean, known.k_mean_rotated, codes.values, codes.scale, codes.lse_shift, known.bad, *x.stride()[:3],
        heads, group, tokens, blocks * BLOCK, call.sm_scale, call.sm_scale * LOG2E, HEAD_DIM=call.head_dim, D=call.dim,
        GROUP=size, SUB=sub, ROTATE=call.config.rotate, IS_K=is_k, SHIFT=shifts, VARLEN=call.varlen,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    return codes


def _quantise_v(call: Call, v: Tensor, known: Statistics) -> Values:
    rows, blocks, dim = call.batch * call.kv_heads, -(-call.nk // BLOCK), call.dim
    smooth = bool(call.config.smooth_v)
    sums = call.int8_v or smooth
    codes = Values(
        values=_new(v, (rows, blocks * BLOCK, dim), torch.int8 if call.int8_v else torch.float16),
        sums=_new(v, (rows, blocks, dim) if sums else (1,), torch.float32),
        put_back=_new(v, (rows, dim) if smooth else (1,), torch.float32),
    )
    quantize.quantize_v_kernel[(rows, _programs(blocks, rows))](
        v, call.cu_k, known.v_mean, known.v_scale, codes.values, codes.sums, *v.stride()[:3], call.kv_heads, call.nk,
        blocks * BLOCK, HEAD_DIM=call.head_dim, D=dim, INT8_V=call.int8_v, SUM_V=sums, VARLEN=call.varlen,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    if smooth:
        quantize.put_back_kernel[(rows,)](
            codes.sums, known.v_mean, known.v_scale, codes.put_back, call.cu_k, call.kv_heads, call.nk, blocks, D=dim,
            VARLEN=call.varlen,
        )  # fmt: skip
    return codes


def _new(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _guard(call: Call, q: Tensor, k: Tensor, v: Tensor, bad: Tensor, mask: Mask, out: Tensor, lse: Tensor) -> None:
    """Serve the heads that hold a NaN or inf, before q, k and v are let go of."""
    splits = min(16, -(-call.nq // 32))
    exact.exact_kernel[(call.batch * call.heads, splits)](
        q, k, v, bad, mask.tensor, call.cu_q, call.cu_k, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *mask.strides, *out.stride()[:3], call.heads, call.group, call.nq, call.nk, call.sm_scale,
        HEAD_DIM=call.head_dim, D=call.dim, BLOCK=32, CAUSAL=call.is_causal, MASK=mask.kind, MASK_ROWS=mask.rows,
        LSE=call.return_lse, VARLEN=call.varlen,
    )  # fmt: skip


def _attend(call: Call, q: Codes, k: Codes, v: Values, known: Statistics, mask: Mask, out: Tensor, lse: Tensor) -> None:
    mask_bytes = mask.tensor.element_size() if mask.rows else 0
    tiles = tiles_for(call.dim, call.int8_v, mask_bytes, _shared_memory(out.device))
    gran = call.granularity
    blocks = -(-call.nq // tiles.block_m)
    attention_kernels.attention_kernel[(blocks * call.batch * call.heads,)](
        q.values, q.scale, k.values, k.scale, v.values, known.v_scale, v.sums, v.put_back, q.lse_shift, known.bad,
        mask.tensor, call.cu_q, call.cu_k, out, lse, *mask.strides, *out.stride()[:3], call.heads, call.group, call.nq,
        call.nk, q.values.shape[1], k.values.shape[1], blocks,
        HEAD_DIM=call.head_dim, D=call.dim, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, GROUP_Q=gran.q_block,
        SUB_Q=gran.q_sub, SUB_K=gran.k_sub, INT8_V=call.int8_v, SMOOTH_V=call.config.smooth_v, CAUSAL=call.is_causal,
        MASK=mask.kind, MASK_ROWS=mask.rows, LSE=call.return_lse, SHIFT=call.return_lse and call.config.smooth_k,
        VARLEN=call.varlen, WIDE=k.values.shape[1] * call.dim >= 2**31, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
