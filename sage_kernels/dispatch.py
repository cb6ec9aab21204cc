"""Which backend and mode serve a call. Capability is data: one table, asked before anything runs.

`choose` is the whole decision; `explain` and `availability` (the public face) and the ops all read it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from . import cuda
from .config import INTENTS, PV_MODES, AttentionConfig
from .quantize import PV, padded_head_dim


@dataclass(frozen=True)
class Request:
    """What dispatch looks at: nothing of the data itself."""

    config: AttentionConfig
    device: torch.device


@dataclass(frozen=True)
class Choice:
    """The answer: `refusal` says why the call cannot run, or is None and the rest says what would run."""

    refusal: str | None
    backend: str = ""
    config: AttentionConfig = AttentionConfig()
    notes: tuple[str, ...] = ()
    rejected: dict[str, str] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        return self.config.pv_accum

    def __str__(self) -> str:
        if self.refusal:
            return f"refused: {self.refusal}"
        c = self.config
        parts = [name for name in ("smooth_k", "smooth_v", "rotate") if getattr(c, name)]
        why = "".join(f"; {note}" for note in self.notes)
        others = "".join(f"; not {name}: {reason}" for name, reason in self.rejected.items())
        return f"{self.backend} {c.pv_accum} {c.qk_quant_gran} {'+'.join(parts) or 'plain'}{why}{others}"


Auto = dict[str, tuple[str, str]]  # intent -> (pv_accum, qk_quant_gran)


@dataclass(frozen=True)
class Backend:
    """One row of the table. `blocked` gives the reason this machine or device cannot use it, or None.

    modes and auto are asked only of a device that is not blocked. auto: what each intent gets there.
    """

    name: str
    blocked: Callable[[torch.device], str | None]
    modes: Callable[[torch.device], tuple[str, ...]]
    auto: Callable[[torch.device], Auto]


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on CPU tensors (TRITON_INTERPRET=1, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


OLDEST_TRITON = (3, 3)  # 3.2.0 ends the process while it compiles; 3.3.1 to 3.7.1 compile


def _triton_version() -> str:
    import triton

    return triton.__version__


@lru_cache(maxsize=32)
def _triton_blocked(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"the Python package triton is not installed: pip install {package}"
    if device.type == "cpu" and interpreting():
        return None
    found = _triton_version()
    if tuple(map(int, found.split(".")[:2])) < OLDEST_TRITON:
        return (
            f"Triton {found} is too old, its compiler crashes on these kernels: 3.3 comes with torch 2.7, update torch"
        )
    if device.type != "cuda":
        return f"Triton kernels need an NVIDIA GPU and the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "the Triton kernels have not been tested on AMD GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"Triton kernels need compute capability 8.0 (RTX 30 or newer) and this GPU has {major}.{minor}"
    return None


def _auto(quick: tuple[str, str], accurate: tuple[str, str]) -> Auto:
    return {"auto": quick, "fast": quick, "balanced": quick, "accurate": accurate}


INT8, FP16 = ("int8/int32", "per_thread"), ("fp16/fp32", "per_thread")

# By compute capability of the kernels. Per thread always: a thread has its scales in registers, so finer costs nothing.
# "accurate" is the mode of the least error, which is also the slowest. The others want speed, and int8/int32 nowhere has
# a faster rival: fp8 has 1.5 times its error.
CUDA_AUTO = {
    # the only mode there is
    "7.5": _auto(INT8, INT8),
    # int8 has twice the rate of every fp16 mode; there is no fp8
    "8.0": _auto(INT8, FP16),
    # int8 has twice the rate of fp16/fp16+fp32 and up to four times that of fp16/fp32; there is no fp8
    "8.6": _auto(INT8, FP16),
    # int8 has the rate of fp8/fp32+fp16 and twice that of fp8/fp32+fp32
    "8.9": _auto(INT8, FP16),
    # wgmma: fp8 is not faster, at twice the error; fp16/fp32 slower by a twentieth to a quarter, at three quarters of it
    "9.0": _auto(INT8, FP16),
    # int8 is the only 8-bit mma.sync there: of fp8 it is fp16's with unpacking before it
    "10.0": _auto(INT8, FP16),
    # as 8.9
    "12.0": _auto(INT8, FP16),
}

# On Triton fp16 PV is at once the fastest and the most accurate: 8-bit P has to be moved between registers before the
# matrix unit can read it, which costs more than the faster matrix instruction gains (docs/triton.md has the numbers).
# Per warp costs nothing over per block: a tile of keys has one scale, which the rows carry. Per thread is one more
# multiplication for each score.
TRITON_AUTO = _auto(("fp16/fp32", "per_warp"), FP16)

# The emulation has no speed to trade, so every intent gets the most accurate mode.
REFERENCE_AUTO = _auto(FP16, FP16)

TABLE = (
    Backend("cuda", cuda.blocked, cuda.modes, lambda device: CUDA_AUTO[cuda.arch(device)]),
    Backend("triton", _triton_blocked, lambda device: ("fp16/fp32", "int8/int32"), lambda device: TRITON_AUTO),
    Backend("reference", lambda device: None, lambda device: PV_MODES, lambda device: REFERENCE_AUTO),
)

# Backends are asked in the table's order. Where mode and backend are left to us, these are asked first: compute capability
# -> intent -> backend.
FIRST = {
    # predicted, not measured: mma.sync is not the way to their matrix rate, and these kernels use wgmma on 9.0 alone
    (10, 0): dict.fromkeys(INTENTS, "triton"),
    (10, 3): dict.fromkeys(INTENTS, "triton"),
}


def _in_order(request: Request) -> tuple[Backend, ...]:
    config, device = request.config, request.device
    if config.backend != "auto" or device.type != "cuda":
        return TABLE
    first = FIRST.get(torch.cuda.get_device_capability(device), {}).get(config.intent)
    for backend in TABLE:
        # also where its own choice was asked for by name
        if backend.name == first and config.pv_accum in ("auto", backend.auto(device)[config.intent][0]):
            return (backend, *(other for other in TABLE if other is not backend))
    return TABLE


def default_device() -> torch.device:
    """The current GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def availability(device: torch.device | str | None = None) -> dict[str, str]:
    """Backend name -> "yes", or the reason it cannot be used on `device`, or if that is None on default_device()."""
    device = default_device() if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())  # answers are kept by device
    return {backend.name: backend.blocked(device) or "yes" for backend in TABLE}


@torch.compiler.assume_constant_result
def chosen(config: str, device: str) -> Choice:
    """`choose` for torch.compile: run once while tracing, its answer a constant of the graph."""
    return choose(Request(AttentionConfig.decode(config), torch.device(device)))


# The fewest tokens from which auto's whole calls were measured to be faster than torch's own attention: backend and compute
# capability -> padded head_dim -> tokens. On an H200: docs/numbers.md, whose shapes include some on either side. Of head_dim 64 lengths
# between 4,250 and 8,192 were not measured; at 4,096, a length that suits torch, a call is at 0.95 to 0.99 of torch's speed.
NEVER = 1 << 20  # not at any length that was measured
BREAK_EVEN = {
    ("cuda", (9, 0)): {64: 4200, 128: 3500},
    ("triton", (9, 0)): {64: NEVER, 128: 32000},
}
NOT_MEASURED = 1024  # below it launches and quantisation cost more than any attention


def too_few(backend: str, device: str, head_dim: int, nq: int, nk: int) -> int | None:
    """The fewest tokens from which a backend's attention is worth it on a device, if a call of nq queries and nk keys has fewer.

    Many queries make up for fewer keys: attention takes nq * nk, quantisation nq + 2 * nk, so a call counts as
    3 * nq * nk / (nq + 2 * nk) tokens, which is nq where both are the same. Not the other way round, and not on other cards:
    nobody has measured that, and the fewer of both count.
    """
    least, measured = _break_even(backend, device, padded_head_dim(head_dim))
    enough_keys = 3 * nq * nk >= least * (nq + 2 * nk) if measured else nk >= least
    return None if nq >= least and enough_keys else least


@torch.compiler.assume_constant_result
def _break_even(backend: str, device: str, head_dim: int) -> tuple[int, bool]:
    """That number, and whether it was measured."""
    on = torch.device(device)
    known = BREAK_EVEN.get((backend, torch.cuda.get_device_capability(on)), {}) if on.type == "cuda" else {}
    return known.get(head_dim, NOT_MEASURED), head_dim in known


@lru_cache(maxsize=512)
def choose(request: Request) -> Choice:
    """The first backend of the table that can serve the request, with the reasons why those before it cannot."""
    rejected: dict[str, str] = {}
    for backend in _in_order(request):
        reason = _refusal(backend, request)
        if reason is None:
            config, notes = _resolve(backend, request)
            return Choice(None, backend.name, config, notes, rejected)
        rejected[backend.name] = reason
    why = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
    return Choice(f"no backend can serve this call on {request.device} ({why})", rejected=rejected)


def _refusal(backend: Backend, request: Request) -> str | None:
    config = request.config
    if config.backend not in ("auto", backend.name):
        return f"backend={config.backend!r} was asked for"
    if reason := backend.blocked(request.device):
        return reason
    if backend.name == "triton" and config.backend == "auto" and request.device.type == "cpu":
        return "its interpreter is for tests; ask for backend='triton' to get it"
    if config.strict and config.pv_accum not in ("auto", *(modes := backend.modes(request.device))):
        return f"it has no {config.pv_accum} on this device; it has {', '.join(modes)}"
    if not config.strict and config.backend == "auto" and backend.name == "reference" and request.device.type != "cpu":
        return "the emulation is slower than unquantised attention on a GPU; ask for backend='reference' to get it"
    return None


def _resolve(backend: Backend, request: Request) -> tuple[AttentionConfig, tuple[str, ...]]:
    """Every "auto" filled in and, where config is not strict, a mode the backend lacks replaced by one it has."""
    config, modes = request.config, backend.modes(request.device)
    auto_mode, auto_gran = backend.auto(request.device)[config.intent]
    notes = []
    mode = auto_mode if config.pv_accum == "auto" else config.pv_accum
    if mode not in modes:
        wanted, mode = mode, nearest_mode(mode, modes)
        how = "at least as accurate" if PV[mode].error <= PV[wanted].error else "the most accurate it has"
        notes.append(f"pv_accum {wanted} is not available on {backend.name}; served by {mode}, which is {how}")
    quantised_v = PV[mode].p_dtype != "fp16" or mode == "fp16/fp16"  # where V's mean would cost accuracy
    resolved = replace(
        config,
        pv_accum=mode,
        qk_quant_gran=auto_gran if config.qk_quant_gran == "auto" else config.qk_quant_gran,
        smooth_k=True if config.smooth_k == "auto" else config.smooth_k,
        smooth_v=quantised_v if config.smooth_v == "auto" else config.smooth_v,
        rotate=True if config.rotate == "auto" else config.rotate,
        backend=backend.name,
    )
    return resolved, tuple(notes)


def nearest_mode(wanted: str, available: tuple[str, ...]) -> str:
    """The available mode closest to `wanted` in error among those at least as accurate, else the most accurate."""
    by_error = sorted(available, key=lambda mode: PV[mode].error)
    good = [mode for mode in by_error if PV[mode].error <= PV[wanted].error]
    return good[-1] if good else by_error[0]
