"""One call in the terms of csrc/params.h, for cubins.py: its fields checked, its scratch memory carved, its kernels named.

What bindings.cpp does for `_C`, with the same answers to nonsense; tests/test_cubins.py compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from ctypes import Structure, c_float
from typing import Any, NoReturn

from . import cubin_layout as layout

MODES = tuple(name.replace("_", "/", 1).replace("_", "+") for name in layout.MODES)
DTYPES = ("float16", "bfloat16", "float32")
MASK_KINDS = ("none", "bool", "float16", "bfloat16", "float32")
INT_MAX, INT64_MAX = (1 << 31) - 1, (1 << 63) - 1
GRANULARITIES = ((128, 1, 1), (16, 1, 1), (16, 8, 4))  # q_block, q_sub, k_sub

Facts = dict[str, dict[str, Any]]  # header -> C++ expression -> value (cubin_layout.FACTS)


def fail(text: str) -> NoReturn:
    raise ValueError(text)


def index_of(what: str, given: str, names: tuple[str, ...]) -> int:
    if given not in names:
        fail(f"{what} is '{given}'; it must be one of {', '.join(names)}")
    return names.index(given)


def padded_head_dim(d: int) -> int:
    return 64 if d <= 64 else 128 if d <= 128 else 256


def padded_v_dim(d: int) -> int:
    return 96 if 64 < d <= 96 else padded_head_dim(d)


def pieces(n: int, size: int) -> int:
    """How many of `size` cover n."""
    return -(-n // size)


def up_to(n: int, multiple: int) -> int:
    return pieces(n, multiple) * multiple


class Keywords:
    """The keywords of Call(...), each taken once; what is missing, left over or out of range is a sentence that names it."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.left = dict(given)

    def take(self, name: str) -> Any:
        if name not in self.left:
            fail(f"{name} is missing")
        return self.left.pop(name)

    def integer(self, name: str, low: int, high: int) -> int:
        given = self.take(name)
        if isinstance(given, int) and low <= given <= high:
            return int(given)
        fail(f"{name} is {given!r}; it must be an integer, {low} to {high}")

    def size(self, name: str, high: int) -> int:
        return self.integer(name, 1, high)

    def flag(self, name: str) -> bool:
        return self.integer(name, 0, 1) != 0

    def address(self, name: str) -> int:
        return self.integer(name, 0, INT64_MAX)

    def number(self, name: str) -> float:
        given = self.take(name)
        if isinstance(given, (int, float)):
            try:
                value = c_float(given).value
            except OverflowError:  # an int that no double holds
                value = math.inf
            if math.isfinite(value):
                return value
        fail(f"{name} is {given!r}; it must be a finite number")

    def one_of(self, name: str, names: tuple[str, ...]) -> int:
        return index_of(name, str(self.take(name)), names)

    def done(self) -> None:
        for name in self.left:
            fail(f"Call has no {name!r}")


class Part:
    """One of the five parts of the scratch memory: Part::carve of params.h, for a call's own sizes."""

    def __init__(
        self, struct: type[Structure], alignment: int, sizes: dict[str, int], without: tuple[str, ...] = ()
    ) -> None:
        """sizes: bytes of each array, in the order of memory. without: arrays that the call has not."""
        self.struct, self.alignment = struct, alignment
        at, starts = 0, {}
        for name, size in sizes.items():
            starts[name] = at
            at += up_to(size, alignment)
        self.bytes = at
        others = {"bytes": at, "zeroed": starts.get("k_mean", 0)}
        self.fields = [
            (name in starts and name not in without, starts[name] if name in starts and name not in without else others.get(name, 0))
            for name, *_ in struct._fields_
        ]  # fmt: skip
        self.last: tuple[int, Any] = (0, struct(*[0 if moves else value for moves, value in self.fields]))

    def at(self, name: str, address: int) -> Any:
        """The part where it begins at `address`."""
        last, known = self.last
        if address == last and (address or not self.bytes):
            return known
        if self.bytes and not address:
            fail(f"{name} is at address 0; it must have {self.bytes} bytes")
        if address % self.alignment:
            fail(f"{name} is at an address that is no multiple of {self.alignment}")
        known = self.struct(*[address + value if moves else value for moves, value in self.fields])
        self.last = address, known
        return known


class DeviceCall:
    """Everything about a call but its tensors. `fields` is the Call of params.h."""

    def __init__(self, facts: Facts, given: dict[str, Any], runs_wgmma: Callable[[int], bool]) -> None:
        take, self.params, self.fields = Keywords(given), facts["params.h"], layout.Call()
        self._take_shape(take)
        self._take_options(take)
        self.most_splits = min(self.params["MOST_SPLITS"], pieces(self.fields.nk, self.params["PANEL"]))
        self.fields.splits = take.size("splits", self.most_splits)
        self.device, self.stream = take.integer("device", 0, INT_MAX), take.address("stream")
        c, mode = self.fields, MODES[self.fields.mode]
        able = bool(self.params[layout.has_wgmma(c.mode, c.v_dim)])
        c.wgmma = take.flag("wgmma") if "wgmma" in take.left else able and runs_wgmma(self.device)
        if c.wgmma and mode == "fp8/fp32+fp16":  # as in bindings.cpp: P is half as large
            c.p_max_log2 -= 1.0
        if c.wgmma and not able:
            fail(f"wgmma is 1; there is no kernel with it for {mode} at head_dim {c.head_dim}")
        take.done()
        self._carve()
        self.kernels = {masked: layout.attention(self.family, c.mode, c.v_dim, masked) for masked in (False, True)}
        self.shared_out: dict[Any, Any] = {}  # what quantize() has worked out before

    def _take_shape(self, take: Keywords) -> None:
        c, block = self.fields, self.params["BLOCK"]
        c.batch, c.heads, c.kv_heads = (take.size(name, INT_MAX) for name in ("batch", "heads", "kv_heads"))
        if c.heads % c.kv_heads:
            fail(f"heads is {c.heads}; it must be a multiple of kv_heads, {c.kv_heads}")
        c.nq, c.nk = take.size("nq", INT_MAX - block), take.size("nk", INT_MAX - block)
        c.head_dim, c.dim, c.v_dim = (take.size(name, 256) for name in ("head_dim", "dim", "v_dim"))
        for name, wanted in (("dim", padded_head_dim(c.head_dim)), ("v_dim", padded_v_dim(c.head_dim))):
            if getattr(c, name) != wanted:
                fail(f"{name} is {getattr(c, name)}; for head_dim {c.head_dim} it must be {wanted}")
        self.q_rows, self.kv_rows, self.group = c.batch * c.heads, c.batch * c.kv_heads, c.heads // c.kv_heads
        self.q_padded, self.k_padded = up_to(c.nq, block), up_to(c.nk, block)
        if max(self.q_rows * self.q_padded, self.kv_rows * self.k_padded) * c.dim > self.params["MOST_ELEMENTS"]:
            fail(f"the call is larger than any memory: {self.describe()}")

    def _take_options(self, take: Keywords) -> None:
        c = self.fields
        c.mode, c.dtype = take.one_of("mode", MODES), take.one_of("dtype", DTYPES)
        c.q_block, c.q_sub = take.size("q_block", self.params["BLOCK"]), take.size("q_sub", self.params["BLOCK"])
        c.k_sub = take.size("k_sub", self.params["PANEL"])
        if (c.q_block, c.q_sub, c.k_sub) not in GRANULARITIES:
            *most, last = map(str, GRANULARITIES)
            fail(f"(q_block, q_sub, k_sub) is {(c.q_block, c.q_sub, c.k_sub)}; it must be {', '.join(most)} or {last}")
        for name in ("is_causal", "smooth_k", "smooth_v", "rotate", "return_lse"):
            setattr(c, name, take.flag(name))
        c.sm_scale, c.q_factor, c.v_max = (take.number(name) for name in ("sm_scale", "q_factor", "v_max"))
        if c.v_max <= 0:
            fail(f"v_max is {c.v_max:g}; it must be above 0")
        c.p_max_log2 = take.number("p_max_log2")
        c.cu_q, c.cu_k = take.address("cu_q"), take.address("cu_k")
        if bool(c.cu_q) != bool(c.cu_k):
            fail(f"cu_{'k' if c.cu_q else 'q'} is 0; packed sequences need both cu_q and cu_k")

    def _carve(self) -> None:
        c, kv = self.fields, self.kv_rows
        alignment, panel = self.params["SCRATCH_ALIGNMENT"], self.params["PANEL"]
        channels = 4 * kv * c.dim  # bytes of a float each
        self.chunks = min(pieces(self.params["STATS_PROGRAMS"], kv), pieces(c.nk, panel))
        stats = dict(
            bad=4 * kv, arrived=4 * kv, v_sums=8 * kv * c.dim, k_top=4 * kv,
            k_mean=channels, v_mean=channels, v_scale=channels,
        )  # fmt: skip
        self.stats = Part(
            layout.Stats, alignment, {**stats, "v_inverse": channels, "partial": channels * self.chunks * 4}
        )
        q_groups, k_groups = self.q_padded // c.q_block * c.q_sub, self.k_padded // panel * c.k_sub
        shifts = c.return_lse and c.smooth_k
        self.q_codes = Part(
            layout.QCodes,
            alignment,
            dict(
                codes=self.q_rows * self.q_padded * c.dim,
                scale=4 * self.q_rows * q_groups,
                lse_shift=4 * self.q_rows * self.q_padded if shifts else 0,
            ),
            without=() if shifts else ("lse_shift",),
        )
        self.k_codes = Part(layout.KCodes, alignment, dict(codes=kv * self.k_padded * c.dim, scale=4 * kv * k_groups))
        width = self.params[layout.v_bytes(c.mode)]
        self.v_codes = Part(layout.VCodes, alignment, dict(codes=kv * self.k_padded * c.v_dim * width))
        self._carve_partials()

    def _carve_partials(self) -> None:
        c = self.fields
        rows = c.splits * self.q_rows * self.q_padded if c.splits > 1 else 0
        sizes = dict(out=4 * rows * c.v_dim, top=4 * rows, total=4 * rows)
        self.partials = Part(layout.Partials, self.params["SCRATCH_ALIGNMENT"], sizes)

    @property
    def splits(self) -> int:
        return self.fields.splits

    @splits.setter
    def splits(self, splits: int) -> None:
        if not 1 <= splits <= self.most_splits:
            fail(f"splits is {splits}; it must be 1 to {self.most_splits} for {self.describe()}")
        self.fields.splits = splits
        self._carve_partials()

    @property
    def wgmma(self) -> bool:
        return self.fields.wgmma

    @property
    def family(self) -> str:
        return "wgmma" if self.wgmma else "mma"

    def bytes(self) -> tuple[int, int, int, int, int]:
        parts = self.stats, self.q_codes, self.k_codes, self.v_codes, self.partials
        return parts[0].bytes, parts[1].bytes, parts[2].bytes, parts[3].bytes, parts[4].bytes

    def describe(self) -> str:
        c = self.fields
        q, kv = [c.batch, c.heads, c.nq, c.head_dim], [c.batch, c.kv_heads, c.nk, c.head_dim]
        return f"q {q}, k and v {kv}"

    def __repr__(self) -> str:
        return f"Call({self.describe()}, {MODES[self.fields.mode]})"


# ---- tensors


def view(name: str, given: Any) -> layout.View:
    """given: address, strides of batch, head, token."""
    try:
        data, b, h, n = given
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {given!r}; it must be a tuple: address, strides of batch, head, token") from error
    if not data:
        fail(f"{name} is at address 0")
    if b < 0 or h < 0 or n < 0:
        _check_strides(name, (b, h, n))
    return layout.View(data, b, h, n)


def mask(given: Any) -> layout.Mask:
    if given is None:
        return layout.Mask()
    whole = isinstance(given, tuple) and len(given) == 6 and isinstance(given[0], str)
    if not whole or not all(isinstance(x, int) for x in given[1:]):
        fail(f"mask is {given!r}; it must be None or (kind, address, and strides of batch, head, query, key)")
    kind, data, *strides = given
    if not data:
        fail("mask is at address 0")
    number = index_of("mask kind", kind, MASK_KINDS)
    _check_strides("mask", strides)
    return layout.Mask(number, data, *strides)


def _check_strides(name: str, given: Iterable[int]) -> None:
    for stride in given:
        if stride < 0:
            fail(f"{name} has a stride of {stride}; strides must not be negative")


def source(call: DeviceCall, given: layout.View) -> layout.Input:
    """Input::of in common/tokens.cuh."""
    unit = 4 if DTYPES[call.fields.dtype] == "float32" else 8
    aligned = given.data % 16 == 0 and call.fields.head_dim % 8 == 0
    wide = aligned and given.b % unit == 0 and given.h % unit == 0 and given.n % unit == 0
    return layout.Input(given, call.fields.head_dim, wide)


def divider(divisor: int) -> layout.Divider:
    """Divider::of in quantize_v.cuh."""
    shift = (divisor - 1).bit_length()
    return layout.Divider(divisor, (((1 << shift) - divisor) << 32) // divisor + 1, shift)
