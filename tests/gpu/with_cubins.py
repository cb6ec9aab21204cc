"""The kernels as NVRTC compiles them for this machine's GPUs, and calls that are served by them instead of by `_C`."""

import contextlib
from functools import cache
from unittest import mock

from csrc import build, lock, nvrtc
from sage_kernels import cubins, cuda


@cache
def compiled():
    """sage_kernels.cubins.Cubins; a BuildError says why not. One process compiles, the others wait and take what it made."""
    archs = build.choose_archs(None)
    folder = build.BUILD_DIR / "tests"
    with lock.held(folder / "install.lock", print) as keep:
        return cubins.Cubins(nvrtc.compile_all(nvrtc.find(archs, None), archs, build_dir=folder, keep=keep))


@contextlib.contextmanager
def served_by(module):
    """Within it every call goes to `module`: `_C` or Cubins."""
    with mock.patch.object(cuda, "binary", lambda: module):
        for cached in (cuda._prepare, cuda.arch):
            cached.cache_clear()
        try:
            yield module
        finally:
            for cached in (cuda._prepare, cuda.arch):
                cached.cache_clear()
