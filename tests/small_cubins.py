"""Cubins of a few small kernels by the real NVRTC, for tests: import the fixtures `compiler` and `small_cubins`."""

import pytest

from csrc import build, nvrtc
from sage_kernels.cubins import Cubins

SMALL = ("combine", "stats")  # the units that take no time


@pytest.fixture(scope="module")
def compiler():
    """NVRTC, from PyPI if nowhere else; without one the test is skipped, with the reason."""
    try:
        return nvrtc.find(["8.9"], None)
    except build.BuildError as reason:
        pytest.skip(str(reason))


def only_small(monkeypatch):
    layout = nvrtc._alone("cubin_layout")
    every = layout.units
    monkeypatch.setattr(layout, "units", lambda facts: {name: every(facts)[name] for name in SMALL})


@pytest.fixture(scope="module")
def small_cubins(compiler, tmp_path_factory):
    """small_cubins(archs): Cubins with the numbers of all kernels and the code of a few. Compiled once for all tests."""
    folder = tmp_path_factory.getbasetemp() / "small cubins, ünder"

    def make(archs=("8.9",)):
        with pytest.MonkeyPatch.context() as patch:
            only_small(patch)
            said = []
            archive = nvrtc.compile_all(compiler, archs, 2, folder / "-".join(archs), said.append)
        return Cubins(archive)

    return make
