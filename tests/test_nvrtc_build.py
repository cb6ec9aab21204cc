"""csrc/nvrtc.py: which NVRTC, the sentence where there is none, and what it compiles.

Where NVRTC is there (PyPI has it) it compiles small kernels, which takes seconds; nothing here needs a GPU.
"""

import dataclasses
import zipfile
from types import SimpleNamespace

import pytest
from small_cubins import compiler, only_small, small_cubins  # noqa: F401 (fixtures)

from csrc import build, nvrtc
from sage_kernels import cubin_layout
from sage_kernels.sources import source_hash

# ---- which NVRTC


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(path, version): an NVRTC of this version at this place, and none elsewhere."""
    versions = {}
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "torch")])
    nvidia = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: {"torch": spec, "nvidia": nvidia}[name])
    for name in ("CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    every = nvrtc._folders
    monkeypatch.setattr(nvrtc, "_folders", lambda: (at for at in every() if at.is_relative_to(tmp_path)))

    def version(path):
        if versions[path] is None:
            raise OSError("invalid ELF header")
        return versions[path]

    monkeypatch.setattr(nvrtc, "version", version)

    def put(name, version):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        versions[str(path)] = version
        return str(path)

    return put


def test_torch_comes_first(installed, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    toolkit = installed("cuda/lib64/libnvrtc.so.13", (13, 1))
    package = installed("nvidia/cu13/lib/libnvrtc.so.13", (13, 0))
    assert nvrtc.find(["9.0"], (13, 0)) == nvrtc.Nvrtc(package, (13, 0))
    torch = installed("torch/lib/libnvrtc-b51b459d.so.12", (12, 8))
    for other in ("libnvrtc.alt.so.12", "libnvrtc-builtins.so.12.8", "libnvrtc_static.a"):
        installed(f"torch/lib/{other}", (1, 0))
    assert nvrtc.find(["9.0"], (13, 0)).path == torch
    assert list(nvrtc.candidates()) == [torch, package, toolkit]


def test_a_folder_that_may_not_be_read_is_passed_over(installed, monkeypatch, tmp_path):
    torch = installed("torch/lib/libnvrtc.so.13", (13, 0))

    def folders():
        yield SimpleNamespace(glob=refuse)
        yield tmp_path / "torch" / "lib"

    def refuse(pattern):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(nvrtc, "_folders", folders)
    assert list(nvrtc.candidates()) == [torch]


def test_an_nvrtc_that_does_not_fit_is_passed_over(installed):
    with pytest.raises(build.NothingToBuild, match=r"NVRTC was not found.*pip install nvidia-cuda-nvrtc==13\.\*"):
        nvrtc.find(["9.0"], (13, 0))
    with pytest.raises(build.NothingToBuild, match=r"nvidia-cuda-nvrtc-cu12==12\.\*"):
        nvrtc.find(["9.0"], (12, 4))
    broken = installed("torch/lib/libnvrtc.so.13", None)
    with pytest.raises(build.NothingToBuild, match=f"{broken} cannot be loaded .invalid ELF header"):
        nvrtc.find(["9.0"], (13, 0))
    old = installed("nvidia/cuda_nvrtc/lib/libnvrtc.so.12", (12, 4))
    assert nvrtc.find(["8.6"], (12, 4)).path == old
    with pytest.raises(build.NothingToBuild, match=r"CUDA 12.4 and compute capability 8.9 needs 12.8"):
        installed("torch/lib/libnvrtc.so.13", (12, 4))
        nvrtc.find(["8.6", "8.9"], (12, 4))
    new = installed("nvidia/cu13/lib/libnvrtc.so.13", (13, 0))
    assert nvrtc.find(["8.9"], (13, 0)).path == new
    with pytest.raises(build.NothingToBuild, match="12.4"):
        nvrtc.find(["8.9"], (12, 9))
    assert "the driver knows CUDA 12.9 and needs 13.0" in nvrtc.unfit(nvrtc.Nvrtc(new, (13, 0)), ["8.9"], (12, 9))


def test_ptx_needs_a_driver_as_new_as_nvrtc():
    one = nvrtc.Nvrtc("nvrtc", (13, 1))
    assert nvrtc.unfit(one, ["12.0"], (13, 0)) is None and nvrtc.unfit(one, ["12.0"], None) is None
    assert "needs 13.1" in nvrtc.unfit(one, ["12.0+PTX"], (13, 0))


def test_windows_names(installed, monkeypatch):
    monkeypatch.setattr(nvrtc, "WINDOWS", True)
    monkeypatch.setattr(nvrtc, "LIBRARY", nvrtc.library_names(windows=True))
    torch = installed("torch/lib/nvrtc64_130_0.dll", (13, 0))
    for other in ("nvrtc64_130_0.alt.dll", "nvrtc-builtins64_130.dll"):
        installed(f"torch/lib/{other}", (1, 0))
    package = installed("nvidia/cu13/bin/x86_64/nvrtc64_130_0.dll", (13, 0))
    older = installed("nvidia/cuda_nvrtc/bin/nvrtc64_120_0.dll", (12, 8))
    assert set(nvrtc.candidates()) == {torch, package, older} and nvrtc.find(["9.0"], (13, 0)).path == torch


# ---- compiling


def test_kernels_and_numbers(compiler, small_cubins):  # noqa: F811
    made = small_cubins(("8.9", "9.0"))
    assert made.SOURCE_HASH == source_hash() and made.ARCHS == ("8.9", "9.0")
    for arch in made.ARCHS:
        about = made._archs[arch]
        module, symbol, threads, shared_bytes = about["kernels"]["stats_kernel<DType::bf16>"]
        assert (threads, shared_bytes) == (about["facts"]["stats.cuh"]["THREADS"], 0)
        assert made._read(module).startswith(b"\x7fELF") and symbol.encode() in made._read(module)
        assert about["kernels"]["combine"][0] == f"{arch}-combine"
    tile = cubin_layout.tile(3, 128, "keys")
    assert [made._archs[arch]["facts"]["tiles.h"][tile] for arch in made.ARCHS] == [
        made.key_tile("int8/int32", 128, arch) for arch in made.ARCHS
    ]
    assert cubin_layout.WGMMA in made._archs["9.0"]["facts"] and cubin_layout.WGMMA not in made._archs["8.9"]["facts"]


def test_every_header_compiles(compiler, tmp_path, monkeypatch):  # noqa: F811
    """One kernel of each: NVRTC takes less than nvcc does, such as a lambda only where functions are the device's by default."""
    layout = nvrtc._alone("cubin_layout")
    every = layout.units

    def first_of_each(facts):
        headers = {}
        for name, (header, kernels) in every(facts).items():
            headers.setdefault(header, (name, dict([next(iter(kernels.items()))])))
        return {name: (header, kernels) for header, (name, kernels) in headers.items()}

    monkeypatch.setattr(layout, "units", first_of_each)
    archive = nvrtc.compile_all(compiler, ["9.0"], 2, tmp_path)
    with zipfile.ZipFile(archive) as files:
        assert sum(name.startswith("9.0-") for name in files.namelist()) == 6


def test_ptx_for_newer_gpus(compiler, small_cubins):  # noqa: F811
    made = small_cubins(("12.0+PTX", "8.9"))
    assert made.ARCHS == ("12.0", "8.9") and made.arch_for(13, 0) == "12.0" == made.arch_for(12, 1)
    assert made.arch_for(8, 9) == "8.9" and made.arch_for(9, 0) == "" and made.modes("12.0")
    module, symbol, *_ = made._archs["12.0"]["kernels"]["combine"]
    ptx = made._read(module).decode()
    assert ".target sm_120\n" in ptx and f".entry {symbol}(" in ptx


def test_what_is_compiled_is_kept(compiler, tmp_path, monkeypatch):  # noqa: F811
    """A run that is stopped goes on where it was; other sources are compiled again, and what is of no use goes."""
    only_small(monkeypatch)
    said = []
    first = nvrtc.compile_all(compiler, ["8.9"], 1, tmp_path, said.append)
    assert said[0].startswith(f"NVRTC of CUDA {compiler.version[0]}.") and said[1].startswith("[1/2] 8.9-")
    before, run = first.read_bytes(), nvrtc.subprocess.run
    monkeypatch.setattr(nvrtc.subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert nvrtc.compile_all(compiler, ["8.9"], 1, tmp_path, said.append).read_bytes() == before, "the same bytes"
    monkeypatch.setattr(nvrtc.subprocess, "run", run)
    (lost,) = (tmp_path / "nvrtc").glob("8.9-combine-*")
    lost.unlink()
    kept = sorted((tmp_path / "nvrtc").iterdir())
    nvrtc.compile_all(compiler, ["8.9"], 1, tmp_path, said.append)
    assert sorted((tmp_path / "nvrtc").iterdir()) == sorted([*kept, lost])
    (tmp_path / "nvrtc" / "8.9-old-0123").touch()
    (tmp_path / "nvrtc" / "8.9-stats-0123.77.tmp").touch()
    nvrtc.compile_all(compiler, ["8.9"], 1, tmp_path, said.append)
    assert sorted((tmp_path / "nvrtc").iterdir()) == sorted([*kept, lost])


def test_what_does_not_compile(compiler, tmp_path):  # noqa: F811
    workers = nvrtc.Compiler(compiler, 1, tmp_path, print, (), [])
    with pytest.raises(
        build.BuildError, match='could not compile it: .*error: identifier "nothing" is undefined.*it.log'
    ):
        workers.run([nvrtc.Unit("it", "sm_90a", "__device__ int x = nothing;")])
    with pytest.raises(build.BuildError, match="could not compile arch: .*invalid value for --gpu-architecture"):
        workers.run([nvrtc.Unit("arch", "sm_1", "")])
    with pytest.raises(build.BuildError, match="could not compile name"):
        workers.run([nvrtc.Unit("name", "sm_90a", "", ("no_kernel<1>",))])
    gone = nvrtc.Compiler(dataclasses.replace(compiler, path=str(tmp_path / "gone.so")), 1, tmp_path, print, (), [])
    with pytest.raises(build.BuildError, match="could not compile none: .*gone.so"):
        gone.run([nvrtc.Unit("none", "sm_90a", "")])
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".log"], "nothing half-made is left"


def test_structs_that_differ_are_found(compiler, tmp_path, monkeypatch):  # noqa: F811
    layout = nvrtc._alone("cubin_layout")
    workers = nvrtc.Compiler(compiler, 1, tmp_path, print, (), [])

    class View(layout.Structure):
        _fields_ = [(name, kind) for name, kind in (*layout.View._fields_[:2], *layout.View._fields_[:1:-1])]

    monkeypatch.setitem(layout.STRUCTS, "params.h", (View,))
    with pytest.raises(build.BuildError, match="View of params.h has its fields elsewhere"):
        nvrtc._facts(workers, "compute_89", {"params.h": ["BLOCK"]})

    class Mask(layout.Structure):
        _fields_ = layout.Mask._fields_[:-1]

    monkeypatch.setitem(layout.STRUCTS, "params.h", (Mask,))
    with pytest.raises(build.BuildError, match="could not compile facts-params.h: .*static assertion failed"):
        nvrtc._facts(workers, "compute_89", {"params.h": ["BLOCK"]})
