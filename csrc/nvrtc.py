"""Compiles the device code of this folder with NVRTC, which torch brings: no nvcc, no C++ compiler, no Python.h.

`find` looks for an NVRTC, `compile_all` makes `_C.cubins` with it: what sage_kernels/cubins.py runs where there is no `_C`. Every
failure is a BuildError whose text is a sentence for the user. docs/nvrtc.md has the whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import build
from .build import ARCHS, BUILD_DIR, CSRC, PACKAGE, PTX, WINDOWS, BuildError, NothingToBuild


def library_names(windows: bool) -> re.Pattern[str]:
    return re.compile(r"nvrtc64_\d+_\d+\.dll" if windows else r"libnvrtc(-[0-9a-f]+)?\.so(\.\d+)*")


LIBRARY = library_names(WINDOWS)
ARCHIVE = "_C.cubins"  # as sage_kernels.cubins has it
JOB_BYTES = 1 << 29  # what one compiler may take: 0.5 GiB
# What a compiler does, in a process of its own: NVRTC compiles one program at a time in a process. It stands in csrc/, so that
# no path is told to NVRTC, whose ideas of non-ASCII ones are its own.
WORKER = "import sys; sys.path.insert(0, sys.argv[1]); from csrc import nvrtc; nvrtc.work()"


def _alone(name: str) -> Any:
    """A module of sage_kernels without that package's own code, which imports torch."""
    package = "sage_kernels_without_torch"
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(PACKAGE)]
    return importlib.import_module(f"{package}.{name}")


# ---- NVRTC itself


@dataclass(frozen=True)
class Nvrtc:
    path: str
    version: tuple[int, int]  # CUDA's


def find(archs: Sequence[str], driver_cuda: tuple[int, ...] | None) -> Nvrtc:
    """The first NVRTC here that compiles for `archs` what a driver that knows CUDA `driver_cuda` runs (None: whatever)."""
    reasons = []
    for path in candidates():
        try:
            found = Nvrtc(path, version(path))
        except OSError as error:
            reasons.append(f"{path} cannot be loaded ({error})")
            continue
        if reason := unfit(found, archs, driver_cuda):
            reasons.append(reason)
        else:
            return found
    if reasons:
        raise NothingToBuild(reasons[0])
    major = driver_cuda[0] if driver_cuda else 13
    package = "nvidia-cuda-nvrtc-cu12" if major == 12 else "nvidia-cuda-nvrtc"
    raise NothingToBuild(
        f"NVRTC was not found, which torch for CUDA brings: {sys.executable} -m pip install {package}=={major}.*"
    )


def unfit(nvrtc: Nvrtc, archs: Sequence[str], driver_cuda: tuple[int, ...] | None) -> str | None:
    """Why this one is of no use for these architectures and this driver, or None."""
    for arch in archs:
        needs = ARCHS[arch.removesuffix(PTX)]
        if nvrtc.version < needs:
            return (
                f"{nvrtc.path} is of CUDA {_dotted(nvrtc.version)} and compute capability {arch} needs {_dotted(needs)}"
            )
    # a driver runs the machine code of any release of its major version and of older ones, but reads no PTX newer than itself
    ptx = any(arch.endswith(PTX) for arch in archs)
    needs = nvrtc.version if ptx else (nvrtc.version[0], 0)
    if driver_cuda and driver_cuda < needs:
        return (
            f"{nvrtc.path} is of CUDA {_dotted(nvrtc.version)}, the driver knows CUDA {_dotted(driver_cuda)} and needs "
            f"{_dotted(needs)} to run what it compiles: update the driver"
        )
    return None


def candidates() -> Iterator[str]:
    """Files that may be NVRTC: torch's own, NVIDIA's packages, the CUDA toolkit, the system's."""
    seen = set()
    for folder in _folders():
        try:
            found = sorted(folder.glob("*nvrtc*"), reverse=True)
        except OSError:  # a folder of somebody's variables that may not be read is none of ours
            continue
        for path in found:
            if LIBRARY.fullmatch(path.name) and path.resolve() not in seen:
                seen.add(path.resolve())
                yield str(path)


def _folders() -> Iterator[Path]:
    for package, below in (("torch", ["lib"]), ("nvidia", ["*/lib", "*/bin", "*/bin/x86_64"])):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for pattern in below:
                yield from sorted(Path(folder).glob(pattern), reverse=True)
    yield Path(sys.prefix, *(("Library", "bin") if WINDOWS else ("lib",)))  # conda's
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in (*homes, *(() if WINDOWS else ("/usr/local/cuda",))):
        yield from (Path(home, *parts) for parts in (("lib64",), ("bin",), ("bin", "x64")))
    system = os.environ.get("PATH" if WINDOWS else "LD_LIBRARY_PATH", "").split(os.pathsep)
    system += [] if WINDOWS else ["/usr/lib/x86_64-linux-gnu", "/usr/lib64"]
    yield from map(Path, filter(None, system))


def load(path: str) -> ctypes.CDLL:
    """NVRTC. It opens its builtins by their mere name, so they are opened first, where they lie."""
    folder = Path(path).parent
    if WINDOWS:
        os.add_dll_directory(str(folder))
    library = ctypes.CDLL(path)
    major, minor = _version(library)
    names = f"nvrtc-builtins64_{major}{minor}.dll" if WINDOWS else f"libnvrtc-builtins*.so.{major}.{minor}*"
    for builtins in folder.glob(names):
        ctypes.CDLL(str(builtins))
    return library


def version(path: str) -> tuple[int, int]:
    return _version(load(path))


def _version(library: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
        raise OSError("it does not tell its version")
    return major.value, minor.value


# ---- one program


def work() -> None:
    """What a worker does: the program that stdin names, into a file. Exit status 1: the compiler's words are on stderr."""
    job = json.load(sys.stdin)
    try:
        code, symbols = compile_program(load(job["library"]), job["source"], job["code"], job["names"])
    except (BuildError, OSError) as reason:
        sys.exit(str(reason))
    out = Path(job["out"])
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    temporary.write_bytes(json.dumps(symbols).encode() + b"\n" + code)
    os.replace(temporary, out)


def compile_program(library: ctypes.CDLL, source: str, code: str, names: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    """The code of the kernels that C++ calls `names`, and what the code calls them. code: "sm_90a", or "compute_90" for PTX."""

    library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def check(status: int, doing: str) -> None:
        if status:
            raise BuildError(f"NVRTC, {doing}: {library.nvrtcGetErrorString(status).decode()}")

    def text(what: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"size of {what}")
        buffer = ctypes.create_string_buffer(size.value)
        check(getattr(library, f"nvrtcGet{what}")(program, buffer), what)
        return buffer.raw

    program = ctypes.c_void_p()
    check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None), "creating")
    for name in names:
        check(library.nvrtcAddNameExpression(program, name.encode()), name)
    options = [f"--gpu-architecture={code}", "--std=c++17", "--include-path=.", "--device-as-default-execution-space"]
    given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    failed = library.nvrtcCompileProgram(program, len(options), given)
    if failed:
        said = text("ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
        raise BuildError(said or f"error: {library.nvrtcGetErrorString(failed).decode()}")
    symbols, symbol = {}, ctypes.c_char_p()
    for name in names:
        check(library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol)), name)
        symbols[name] = (symbol.value or b"").decode()
    return text("PTX").rstrip(b"\0") if code.startswith("compute") else text("CUBIN"), symbols


# ---- all of them


@dataclass(frozen=True)
class Unit:
    """One compilation."""

    name: str
    code: str  # as compile_program has it
    source: str
    names: tuple[str, ...] = ()


class Compiler:
    """Runs workers, a few at once, and keeps what they made: a run that is stopped goes on where it was."""

    def __init__(
        self, nvrtc: Nvrtc, jobs: int, folder: Path, say: Callable[[str], None], keep: Sequence[int], key: Sequence[Any]
    ) -> None:
        self.nvrtc, self.jobs, self.folder, self.say, self.keep = nvrtc, jobs, folder, say, keep
        self.key = key  # of all that a program depends on beside its own text
        self.used: set[Path] = set()

    def run(self, units: Sequence[Unit], aloud: bool = True) -> dict[str, tuple[dict[str, str], bytes]]:
        """What each unit's kernels are called in its code, and that code."""
        made = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = {pool.submit(self._compile, unit): unit for unit in units}
            try:
                for count, done in enumerate(as_completed(waiting), 1):
                    unit = waiting[done]
                    symbols, _, code = done.result().read_bytes().partition(b"\n")
                    made[unit.name] = json.loads(symbols), code
                    if aloud:
                        self.say(f"[{count}/{len(units)}] {unit.name}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return made

    def _compile(self, unit: Unit) -> Path:
        key = repr([*self.key, unit.code, unit.source, unit.names])
        out = self.folder / f"{unit.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.used.add(out)
        if out.exists():
            return out
        job = {
            "library": self.nvrtc.path,
            "source": unit.source,
            "code": unit.code,
            "names": unit.names,
            "out": str(out),
        }
        done = subprocess.run(
            [sys.executable, "-c", WORKER, str(CSRC.parent)],
            input=json.dumps(job),
            cwd=CSRC,
            capture_output=True,
            text=True,
            errors="replace",
            pass_fds=self.keep,
        )
        if done.returncode or not out.exists():
            log = self.folder / f"{unit.name}.log"
            log.write_text(done.stderr, encoding="utf-8")
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            errors = [line for line in lines if re.search(r"\berror\b", line)]
            raise BuildError(f"NVRTC could not compile {unit.name}: {(errors or lines)[0].strip()} (all of it: {log})")
        return out

    def tidy(self) -> None:
        """Removes what older sources left."""
        for path in self.folder.iterdir():
            if path not in self.used:
                path.unlink()


def _source(header: str, *lines: str) -> str:
    return "\n".join((f'#include "{header}"', "#define ARCH (__CUDA_ARCH__ / 10)", "using namespace sage;", *lines, ""))


def _facts(compiler: Compiler, code: str, asked: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """By header the value of each C++ expression: the compiler leaves an array of them in PTX, which is text."""
    layout = _alone("cubin_layout")
    units = []
    for header, expressions in asked.items():
        values = ", ".join(f"double({expression})" for expression in expressions)
        array = f'extern "C" __device__ const double facts[] = {{{values}}};'
        units.append(Unit(f"facts-{header}", code, _source(header, layout.probes(header), array)))
    made, found = compiler.run(units, aloud=False), {}
    for header, expressions in asked.items():
        ptx = made[f"facts-{header}"][1].decode(errors="replace")
        array = re.search(r"\bfacts\[(\d+)\] = \{([^}]*)\}", ptx)
        if array is None:
            raise BuildError(f"NVRTC of CUDA {_dotted(compiler.nvrtc.version)} gave no numbers of {header}")
        if name := layout.misplaced(header, ptx):
            raise BuildError(f"{name} of {header} has its fields elsewhere than sage_kernels/cubin_layout.py says")
        values = bytes(map(int, array[2].split(","))).ljust(int(array[1]), b"\0")  # zeros at the end are left out
        numbers = struct.unpack(f"<{len(values) // 8}d", values)
        whole = (int(x) if x.is_integer() and abs(x) < 1 << 53 else x for x in numbers)
        found[header] = dict(zip(expressions, whole, strict=True))
    return found


def _compile_arch(compiler: Compiler, arch: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the archive says of an architecture, and the files it has for it."""
    layout = _alone("cubin_layout")
    plain, ptx = arch.removesuffix(PTX), arch.endswith(PTX)
    number = plain.replace(".", "")
    code = f"compute_{number}" if ptx else f"sm_{build.code_name(plain)}"
    with_wgmma = code == "sm_90a"
    facts_code = f"compute_{number}{'a' if with_wgmma else ''}"
    facts = _facts(compiler, facts_code, layout.FACTS)
    if with_wgmma:
        facts |= _facts(compiler, facts_code, {layout.WGMMA: layout.wgmma_facts(facts["params.h"])})
    sizes, units = {}, []
    for name, (header, kernels) in layout.units(facts).items():
        units.append(Unit(f"{arch}-{name}", code, _source(header), tuple(kernels)))
        sizes.update(kernels)
    files, launches = {}, {}
    for name, (symbols, made) in compiler.run(units).items():
        files[name] = made
        launches |= {kernel: [name, symbol, *sizes[kernel]] for kernel, symbol in symbols.items()}
    return {"facts": facts, "kernels": launches}, files


def compile_all(
    nvrtc: Nvrtc,
    archs: Sequence[str],
    jobs: int | None = None,
    build_dir: Path = BUILD_DIR,
    say: Callable[[str], None] = print,
    keep: Sequence[int] = (),
) -> Path:
    """The archive `_C.cubins` for `archs`, made in `build_dir`. keep: what the compilers inherit of install.py's lock."""
    layout, source_hash = _alone("cubin_layout"), build.source_hash(CSRC)
    jobs = build.bounded_jobs(jobs, build.cores(), build.free_memory(), JOB_BYTES)
    folder = Path(build_dir).resolve() / "nvrtc"
    say(f"NVRTC of CUDA {_dotted(nvrtc.version)}, compute capability {', '.join(archs)}, {jobs} at once")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        compiler = Compiler(nvrtc, jobs, folder, say, keep, [source_hash, nvrtc.version])
        about, files = {}, {}
        for arch in archs:
            about[arch], more = _compile_arch(compiler, arch)
            files.update(more)
        manifest = {
            "source_hash": source_hash,
            "layout": layout.digest(),
            "cuda": nvrtc.version[0] * 1000 + nvrtc.version[1] * 10,
            "archs": about,
        }
        archive = folder.with_name(ARCHIVE)
        new = archive.with_suffix(".new")  # another process may be reading the old one
        with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as into:
            for name, content in (("manifest.json", json.dumps(manifest, sort_keys=True)), *sorted(files.items())):
                # without the time, so that the same code makes the same bytes
                into.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        new.replace(archive)
        compiler.tidy()
    except OSError as error:
        raise BuildError(f"a file of the build cannot be written: {error}") from error
    return archive


def read(archive: Path) -> tuple[list[str], int, str]:
    """As make_wheel.binary_info: architectures, CUDA and the hash of the sources of an archive."""
    try:
        manifest, _ = _alone("cubins").read(archive)
    except ValueError as reason:
        raise BuildError(str(reason)) from reason
    return list(manifest["archs"]), manifest["cuda"], manifest["source_hash"]


def verify(archive: Path, say: Callable[[str], None] = print) -> None:
    """Loads every kernel on every GPU here that it is for."""
    cubins = _alone("cubins")
    try:
        cubins.Cubins(archive).load_all()
    except (ValueError, RuntimeError) as reason:
        if "OUT_OF_MEMORY" in str(reason):  # of a GPU that is at work says nothing of the kernels
            say(f"The kernels have not been tried: {reason}")
            return
        raise BuildError(f"{archive} was built and is of no use: {reason}") from reason


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
