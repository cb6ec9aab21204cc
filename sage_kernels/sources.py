"""The name of a state of csrc/: kept in the binary, so that one built from other sources is not used.

Imports nothing else of the package: csrc/build.py runs this file where torch may be missing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SUFFIXES = (".cu", ".cuh", ".h", ".cpp")


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each source under `folder`, by its name there; what csrc/build holds is none."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}
    kept = {name: path for name, path in found.items() if path.suffix in SUFFIXES and not name.startswith("build/")}
    # without the line ends that git may check out on Windows
    texts = {name: path.read_bytes().replace(b"\r\n", b"\n") for name, path in kept.items()}
    return {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}


def source_hash(folder: Path = CSRC) -> str | None:
    """16 hex digits of all sources under `folder`, or None where there are none, as in a wheel."""
    found = sorted(digests(folder).items())
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16] if found else None
