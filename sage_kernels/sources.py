"""The name of a state of csrc/: kept in the binary, so that one built from other sources is not used.

Imports nothing else of the package: csrc/build.py runs this file where torch may be missing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"


def source_hash(folder: Path = CSRC) -> str | None:
    """16 hex digits of the sources under `folder` (csrc/build is not one), or None where there are none, as in a wheel."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}
    kept = {
        name: path
        for name, path in found.items()
        if path.suffix in (".cu", ".cuh", ".h", ".cpp") and not name.startswith("build/")
    }
    if not kept:
        return None
    total = hashlib.sha256()
    for name, path in sorted(kept.items()):
        text = path.read_bytes().replace(b"\r\n", b"\n")  # as git may check it out on Windows
        total.update(f"{name}\0{len(text)}\0".encode() + text)
    return total.hexdigest()[:16]
