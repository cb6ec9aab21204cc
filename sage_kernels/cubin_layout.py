"""What Python and the device code of csrc/ have to agree on where no C++ stands between them: structs, kernels, numbers.

csrc/nvrtc.py has the compiler compare every struct with the one of the same name in csrc/, and asks it for the numbers of
`facts`; cubins.py reads them. So nothing here is trusted, and no number of a kernel is written twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from ctypes import Structure, c_bool, c_float, c_int32, c_int64, c_uint32, c_uint64, sizeof
from pathlib import Path

# In the order of the enums in params.h.
MODES = ("fp16_fp32", "fp16_fp16_fp32", "fp16_fp16", "int8_int32", "fp8_fp32_fp32", "fp8_fp32_fp16", "fp8_fp32")
DTYPES = ("f16", "bf16", "f32")
MASK_KINDS = ("none", "boolean", "f16", "bf16", "f32")

DIMS = {64: 64, 96: 128, 128: 128, 256: 256}  # channels of V codes -> of Q and K codes
PASSES = (1, 2)  # of a program of quantize_kernel

Pointer = c_uint64  # which ctypes gives back as an int, 0 too


# ---- the structs, by the header that defines them


class View(Structure):
    _fields_ = [("data", Pointer), ("b", c_int64), ("h", c_int64), ("n", c_int64)]


class Mask(Structure):
    _fields_ = [("kind", c_int32), ("data", Pointer), ("b", c_int64), ("h", c_int64), ("q", c_int64), ("k", c_int64)]


class Call(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("batch", "heads", "kv_heads", "nq", "nk", "head_dim", "dim", "v_dim")),
        *((name, c_int32) for name in ("mode", "dtype", "q_block", "q_sub", "k_sub")),
        *((name, c_bool) for name in ("is_causal", "smooth_k", "smooth_v", "rotate", "return_lse", "wgmma")),
        *((name, c_float) for name in ("sm_scale", "q_factor", "v_max", "p_max_log2")),
        ("cu_q", Pointer),
        ("cu_k", Pointer),
        ("splits", c_int32),
    ]


class Stats(Structure):
    _fields_ = [
        ("bad", Pointer),
        ("arrived", Pointer),
        ("v_sums", Pointer),
        ("k_top", Pointer),
        ("zeroed", c_int64),
        *((name, Pointer) for name in ("k_mean", "v_mean", "v_scale", "v_inverse", "partial")),
        ("bytes", c_int64),
    ]


class QCodes(Structure):
    _fields_ = [("codes", Pointer), ("scale", Pointer), ("lse_shift", Pointer), ("bytes", c_int64)]


class KCodes(Structure):
    _fields_ = [("codes", Pointer), ("scale", Pointer), ("bytes", c_int64)]


class VCodes(Structure):
    _fields_ = [("codes", Pointer), ("bytes", c_int64)]


class Partials(Structure):
    _fields_ = [("out", Pointer), ("top", Pointer), ("total", Pointer), ("bytes", c_int64)]


class Input(Structure):
    _fields_ = [("view", View), ("head_dim", c_int32), ("wide", c_bool)]


class StatsJob(Structure):
    _fields_ = [("call", Call), ("k", Input), ("v", Input), ("stats", Stats), ("chunks", c_int32), ("chunk", c_int32)]


class Divider(Structure):
    _fields_ = [("divisor", c_uint32), ("factor", c_uint32), ("shift", c_uint32)]


class CodesJob(Structure):
    _fields_ = [
        ("call", Call),
        *((name, Input) for name in ("q", "k", "v")),
        ("stats", Stats),
        ("q_codes", QCodes),
        ("k_codes", KCodes),
        ("v_codes", VCodes),
        *((name, c_int32) for name in ("kv_programs", "kv_units", "k_per_unit")),
        *((name, Divider) for name in ("per_unit", "q_units", "k_units", "heads", "kv_heads", "group")),
    ]


class ExactJob(Structure):
    _fields_ = [
        ("call", Call),
        *((name, Input) for name in ("q", "k", "v")),
        ("mask", Mask),
        ("bad", Pointer),
        ("out", View),
        ("lse", Pointer),
        ("shares", c_int32),
        ("all_shares", c_int64),
    ]


STRUCTS: dict[str, tuple[type[Structure], ...]] = {
    "params.h": (View, Mask, Call, Stats, QCodes, KCodes, VCodes, Partials),
    "stats.cuh": (Input, StatsJob),
    "quantize.cuh": (Divider, CodesJob),
    "exact.cuh": (ExactJob,),
}


def fields(struct: type[Structure]) -> list[tuple[str, int, int]]:
    """The name, the place and the bytes of each field."""
    names = (field[0] for field in struct._fields_)
    return [(name, (at := getattr(struct, name)).offset, at.size) for name in names]


def probes(header: str) -> str:
    """C++ that does not compile where a size or an enum of `header` is not what it is above, and that tells the compiler's
    places of the fields, which NVRTC has no offsetof for: in PTX the array places_<struct> is addresses in probe_<struct>."""
    lines = []
    for struct in STRUCTS.get(header, ()):
        name = struct.__name__
        lines.append(f"static_assert(sizeof({name}) == {sizeof(struct)});")
        lines += [f"static_assert(sizeof({name}::{field}) == {size});" for field, _, size in fields(struct)]
        places = ", ".join(f"&probe_{name}.{field}" for field, _, _ in fields(struct))
        lines.append(f'extern "C" __device__ {name} probe_{name};')
        lines.append(f'extern "C" __device__ const void* const places_{name}[] = {{{places}}};')
    if header == "params.h":
        for enum, names in (("Mode", (*MODES, "count")), ("DType", DTYPES), ("MaskKind", MASK_KINDS)):
            lines += [f"static_assert(int({enum}::{name}) == {at});" for at, name in enumerate(names)]
    return "\n".join(lines)


def misplaced(header: str, ptx: str) -> str | None:
    """The first struct whose fields are elsewhere than here, by the PTX of `probes`."""
    for struct in STRUCTS.get(header, ()):
        name = struct.__name__
        listed = re.search(rf"\bplaces_{name}\[\d+\] = {{([^}}]*)}}", ptx)
        places = re.findall(rf"generic\(probe_{name}\)(?:\+(\d+))?", listed[1] if listed else "")
        if [int(place or 0) for place in places] != [offset for _, offset, _ in fields(struct)]:
            return name
    return None


def digest() -> str:
    """The name of this state of this file: cubins that were made by another one are not used."""
    return hashlib.sha256(Path(__file__).read_bytes().replace(b"\r\n", b"\n")).hexdigest()[:16]


# ---- kernels, by the names that C++ has for them


def stats(dtype: int) -> str:
    return f"stats_kernel<DType::{DTYPES[dtype]}>"


def quantize(dtype: int, dim: int, passes: int) -> str:
    return f"quantize_kernel<DType::{DTYPES[dtype]}, {dim}, {passes}>"


def exact(dtype: int) -> str:
    return f"exact_kernel<DType::{DTYPES[dtype]}>"


def attention(family: str, mode: int, v_dim: int, masked: bool) -> str:
    """family: "mma" or "wgmma"."""
    return f"attention_{family}<{_variant(mode, v_dim, masked)}>"


def _variant(mode: int, v_dim: int, masked: bool) -> str:
    return f"Mode::{MODES[mode]}, {DIMS[v_dim]}, {v_dim}, {str(masked).lower()}"


COMBINE = "combine"


# ---- numbers, by the C++ that yields them; ARCH is compute capability times ten


def has_mode(mode: int) -> str:
    return f"has_mode(Mode::{MODES[mode]}, ARCH)"


def has_wgmma(mode: int, v_dim: int) -> str:
    return f"has_wgmma(Mode::{MODES[mode]}, {DIMS[v_dim]}, {v_dim})"


def v_bytes(mode: int) -> str:
    return f"v_bytes(Mode::{MODES[mode]})"


def tile(mode: int, v_dim: int, what: str) -> str:
    """what: a member of Tile."""
    return f"tile_for(Mode::{MODES[mode]}, {DIMS[v_dim]}, {v_dim}, ARCH).{what}"


def mma_shared_bytes(mode: int, v_dim: int) -> str:
    return tile(mode, v_dim, f"shared_bytes(Mode::{MODES[mode]}, {DIMS[v_dim]}, {v_dim}, ARCH)")


def wgmma(mode: int, v_dim: int, masked: bool, what: str) -> str:
    """what: a constant of WgmmaAttention."""
    return f"WgmmaAttention<{_variant(mode, v_dim, masked)}>::{what}"


def program_threads(dim: int) -> str:
    return f"program_threads({dim})"


PARAMS = (
    "LARGEST TINY LOG2E MASK_LIMIT EXACT_P_MAX HASH BLOCK PANEL WGMMA_KEYS STATS_PROGRAMS SCRATCH_ALIGNMENT MOST_SPLITS "
    "MOST_ELEMENTS"
).split()
# What is asked of each header before anything is known; of attention_wgmma.cuh see wgmma_facts.
FACTS: dict[str, list[str]] = {
    "params.h": [
        *PARAMS,
        *(has_mode(mode) for mode in range(len(MODES))),
        *(v_bytes(mode) for mode in range(len(MODES))),
        *(has_wgmma(mode, v_dim) for mode in range(len(MODES)) for v_dim in DIMS),
    ],
    "tiles.h": [
        *("WGMMA_ROWS", "SPLIT_TILES", "USUAL_SPLITS"),
        *(
            tile(mode, v_dim, what)
            for mode in range(len(MODES))
            for v_dim in DIMS
            for what in ("rows()", "threads()", "keys", "blocks")
        ),
        *(mma_shared_bytes(mode, v_dim) for mode in range(len(MODES)) for v_dim in DIMS),
    ],
    "stats.cuh": ["THREADS"],
    "quantize.cuh": ["TILE", *map(program_threads, sorted(set(DIMS.values())))],
    "exact.cuh": ["THREADS", "ROWS", "MOST_SHARES", "MOST_PROGRAMS"],
    "combine.cuh": ["COMBINE_THREADS", "COMBINE_CHANNELS"],
}
WGMMA = "attention_wgmma.cuh"


def wgmma_facts(params: Mapping[str, float]) -> list[str]:
    """What is asked of WGMMA; params: the facts of params.h."""
    variants = list(wgmma_variants(params))
    return [wgmma(*variant, what) for variant in variants for what in ("ROWS", "THREADS", "SHARED_BYTES")]


def wgmma_variants(params: Mapping[str, float]) -> Iterable[tuple[int, int, bool]]:
    for mode in range(len(MODES)):
        for v_dim in DIMS:
            if params[has_wgmma(mode, v_dim)]:
                yield from ((mode, v_dim, masked) for masked in (False, True))


# Its name in C++ -> threads of a block, bytes of shared memory that a launch asks for.
Kernels = dict[str, tuple[int, int]]


def units(facts: dict[str, dict[str, int]]) -> dict[str, tuple[str, Kernels]]:
    """What is compiled at a time: its name -> (the header, the kernels)."""
    params, tiles, programs = facts["params.h"], facts["tiles.h"], facts["quantize.cuh"]
    every, dims = range(len(DTYPES)), sorted(set(DIMS.values()))
    found: dict[str, tuple[str, Kernels]] = {
        "stats": ("stats.cuh", {stats(dtype): (facts["stats.cuh"]["THREADS"], 0) for dtype in every}),
        "exact": ("exact.cuh", {exact(dtype): (facts["exact.cuh"]["THREADS"], 0) for dtype in every}),
        "combine": ("combine.cuh", {COMBINE: (facts["combine.cuh"]["COMBINE_THREADS"], 0)}),
    }
    for dtype in every:
        kernels = {
            quantize(dtype, dim, passes): (programs[program_threads(dim)], 0) for dim in dims for passes in PASSES
        }
        found[f"quantize_{DTYPES[dtype]}"] = ("quantize.cuh", kernels)
    for mode, name in enumerate(MODES):
        if params[has_mode(mode)]:
            sizes = {
                v_dim: (tiles[tile(mode, v_dim, "threads()")], tiles[mma_shared_bytes(mode, v_dim)]) for v_dim in DIMS
            }
            kernels = {
                attention("mma", mode, v_dim, masked): sizes[v_dim] for v_dim in DIMS for masked in (False, True)
            }
            found[f"mma_{name}"] = ("attention_mma.cuh", kernels)
    if WGMMA in facts:
        for variant in wgmma_variants(params):
            threads, shared_bytes = (facts[WGMMA][wgmma(*variant, what)] for what in ("THREADS", "SHARED_BYTES"))
            of_mode = found.setdefault(f"wgmma_{MODES[variant[0]]}", (WGMMA, {}))[1]
            of_mode[attention("wgmma", *variant)] = threads, shared_bytes
    return found
