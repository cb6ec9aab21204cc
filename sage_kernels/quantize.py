"""What a quantised tensor looks like: scale groups, ranges and the rotation, shared by every backend.

The arithmetic itself is in each backend; docs/algorithm.md explains why it is as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOG2E = 1.4426950408889634  # scores are kept in base 2, so that exp is one ex2 instruction
KEY_TILE = 64  # keys between two flushes of a low-precision accumulator
INT8_KEY_TILE = 128  # keys that share one scale of P in int8 PV; 128 * 255 * 127 < 2**22 keeps the flush exact
HASH = 0x9E3779B1  # see rotation_signs
MASK_LIMIT = 2e38  # of a finite additive mask, whose values are multiplied by LOG2E
EXACT_P_MAX = 2.0**-32  # P's factor in exact attention: 2**31 values of any size then add up to a float
LARGEST = 1e36  # a head that holds a larger magnitude, a NaN or an inf is computed exactly
TINY = 1e-35  # a group whose largest magnitude is below this is all zeros


@dataclass(frozen=True)
class Granularity:
    """Which tokens share a scale: token t belongs to group (t // block) * sub + (t % 8) * sub // 8.

    sub > 1 interleaves the tokens of a block as the registers of an m16n8 matrix instruction do, so that every value a
    thread holds has one scale for its rows and one for its columns (SageAttention2, section 3.2).
    """

    q_block: int
    q_sub: int
    k_block: int
    k_sub: int

    def q_groups(self, tokens: int) -> int:
        return -(-tokens // self.q_block) * self.q_sub

    def k_groups(self, tokens: int) -> int:
        return -(-tokens // self.k_block) * self.k_sub


GRANULARITIES = {
    "per_block": Granularity(q_block=128, q_sub=1, k_block=64, k_sub=1),
    "per_warp": Granularity(q_block=16, q_sub=1, k_block=64, k_sub=1),
    "per_thread": Granularity(q_block=16, q_sub=8, k_block=64, k_sub=4),
}


def group_index(tokens: int, block: int, sub: int, device: torch.device) -> torch.Tensor:
    """The group of every token, int64 [tokens]."""
    t = torch.arange(tokens, device=device)
    return t // block * sub + t % 8 * sub // 8


@dataclass(frozen=True)
class PVMode:
    """The numbers of one PV mode.

    p_max: P = exp2(score - maximum) is multiplied by this before it is rounded.
    v_max: V is scaled per channel so that its largest magnitude is at most this.
    flush: keys summed in the mode's accumulator before it is added to a float32 one; None = never flushed.
    error: worst relative L2 of the three distributions of docs/accuracy.md (N = 16384, everything else at its default);
        tests/test_reference.py measures it again. It orders the modes for "the nearest at least as accurate".
    """

    p_dtype: str
    accumulator: str
    p_max: float
    v_max: float
    flush: int | None
    error: float


PV = {
    # fp16: P's factor keeps small probabilities out of fp16's subnormals; V's range and the flush keep sums below 65504.
    "fp16/fp32": PVMode("fp16", "fp32", 2.0**15, 0.5, None, 0.0272),
    "fp16/fp16+fp32": PVMode("fp16", "fp16", 2.0**10, 0.5, KEY_TILE, 0.0272),
    "fp16/fp16": PVMode("fp16", "fp16", 1.0, 0.5, None, 0.0275),
    "int8/int32": PVMode("u8", "int32", 255.0, 127.0, INT8_KEY_TILE, 0.0292),
    "fp8/fp32+fp32": PVMode("e4m3", "fp22", 448.0, 448.0, KEY_TILE, 0.0449),
    # 64 keys * 224 * 4.5 = 64512 fits in fp16
    "fp8/fp32+fp16": PVMode("e4m3", "fp16", 224.0, 4.5, KEY_TILE, 0.0450),
    "fp8/fp32": PVMode("e4m3", "fp22", 448.0, 448.0, None, 0.0468),
}


def v_range(mode: str, nk: int) -> float:
    """v_max of a mode for nk keys: an fp16 accumulator that is never flushed must hold nk * v_max."""
    pv = PV[mode]
    if pv.accumulator == "fp16" and pv.flush is None:
        return min(pv.v_max, 2.0 ** (15 - (nk - 1).bit_length()))
    return pv.v_max


def padded_head_dim(head_dim: int) -> int:
    """The head_dim kernels work at: 64, 128 or 256; the padding is zeros."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def rotation_signs(dim: int, device: torch.device) -> torch.Tensor:
    """The fixed signs of the rotation, float32 [dim]: the top bit of Knuth's multiplicative hash of the channel."""
    hashed = torch.arange(dim, device=device) * HASH
    return 1.0 - 2.0 * (hashed >> 31 & 1).float()


def rotate(x: torch.Tensor) -> torch.Tensor:
    """The signed Hadamard rotation of float x [..., dim], as log2(dim) butterflies (no matrix unit, so no TF32)."""
    dim = x.shape[-1]
    x = x * rotation_signs(dim, x.device)
    width = 1
    while width < dim:
        pair = x.unflatten(-1, (-1, 2, width))
        a, b = pair[..., 0, :], pair[..., 1, :]
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        width *= 2
    return x * dim**-0.5
