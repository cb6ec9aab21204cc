"""The CUDA kernels without `_C`: the same names as that module, on cubins that csrc/nvrtc.py compiled and the driver loads.

Where there is neither nvcc nor a wheel, install.py has NVRTC compile the device code into `_C.cubins`, a zip of machine code
and a manifest.json: what it was compiled from and for, what the kernels are called, and the numbers that csrc/ has for their
launches. bindings.cpp and the launch_... functions of csrc/ say the same as this file in C++. docs/nvrtc.md has the rest.

As in `_C` nothing waits for the GPU and nothing is allocated on it. A cubin is loaded when its first kernel is called.
"""

from __future__ import annotations

import io
import json
import threading
import zipfile
import zlib
from ctypes import Structure, addressof, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from . import cubin_call, cuda_driver
from . import cubin_layout as layout
from .cubin_call import MODES, DeviceCall, divider, fail, pieces, source, view
from .cuda_driver import Device, Function

ARCHIVE = Path(__file__).resolve().with_name("_C.cubins")
PTX = "+PTX"  # after an architecture: there is PTX of it and no machine code


def read(path: Path) -> tuple[dict[str, Any], zipfile.ZipFile]:
    """An archive, as it is now: install.py may put another one there before a kernel is needed. With its manifest.

    Fails with a ValueError for whatever cannot be used.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
        manifest = json.loads(archive.read("manifest.json"))
        known = manifest["layout"]
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    if known != layout.digest():
        raise ValueError(f"{path.name} was made for another version of these files")
    return manifest, archive


class Cubins:
    """What the module `_C` is, for the archive at `path`."""

    PART_Q, PART_K, PART_V = 1, 2, 4

    def __init__(self, path: Path = ARCHIVE) -> None:
        manifest, self._archive = read(path)
        self.path = path
        self.SOURCE_HASH: str = manifest["source_hash"]
        self.CUDA_RUNTIME: int = manifest["cuda"]
        self.ARCHS = tuple(arch.removesuffix(PTX) for arch in manifest["archs"])
        self._names = ",".join(manifest["archs"])
        self._ptx = {arch.removesuffix(PTX) for arch in manifest["archs"] if arch.endswith(PTX)}
        self._archs = {arch.removesuffix(PTX): about for arch, about in manifest["archs"].items()}
        self._facts: cubin_call.Facts = self._archs[self.ARCHS[0]]["facts"]  # where it does not matter of which
        for name in layout.PARAMS:
            setattr(self, name, self._facts["params.h"][name])
        self._devices: dict[int, tuple[Device, str]] = {}
        self._wgmma: dict[int, bool] = {}
        self._functions: dict[tuple[int, str], Function] = {}
        self._lock = threading.Lock()

    # ---- what there is

    def driver_version(self) -> int:
        return cuda_driver.version()

    def arch_for(self, major: int, minor: int) -> str:
        """What a GPU of compute capability major.minor runs, "" if nothing: as in bindings.cpp, the nearest below."""
        numbers = {arch: tuple(map(int, arch.split("."))) for arch in self.ARCHS}
        older = [arch for arch in self.ARCHS if numbers[arch] <= (major, minor)]
        own = [arch for arch in older if numbers[arch][0] == major]
        return max(own or [arch for arch in older if arch in self._ptx], key=numbers.__getitem__, default="")

    def modes(self, arch: str) -> tuple[str, ...]:
        params = self._of(arch)["params.h"]
        return tuple(name for mode, name in enumerate(MODES) if params[layout.has_mode(mode)])

    def key_tile(self, mode: str, head_dim: int, arch: str) -> int:
        if not 1 <= head_dim <= 256:
            fail(f"head_dim is {head_dim}; it must be 1 to 256")
        wanted = layout.tile(cubin_call.index_of("mode", mode, MODES), cubin_call.padded_v_dim(head_dim), "keys")
        return self._of(arch)["tiles.h"][wanted]

    def choose_splits(self, call: DeviceCall, multiprocessors: int, arch: str) -> int:
        """choose_splits of csrc/attention.cu."""
        if multiprocessors < 1:
            fail(f"multiprocessors is {multiprocessors}; it must be at least 1")
        c, tiles, params = call.fields, self._of(arch)["tiles.h"], self._facts["params.h"]
        if c.wgmma:
            rows, keys, blocks = tiles["WGMMA_ROWS"], params["WGMMA_KEYS"], 1
        else:
            rows, keys, blocks = (tiles[layout.tile(c.mode, c.v_dim, what)] for what in ("rows()", "keys", "blocks"))
        wanted = multiprocessors * blocks // (call.q_rows * pieces(c.nq, rows))
        return max(1, min(wanted, c.nk // (tiles["SPLIT_TILES"] * keys), tiles["USUAL_SPLITS"]))

    def Call(self, **fields: Any) -> DeviceCall:
        return DeviceCall(self._facts, fields, self._runs_wgmma)

    def _of(self, arch: str) -> cubin_call.Facts:
        if arch not in self._archs:
            fail(f"arch is '{arch}'; this binary has {self._names}")
        return self._archs[arch]["facts"]

    def _runs_wgmma(self, device: int) -> bool:
        if device not in self._wgmma:
            has = "9.0" in self.ARCHS and "9.0" not in self._ptx and device < cuda_driver.device_count()
            self._wgmma[device] = has and cuda_driver.capability(device) == (9, 0)
        return self._wgmma[device]

    # ---- the steps: as in bindings.cpp, with the launches of stats.cu, quantize.cu, exact.cu and attention.cu

    def stats(self, call: DeviceCall, k: Any, v: Any, stats: int) -> None:
        k_view, v_view, known = view("k", k), view("v", v), call.stats.at("stats", stats)
        device, _ = self._ready(call)
        _check(device.clear(known.bad, known.zeroed, call.stream), "cuMemsetD8Async", call)
        panel = self._facts["params.h"]["PANEL"]
        chunk = pieces(pieces(call.fields.nk, panel), call.chunks) * panel
        job = layout.StatsJob(call.fields, source(call, k_view), source(call, v_view), known, call.chunks, chunk)
        self._launch(call, layout.stats(call.fields.dtype), call.kv_rows * call.chunks, job)

    def quantize(
        self, call: DeviceCall, parts: int, q: Any, k: Any, v: Any, stats: int, q_codes: int, k_codes: int, v_codes: int
    ) -> None:
        if not 1 <= parts <= self.PART_Q | self.PART_K | self.PART_V:
            fail(f"parts is {parts}; it must be a sum of PART_Q, PART_K, PART_V")
        with_q, with_k, with_v = (bool(parts & part) for part in (self.PART_Q, self.PART_K, self.PART_V))
        # of a part that is not asked for, nothing is read: its tensor may be gone
        views = [
            view(name, given) if asked else layout.View()
            for name, given, asked in (("q", q, with_q), ("k", k, with_k), ("v", v, with_v))
        ]
        known = call.stats.at("stats", stats)
        q_to = call.q_codes.at("q_codes", q_codes) if with_q else layout.QCodes()
        k_to = call.k_codes.at("k_codes", k_codes) if with_k else layout.KCodes()
        v_to = call.v_codes.at("v_codes", v_codes) if with_v else layout.VCodes()
        kernel, programs, rest = self._shared_out(call, with_q, with_k, with_v)
        sources = (source(call, given) for given in views)
        job = layout.CodesJob(call.fields, *sources, known, q_to, k_to, v_to, *rest)
        if programs:
            self._launch(call, kernel, programs, job)

    def _shared_out(self, call: DeviceCall, q: bool, k: bool, v: bool) -> tuple[str, int, tuple[Any, ...]]:
        """The kernel, its programs, and what CodesJob says of them."""
        key = (q, k, v)
        if key in call.shared_out:
            return call.shared_out[key]
        c, tile = call.fields, self._facts["quantize.cuh"]["TILE"]
        passes = 2 if q and c.q_block > tile else 1  # a group of 128 tokens takes the registers of two passes
        q_units, k_units = call.q_padded // (passes * tile), call.k_padded // (passes * tile)
        per_unit, kv_units = k + v * passes, call.kv_rows * k_units
        dividers = per_unit or 1, q_units, k_units, c.heads, c.kv_heads, call.group
        rest = (kv_units * per_unit, kv_units, int(k), *map(divider, dividers))
        programs = kv_units * per_unit + q * call.q_rows * q_units
        call.shared_out[key] = layout.quantize(c.dtype, c.dim, passes), programs, rest
        return call.shared_out[key]

    def exact(self, call: DeviceCall, q: Any, k: Any, v: Any, mask: Any, stats: int, out: Any, lse: int) -> None:
        inputs = [source(call, view(name, given)) for name, given in (("q", q), ("k", k), ("v", v))]
        to, hidden = view("out", out), cubin_call.mask(mask)
        known, lse = call.stats.at("stats", stats), _lse(call, lse)
        facts = self._facts["exact.cuh"]
        shares = min(pieces(call.fields.nq, facts["ROWS"]), facts["MOST_SHARES"])
        job = layout.ExactJob(call.fields, *inputs, hidden, known.bad, to, lse, shares, call.q_rows * shares)
        programs = min(call.q_rows * shares, facts["MOST_PROGRAMS"])
        self._launch(call, layout.exact(call.fields.dtype), programs, job)

    def attention(
        self,
        call: DeviceCall,
        stats: int,
        q_codes: int,
        k_codes: int,
        v_codes: int,
        mask: Any,
        partials: int,
        out: Any,
        lse: int,
    ) -> None:
        known, c = call.stats.at("stats", stats), call.fields
        q, k = call.q_codes.at("q_codes", q_codes), call.k_codes.at("k_codes", k_codes)
        v, parts = call.v_codes.at("v_codes", v_codes), call.partials.at("partials", partials)
        hidden, to, lse_at = cubin_call.mask(mask), view("out", out), c_uint64(_lse(call, lse))
        device, arch = self._ready(call)
        if c.wgmma and not self._runs_wgmma(device.index):
            fail(f"wgmma is 1; device {device.index} or this binary, with kernels for {self._names}, does not have it")
        facts, masked = self._of(arch), hidden.kind != 0
        if c.wgmma:
            rows = facts[layout.WGMMA][layout.wgmma(c.mode, c.v_dim, masked, "ROWS")]
        else:
            rows = facts["tiles.h"][layout.tile(c.mode, c.v_dim, "rows()")]
        blocks = _grid(call, call.q_rows * c.splits * pieces(c.nq, rows))
        if c.wgmma and c.splits == 1 and not (c.cu_q or masked):  # they stay and take one query block after another
            blocks = min(blocks, device.multiprocessors)
        self._launch(call, call.kernels[masked], blocks, c, q, k, v, known, hidden, parts, to, lse_at)
        if c.splits > 1:
            threads = call.q_rows * c.nq * (c.v_dim // facts["combine.cuh"]["COMBINE_CHANNELS"])
            blocks = _grid(call, pieces(threads, facts["combine.cuh"]["COMBINE_THREADS"]))
            self._launch(call, layout.COMBINE, blocks, c, q, known, parts, to, lse_at)

    # ---- launches

    def _ready(self, call: DeviceCall) -> tuple[Device, str]:
        """The call's device and the architecture of its kernels, after checking that they can run the call."""
        if call.device not in self._devices:
            count = cuda_driver.device_count()
            if call.device >= count:
                fail(f"device is {call.device}; CUDA devices here: {count}")
            own = cuda_driver.capability(call.device)
            arch = self.arch_for(*own)
            if not arch:
                fail(
                    f"device {call.device} has compute capability {own[0]}.{own[1]}; this binary has kernels for {self._names}"
                )
            with self._lock:
                self._devices.setdefault(call.device, (Device(call.device), arch))
        device, arch = self._devices[call.device]
        if not self._archs[arch]["facts"]["params.h"][layout.has_mode(call.fields.mode)]:
            mode = MODES[call.fields.mode]
            fail(f"mode is {mode}; kernels of compute capability {arch} do not have it")
        return device, arch

    def _launch(self, call: DeviceCall, kernel: str, blocks: int, *arguments: Structure | c_uint64) -> None:
        device, arch = self._ready(call)
        function = self._functions.get((device.index, kernel)) or self._load(device, arch, kernel)
        addresses = (c_void_p * len(arguments))(*map(addressof, arguments))
        _check(device.launch(function, blocks, call.stream, addresses), kernel.partition("<")[0], call)

    def _load(self, device: Device, arch: str, kernel: str) -> Function:
        module, symbol, threads, shared_bytes = self._archs[arch]["kernels"][kernel]
        function = device.load(module, lambda: self._read(module), symbol, threads, shared_bytes)
        return self._functions.setdefault((device.index, kernel), function)

    def _read(self, module: str) -> bytes:
        try:
            return self._archive.read(module)
        except (KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise RuntimeError(f"{module} cannot be read from {self.path} ({error}): run install.py again") from error

    def load_all(self) -> None:
        """Loads every kernel on every GPU here that it is for."""
        for index in range(cuda_driver.device_count()):
            if arch := self.arch_for(*cuda_driver.capability(index)):
                device = Device(index)
                for kernel in self._archs[arch]["kernels"]:
                    self._load(device, arch, kernel)


def _check(error: int, what: str, call: DeviceCall) -> None:
    if error:
        raise RuntimeError(f"{what} failed for {call.describe()}: {cuda_driver.said(error)}")


def _grid(call: DeviceCall, blocks: int) -> int:
    """A grid's first axis holds up to 2^31 - 1 blocks."""
    if blocks > 0x7FFFFFFF:
        fail(f"the call has too many blocks for one launch: {call.describe()}")
    return blocks


def _lse(call: DeviceCall, address: int) -> int:
    if call.fields.return_lse and not address:
        fail("lse is at address 0, and return_lse was asked for")
    return address if call.fields.return_lse else 0
