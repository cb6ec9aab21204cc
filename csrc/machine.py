"""What this machine has, and what install.py does about it: `Machine.look()` asks, `plan` decides, `table` shows.

torch is not imported: that takes seconds, and an install has to say what is wrong where torch does not even load.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from . import build, driver, make_wheel, nvrtc, pypi, wheels
from .driver import Gpu

OLDEST_PYTHON = (3, 10)
OLDEST_GPU = min(build.ARCHS, key=build.arch_number)
OLDEST_TRITON, OLDEST_TRITON_GPU = (3, 3), (8, 0)  # as sage_kernels.dispatch has them, which imports torch
NO_INDEX = "no index of wheels is set (--index, or SAGE_KERNELS_INDEX)"


@dataclass(frozen=True)
class Binary:
    """The CUDA binary for this Python that is in the pack."""

    archs: tuple[str, ...] = ()
    cuda: tuple[int, int] = (0, 0)
    source_hash: str = ""
    problem: str = ""  # why it cannot be loaded


@dataclass(frozen=True)
class Machine:
    python: str  # "3.12.7"
    python_tag: str  # as wheels have it: "cp312"
    executable: str
    system: str  # "Linux", "Windows", "Darwin"
    system_version: str
    platform_tags: list[str]  # as wheels have them, the best first
    torch: str | None
    torch_for: str  # "cuda", "rocm", "xpu" or "cpu"; "" where there is no torch
    torch_cuda: tuple[int, int] | None
    driver: str  # "580.159.04"; "" where it is not told
    driver_cuda: tuple[int, int] | None  # the newest CUDA it knows; None without a driver
    driver_problem: str  # where there are no GPUs: why
    gpus: tuple[Gpu, ...]
    nvcc: str | None
    nvcc_cuda: tuple[int, ...] | None
    nvcc_problem: str  # why there is none
    nvcc_given: bool  # by --nvcc: no other will do
    nvcc_fetched: bool  # PyPI's is here, from an earlier build
    host: str | None  # the C++ compiler
    missing: tuple[str, ...]  # what a build lacks and PyPI has not, a sentence each
    missing_tools: tuple[str, ...]  # what it lacks and PyPI has
    triton: str | None
    comfyui: str | None
    comfyui_version: str | None
    source_hash: str | None
    binary: Binary | None
    cubins: Binary | None = None  # what NVRTC compiled, where there is no binary
    nvrtc: nvrtc.Nvrtc | None = None
    nvrtc_problem: str = ""  # why there is none

    @staticmethod
    def look(nvcc: str | None = None) -> Machine:
        missing: list[str] = []

        def found(probe: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return probe(*arguments)
            except build.BuildError as reason:
                missing.append(str(reason))
                return None

        its_nvcc, nvcc_cuda, nvcc_problem = _nvcc(nvcc)
        host = found(build.find_host_compiler)
        found(build.python_headers)
        its_driver = driver.look()
        its_nvrtc, nvrtc_problem = _nvrtc(its_driver)
        torch, torch_for, torch_cuda = _torch()
        comfyui = _comfyui()
        version = sys.version_info
        return Machine(
            python=platform.python_version(),
            # a wheel is for one of the two Pythons with and without the GIL; they are built with it
            python_tag=f"cp{version[0]}{version[1]}{'t' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''}",
            executable=sys.executable,
            system=platform.system(),
            system_version=platform.platform(terse=True),
            platform_tags=_platform_tags(),
            torch=torch,
            torch_for=torch_for,
            torch_cuda=torch_cuda,
            driver=its_driver.version,
            driver_cuda=its_driver.cuda,
            driver_problem=its_driver.problem,
            gpus=its_driver.gpus,
            nvcc=its_nvcc,
            nvcc_cuda=nvcc_cuda,
            nvcc_problem=nvcc_problem,
            nvcc_given=nvcc is not None,
            nvcc_fetched=pypi.nvcc_path().is_file(),
            host=host,
            missing=tuple(missing),
            missing_tools=tuple(build.missing_tools()),
            triton=_version("triton", "triton-windows", "pytorch-triton"),
            comfyui=str(comfyui) if comfyui else None,
            comfyui_version=_assigned(comfyui / "comfyui_version.py").get("__version__") if comfyui else None,
            source_hash=build.source_hash(build.CSRC),
            binary=read_binary(build.PACKAGE / build.binary_name()),
            cubins=read_cubins(build.PACKAGE / nvrtc.ARCHIVE),
            nvrtc=its_nvrtc,
            nvrtc_problem=nvrtc_problem,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# ---- how each thing is found


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def _nvcc(given: str | None) -> tuple[str | None, tuple[int, ...] | None, str]:
    """Its path, its CUDA, and why there is none."""
    try:
        nvcc = build.find_nvcc(given)
        return nvcc, build.cuda_version(nvcc), ""
    except build.BuildError as reason:
        return None, None, str(reason)


def _nvrtc(its_driver: driver.Driver) -> tuple[nvrtc.Nvrtc | None, str]:
    """That of this driver and its GPUs, and why there is none."""
    try:
        archs = build.choose_archs(None, [gpu.arch for gpu in its_driver.gpus]) if its_driver.gpus else []
        return nvrtc.find(archs, its_driver.cuda), ""
    except build.BuildError as reason:
        return None, str(reason)


def _assigned(file: Path) -> dict[str, str]:
    """The strings that a Python file assigns to names, without running it."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return dict(re.findall(r"^(\w+)[^=\n]*=\s*['\"]([^'\"\n]*)['\"]", text, re.MULTILINE))


def _torch() -> tuple[str | None, str, tuple[int, int] | None]:
    """Its version, what it is built for, and the CUDA of that."""
    version, spec = _version("torch"), importlib.util.find_spec("torch")
    if version is None:
        return None, "", None
    said = _assigned(Path(spec.origin).with_name("version.py")) if spec and spec.origin else {}
    local = re.search(r"\+cu(\d+)(\d)\b", said.get("__version__", version))
    cuda = said.get("cuda") or (f"{local[1]}.{local[2]}" if local else "")
    if release := re.match(r"(\d+)\.(\d+)", cuda):
        return version, "cuda", (int(release[1]), int(release[2]))
    others = {"hip": "rocm", "rocm": "rocm", "xpu": "xpu"}
    return version, next((name for key, name in others.items() if said.get(key) or f"+{key}" in version), "cpu"), None


def _platform_tags() -> list[str]:
    try:
        return list(make_wheel.packaging("tags").platform_tags())
    except wheels.WheelError:
        return [re.sub("[-.]", "_", sysconfig.get_platform())]  # enough to say which wheel would be needed


def _comfyui() -> Path | None:
    """The folder above this pack with a main.py and a comfy/; the Manager's own word where the pack is a link to elsewhere."""
    told = os.environ.get("COMFYUI_PATH")
    for folder in (*build.PACKAGE.parent.parents, *([Path(told)] if told else [])):
        if (folder / "main.py").is_file() and (folder / "comfy").is_dir():
            return folder
    return None


def read_binary(path: Path) -> Binary | None:
    if not path.is_file():
        return None
    try:
        archs, cuda, source_hash = make_wheel.binary_info(path)
    except wheels.WheelError as reason:
        return Binary(problem=str(reason))
    return Binary(tuple(archs), (cuda // 1000, cuda % 1000 // 10), source_hash)


def read_cubins(path: Path) -> Binary | None:
    if not path.is_file():
        return None
    try:
        archs, cuda, source_hash = nvrtc.read(path)
    except build.BuildError as reason:
        return Binary(problem=str(reason))
    return Binary(tuple(archs), (cuda // 1000, cuda % 1000 // 10), source_hash)


# ---- what is done about it


@dataclass(frozen=True)
class Plan:
    """kind: "ready" (nothing to do), "download", "build", "nvrtc", "fallback" (other kernels serve) or "fail"."""

    kind: str
    sentence: str
    archs: tuple[str, ...] = ()  # of a build, and the nvcc of it
    nvcc: str = ""
    fetch_mb: int = 0  # what of nvcc has to be downloaded first
    wheel: wheels.Candidate | None = None  # of a download

    def as_json(self) -> dict[str, Any]:
        of = {"name": self.wheel.name, "url": self.wheel.url, "sha256": self.wheel.sha256} if self.wheel else None
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "wheel": of}


def plan(
    machine: Machine,
    wheel: Callable[[], wheels.Candidate | str] = lambda: NO_INDEX,
    archs: Sequence[str] | None = None,
    must_build: bool = False,
    download: bool = True,
    must_nvrtc: bool = False,
) -> Plan:
    """What to do on `machine`. Of it and of what `wheel` says alone, which is asked only if its answer matters.

    wheel: the wheel of the index that fits, or why there is none. archs: what --archs says; with it, or with must_build,
    nothing but a build will do. download: a build may take from PyPI what it lacks. must_nvrtc: nothing but NVRTC will do.
    """
    if _numbers(machine.python) < OLDEST_PYTHON:
        return Plan("fail", f"The pack needs Python {_dotted(OLDEST_PYTHON)} or newer and {_wrong_python(machine)}.")
    if must_nvrtc:
        try:
            return _compile(machine, archs, "as you asked")
        except build.BuildError as reason:
            return Plan("fail", f"The CUDA kernels cannot be compiled by NVRTC: {reason}.")
    if archs or must_build:
        try:
            return _build(machine, archs, download, "as you asked")
        except build.BuildError as reason:
            return Plan("fail", f"The CUDA kernels cannot be built: {reason}.")
    if machine.torch is None:
        return Plan("fail", f"The pack needs torch and {_wrong_python(machine)}.")
    if why := useless(machine):
        return Plan("fallback", f"{instead(machine)}, without CUDA kernels: {why}.")
    have = machine.binary if misfit(machine, machine.binary) is None else None
    better = have and better_arch(machine, have)
    ready = f"Nothing to do: the CUDA kernels are here, for {_join(have.archs)}" if have else ""
    if have and not better:
        return Plan("ready", f"{ready}.")
    answer = wheel()
    if not isinstance(answer, str):
        if not have or not better_arch(machine, answer):
            return Plan(
                "download", f"Download {answer.name}, with CUDA kernels for {_join(answer.archs)}.", wheel=answer
            )
        answer = "no wheel has those"
    answer = answer.rstrip(".")
    if better:
        answer = f"{better}, and {answer}"
    try:
        return _build(machine, None, download, f"as {answer}")
    except build.BuildError as reason:
        if have:
            return Plan("ready", f"{ready}, though {answer}; {reason}.")
        return _without_nvcc(machine, f"{answer}; {reason}")


def _without_nvcc(machine: Machine, why: str) -> Plan:
    """What is done where there is neither a wheel nor a build: NVRTC compiles what the driver then loads."""
    have = machine.cubins
    if have and misfit(machine, have) is None and not better_arch(machine, have):
        return Plan("ready", f"Nothing to do: the CUDA kernels are here, for {_join(have.archs)}, by NVRTC.")
    try:
        return _compile(machine, None, f"as {why}")
    except build.BuildError as reason:
        others = f"; {reason}" if str(reason) else ""
        return Plan("fallback", f"{instead(machine)}, without CUDA kernels: {why}{others}.")


def _compile(machine: Machine, asked: Sequence[str] | None, why: str) -> Plan:
    archs = build.choose_archs(asked, [gpu.arch for gpu in machine.gpus])
    found = machine.nvrtc
    problem = machine.nvrtc_problem if found is None else nvrtc.unfit(found, archs, None)
    if found is None or problem:
        raise build.NothingToBuild(problem or "")
    if misfit(machine, machine.binary) is None:
        why += "; the binary that is here stays in use until it is removed"
    of = f"the NVRTC of CUDA {_dotted(found.version)} ({found.path})"
    return Plan("nvrtc", f"Compile the CUDA kernels for {_join(archs)} with {of}, {why}.", tuple(archs))


def _wrong_python(machine: Machine) -> str:
    lacks = f"is {machine.python}" if _numbers(machine.python) < OLDEST_PYTHON else "has none"
    return f"{machine.executable} {lacks}: run install.py with the Python that runs ComfyUI"


def _build(machine: Machine, asked: Sequence[str] | None, download: bool, why: str) -> Plan:
    archs = build.choose_archs(asked, [gpu.arch for gpu in machine.gpus])
    problem = machine.nvcc_problem or _nvcc_misfit(machine, archs, for_here=not asked)
    lacks = [*([_no_nvcc(machine, problem, download)] if problem else []), *machine.missing]
    if machine.missing_tools and not download:
        tools = " ".join(machine.missing_tools)
        lacks.append(f"the build needs more and --no-download was given: {machine.executable} -m pip install {tools}")
    if any(lacks):
        raise build.NothingToBuild("; ".join(filter(None, lacks)))
    if not problem:
        assert machine.nvcc is not None and machine.nvcc_cuda is not None
        nvcc, of, fetch_mb = machine.nvcc, f"the nvcc of CUDA {_dotted(machine.nvcc_cuda)}", 0
    else:
        nvcc = str(pypi.nvcc_path())
        fetch_mb = 0 if machine.nvcc_fetched else pypi.nvcc_megabytes(machine.platform_tags)
        where = f"a download of about {fetch_mb} MB" if fetch_mb else "it is here"
        of = f"PyPI's nvcc of CUDA {_dotted(pypi.CUDA)} ({where})"
        why += f"; {problem.partition(': ')[0]}"  # without the advice, which is not needed
    return Plan("build", f"Build the CUDA kernels for {_join(archs)} with {of}, {why}.", tuple(archs), nvcc, fetch_mb)


def _no_nvcc(machine: Machine, problem: str, download: bool) -> str:
    """Why there is no nvcc at all, where this machine's is none for the reason of `problem`; "" where PyPI's serves."""
    if machine.nvcc_given:
        return problem
    reason = pypi.nvcc_misfit(machine.driver_cuda, machine.platform_tags)
    if not reason and not download and not machine.nvcc_fetched:
        reason = "PyPI's is not taken, as --no-download was given"
    return f"{problem}; {reason}" if reason else ""


def _nvcc_misfit(machine: Machine, archs: Sequence[str], for_here: bool) -> str | None:
    """Why this machine's nvcc is none for these architectures, or for the driver that is to run them; or None."""
    assert machine.nvcc is not None and machine.nvcc_cuda is not None
    try:
        build.check_cuda(machine.nvcc, machine.nvcc_cuda, archs)
    except build.NothingToBuild as reason:
        return str(reason)
    if not for_here or machine.driver_cuda is None:
        return None
    # a driver runs what any release of its major version built, but compiles no PTX newer than itself
    ptx = any(arch.endswith(build.PTX) for arch in archs)
    needs = machine.nvcc_cuda if ptx else (machine.nvcc_cuda[0], 0)
    if machine.driver_cuda >= needs:
        return None
    return (
        f"{machine.nvcc} is of CUDA {_dotted(machine.nvcc_cuda)}, the driver knows CUDA {_dotted(machine.driver_cuda)} "
        f"and needs {_dotted(needs)} to run what it builds: update the driver, or pass --nvcc that of an older CUDA"
    )


def useless(machine: Machine) -> str | None:
    """Why no CUDA binary would be used here, wherever it came from; or None."""
    if not machine.gpus:
        return f"{_no_gpu(machine)} (--archs builds for those of another machine)"
    if machine.torch_for != "cuda":
        made = {"cpu": "for CPUs only", "rocm": "for AMD GPUs", "xpu": "for Intel GPUs"}[machine.torch_for]
        return f"this torch ({machine.torch}) is made {made}: install the torch for CUDA (pytorch.org has the command)"
    have = ", ".join(f"{gpu.name} has {gpu.arch}" for gpu in machine.gpus)
    if not _usable(machine):
        return f"they need compute capability {OLDEST_GPU} (RTX 20) or newer, and {have}"
    torch, known = machine.torch_cuda, machine.driver_cuda
    if torch and known and known[0] < torch[0]:
        return (
            f"this torch is made for CUDA {_dotted(torch)} and the driver knows CUDA {_dotted(known)}, so torch cannot use "
            f"the GPU: update the driver, or install the torch for CUDA {known[0]}"
        )
    return None


def misfit(machine: Machine, binary: Binary | None) -> str | None:
    """Why this binary is not what this machine needs, or None."""
    if binary is None:
        return "there is no CUDA binary yet"
    if binary.problem:
        return binary.problem
    if binary.source_hash != machine.source_hash:
        return "the CUDA binary is built from other sources than these"
    known = machine.driver_cuda
    if known is None:
        return None  # no GPU that it could fail on
    if known[0] < binary.cuda[0]:
        return f"the CUDA binary needs a driver for CUDA {binary.cuda[0]}.0 and this one knows {_dotted(known)}"
    for gpu in _usable(machine):
        if wheels.serving_arch(gpu.arch, binary, known) is None:
            return f"the CUDA binary has kernels for {_join(binary.archs)} and {gpu.name} has {gpu.arch}"
    return None


def better_arch(machine: Machine, of: Binary | wheels.Candidate) -> str | None:
    """Which GPU has better kernels than those that serve it, as an RTX 40 with kernels for the RTX 30; or None."""
    for gpu in _usable(machine):
        best = build.choose_archs(None, [gpu.arch])[0]
        serving = machine.driver_cuda and wheels.serving_arch(gpu.arch, of, machine.driver_cuda)
        if serving and build.arch_number(serving) < build.arch_number(best):
            return f"{gpu.name} has better ones, for {best}"
    return None


def instead(machine: Machine) -> str:
    """What serves attention without CUDA kernels: what sage_kernels.dispatch chooses, said without torch."""
    if machine.system == "Darwin" or machine.torch_for in ("rocm", "xpu"):
        return "ComfyUI's own attention stays in use"
    if not machine.gpus or machine.torch_for == "cpu":
        return "The reference backend serves attention, on the CPU"
    if machine.triton is None:
        package = "triton-windows" if machine.system == "Windows" else "triton"
        lacks = f"it is not installed: {machine.executable} -m pip install {package}"
    elif _numbers(machine.triton) < OLDEST_TRITON:
        lacks = f"{machine.triton} is older than {_dotted(OLDEST_TRITON)}, which comes with torch 2.7"
    elif not any(_numbers(gpu.arch) >= OLDEST_TRITON_GPU for gpu in machine.gpus):
        lacks = f"its kernels need compute capability {_dotted(OLDEST_TRITON_GPU)} (RTX 30) or newer"
    else:
        return "The triton backend serves attention"
    return f"ComfyUI's own attention stays in use, as Triton does not serve it either ({lacks})"


def _no_gpu(machine: Machine) -> str:
    return machine.driver_problem or "no NVIDIA GPU was found"


def _usable(machine: Machine) -> list[Gpu]:
    return [gpu for gpu in machine.gpus if _numbers(gpu.arch) >= _numbers(OLDEST_GPU)]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _join(archs: Sequence[str]) -> str:
    return f"compute capability {', '.join(archs)}"


# ---- the table


def table(machine: Machine) -> str:
    m = machine
    made = {"cuda": f"for CUDA {_dotted(m.torch_cuda or ())}", "cpu": "for CPUs", "rocm": "for AMD", "xpu": "for Intel"}
    fetched = f", but CUDA {_dotted(pypi.CUDA)} from PyPI" if m.nvcc_fetched else ""
    rows = [
        ("Python", f"{m.python} ({m.executable})"),
        ("OS", f"{m.system_version} ({m.platform_tags[0]})"),
        ("torch", f"{m.torch} {made[m.torch_for]}" if m.torch else "none"),
        ("driver", f"{m.driver or 'there'}, knows CUDA {_dotted(m.driver_cuda)}" if m.driver_cuda else "none"),
        *(("GPU", f"{gpu.name}, compute capability {gpu.arch}") for gpu in m.gpus),
        *([] if m.gpus else [("GPU", _no_gpu(m))]),
        ("nvcc", f"CUDA {_dotted(m.nvcc_cuda)} ({m.nvcc})" if m.nvcc_cuda else f"none{fetched}"),
        ("C++ compiler", m.host or "none"),
        *([("NVRTC", f"CUDA {_dotted(m.nvrtc.version)} ({m.nvrtc.path})")] if m.nvrtc else []),
        ("Triton", m.triton or "none"),
        (
            "ComfyUI",
            f"{m.comfyui_version or 'unknown version'} ({m.comfyui})" if m.comfyui else "not above this folder",
        ),
        ("CUDA binary", misfit(m, m.binary) or f"for {_join(m.binary.archs)}" if m.binary else "none"),
        *([("cubins", misfit(m, m.cubins) or f"for {_join(m.cubins.archs)}")] if m.cubins else []),
    ]
    return "\n".join(f"{name:<13} {value}" for name, value in rows)
