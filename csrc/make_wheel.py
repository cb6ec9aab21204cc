"""Makes wheels of the CUDA binary, and the index that lists them.

A wheel holds sage_kernels/_C and nothing else. Its name says all that it has to fit, so an index needs no more than names:
sage_kernels_cuda-<version>-<CUDA>.sm<arch>.sm<arch>.src<source hash>-cpXY-cpXY-<platform>.whl
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib
import io
import json
import os
import subprocess
import sys
import urllib.parse
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import build
from .build import PTX, arch_number

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "sage-kernels-cuda"
MODULE = "sage_kernels_cuda"  # the project's name as file names have it
# What the binary says of itself. In a process of its own: Windows locks a file that is loaded.
ASK = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps([module.ARCHS, module.CUDA_RUNTIME, module.SOURCE_HASH, module.arch_for(99, 0)]))
"""


class WheelError(Exception):
    """Why there is no wheel, or none was installed; the binary that was there is untouched."""


def pyproject() -> dict[str, Any]:
    for name in ("tomllib", "pip._vendor.tomli"):  # pip's is for Python 3.10
        try:
            toml = importlib.import_module(name)
        except ImportError:
            continue
        try:
            return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        except FileNotFoundError:
            break
        except (OSError, ValueError) as error:
            raise WheelError(f"{ROOT / 'pyproject.toml'} cannot be read ({error}): restore it from git") from error
    return {}


def packaging(part: str) -> Any:
    """packaging.`part`, which most environments have; else the copy that is in pip."""
    for name in ("packaging", "pip._vendor.packaging"):
        try:
            return importlib.import_module(f"{name}.{part}")
        except ImportError:
            continue
    raise WheelError(f"wheels need packaging or pip, which this Python lacks: run {sys.executable} -m ensurepip")


# ---- a wheel


def binary_info(binary: Path) -> tuple[list[str], int, str]:
    """The archs, CUDA_RUNTIME and SOURCE_HASH of a binary for this Python. No GPU is needed."""
    done = subprocess.run([sys.executable, "-c", ASK, str(binary)], capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise WheelError(f"{binary.name} cannot be loaded by this Python ({said[-1]}): build it for this machine")
    archs, cuda, source_hash, ptx = json.loads(done.stdout)  # ptx: what a GPU newer than all of them would run
    return [arch + PTX * (arch == ptx) for arch in archs], cuda, source_hash


def build_wheel(binary: Path, archs: Sequence[str] | None, out: Path, say: Callable[[str], None] = print) -> Path:
    """A wheel of `binary` in the folder `out`, named after what the binary says of itself. Same binary, same bytes."""
    has, cuda, source_hash = binary_info(binary)
    if archs and {arch.removesuffix(PTX) for arch in archs} != {arch.removesuffix(PTX) for arch in has}:
        raise WheelError(f"{binary} is built for {', '.join(has)} and not for {', '.join(archs)}: build it first")
    names = [arch.replace(".", "").replace(PTX, "ptx") for arch in sorted(set(has), key=arch_number)]
    tag = ".".join([f"{cuda // 1000}.{cuda % 1000 // 10}", *(f"sm{name}" for name in names), f"src{source_hash}"])
    version = pyproject().get("project", {}).get("version", "0")
    wheel = Path(out) / f"{MODULE}-{version}-{tag}-{_this_python()}.whl"
    info = f"{MODULE}-{version}.dist-info"
    about = (
        f"Metadata-Version: 2.1\nName: {MODULE}\nVersion: {version}\nSummary: The CUDA binary of Sage Attention Patch\n"
    )
    try:
        entries = {
            f"sage_kernels/{build.binary_name()}": Path(binary).read_bytes(),
            f"{info}/LICENSE": (ROOT / "LICENSE").read_bytes().replace(b"\r\n", b"\n"),
            f"{info}/METADATA": f"{about}License: Apache-2.0\n".encode(),
            f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: csrc/wheels.py\nRoot-Is-Purelib: false\n"
            f"Tag: {_this_python()}\nBuild: {tag}\n".encode(),
        }
        Path(out).mkdir(parents=True, exist_ok=True)
        _write(wheel, _zip(entries, f"{info}/RECORD"))
    except OSError as error:
        raise WheelError(f"{wheel} cannot be written: {error}") from error
    say(f"Made {wheel}")
    return wheel


def _this_python() -> str:
    """cp312-cp312-manylinux_2_35_x86_64: a newer glibc runs what is linked with this one, an older one may not."""
    tags = packaging("tags")
    first = next(iter(tags.cpython_tags()))
    platforms = list(tags.platform_tags())
    libc = [name for name in platforms if name.startswith(("manylinux", "musllinux"))]
    return f"{first.interpreter}-{first.abi}-{(libc or platforms)[0]}"


def _zip(entries: dict[str, bytes], record: str) -> bytes:
    """A zip with its RECORD, and nothing in it of when, where or by whom it was made."""
    lines = []
    for name, content in sorted(entries.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}\n")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted({**entries, record: "".join([*lines, f"{record},,\n"]).encode()}.items()):
            entry = zipfile.ZipInfo(name)  # its time is 1980
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return packed.getvalue()


# ---- an index


def write_index(folder: Path) -> None:
    """index.html of the wheels in `folder`: a project's page of PEP 503, for a web server or a release's files."""
    try:
        found = {path.name: sha256(path) for path in sorted(Path(folder).glob(f"{MODULE}-*.whl"))}
        links = [
            f'<a href="{urllib.parse.quote(name)}#sha256={digest}">{html.escape(name)}</a><br>'
            for name, digest in found.items()
        ]
        head = f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>{PROJECT}</title></head><body>'
        _write(Path(folder) / "index.html", "\n".join([head, *links, "</body></html>\n"]).encode())
    except OSError as error:
        raise WheelError(f"the index in {folder} cannot be written: {error}") from error


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """In one step: there is the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
