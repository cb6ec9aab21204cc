"""When install.py has NVRTC compile the kernels, and that it puts them into the pack whole or not at all."""

import sys

import pytest
from stand_in import gpus, made_up, pretend

import install
from csrc import machine, nvrtc
from csrc.build import BuildError, NothingToBuild
from csrc.machine import Binary, plan

NVRTC = nvrtc.Nvrtc("/torch/lib/libnvrtc.so.13", (13, 0))
NO_COMPILER = ("nvcc needs a C++ compiler and g++ was not found: install g++, or set CXX",)
CUBINS = Binary(("8.9",), (13, 0), "0123456789abcdef")


def bare(**changes):
    """A machine with a GPU and torch's NVRTC, that cannot build."""
    return made_up(**{"host": None, "missing": NO_COMPILER, "nvrtc": NVRTC, **changes})


@pytest.mark.parametrize(
    "changes, kind, words",
    [
        ({}, "nvrtc", "Compile the CUDA kernels for compute capability 8.9 with the NVRTC of CUDA 13.0 (/torch/lib/lib"),
        ({}, "nvrtc", "as no index of wheels is set"),
        ({}, "nvrtc", "g++ was not found"),
        (dict(missing=(), host="/g++"), "build", "with the nvcc of CUDA 13.0"),
        (dict(cubins=CUBINS), "ready", "Nothing to do: the CUDA kernels are here, for compute capability 8.9, by NVRTC"),
        (dict(cubins=CUBINS, source_hash="other"), "nvrtc", "Compile"),
        (dict(cubins=CUBINS, gpus=gpus("12.0")), "nvrtc", "for compute capability 12.0"),
        (dict(cubins=Binary(("8.6",), (13, 0), "0123456789abcdef")), "nvrtc", "for compute capability 8.9"),
        (dict(cubins=Binary(problem="_C.cubins cannot be read")), "nvrtc", "Compile"),
        (dict(cubins=CUBINS, missing=(), host="/g++"), "build", "with the nvcc of CUDA 13.0"),
        (dict(binary=CUBINS), "ready", "Nothing to do"),
        (dict(gpus=()), "fallback", "no NVIDIA GPU"),
        (dict(nvrtc=None, nvrtc_problem="NVRTC was not found"), "fallback", "g++, or set CXX; NVRTC was not found."),
        (dict(gpus=gpus("13.0")), "nvrtc", "for compute capability 12.0+PTX"),
        (dict(nvrtc=nvrtc.Nvrtc("/old", (12, 4))), "fallback", "/old is of CUDA 12.4 and compute capability 8.9 needs 12.8"),
    ],
)  # fmt: skip
def test_nvrtc_comes_after_wheels_and_builds(changes, kind, words):
    todo = plan(bare(**changes))
    assert todo.kind == kind and words in todo.sentence, todo


def test_where_it_is_asked_for():
    able = dict(missing=(), host="/g++")
    todo = plan(bare(**able), must_nvrtc=True)
    assert todo.kind == "nvrtc" and todo.archs == ("8.9",) and todo.sentence.endswith("as you asked.")
    assert plan(bare(cubins=CUBINS), must_nvrtc=True).kind == "nvrtc"
    assert "the binary that is here stays in use" in plan(bare(**able, binary=CUBINS), must_nvrtc=True).sentence
    assert plan(bare(gpus=()), archs=["9.0"], must_nvrtc=True).archs == ("9.0",)
    for changes, words in (
        (dict(nvrtc=None, nvrtc_problem="NVRTC was not found"), "NVRTC was not found"),
        (dict(gpus=()), "no NVIDIA GPU was found to build for"),
        (dict(nvrtc=nvrtc.Nvrtc("/old", (12, 4))), "compute capability 8.9 needs 12.8"),
    ):
        todo = plan(bare(**changes), must_nvrtc=True)
        assert todo.kind == "fail" and words in todo.sentence


def test_the_table_names_both():
    rows = machine.table(bare(cubins=CUBINS))
    assert "NVRTC         CUDA 13.0 (/torch/lib/libnvrtc.so.13)" in rows
    assert "cubins        for compute capability 8.9" in rows
    assert "NVRTC" not in machine.table(bare(nvrtc=None)) and "cubins" not in machine.table(bare())


@pytest.fixture
def pack(monkeypatch, tmp_path, csrc):
    """install.py in tmp_path on a bare machine; NVRTC is a function that writes what `pack.made` says."""
    pretend(monkeypatch.setattr, tmp_path, host=None, missing=NO_COMPILER, nvrtc=NVRTC)
    asked = []

    def compile_all(found, archs, jobs, build_dir, say, keep):
        asked.append((found, list(archs), jobs))
        archive = tmp_path / "build" / "_C.cubins"
        archive.write_text("cubins")
        return archive

    monkeypatch.setattr(nvrtc, "compile_all", compile_all)
    monkeypatch.setattr(nvrtc, "verify", lambda archive, say: None)
    target = tmp_path / "package" / "_C.cubins"
    return target, asked


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvcc is a shell script")
def test_cubins_are_put_into_the_pack(pack, monkeypatch, capsys):
    target, asked = pack
    assert install.main(["--check"]) == 0 and not asked
    assert "Plan:         Compile the CUDA kernels for compute capability 8.9" in capsys.readouterr().out
    assert install.main(["--jobs", "3"]) == 0
    assert asked == [(NVRTC, ["8.9"], 3)] and target.read_text() == "cubins"
    assert f"Compiled {target}. Restart ComfyUI" in capsys.readouterr().out
    assert list(target.parent.iterdir()) == [target]


def test_cubins_that_do_not_load_are_not_put_there(pack, monkeypatch, capsys):
    target, asked = pack
    target.write_text("old")

    def verify(archive, say):
        raise BuildError(f"{archive} was built and is of no use: loading 8.9-stats failed")

    monkeypatch.setattr(nvrtc, "verify", verify)
    assert install.main([]) == 1 and asked
    assert "Nothing was installed:" in (said := capsys.readouterr().err) and "8.9-stats failed" in said
    assert target.read_text() == "old" and list(target.parent.iterdir()) == [target]
    assert install.main(["--nvrtc", "--archs", "9.0"]) == 0, "those of another machine are not tried"
    assert target.read_text() == "cubins" and asked[-1][1] == ["9.0"]


def test_nvrtc_where_pypi_cannot_be_reached(pack, monkeypatch, capsys):
    """The build needs ninja and does not get it."""
    target, asked = pack
    at = target.parents[1]
    pretend(monkeypatch.setattr, at, host="/g++", missing=(), missing_tools=("ninja",), nvrtc=NVRTC)

    def fetch_tools(*args):
        raise NothingToBuild("PyPI cannot be reached")

    monkeypatch.setattr(install.pypi, "fetch_tools", fetch_tools)
    assert install.main([]) == 0 and len(asked) == 1 and target.read_text() == "cubins"
    assert "with the NVRTC of CUDA 13.0" in (said := capsys.readouterr().out) and "PyPI cannot be reached" in said


def test_nvrtc_where_a_build_fails(pack, monkeypatch, capsys):
    """As a C++ compiler that nvcc refuses makes it fail. Where the build was asked for, or there is no NVRTC, that is a failure."""
    target, asked = pack
    at = target.parents[1]

    def build(*args, **options):
        raise BuildError("the build failed: error: unsupported GNU version!")

    monkeypatch.setattr(install, "build_binary", build)
    pretend(monkeypatch.setattr, at, host="/g++", missing=(), nvrtc=NVRTC)
    assert install.main([]) == 0 and len(asked) == 1 and target.read_text() == "cubins"
    assert "with the NVRTC of CUDA 13.0" in (said := capsys.readouterr().out) and "unsupported GNU version" in said
    target.unlink()
    assert install.main(["--archs", "8.9"]) == 1 and len(asked) == 1 and not target.exists()
    pretend(monkeypatch.setattr, at, host="/g++", missing=(), nvrtc=None)
    assert install.main([]) == 1 and "unsupported GNU version" in capsys.readouterr().err


@pytest.mark.parametrize("others", (["--nvcc", "/cuda/bin/nvcc"], ["--build-wheel"]))
def test_options_that_contradict(pack, others, capsys):
    with pytest.raises(SystemExit):
        install.main(["--nvrtc", *others])
    assert "--nvrtc compiles without nvcc" in capsys.readouterr().err
