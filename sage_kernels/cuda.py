"""The CUDA kernels of csrc/ through the binary `_C`, or cubins.py in its place: whether this machine can use it, and one call.

Nothing here waits for the GPU. csrc/kernels.h says what the four steps of a call are, csrc/params.h what they share.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cubins
from .config import AttentionConfig
from .quantize import GRANULARITIES, LOG2E, PV, padded_head_dim, v_range
from .sources import source_hash

PACKAGE = Path(__file__).resolve().parent
BUILD = f"run {sys.executable} install.py in {PACKAGE.parent}"
# Bytes of q, k and v from which a call quantises them one by one, so that each can be freed before the next one's codes
# are allocated. Below, and where k and v are a small part of that, one launch for all three saves time.
LARGE = 256 << 20

_forced: dict[str, int] = {}  # what `with_wgmma` adds to each call

View = tuple[int, int, int, int]  # address, and strides of batch, head and token in elements


@lru_cache(maxsize=1)
def binary() -> Any:
    """The module `_C`, else the same of cubins, or a string: the reason why no GPU of this machine can use it."""
    module = _compiled()
    archive = PACKAGE / cubins.ARCHIVE.name
    if isinstance(module, str) and archive.exists():
        try:
            return _fitting(cubins.Cubins(archive))
        except ValueError as reason:
            return f"the CUDA kernels cannot be used, as {reason}: {BUILD} again"
    return module


def _compiled() -> Any:
    """`_C`, or why it cannot be had."""
    try:
        module = importlib.import_module("._C", __package__)
    except ImportError as error:
        there = sorted(path.name for path in PACKAGE.glob("_C.*") if path.suffix in (".so", ".pyd"))
        if not there:
            return f"the CUDA binary is not built: {BUILD}"
        if isinstance(error, ModuleNotFoundError):
            return f"the CUDA binary is for another Python ({', '.join(there)}): {BUILD}"
        return f"the CUDA binary cannot be loaded ({' '.join(str(error).split())}): {BUILD}"
    return _fitting(module)


def _fitting(module: Any) -> Any:
    """`module`, or why it is not for these sources and this driver."""
    if source_hash() not in (None, module.SOURCE_HASH):
        return f"the CUDA binary is built from other sources than these: {BUILD} again"
    driver, needed = module.driver_version(), module.CUDA_RUNTIME
    if driver // 1000 < needed // 1000:  # a driver runs every binary of its major version
        return (
            f"the GPU driver supports CUDA {_dotted(driver)} and the CUDA binary needs {needed // 1000}.0: update the "
            f"driver, or with an older CUDA toolkit {BUILD}"
        )
    return module


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def blocked(device: torch.device) -> str | None:
    """Why the kernels cannot serve tensors on `device`, or None."""
    if device.type != "cuda":
        return f"the CUDA kernels need an NVIDIA GPU and the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "the CUDA kernels need an NVIDIA GPU and this torch is built for AMD GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (7, 5):
        return f"the CUDA kernels need compute capability 7.5 (RTX 20 or newer) and this GPU has {major}.{minor}"
    module = binary()
    if isinstance(module, str):
        return module
    kernels, driver, needed = arch(device), module.driver_version(), module.CUDA_RUNTIME
    if not kernels:
        return (
            f"the CUDA binary has kernels for compute capability {', '.join(module.ARCHS)} and this GPU has "
            f"{major}.{minor}: {BUILD}"
        )
    if not kernels.startswith(f"{major}.") and driver < needed:  # a driver reads no PTX newer than itself
        return (
            f"the GPU driver supports CUDA {_dotted(driver)} and needs {_dotted(needed)} to compile the CUDA binary for "
            f"this GPU ({major}.{minor}): update the driver, or with an older CUDA toolkit {BUILD}"
        )
    return None


@lru_cache(maxsize=32)
def arch(device: torch.device) -> str:
    """The compute capability of the kernels that `device` runs, "" if none: of its major version, or compiled by the driver."""
    return binary().arch_for(*torch.cuda.get_device_capability(device))


def modes(device: torch.device) -> tuple[str, ...]:
    """What of PV_MODES the kernels for `device` have; ask `blocked` first."""
    return binary().modes(arch(device))


def attention(
    qkv: list[Tensor],
    attn_mask: Tensor | None,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float,
    return_lse: bool,
    config: AttentionConfig,
) -> tuple[Tensor, Tensor]:
    """One padded call; see sage_kernels.attention. `qkv` is emptied, one by one where that saves memory."""
    tokens, heads = (2, 1) if tensor_layout == "HND" else (1, 2)
    shape, kv_shape, dtype, device = qkv[0].shape, qkv[1].shape, qkv[0].dtype, qkv[0].device
    out = torch.empty(shape, dtype=dtype, device=device)
    lse = torch.empty(
        (shape[0], shape[heads], shape[tokens]) if return_lse else (0,), dtype=torch.float32, device=device
    )
    call = _prepare(
        shape[0], shape[heads], kv_shape[heads], shape[tokens], kv_shape[tokens], shape[3], dtype, is_causal, sm_scale,
        return_lse, config, device, torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip
    q, k, v, to = (_view(x, 0, heads, tokens) for x in (*qkv, out))
    _run(call, qkv, q, k, v, _mask(attn_mask), to, lse.data_ptr())
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
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # tokens that belong to no sequence stay 0
    call = _prepare.__wrapped__(  # not remembered: its addresses are of this call alone
        cu_seqlens_q.numel() - 1, q.shape[1], k.shape[1], max_seqlen_q, max_seqlen_k, q.shape[2], q.dtype, is_causal,
        sm_scale, False, config, q.device, torch.cuda.current_stream(q.device).cuda_stream,
        cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr(),
    )  # fmt: skip
    views = [_view(x, None, 1, 0) for x in (q, k, v, out)]
    _run(call, [q, k, v], views[0], views[1], views[2], None, views[3], 0)
    return out


@lru_cache(maxsize=512)
def _prepare(
    batch: int,
    heads: int,
    kv_heads: int,
    nq: int,
    nk: int,
    head_dim: int,
    dtype: torch.dtype,
    is_causal: bool,
    sm_scale: float,
    return_lse: bool,
    config: AttentionConfig,
    device: torch.device,
    stream: int,
    cu_q: int = 0,
    cu_k: int = 0,
) -> Any:
    """The `_C.Call`: everything about a call but its tensors. Remembered, as a model repeats few shapes many times."""
    granularity, pv, dim = GRANULARITIES[config.qk_quant_gran], PV[config.pv_accum], padded_head_dim(head_dim)
    call = binary().Call(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        nq=nq,
        nk=nk,
        head_dim=head_dim,
        dim=dim,
        v_dim=96 if 64 < head_dim <= 96 else dim,
        mode=config.pv_accum,
        dtype=str(dtype).removeprefix("torch."),
        q_block=granularity.q_block,
        q_sub=granularity.q_sub,
        k_sub=granularity.k_sub,
        is_causal=is_causal,
        smooth_k=config.smooth_k,
        smooth_v=config.smooth_v,
        rotate=config.rotate,
        return_lse=return_lse,
        sm_scale=sm_scale,
        q_factor=sm_scale * LOG2E,
        v_max=v_range(config.pv_accum, nk),
        p_max_log2=math.log2(pv.p_max),
        cu_q=cu_q,
        cu_k=cu_k,
        splits=1,
        device=device.index,
        stream=stream,
        **_forced,
    )
    call.splits = binary().choose_splits(call, _multiprocessors(device), arch(device))
    return call


@contextmanager
def with_wgmma(wanted: bool) -> Iterator[None]:
    """Within it every call uses wgmma, or none does, where otherwise the GPU decides: for tests and benchmarks.

    Where mode or head_dim have no kernel with wgmma, wanting it is an error; where the GPU has none, its last step is.
    """
    before = dict(_forced)
    _forced["wgmma"] = int(wanted)
    _prepare.cache_clear()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _prepare.cache_clear()


@lru_cache(maxsize=32)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _view(x: Tensor, batch: int | None, heads: int, tokens: int) -> View:
    """`x` as the kernels take it, given which of its dimensions are which; packed sequences have no batch."""
    strides = x.stride()
    return x.data_ptr(), 0 if batch is None else strides[batch], strides[heads], strides[tokens]


def _mask(mask: Tensor | None) -> tuple[str, int, int, int, int, int] | None:
    """The mask as the kernels take it: its kind, its address and four strides, 0 where it broadcasts."""
    if mask is None:
        return None
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    b, h, q, k = [0] * (4 - len(strides)) + strides
    return str(mask.dtype).removeprefix("torch."), mask.data_ptr(), b, h, q, k


def _run(
    call: Any,
    qkv: list[Tensor],
    q: View,
    k: View,
    v: View,
    mask: tuple[str, int, int, int, int, int] | None,
    out: View,
    lse: int,
) -> None:
    """The four steps; the guard of `exact` comes as early as it can, because it is the last to need q, k and v."""
    step, device, sizes = binary(), qkv[0].device, call.bytes()
    if sum(x.nbytes for x in qkv) < LARGE or sum(x.nbytes for x in qkv[1:]) < LARGE // 16:
        scratch = _scratch(sum(sizes), device)
        stats, q_at, k_at, v_at, partials = accumulate(sizes[:-1], initial=scratch.data_ptr())
        step.stats(call, k, v, stats)
        step.quantize(call, step.PART_Q | step.PART_K | step.PART_V, q, k, v, stats, q_at, k_at, v_at)
        step.exact(call, q, k, v, mask, stats, out, lse)
        qkv.clear()
        step.attention(call, stats, q_at, k_at, v_at, mask, partials, out, lse)
        return
    known, q_codes = _scratch(sizes[0], device), _scratch(sizes[1], device)
    stats, q_at = known.data_ptr(), q_codes.data_ptr()
    step.stats(call, k, v, stats)
    step.quantize(call, step.PART_Q, q, k, v, stats, q_at, 0, 0)
    step.exact(call, q, k, v, mask, stats, out, lse)
    del qkv[0]
    k_codes = _scratch(sizes[2], device)
    k_at = k_codes.data_ptr()
    step.quantize(call, step.PART_K, q, k, v, stats, 0, k_at, 0)
    del qkv[0]
    v_codes = _scratch(sizes[3], device)
    v_at = v_codes.data_ptr()
    step.quantize(call, step.PART_V, q, k, v, stats, 0, 0, v_at)
    del qkv[0]
    partials = _scratch(sizes[4], device)
    step.attention(call, stats, q_at, k_at, v_at, mask, partials.data_ptr(), out, lse)


def _scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)
