"""One install.py at a time. The lock is the operating system's, so that it ends with the processes that hold it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def held(path: Path, say: Callable[[str], None]) -> Iterator[tuple[int, ...]]:
    """Waits until the lock is free, and gives what a child process has to inherit to hold it, too (`pass_fds`).

    A compiler outlives an install.py that is killed; as it holds the lock, the next run does not write the same files
    beside it. Windows has no such inheritance. The file stays: one that is removed could be locked twice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        waiting = False
        while True:
            try:
                _lock(file)
                break
            except (BlockingIOError, PermissionError):  # Linux and Windows say so that another holds it
                if not waiting:
                    say(
                        f"Another install.py is at work here (it holds {path}): waiting until it ends; Ctrl-C gives up."
                    )
                waiting = True
                time.sleep(0.2)
            except OSError as error:  # some network file systems have none
                say(f"{path} cannot be locked ({error.strerror}): see that no other install.py runs.")
                break
        yield () if sys.platform == "win32" else (file,)
    finally:
        os.close(file)
