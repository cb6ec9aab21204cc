"""Wheels of the CUDA binary: finds the one of an index that fits a machine, and installs it; make_wheel.py makes them.

docs/installing.md says how to use it. Every failure is a WheelError whose text is a sentence for the user.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from . import build, pypi
from .build import PTX, BuildError, arch_number
from .make_wheel import (
    MODULE,
    PROJECT,
    ROOT,
    WheelError,
    binary_info,
    build_wheel,
    packaging,
    pyproject,
    sha256,
    write_index,
)

__all__ = ["Candidate", "WheelError", "build_wheel", "configured_index", "find", "install", "write_index"]

BUILD_TAG = re.compile(r"(\d+)\.(\d+)((?:\.sm\d+(?:ptx)?)+)\.src([0-9a-f]+)")
TRIES = 3  # of a page or a file that does not arrive whole
TIMEOUT = 15  # seconds without a byte
OTHER_FILE = "the file that came has another sha256 than the index says: cut short, or broken or changed since"


@dataclass(frozen=True)
class Candidate:
    """A wheel of an index, by its name."""

    name: str
    url: str
    sha256: str
    tags: frozenset[Any]
    cuda: tuple[int, int]
    archs: tuple[str, ...]  # as --archs takes them
    source_hash: str


def configured_index(argument: str | None) -> str | None:
    """--index, else SAGE_KERNELS_INDEX, else pyproject's; one that is given empty means none."""
    for given in (argument, os.environ.get("SAGE_KERNELS_INDEX")):
        if given is not None:
            return given or None
    if index := pyproject().get("tool", {}).get("sage_kernels", {}).get("index"):
        return index if _is_url(index) else str(ROOT / index)  # a folder is given from where the file is
    return None


# ---- an index


def _is_url(index: str) -> bool:
    return re.match("(https?|file)://", index) is not None


def _page_address(index: str) -> str:
    if not _is_url(index):
        path = Path(index).expanduser().resolve()
        if path.is_dir():
            path /= "index.html"
        if not path.is_file():
            raise WheelError(
                f"the index {index} is neither an http(s) address nor a folder with an index.html; "
                "install.py --build-wheel --index DIR makes such a folder"
            )
        return path.as_uri()
    if index.endswith(".html"):
        return index
    return index.rstrip("/") + ("/index.html" if index.startswith("file:") else "/")


class _Page(HTMLParser):
    """The addresses a page links to, without what its owner has withdrawn (PEP 592)."""

    def __init__(self, address: str):
        super().__init__()
        self.links: list[str] = []
        # from the address asked for, not the one it led to: a release page sends each file on to a place of its own
        self.address = address
        self.feed(_read(address))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a" and given.get("href") and "data-yanked" not in given:
            self.links.append(urllib.parse.urljoin(self.address, given["href"]))


def _read(address: str) -> str:
    for attempt in range(1, TRIES + 1):
        try:  # an opener of its own takes the proxies of now
            with urllib.request.build_opener().open(address, timeout=TIMEOUT) as page:
                return page.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, ValueError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or attempt == TRIES:
                raise WheelError(
                    f"the index {address} cannot be read ({getattr(error, 'reason', None) or error}): check the address, "
                    "the network and the proxy (HTTPS_PROXY); that of a release page ends with index.html"
                ) from error
    raise AssertionError


def _candidates(index: str) -> list[Candidate]:
    page = _Page(_page_address(index))
    found = [wheel for link in page.links if (wheel := _candidate(link))]
    if not found:  # the root of an index links to the project's page
        for link in page.links:
            last = urllib.parse.urlsplit(link).path.rstrip("/").rsplit("/", 1)[-1]
            if re.sub(r"[-_.]+", "-", last).lower() == PROJECT:
                return [wheel for inner in _Page(link).links if (wheel := _candidate(inner))]
    return found


def _candidate(link: str) -> Candidate | None:
    """The wheel behind a link; None for other files, and for one whose sha256 is not there to be verified."""
    utils = packaging("utils")
    address, fragment = urllib.parse.urldefrag(link)
    name = urllib.parse.unquote(urllib.parse.urlsplit(address).path).rsplit("/", 1)[-1]
    digest = re.fullmatch("sha256=([0-9a-f]{64})", fragment)
    try:
        project, _, tag, tags = utils.parse_wheel_filename(name)
    except ValueError:
        return None
    built = BUILD_TAG.fullmatch("".join(map(str, tag)))
    if project != PROJECT or not digest or not built:
        return None
    archs = [f"{a}.{b}{PTX if ptx else ''}" for a, b, ptx in re.findall(r"sm(\d+)(\d)(ptx)?", built[3])]
    return Candidate(name, address, digest[1], tags, (int(built[1]), int(built[2])), tuple(archs), built[4])


# ---- which of them


def find(index: str, machine: Any) -> Candidate | str:
    """The wheel that fits `machine` best, or a sentence why there is none."""
    oldest = min(build.ARCHS, key=arch_number)
    gpus = [gpu for gpu in machine.gpus if arch_number(gpu.arch) >= arch_number(oldest)]  # no kernel runs on the others
    if not gpus:
        have = ", ".join(f"{gpu.name} has {gpu.arch}" for gpu in machine.gpus) or "there is none here"
        return f"a wheel needs a GPU of compute capability {oldest} or newer: {have}"
    if machine.driver_cuda is None:
        return "a wheel needs an NVIDIA driver and none was found: install one"
    wheels = _candidates(index)
    if not wheels:
        return f"the index {index} lists no {MODULE} wheel with a #sha256=: check its address"
    misfits = {wheel: _misfit(wheel, machine, gpus) for wheel in wheels}
    fitting = [wheel for wheel, misfit in misfits.items() if misfit is None]
    if not fitting:
        nearest = max(wheels, key=lambda wheel: (misfits[wheel][0], wheel.name))
        return (
            f"none of the {len(wheels)} wheels of {index} fits this machine; the nearest, {nearest.name}, "
            f"{misfits[nearest][1]}"
        )

    def rank(wheel: Candidate) -> tuple[Any, ...]:
        """The newest kernels for each GPU, then the fewest for other GPUs, then the newest CUDA."""
        served = [serving_arch(gpu.arch, wheel, machine.driver_cuda) for gpu in gpus]
        return [arch_number(arch) for arch in served], -len(set(wheel.archs) - set(served)), wheel.cuda, wheel.name

    return max(fitting, key=rank)


def _misfit(wheel: Candidate, machine: Any, gpus: Sequence[Any]) -> tuple[int, str] | None:
    """What is wrong with a wheel, after how much is right with it."""
    python, platforms, driver = machine.python_tag, machine.platform_tags, machine.driver_cuda
    name = wheel.name.removesuffix(".whl")
    if not any(tag.platform in platforms for tag in wheel.tags):
        return 0, f"is for {name.rsplit('-', 1)[1]} and this machine is {' or '.join(platforms[:2])}"
    if not any(tag.abi == python and tag.interpreter == python.rstrip("t") for tag in wheel.tags):  # cp313t: no GIL
        return 1, f"is for Python {name.rsplit('-', 2)[1]} and this Python is {python}"
    if wheel.source_hash != machine.source_hash:
        return 2, (
            f"is built from other sources ({wheel.source_hash}) than those here ({machine.source_hash}): update this pack, "
            "or give the index of its version with --index"
        )
    if driver < (wheel.cuda[0], 0):  # a driver runs every minor version of its major
        return 3, f"needs a driver for CUDA {wheel.cuda[0]}.0 and this one is for {'%d.%d' % driver}: update the driver"
    for gpu in gpus:
        if serving_arch(gpu.arch, wheel, driver) is None:
            return 4, f"has kernels for compute capability {', '.join(wheel.archs)} and {gpu.name} has {gpu.arch}"
    return None


def serving_arch(gpu: str, wheel: Candidate, driver: tuple[int, int]) -> str | None:
    """Which of the wheel's archs a GPU runs: bindings.cpp's arch_for."""
    older = [arch for arch in wheel.archs if arch_number(arch) <= arch_number(gpu)]
    fits = [arch for arch in older if arch_number(arch)[0] == arch_number(gpu)[0]]
    if not fits and driver >= wheel.cuda:  # a driver compiles no PTX newer than itself
        fits = [arch for arch in older if arch.endswith(PTX)]
    return max(fits, key=arch_number, default=None)


# ---- one wheel


def install(candidate: Candidate, package: Path, say: Callable[[str], None] = print) -> Path:
    """Download, verify, load once, and put the binary into `package`, which changes in the last step only."""
    try:
        with tempfile.TemporaryDirectory(prefix="sage_kernels_", ignore_cleanup_errors=True) as folder:
            wheel = _download(candidate, Path(folder), say)
            binary = Path(folder) / build.binary_name()
            binary.write_bytes(_content(wheel, f"sage_kernels/{binary.name}"))
            if binary_info(binary)[2] != candidate.source_hash:
                raise WheelError(f"{candidate.name} holds a binary of other sources than its name says: build it again")
            return build.put(binary, Path(package) / binary.name)
    except BuildError as error:
        raise WheelError(str(error)) from error
    except OSError as error:
        raise WheelError(f"{candidate.name} cannot be installed into {package}: {error}") from error


def _download(candidate: Candidate, folder: Path, say: Callable[[str], None]) -> Path:
    say(f"Downloading {candidate.name} from {candidate.url.rsplit('/', 1)[0]}")
    transfer = _by_pip if importlib.util.find_spec("pip") else _by_python
    wheel = folder / candidate.name
    for attempt in range(1, TRIES + 1):
        why = transfer(candidate, wheel)
        if wheel.is_file() and sha256(wheel) == candidate.sha256:
            return wheel
        wheel.unlink(missing_ok=True)
        if attempt < TRIES:
            say(f"{why}; trying again ({attempt + 1} of {TRIES})")
    raise WheelError(f"{candidate.name} was not installed, after {TRIES} tries: {why} (from {candidate.url})")


def _by_pip(candidate: Candidate, wheel: Path) -> str:
    """Its proxies, certificates and retries are what people have set up. What went wrong, if anything did."""
    pip = [sys.executable, *"-m pip download --no-deps --no-index --require-hashes --no-cache-dir --no-input".split()]
    pip += [*"--disable-pip-version-check --progress-bar off --retries 2 --dest".split(), str(wheel.parent)]
    # A pip that can resume does (25.1 and newer); the others do not know the setting and leave it alone.
    environment = {**os.environ, "PIP_RESUME_RETRIES": "5"}
    done = subprocess.run(
        [*pip, f"{candidate.url}#sha256={candidate.sha256}"], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    if "DO NOT MATCH THE HASHES" in done.stdout:
        return OTHER_FILE
    return pypi.failure(done.stdout.splitlines())


def _by_python(candidate: Candidate, wheel: Path) -> str:
    """Where there is no pip, as in the environments that uv makes: as the index is read."""
    try:
        with urllib.request.build_opener().open(candidate.url, timeout=TIMEOUT) as page, wheel.open("wb") as to:
            shutil.copyfileobj(page, to)
    except (OSError, http.client.HTTPException) as error:
        return f"the transfer broke ({getattr(error, 'reason', None) or error})"
    return OTHER_FILE


def _content(wheel: Path, wanted: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if ".dist-info/" not in name]
            if names != [wanted]:
                raise WheelError(
                    f"{wheel.name} holds {', '.join(names) or 'no binary'} and this Python needs {wanted} and nothing else"
                )
            return archive.read(wanted)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise WheelError(f"{wheel.name} is no whole wheel ({error}): build it again") from error
