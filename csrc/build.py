"""Builds sage_kernels/_C from the sources of this folder: nvcc compiles, ninja runs it, pybind11 binds. Imports no torch.

`build()` is the whole of it; every failure is a BuildError whose text is a sentence for the user.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import driver

CSRC = Path(__file__).resolve().parent
PACKAGE = CSRC.parent / "sage_kernels"
BUILD_DIR = CSRC / "build"
TOOLS = BUILD_DIR / "tools"  # where install.py puts what is missing, so that nobody's environment changes
WINDOWS = sys.platform == "win32"

# Architecture -> the oldest CUDA whose nvcc compiles the kernels for it. fp8 with fp16 accumulators came with 12.8.
ARCHS = {
    "7.5": (12, 0),
    "8.0": (12, 0),
    "8.6": (12, 0),
    "8.9": (12, 8),
    "9.0": (12, 8),
    "10.0": (12, 8),
    "12.0": (12, 8),
}
# wgmma is in the code of 9.0 that no other runs; its PTX is plain, for newer ones to compile.
FEATURES = {"9.0": "a"}
PTX = "+PTX"  # after an architecture: its PTX goes along, which the driver of any newer GPU can compile
JOB_BYTES = 3 << 29  # what one compiler may take: 1.5 GiB

sys.path.append(str(TOOLS))  # last, so that what is installed comes first
SOURCES = runpy.run_path(str(PACKAGE / "sources.py"))
digests, source_hash = SOURCES["digests"], SOURCES["source_hash"]


class BuildError(Exception):
    """Why there is no new binary; the old one, if any, is untouched."""


class NothingToBuild(BuildError):
    """This machine has nothing to build with, or no GPU to build for. No failure where nobody asked: other kernels serve it."""


# ---- what is built for


def gpu_archs() -> list[str]:
    """Compute capability of each GPU, from the driver itself; [] where there is no driver or no GPU."""
    return [gpu.arch for gpu in driver.look().gpus]


def choose_archs(asked: Sequence[str] | None, gpus: Sequence[str] | None = None) -> list[str]:
    """What was asked for, or else what the GPUs (None: those here) run: the same major version, at most their minor."""
    if asked:
        for arch in asked:
            if arch.removesuffix(PTX) not in ARCHS:
                raise BuildError(
                    f"{arch!r} is no architecture of these kernels; there are {', '.join(ARCHS)}, each with {PTX} after it "
                    "where newer GPUs are to compile it for themselves"
                )
        return sorted(set(asked), key=arch_number)
    gpus = gpu_archs() if gpus is None else gpus
    if not gpus:
        raise NothingToBuild("no NVIDIA GPU was found to build for: name architectures, for example --archs 8.9,12.0")
    chosen = set()
    for gpu in gpus:
        older = [arch for arch in ARCHS if arch_number(arch) <= arch_number(gpu)]
        fits = [arch for arch in older if arch_number(arch)[0] == arch_number(gpu)[0]]
        if fits:
            chosen.add(max(fits, key=arch_number))
        elif older:  # newer than these kernels: its driver compiles the newest of them that it can
            chosen.add(max(older, key=arch_number) + PTX)
    if not chosen:
        raise NothingToBuild(
            f"these kernels need compute capability 7.5 or newer and the GPUs here have {', '.join(gpus)}"
        )
    return sorted(chosen, key=arch_number)


def code_name(arch: str) -> str:
    """What nvcc calls the machine code of an architecture: 90a of 9.0."""
    return arch.replace(".", "") + FEATURES.get(arch, "")


def arch_number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.removesuffix(PTX).split("."))


# ---- what builds it


def check_machine(asked: Sequence[str] | None, nvcc: str | None) -> tuple[list[str], str]:
    """The architectures and the nvcc of a build. Fails for whatever is missing that pip cannot bring, so it comes before pip."""
    archs, nvcc = choose_archs(asked), find_nvcc(nvcc)
    check_cuda(nvcc, cuda_version(nvcc), archs)
    find_host_compiler()
    python_headers()
    return archs, nvcc


@dataclass(frozen=True)
class Toolchain:
    nvcc: str
    cuda: tuple[int, ...]
    host: str
    ninja: str
    includes: tuple[str, ...]

    @staticmethod
    def find(nvcc: str) -> Toolchain:
        return Toolchain(nvcc, cuda_version(nvcc), find_host_compiler(), find_ninja(), includes())


def find_nvcc(given: str | None = None) -> str:
    """The given one, else of CUDA_HOME (CUDA_PATH is its name on Windows), else of the PATH."""
    if given:
        candidates = [given]
    else:
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        candidates = [os.path.join(home, "bin", "nvcc") for home in homes] + ["nvcc"]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    if given:
        raise BuildError(f"nvcc is not at {given}: pass --nvcc the path of the program")
    raise NothingToBuild("nvcc was not found: install the CUDA toolkit and set CUDA_HOME, or pass --nvcc")


def cuda_version(nvcc: str) -> tuple[int, ...]:
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{nvcc} cannot be run ({error}): pass --nvcc another one") from error
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        raise BuildError(f"{nvcc} --version names no CUDA release: pass --nvcc another one")
    return int(release[1]), int(release[2])


def check_cuda(nvcc: str, cuda: tuple[int, ...], archs: Sequence[str]) -> None:
    for arch in archs:
        needs = ARCHS[arch.removesuffix(PTX)]
        if cuda < needs:
            raise NothingToBuild(
                f"{nvcc} is of CUDA {cuda[0]}.{cuda[1]} and compute capability {arch} needs {'%d.%d' % needs} or newer: "
                "install a newer CUDA toolkit, or name other architectures with --archs"
            )


def find_host_compiler() -> str:
    """CXX, else g++, or Visual Studio's cl: that of the PATH, else what is installed."""
    given = os.environ.get("CXX")
    wanted = given or ("cl" if WINDOWS else "g++")
    if found := shutil.which(wanted) or (None if given or not WINDOWS else _installed_cl()):
        return found
    how = "install Visual Studio 2022 or its Build Tools, with C++" if WINDOWS else "install g++"
    raise NothingToBuild(f"nvcc needs a C++ compiler and {wanted} was not found: {how}, or set CXX")


def _installed_cl() -> str | None:
    """cl of the newest Visual Studio, which vswhere finds; nvcc sets up what cl needs around it. 2019 and 2022 come first:
    nvcc refuses one that is newer than itself."""
    programs = os.environ.get("ProgramFiles(x86)", r"C:\Program Files (x86)")
    vswhere = os.path.join(programs, "Microsoft Visual Studio", "Installer", "vswhere.exe")
    asked = ["-latest", "-products", "*", "-requires", "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"]
    for versions in ("[16.0,18.0)", "[18.0,)"):
        command = [vswhere, *asked, "-version", versions, "-property", "installationPath", "-utf8"]
        try:
            said = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60).stdout
        except (OSError, subprocess.SubprocessError):
            return None  # no Visual Studio has been here
        for studio in said.splitlines():
            if found := sorted(Path(studio).glob("VC/Tools/MSVC/*/bin/Hostx64/x64/cl.exe"), key=_msvc_number):
                return str(found[-1])
    return None


def _msvc_number(cl: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", cl.parents[3].name))  # 14.44.35207


def missing_tools() -> list[str]:
    """The packages that have to be installed before a build."""
    have = {"ninja": _ninja(), "pybind11": importlib.util.find_spec("pybind11")}
    return [package for package, found in have.items() if found is None]


def _ninja() -> str | None:
    """The binary of the package ninja, wherever that is installed; one on the PATH is as good."""
    folders = [str(TOOLS / "bin")]  # where pip --target puts it, and ninja.BIN_DIR does not look
    try:
        import ninja

        folders.append(ninja.BIN_DIR)
    except ImportError:
        pass
    return shutil.which("ninja", path=os.pathsep.join(filter(None, folders))) or shutil.which("ninja")


def find_ninja() -> str:
    if found := _ninja():
        return found
    raise BuildError(f"ninja was not found: {sys.executable} -m pip install ninja")


def includes() -> tuple[str, ...]:
    """The folders of pybind11.h and Python.h."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildError(f"pybind11 is not installed: {sys.executable} -m pip install pybind11") from error
    return pybind11.get_include(), python_headers()


def python_headers() -> str:
    """The folder of Python.h."""
    folder = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(folder, "Python.h")):
        how = "this needs a full Python" if WINDOWS else "install the development files of this Python (python3-dev)"
        raise NothingToBuild(f"Python.h is not in {folder}: {how}")
    return folder


def bounded_jobs(asked: int | None, cores: int, free_bytes: int | None, each: int = JOB_BYTES) -> int:
    """How many compilers to run at once: what was asked for, else one a core as far as memory goes."""
    if asked is not None:
        if asked < 1:
            raise BuildError(f"--jobs is {asked}; it must be at least 1")
        return asked
    return max(1, cores if free_bytes is None else min(cores, free_bytes // each))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes that can be had without swapping, from /proc/meminfo or psutil; None where neither is."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().available


# ---- the build


def binary_name() -> str:
    return "_C" + sysconfig.get_config_var("EXT_SUFFIX")


def sources(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.cu"), *folder.glob("instantiations/*.cu"), *folder.glob("*.cpp")])


def ninja_text(tools: Toolchain, archs: Sequence[str], folder: Path, build_dir: Path) -> str:
    """build.ninja: an edge for each source, with the headers it reads from a depfile, and the link."""

    def shell(*words: str) -> str:
        quoted = subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)
        return quoted.replace("$", "$$")

    def path(at: Path | str) -> str:  # as ninja reads it; relative ones are in build_dir
        return re.sub(r"([$ :])", r"$\1", str(at))

    gencodes = []
    for arch in archs:
        code = code_name(arch.removesuffix(PTX))
        gencodes.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if arch.endswith(PTX):
            code = arch.removesuffix(PTX).replace(".", "")
            gencodes.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    host = ["/MD", "/EHsc", "/O2"] if WINDOWS else ["-fPIC", "-fvisibility=hidden"]
    # The same sources and compiler make the same bytes, in a folder of the same name: no asserts, which hold the names of
    # other folders; no symbols, which hold those of nvcc's temporary files; no link of device code, which holds its command.
    flags = ["-ccbin", tools.host, "-std=c++17", "-O3", "-DNDEBUG", *gencodes, *(f"-Xcompiler={flag}" for flag in host)]
    include = [f"-I{at}" for at in (build_dir, folder, *tools.includes)]
    libraries = [f"-L{os.path.join(sys.base_prefix, 'libs')}"] if WINDOWS else ["-Xlinker=-s"]
    beside = Path(tools.nvcc).parents[1] / "lib"  # where PyPI's nvcc has its libraries, and does not look for them
    if (beside / "libcudart_static.a").is_file():
        libraries.append(f"-L{beside}")
    lines = [
        "rule compile",
        f"  command = {shell(tools.nvcc, *flags, *include)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $name",
        "rule link",
        f"  command = {shell(tools.nvcc, '-ccbin', tools.host, '-shared', '-cudart=static', '-nodlink', *libraries)} $in -o $out",
        "  description = link",
    ]
    objects = []
    for source in sources(folder):
        name = source.relative_to(folder).with_suffix("").as_posix()
        objects.append(path(f"{name}.o"))
        lines += [f"build {objects[-1]}: compile {path(source)}", f"  name = {name}"]
    lines += [f"build {path(binary_name())}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def build_info(folder: Path, archs: Sequence[str]) -> str:
    """What bindings.cpp includes; a header and not -D, because nvcc splits those at commas."""
    return f'#define SAGE_ARCHS "{",".join(archs)}"\n#define SAGE_SOURCE_HASH "{source_hash(folder)}"\n'


def build(
    archs: Sequence[str] | None = None,
    jobs: int | None = None,
    nvcc: str | None = None,
    build_dir: Path = BUILD_DIR,
    folder: Path = CSRC,
    package: Path = PACKAGE,
    say: Callable[[str], None] = print,
    keep: Sequence[int] = (),
) -> Path:
    """Compile `folder` into `package`/_C and return where that is. Only what changed is compiled again.

    keep: what the compilers inherit of install.py's lock.
    """
    archs, nvcc = check_machine(archs, nvcc)
    tools = Toolchain.find(nvcc)
    jobs = bounded_jobs(jobs, cores(), free_memory())
    build_dir = Path(build_dir).resolve()
    try:
        build_dir.mkdir(parents=True, exist_ok=True)
        _forget_changed(build_dir, folder, tools)
        _write(build_dir / "build_info.h", build_info(folder, archs))
        _write(build_dir / "build.ninja", ninja_text(tools, archs, folder, build_dir))
        say(f"CUDA {tools.cuda[0]}.{tools.cuda[1]}, compute capability {', '.join(archs)}, {jobs} at once")
        _run_ninja(tools.ninja, build_dir, jobs, say, keep)
        return put(build_dir / binary_name(), package / binary_name())
    except OSError as error:
        raise BuildError(f"a file of the build cannot be written: {error}") from error


def _write(path: Path, text: str) -> None:
    """Leaves a file alone that is so already, because its time tells ninja what to compile."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _forget_changed(build_dir: Path, folder: Path, tools: Toolchain) -> None:
    """ninja goes by times, and an unpacked release may be older than what was built: objects of other contents are removed."""
    said = subprocess.run([tools.nvcc, "--version"], capture_output=True, text=True).stdout
    options = [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    headers, files = {}, {}
    for name, digest in digests(folder).items():
        (headers if name.endswith((".h", ".cuh")) else files)[name] = digest
    state = {"common": [said, tools.host, *options, headers], "files": files}
    kept = build_dir / "state.json"
    try:
        before = json.loads(kept.read_text(encoding="utf-8"))
        known = before["files"] if before["common"] == state["common"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}  # there is none, or it is broken or another version's
    for name, digest in files.items():
        if known.get(name) != digest:
            (build_dir / name).with_suffix(".o").unlink(missing_ok=True)
    kept.write_text(json.dumps(state), encoding="utf-8")


def _run_ninja(ninja: str, build_dir: Path, jobs: int, say: Callable[[str], None], keep: Sequence[int]) -> None:
    log = build_dir / "build.log"
    lines = []
    with log.open("w", encoding="utf-8", errors="replace") as kept:
        command = [ninja, "-C", str(build_dir), "-j", str(jobs)]
        environment = {**os.environ, "NINJA_STATUS": "[%f/%t, %e s] "}
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=environment,
            pass_fds=keep,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                kept.write(line)
                lines.append(line.strip())
                if re.match(r"\[\d+/\d+, ", line):
                    say(line.strip())
    if process.returncode:
        errors = [line for line in lines if re.search(r"\b(error|fatal)( \w+)?\s*:", line)]  # of nvcc, ptxas, gcc, cl
        raise BuildError(f"the build failed: {(errors or lines or ['ninja said nothing'])[-1]} (all of it: {log})")


def check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise BuildError(
            f"{folder} cannot be written: run install.py as the user whom it belongs to, or change its rights"
        )


def put(built: Path, target: Path) -> Path:
    """In one step, so that there is always a whole binary; Windows refuses while a process has the old one loaded."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copy2(built, temporary)
        os.replace(temporary, target)
    except PermissionError as error:
        raise BuildError(
            f"{target} cannot be written ({error.strerror}): close ComfyUI if it runs, and see that the folder is writable"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target
