"""What a build takes from PyPI: the tools it runs, and CUDA's compiler where this machine has none that will do.

Each goes into a folder of the build, so that nobody's environment changes.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import build
from .build import BuildError, NothingToBuild

# The oldest nvcc that is whole there (packages for CUDA 12 lack nvcc itself, cicc and cudafe++): every driver that knows
# CUDA 13 runs what it builds, PTX too. The versions are those of the CUDA toolkit 13.0.2.
CUDA = (13, 0)
NVCC = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
)
# What is transferred for it, in MB, by the platform that wheels are chosen by; on disk it is 2.5 times that.
MEGABYTES = {"(many)?linux.*_x86_64": 101, "(many)?linux.*_aarch64": 94, "win_amd64": 87}
# What pip and uv say of more than a network that is not there: a full disk, a file that is not what the index says.
FAILURES = ("No space left", "DO NOT MATCH THE HASHES", "Hash mismatch")
NETWORK = r"(?i)connect|resolve|timed? ?out|retr|proxy|ssl|certificate|\b[45]\d\d\b|no matching distribution"


# ---- the compiler


def nvcc_path() -> Path:
    """Where PyPI's nvcc is, or will be."""
    name = "nvcc.exe" if build.WINDOWS else "nvcc"
    return build.BUILD_DIR / f"nvcc-{NVCC[0].rpartition('=')[2]}" / "nvidia" / "cu13" / "bin" / name


def nvcc_megabytes(platform_tags: Sequence[str]) -> int:
    """What its download is where wheels are chosen by these platforms; 0 where there is none."""
    if any("musl" in tag for tag in platform_tags):
        return 0
    return next((size for name, size in MEGABYTES.items() if any(re.fullmatch(name, tag) for tag in platform_tags)), 0)


def nvcc_misfit(driver_cuda: tuple[int, int] | None, platform_tags: Sequence[str]) -> str | None:
    """Why PyPI's nvcc is none for this machine, or None."""
    if not nvcc_megabytes(platform_tags):
        return f"PyPI has no nvcc for {platform_tags[0]}"
    if driver_cuda and driver_cuda < CUDA:
        older = ", or install the CUDA toolkit 12.8 or 12.9" if driver_cuda >= (12, 0) else ""
        return (
            f"PyPI has whole compilers of CUDA {'%d.%d' % CUDA} and newer only, and the driver knows CUDA "
            f"{'%d.%d' % driver_cuda}: update the driver (to 580 or newer){older}"
        )
    return None


def fetch_nvcc(say: Callable[[str], None], keep: Sequence[int] = ()) -> None:
    if not nvcc_path().is_file():
        fetch(NVCC, nvcc_path().parents[3], say, keep)


# ---- the tools


def fetch_tools(say: Callable[[str], None], keep: Sequence[int] = ()) -> None:
    """What this Python lacks of ninja and pybind11."""
    if not build.missing_tools():
        return
    shutil.rmtree(build.TOOLS, ignore_errors=True)  # something of it is missing
    importlib.invalidate_caches()
    fetch(build.missing_tools(), build.TOOLS, say, keep)
    importlib.invalidate_caches()  # the folder may be new


# ---- anything


def fetch(packages: Sequence[str], folder: Path, say: Callable[[str], None], keep: Sequence[int] = ()) -> None:
    """`packages`, and none that they ask for, into `folder`, by pip or uv with the settings that people have given them.

    The folder appears in one step: half of a package would be taken for the whole of it. Raises NothingToBuild where they
    cannot be had, so that other kernels serve. keep: what pip inherits of install.py's lock.
    """
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    say(f"Fetching {', '.join(packages)} into {folder}")
    name, command = installer()
    command += ["--no-deps", "--target", str(new), *packages]
    lines: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        errors="replace", env={**os.environ, "PIP_REQUIRE_VIRTUALENV": "0"}, pass_fds=keep,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if lines[-1].startswith("Downloading "):  # so say both, with the size
                say(lines[-1])
    if process.returncode:
        shutil.rmtree(new, ignore_errors=True)
        why = f"{', '.join(packages)} cannot be had from PyPI: {failure(lines, name)}"
        if any(words in line for line in lines for words in FAILURES):
            raise BuildError(why)
        if any(re.search(NETWORK, line) for line in lines):
            why += " (check the network and the proxy, HTTPS_PROXY)"
        raise NothingToBuild(why)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def installer() -> tuple[str, list[str]]:
    """pip; or uv in an environment that uv made, which has no pip."""
    if importlib.util.find_spec("pip") is None:
        uv = shutil.which("uv")
        program = [sys.executable, "-m", "uv"] if importlib.util.find_spec("uv") else [uv] if uv else None
        if program:
            return "uv", [*program, "pip", "install", "--python", sys.executable]
    # whatever people's settings say: --target goes with no other place, and nobody is there to answer questions
    quiet = ["--no-input", "--no-user", "--disable-pip-version-check", "--progress-bar", "off"]
    return "pip", [sys.executable, "-m", "pip", "install", *quiet]


def failure(said: Sequence[str], by: str = "pip") -> str:
    """Why it failed, of what it said."""
    lines = [line.strip() for line in said if line.strip()] or ["nothing"]
    if any("No module named pip" in line for line in lines):
        return f"this Python has no pip; run {sys.executable} -m ensurepip"
    # how older and newer releases say it; a traceback says it in its last line
    errors = [line for line in lines if re.match("ERROR:|error:|×", line) and line != "ERROR: Exception:"]
    causes = [line for line in lines if re.match("cause:|Caused by:", line)]  # of uv, the deepest last
    return f"{by} said: {', '.join([(errors or lines)[-1].lstrip('× '), *causes[-1:]])}"
