"""Exact attention, and the exact emulation of every quantised mode: the oracle of all kernels, in plain torch.

Both walk over blocks of queries and tiles of keys, so memory is linear in tokens, and run on any device. Tensors here
are HND and grouped for GQA: q [b, g, r, nq, d] against k, v [b, g, 1, nk, d], where g counts kv heads and r the query
heads of each. docs/algorithm.md says what each step is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import AttentionConfig
from .quantize import (
    EXACT_P_MAX,
    GRANULARITIES,
    INT8_KEY_TILE,
    KEY_TILE,
    LARGEST,
    LOG2E,
    MASK_LIMIT,
    PV,
    TINY,
    PVMode,
    group_index,
    padded_head_dim,
    rotate,
    v_range,
)

SCORES = 1 << 24  # score elements held at a time


@dataclass(frozen=True)
class Visible:
    """Which keys a query may see: the causal rule and the mask, given tile by tile."""

    is_causal: bool
    mask: Tensor | None  # bool or additive, expanded to [b, g, r, nq, nk]

    def tile(self, rows: slice, cols: slice, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """(allowed, bias) for a tile, each broadcastable to [b, g, r, rows, cols] or None for "all" and "zero"."""
        allowed, bias = None, None
        if self.is_causal:
            q_pos = torch.arange(rows.start, rows.stop, device=device)
            k_pos = torch.arange(cols.start, cols.stop, device=device)
            allowed = k_pos[None, :] <= q_pos[:, None]
        if self.mask is not None:
            part = self.mask[..., rows, cols]
            if part.dtype == torch.bool:
                seen = part
            else:
                bias = part
                seen = part != float("-inf")
            allowed = seen if allowed is None else allowed & seen
        return allowed, bias


@dataclass(frozen=True)
class Grouped:
    """One call in the grouped layout of this file."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Visible
    sm_scale: float

    @staticmethod
    def of(
        q: Tensor, k: Tensor, v: Tensor, is_causal: bool, sm_scale: float | None, attn_mask: Tensor | None
    ) -> Grouped:
        b, heads, nq, d = q.shape
        g, nk = k.shape[1], k.shape[2]
        mask = None if attn_mask is None else attn_mask.expand(b, heads, nq, nk).unflatten(1, (g, heads // g))
        scale = d**-0.5 if sm_scale is None else sm_scale
        return Grouped(q.unflatten(1, (g, heads // g)), k.unsqueeze(2), v.unsqueeze(2), Visible(is_causal, mask), scale)

    def row_blocks(self, tile: int) -> Iterator[slice]:
        """Slices of queries such that one tile of scores stays within SCORES elements."""
        b, g, r, nq, _ = self.q.shape
        rows = max(16, SCORES // (b * g * r * tile))
        for start in range(0, nq, rows):
            yield slice(start, min(start + rows, nq))

    def tiles(self, rows: slice, tile: int) -> Iterator[slice]:
        """Slices of keys that some query of `rows` may see."""
        stop = min(self.k.shape[-2], rows.stop) if self.visible.is_causal else self.k.shape[-2]
        for start in range(0, stop, tile):
            yield slice(start, min(start + tile, stop))


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    sm_scale: float | None = None,
    attn_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T sm_scale + mask) v in `dtype`: (out [b, heads, nq, d], lse [b, heads, nq]), both of `dtype`.

    A query that sees no key gives 0 and lse -inf. Keys that are masked out take no part, whatever they hold; a NaN or
    inf in a key or value that is seen acts as IEEE arithmetic has it.
    """
    call = Grouped.of(q, k, v, is_causal, sm_scale, attn_mask)
    out = torch.empty(call.q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(call.q.shape[:-1], dtype=dtype, device=q.device)
    tile = 1024
    for rows in call.row_blocks(tile):
        query = call.q[..., rows, :].to(dtype) * call.sm_scale
        top = torch.full(query.shape[:-1], float("-inf"), dtype=dtype, device=q.device)
        total = torch.zeros_like(top)
        acc = torch.zeros_like(query)
        for cols in call.tiles(rows, tile):
            allowed, bias = call.visible.tile(rows, cols, q.device)
            score = query @ call.k[..., cols, :].to(dtype).mT
            score = _hide(score if bias is None else score + bias.to(dtype), allowed)
            new_top = torch.maximum(top, score.amax(-1))  # NaN wins, as it should
            p = _exp(score - _finite_or_zero(new_top)[..., None], torch.exp, allowed) * EXACT_P_MAX
            shrink = torch.exp(top - _finite_or_zero(new_top))
            acc = acc * shrink[..., None] + _weigh(p, call.v[..., cols, :].to(dtype), allowed)
            total = total * shrink + p.sum(-1)
            top = new_top
        empty = total == 0
        out[..., rows, :] = torch.where(empty[..., None], 0.0, acc / total[..., None])
        lse[..., rows] = torch.where(empty, float("-inf"), top + torch.log(total / EXACT_P_MAX))
    return out.flatten(1, 2), lse.flatten(1, 2)


def _hide(score: Tensor, allowed: Tensor | None) -> Tensor:
    return score if allowed is None else score.masked_fill(~allowed, float("-inf"))


def _exp(x: Tensor, function: Callable[[Tensor], Tensor], allowed: Tensor | None) -> Tensor:
    p = function(x)
    return p if allowed is None else p.masked_fill(~allowed, 0.0)


def _finite_or_zero(top: Tensor) -> Tensor:
    """-inf (nothing seen yet) becomes 0 so that exp(-inf - top) is 0, not NaN."""
    return torch.where(top == float("-inf"), 0.0, top)


def _weigh(p: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """p @ v where a masked key takes no part even if its value is NaN or inf."""
    if allowed is None:
        return p @ v
    finite = v.isfinite()
    if bool(finite.all()):
        return p @ v
    seen = allowed.to(p.dtype).expand(p.shape)
    up = seen @ ((v == float("inf")) | v.isnan()).to(p.dtype) > 0
    down = seen @ ((v == float("-inf")) | v.isnan()).to(p.dtype) > 0
    inf = torch.tensor(float("inf"), dtype=p.dtype, device=p.device)
    return p @ torch.where(finite, v, 0.0) + torch.where(up, inf, 0.0) + torch.where(down, -inf, 0.0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: AttentionConfig,
    is_causal: bool = False,
    sm_scale: float | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference backend: the emulation, with kv heads that hold a NaN, an inf or huge numbers computed exactly."""
    options = dict(is_causal=is_causal, sm_scale=sm_scale, attn_mask=attn_mask)
    out, lse = emulate(q, k, v, config=config, **options)  # type: ignore[arg-type]
    ordinary = _head_is_ordinary(q, k.shape[1]) & _head_is_ordinary(k) & _head_is_ordinary(v)  # [b, g]
    for x, smoothed in ((k, config.smooth_k), (v, config.smooth_v)):
        if smoothed:
            ordinary &= x.float().mean(-2).isfinite().all(-1)
    bad = ~ordinary
    if bool(bad.any()):
        exact_out, exact_lse = exact_attention(q, k, v, dtype=torch.float32, **options)  # type: ignore[arg-type]
        bad = bad.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[..., None]
        out = torch.where(bad[..., None], exact_out, out)
        lse = torch.where(bad, exact_lse, lse)
    return out.to(q.dtype), lse


def _head_is_ordinary(x: Tensor, groups: int | None = None) -> Tensor:
    ordinary = (x.abs() < LARGEST).flatten(2).all(-1)
    return ordinary if groups is None else ordinary.unflatten(1, (groups, -1)).all(-1)


def emulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: AttentionConfig,
    is_causal: bool = False,
    sm_scale: float | None = None,
    attn_mask: Tensor | None = None,
    p_top: str = "tile",
    key_tile: int | None = None,
    residual_mean: bool = True,
    accumulator: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with the roundings of `config` (resolved: nothing "auto"): (out float32, lse float32), HND.

    The last four arguments exist to show why the modes are as they are (docs/accuracy.md): p_top="running" scales int8
    P to the running maximum instead of the tile's, key_tile changes the keys a tile has, residual_mean=False puts back
    V's plain mean, accumulator is another one than the mode's (a GPU without fp8 mma.sync sums its products in "fp32").
    """
    pv = PV[config.pv_accum]
    if accumulator is not None:
        pv = replace(pv, accumulator=accumulator)
    call = Grouped.of(q, k, v, is_causal, sm_scale, attn_mask)
    tile = key_tile or (INT8_KEY_TILE if pv.p_dtype == "u8" else KEY_TILE)
    scores = QuantisedScores.of(call, config)
    values = QuantisedValues.of(call.v, config, residual_mean)
    out = torch.empty(call.q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(call.q.shape[:-1], dtype=torch.float32, device=q.device)
    for rows in call.row_blocks(tile):
        out[..., rows, :], lse[..., rows] = _attend(call, scores, values, pv, rows, tile, p_top)
    return out.flatten(1, 2), lse.flatten(1, 2)


@dataclass(frozen=True)
class QuantisedScores:
    """INT8 Q and K (as float32 codes) and their scales per token; scores come out in base 2."""

    q: Tensor
    q_scale: Tensor  # [b, g, r, nq, 1]
    k: Tensor
    k_scale: Tensor  # [b, g, 1, nk, 1]
    lse_shift: Tensor  # what smoothing took from each query's scores, natural log [b, g, r, nq]

    @staticmethod
    def of(call: Grouped, config: AttentionConfig) -> QuantisedScores:
        gran = GRANULARITIES[config.qk_quant_gran]
        q, k = call.q.float(), call.k.float()
        shift = torch.zeros(q.shape[:-1], device=q.device)
        if config.smooth_k:
            mean = k.mean(-2, keepdim=True)
            k = k - mean
            shift = (q * mean).sum(-1) * call.sm_scale
        q = q * (call.sm_scale * LOG2E)
        if config.rotate:
            pad = padded_head_dim(q.shape[-1]) - q.shape[-1]
            q, k = (rotate(torch.nn.functional.pad(x, (0, pad))) for x in (q, k))
        return QuantisedScores(
            *_int8_groups(q, gran.q_block, gran.q_sub), *_int8_groups(k, gran.k_block, gran.k_sub), shift
        )

    def tile(self, rows: slice, cols: slice) -> Tensor:
        codes = self.q[..., rows, :] @ self.k[..., cols, :].mT  # exact: below 2**24
        return codes * self.q_scale[..., rows, :] * self.k_scale[..., cols, :].mT


def _int8_groups(x: Tensor, block: int, sub: int) -> tuple[Tensor, Tensor]:
    """Codes (float32 integers in -127..127) and the scale of every token [..., n, 1]."""
    index = group_index(x.shape[-2], block, sub, x.device)
    row_top = x.abs().amax(-1)
    top = torch.zeros(*row_top.shape[:-1], int(index.max()) + 1, device=x.device)
    top = top.scatter_reduce(-1, index.expand(row_top.shape), row_top, "amax")[..., index].unsqueeze(-1)
    used = top > TINY
    codes = torch.round(x * torch.where(used, torch.full_like(top, 127.0) / top, 0.0))  # a number / top is less exact
    return codes, torch.where(used, top / 127.0, 0.0)


@dataclass(frozen=True)
class QuantisedValues:
    """V in the mode's type (as float32 codes), its scale per channel and what is added to the output at the end."""

    v: Tensor
    scale: Tensor  # [b, g, 1, 1, d]
    put_back: Tensor | None  # [b, g, 1, 1, d]

    @staticmethod
    def of(v: Tensor, config: AttentionConfig, residual_mean: bool) -> QuantisedValues:
        pv = PV[config.pv_accum]
        v = v.float()
        mean = v.mean(-2, keepdim=True) if config.smooth_v else None
        if mean is not None:
            v = v - mean
        top = v.abs().amax(-2, keepdim=True)
        used = top > TINY
        v_max = v_range(config.pv_accum, v.shape[-2])
        if pv.p_dtype == "fp16":  # a power of two, so that scaling costs no bits
            scale = torch.where(used, torch.exp2(torch.ceil(torch.log2(top / v_max))), 0.0)
        else:
            scale = torch.where(used, top / v_max, 0.0)
        codes = _round_to(v * torch.where(used, 1.0 / scale, 0.0), pv.p_dtype, v_max)
        if mean is not None and residual_mean:
            mean = mean - codes.mean(-2, keepdim=True, dtype=torch.float64).float() * scale
        return QuantisedValues(codes, scale, mean)


def _round_to(x: Tensor, dtype: str, limit: float) -> Tensor:
    if dtype == "fp16":
        return x.half().float()
    if dtype == "e4m3":
        return x.clamp(-limit, limit).to(torch.float8_e4m3fn).float()
    return x.round().clamp(-limit, limit)


def _attend(
    call: Grouped, scores: QuantisedScores, values: QuantisedValues, pv: PVMode, rows: slice, tile: int, p_top: str
) -> tuple[Tensor, Tensor]:
    """One block of queries over all its tiles of keys: the online softmax with the mode's roundings."""
    shape = call.q[..., rows, :].shape
    top = torch.full(shape[:-1], float("-inf"), device=call.q.device)
    total = torch.zeros_like(top)  # float32, from p before it is rounded
    acc = torch.zeros(shape, device=call.q.device)
    for cols in call.tiles(rows, tile):
        allowed, bias = call.visible.tile(rows, cols, call.q.device)
        score = scores.tile(rows, cols)
        if bias is not None:
            score = score + _in_base_2(bias.float())
        score = _hide(score, allowed)
        tile_top = score.amax(-1)
        new_top = torch.maximum(top, tile_top)
        base = tile_top if pv.p_dtype == "u8" and p_top == "tile" else new_top
        p = _exp(score - _finite_or_zero(base)[..., None], torch.exp2, allowed)
        grow = torch.exp2(base - _finite_or_zero(new_top))  # 1 unless P is scaled to the tile
        shrink = torch.exp2(top - _finite_or_zero(new_top))
        codes = _round_to(p * pv.p_max, pv.p_dtype, pv.p_max)
        acc = _accumulate(acc * shrink[..., None], codes, values.v[..., cols, :], pv, grow[..., None])
        total = total * shrink + p.sum(-1) * grow
        top = new_top
    empty = total == 0
    out = acc * (values.scale / pv.p_max) / total[..., None]
    if values.put_back is not None:
        out = out + values.put_back
    out = torch.where(empty[..., None], 0.0, out)
    lse = (top + torch.log2(total)) / LOG2E + scores.lse_shift[..., rows]
    return out, torch.where(empty, float("-inf"), lse)


def _in_base_2(bias: Tensor) -> Tensor:
    """A finite value, such as a dtype's smallest, must not become an inf."""
    return torch.where(bias.isfinite(), bias.clamp(-MASK_LIMIT, MASK_LIMIT), bias) * LOG2E


def _accumulate(acc: Tensor, p: Tensor, v: Tensor, pv: PVMode, grow: Tensor) -> Tensor:
    """acc + grow * (p @ v), summed as the mode's matrix instruction does: k keys at a time, rounded after each."""
    if pv.accumulator in ("fp32", "int32"):
        return acc + grow * (p @ v)
    step = 32 if pv.p_dtype == "e4m3" else 16
    flush = pv.flush or p.shape[-1]
    part = _narrow(acc, pv.accumulator) if pv.flush is None else acc
    for first in range(0, p.shape[-1], flush):
        if pv.flush is not None:
            part = torch.zeros_like(acc)
        for k in range(first, min(first + flush, p.shape[-1]), step):
            part = _narrow(part + p[..., k : k + step] @ v[..., k : k + step, :], pv.accumulator)
        if pv.flush is not None:
            acc = acc + part
    return part if pv.flush is None else acc


def _narrow(x: Tensor, accumulator: str) -> Tensor:
    """Round to what the accumulator keeps: fp16, or the 13 mantissa bits (truncated) of the fp8 instructions' "fp32"."""
    if accumulator == "fp16":
        return x.half().float()
    return (x.contiguous().view(torch.int32) & ~0x3FF).view(torch.float32)
