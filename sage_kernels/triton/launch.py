"""One attention call on Triton: allocate, quantise, guard, attend. Nothing here waits for the GPU."""

from __future__ import annotations

import contextlib
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
    def shifts_lse(self) -> bool:
        return self.return_lse and bool(self.config.smooth_k)


@dataclass
class Quantised:
    """What the attention kernel eats. Padded to whole BLOCKs of tokens and to `dim` channels."""

    q: Tensor  # int8 [b, heads, q_padded, dim]
    q_scale: Tensor  # [b, heads, groups]
    k: Tensor  # int8 [b, kv_heads, k_padded, dim]
    k_scale: Tensor
    v: Tensor  # fp16 [b, kv_heads, k_padded, dim] or int8 [b, kv_heads, dim, k_padded]
    v_scale: Tensor  # [b, kv_heads, dim]
    v_sums: Tensor  # [b, kv_heads, k_padded // BLOCK, dim], where needed
    put_back: Tensor  # [b, kv_heads, dim]
    lse_shift: Tensor  # [b, heads, q_padded], where needed
    bad: Tensor  # int32 [b, kv_heads]


def attention(
    qkv: list[Tensor],
    attn_mask: Tensor | None,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float,
    return_lse: bool,
    config: AttentionConfig,
) -> tuple[Tensor, Tensor]:
    """One padded call; see sage_kernels.attention. `qkv` is emptied once its tensors are quantised."""
    q, k, v = (_readable(x if tensor_layout == "HND" else x.transpose(1, 2)) for x in qkv)
    b, heads, nq, d = q.shape
    call = Call(b, heads, k.shape[1], nq, k.shape[2], d, is_causal, sm_scale, return_lse, config)
    out = torch.empty(qkv[0].shape, dtype=qkv[0].dtype, device=q.device)
    out_hnd = out if tensor_layout == "HND" else out.transpose(1, 2)
    lse = torch.empty((b, heads, nq) if return_lse else (0,), dtype=torch.float32, device=q.device)
    with _device(q):
        quantised = _quantise(call, q, k, v)
        mask = Mask.of(attn_mask, call, out)
        _guard(call, q, k, v, quantised.bad, mask, out_hnd, lse)
        del q, k, v
        qkv.clear()
        _attend(call, quantised, mask, out_hnd, lse)
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
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (_readable(x.transpose(0, 1).unsqueeze(0)) for x in (q, k, v))  # [1, heads, total, d]
    packed = out.transpose(0, 1).unsqueeze(0)
    lse = torch.empty(0, dtype=torch.float32, device=q.device)
    with _device(q):
        quantised = _quantise(call, q, k, v)
        mask = Mask.of(None, call, out)
        _guard(call, q, k, v, quantised.bad, mask, packed, lse)
        _attend(call, quantised, mask, packed, lse)
    return out


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


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _readable(x: Tensor) -> Tensor:
    """Triton's interpreter cannot multiply bfloat16; on a GPU this returns x itself."""
    return x.float() if interpreting() and x.dtype == torch.bfloat16 else x


def _programs(blocks: int, rows: int) -> int:
    """How many programs share the `blocks` blocks of one row."""
    return min(blocks, -(-PROGRAMS // rows))


def _quantise(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Quantised:
    config, gran, dim = call.config, call.granularity, call.dim
    rows, kv_rows = call.batch * call.heads, call.batch * call.kv_heads
    q_blocks, k_blocks = -(-call.nq // BLOCK), -(-call.nk // BLOCK)
    q_padded, k_padded = q_blocks * BLOCK, k_blocks * BLOCK
    sums = call.int8_v or bool(config.smooth_v)

    def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    out = Quantised(
        q=new((rows, q_padded, dim), torch.int8),
        q_scale=new((rows, gran.q_groups(q_padded)), torch.float32),
        k=new((kv_rows, k_padded, dim), torch.int8),
        k_scale=new((kv_rows, gran.k_groups(k_padded)), torch.float32),
        v=new((kv_rows, k_padded, dim), torch.int8 if call.int8_v else torch.float16),
        v_scale=new((kv_rows, dim), torch.float32),
        v_sums=new((kv_rows, k_blocks, dim) if sums else (1,), torch.float32),
        put_back=new((kv_rows, dim) if config.smooth_v else (1,), torch.float32),
        lse_shift=new((rows, q_padded) if call.shifts_lse else (1,), torch.float32),
        bad=torch.zeros(kv_rows, dtype=torch.int32, device=q.device),
    )
    k_mean, k_mean_rotated, v_mean = (new((kv_rows, dim), torch.float32) for _ in range(3))
    if not config.rotate:
        k_mean_rotated = k_mean

    common = {"HEAD_DIM": call.head_dim, "D": dim, "VARLEN": call.cu_q is not None}
    k_strides, v_strides = k.stride()[:3], v.stride()[:3]
    chunks = max(1, min(k_blocks, PROGRAMS // kv_rows))
    chunk = -(-k_blocks // chunks) * BLOCK
    chunks = -(-call.nk // chunk)
    partial = new((chunks, kv_rows, 4, dim), torch.float32)
    quantize.stats_kernel[(chunks, kv_rows)](
        k,
        v,
        call.cu_k,
        partial,
        out.bad,
        *k_strides,
        *v_strides,
        call.kv_heads,
        call.nk,
        chunk,
        ROWS=4096 // dim,
        **common,
    )
    quantize.finish_stats_kernel[(kv_rows,)](
        partial, call.cu_k, k_mean, k_mean_rotated, v_mean, out.v_scale, call.kv_heads, call.nk, chunks,
        v_range(config.pv_accum, call.nk), D=dim, VARLEN=common["VARLEN"], ROTATE=config.rotate,
        SMOOTH_K=config.smooth_k, SMOOTH_V=config.smooth_v, POWER_OF_TWO=not call.int8_v,
    )  # fmt: skip
    quantize.quantize_q_kernel[(_programs(q_blocks, rows), rows)](
        q, call.cu_q, k_mean, out.q, out.q_scale, out.lse_shift, out.bad, *q.stride()[:3], call.heads, call.group, call.nq,
        q_padded, call.sm_scale, call.sm_scale * LOG2E, GROUP=gran.q_block, SUB=gran.q_sub, ROTATE=config.rotate,
        SHIFT=call.shifts_lse, num_warps=8, num_stages=1, **common,
    )  # fmt: skip
    quantize.quantize_kv_kernel[(_programs(k_blocks, kv_rows), kv_rows)](
        k, v, call.cu_k, k_mean_rotated, v_mean, out.v_scale, out.k, out.k_scale, out.v, out.v_sums, *k_strides,
        *v_strides, call.kv_heads, call.nk, k_padded, GROUP=gran.k_block, SUB=gran.k_sub, ROTATE=config.rotate,
        INT8_V=call.int8_v, SUM_V=sums, num_warps=8, num_stages=1, **common,
    )  # fmt: skip
    if config.smooth_v:
        quantize.put_back_kernel[(kv_rows,)](
            out.v_sums, v_mean, out.v_scale, out.put_back, call.cu_k, call.kv_heads, call.nk, k_blocks, D=dim,
            VARLEN=common["VARLEN"],
        )  # fmt: skip
    return out


def _guard(call: Call, q: Tensor, k: Tensor, v: Tensor, bad: Tensor, mask: Mask, out: Tensor, lse: Tensor) -> None:
    """Serve the heads that hold a NaN or inf, before q, k and v are let go of."""
    splits = min(16, -(-call.nq // 32))
    exact.exact_kernel[(splits, call.batch * call.heads)](
        q, k, v, bad, mask.tensor, call.cu_q, call.cu_k, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *mask.strides, *out.stride()[:3], call.heads, call.group, call.nq, call.nk, call.sm_scale,
        HEAD_DIM=call.head_dim, D=call.dim, BLOCK=32, CAUSAL=call.is_causal, MASK=mask.kind, MASK_ROWS=mask.rows,
        LSE=call.return_lse, VARLEN=call.cu_q is not None,
    )  # fmt: skip


def _attend(call: Call, x: Quantised, mask: Mask, out: Tensor, lse: Tensor) -> None:
    mask_bytes = mask.tensor.element_size() if mask.rows else 0
    tiles = tiles_for(call.dim, call.int8_v, mask_bytes, _shared_memory(out.device))
    gran = call.granularity
    blocks = -(-call.nq // tiles.block_m)
    attention_kernels.attention_kernel[(blocks * call.batch * call.heads,)](
        x.q, x.q_scale, x.k, x.k_scale, x.v, x.v_scale, x.v_sums, x.put_back, x.lse_shift, x.bad, mask.tensor, call.cu_q,
        call.cu_k, out, lse, *mask.strides, *out.stride()[:3], call.heads, call.group, call.nq, call.nk,
        x.q.shape[1], -(-call.nk // BLOCK) * BLOCK, blocks,
        HEAD_DIM=call.head_dim, D=call.dim, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, GROUP_Q=gran.q_block,
        SUB_Q=gran.q_sub, SUB_K=gran.k_sub, INT8_V=call.int8_v, SMOOTH_V=call.config.smooth_v, CAUSAL=call.is_causal,
        MASK=mask.kind, MASK_ROWS=mask.rows, LSE=call.return_lse, SHIFT=call.shifts_lse, VARLEN=call.cu_q is not None,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
