"""What a caller may ask of an attention call, and the checks that turn a bad request into a sentence.

`AttentionConfig` names a quantised mode (docs/algorithm.md explains each part); `check_inputs` is the one place where
tensors are looked at before any backend sees them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import torch

Tristate = bool | Literal["auto"]

INTENTS = ("auto", "fast", "balanced", "accurate")
QK_GRANULARITIES = ("per_block", "per_warp", "per_thread")  # finer to the right
PV_MODES = ("fp16/fp32", "fp16/fp16+fp32", "fp16/fp16", "int8/int32", "fp8/fp32+fp32", "fp8/fp32+fp16", "fp8/fp32")
BACKENDS = ("cuda", "triton", "reference")
LAYOUTS = ("HND", "NHD")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
LARGEST_SCALE = 1e30


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class AttentionConfig:
    """How attention is quantised; every part may be "auto", which dispatch resolves for the machine at hand.

    intent: what "auto" should prefer, "auto", "fast", "balanced" or "accurate".
    pv_accum: one of PV_MODES, "<PV type>/<accumulator>".
    qk_quant_gran: how many scales Q and K get, one of QK_GRANULARITIES.
    smooth_k: subtract K's mean over tokens before quantising (exact for softmax).
    smooth_v: subtract V's mean per channel before quantising and put it back at the end.
    rotate: the same signed Hadamard rotation on Q and K before quantising (spreads outlier channels).
    backend: force one of BACKENDS.
    strict: an explicit choice that nothing here can run is an error; with False the nearest mode that is at least as
        accurate is used and named in Choice.notes.
    """

    intent: str = "auto"
    pv_accum: str = "auto"
    qk_quant_gran: str = "auto"
    smooth_k: Tristate = "auto"
    smooth_v: Tristate = "auto"
    rotate: Tristate = "auto"
    backend: str = "auto"
    strict: bool = True

    def __post_init__(self) -> None:
        _one_of("intent", self.intent, INTENTS)
        _one_of("pv_accum", self.pv_accum, ("auto", *PV_MODES))
        _one_of("qk_quant_gran", self.qk_quant_gran, ("auto", *QK_GRANULARITIES))
        _one_of("backend", self.backend, ("auto", *BACKENDS))
        for name in ("smooth_k", "smooth_v", "rotate"):
            value = getattr(self, name)
            if value != "auto" and not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; it must be True, False or 'auto'")
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict is {self.strict!r}; it must be True or False")

    def encode(self) -> str:
        """One string that `decode` reads back: how a config crosses a torch.library op."""
        return "|".join(str(getattr(self, field.name)) for field in fields(self))

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> AttentionConfig:
        literal = {"True": True, "False": False}
        return AttentionConfig(*(literal.get(part, part) for part in text.split("|")))  # type: ignore[arg-type]


AUTO = AttentionConfig()


@dataclass(frozen=True)
class Problem:
    """The shape of one checked call, whatever its layout: q [b, heads, nq, d], k and v [b, kv_heads, nk, d]."""

    batch: int
    heads: int
    kv_heads: int
    nq: int
    nk: int
    head_dim: int


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    tensor_layout: str = "HND",
    sm_scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
    config: AttentionConfig = AUTO,
) -> Problem:
    """Raise TypeError or ValueError, naming the argument, for anything the kernels are not defined on."""
    if not isinstance(config, AttentionConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be an AttentionConfig")
    _one_of("tensor_layout", tensor_layout, LAYOUTS)
    for name, flag in (("is_causal", is_causal), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is a {type(flag).__name__}; it must be True or False")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, q)
    batch, heads, nq, head_dim = _hnd_shape(q, tensor_layout)
    kv_batch, kv_heads, nk, k_dim = _hnd_shape(k, tensor_layout)
    if tuple(v.shape) != tuple(k.shape):
        raise ValueError(f"v has shape {tuple(v.shape)} but k has {tuple(k.shape)}; they must be equal")
    if kv_batch != batch:
        raise ValueError(f"k has batch {kv_batch} but q has {batch}; they must be equal (expand() costs no memory)")
    if head_dim != k_dim:
        raise ValueError(f"k has head_dim {k_dim} but q has {head_dim}; they must be equal")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}; it must be 1 to {MAX_HEAD_DIM}")
    for name, n in (("q", nq), ("k", nk)):
        if n == 0:
            raise ValueError(
                f"{name} has 0 tokens; at least 1 is needed (skip the call when there is nothing to attend)"
            )
    if batch == 0 or heads == 0 or kv_heads == 0:
        raise ValueError(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; batch and heads must be at least 1")
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}; q's must be a multiple of k's (GQA)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and head_dim > 1:
            raise ValueError(
                f"{name} has stride {x.stride(-1)} along head_dim; it must be 1: pass {name}.contiguous() or a view "
                "whose last dimension is contiguous"
            )
    if sm_scale is not None:
        if isinstance(sm_scale, bool) or not isinstance(sm_scale, (int, float)):
            raise TypeError(
                f"sm_scale is a {type(sm_scale).__name__}; it must be a float, or None for head_dim ** -0.5"
            )
        if not -LARGEST_SCALE < sm_scale < LARGEST_SCALE:  # NaN fails this, too
            raise ValueError(
                f"sm_scale is {sm_scale}; it must be finite and below {LARGEST_SCALE} in magnitude, or None for "
                "head_dim ** -0.5"
            )
    if attn_mask is not None:
        _check_mask(attn_mask, q, (batch, heads, nq, nk))
    return Problem(batch, heads, kv_heads, nq, nk, head_dim)


def _check_tensor(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}; it must be torch.float16, torch.bfloat16 or torch.float32")
    if x.dim() != 4:
        raise ValueError(
            f"{name} has {x.dim()} dimensions, shape {tuple(x.shape)}; it must have 4: [batch, heads, tokens, head_dim] "
            "(HND) or [batch, tokens, heads, head_dim] (NHD)"
        )
    if x.dtype != q.dtype:
        raise TypeError(f"{name} is {x.dtype} but q is {q.dtype}; q, k and v must have one dtype")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} but q is on {q.device}; q, k and v must be on one device")


def _check_mask(mask: torch.Tensor, q: torch.Tensor, shape: tuple[int, int, int, int]) -> None:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attn_mask is a {type(mask).__name__}; it must be a torch.Tensor or None")
    if mask.dtype != torch.bool and mask.dtype not in DTYPES:
        raise TypeError(
            f"attn_mask is {mask.dtype}; it must be bool (True = may attend) or float16, bfloat16 or float32 (added to "
            "the scores)"
        )
    if mask.device != q.device:
        raise ValueError(f"attn_mask is on {mask.device} but q is on {q.device}; they must be on one device")
    fits = mask.dim() <= 4 and all(m in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1], strict=False))
    if not fits:
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}; it must broadcast to [batch, heads, nq, nk] = {shape}"
        )


def _hnd_shape(x: torch.Tensor, layout: str) -> tuple[int, int, int, int]:
    b, h, n, d = x.shape
    return (b, h, n, d) if layout == "HND" else (b, n, h, d)
