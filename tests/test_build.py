"""csrc/build.py: what is compiled, for what, and the sentence for everything that can be missing.

A small program stands in for nvcc, so these run anywhere and take no time.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from csrc import build
from csrc.build import BuildError
from sage_kernels import PV_MODES, dispatch, quantize
from sage_kernels.sources import source_hash

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nvcc's stand-in is a shell script")


@pytest.fixture
def run(csrc, tmp_path, nvcc):
    """run(**options) builds `csrc` with the stand-in into an empty package, and gives the lines it said."""
    package = tmp_path / "package"
    package.mkdir()

    def go(**options):
        said = []
        if "nvcc" not in options:
            options["nvcc"] = nvcc()
        given = {"archs": ["8.9"], "build_dir": tmp_path / "a build, ünder", "jobs": 1, **options}
        binary = build.build(**given, folder=csrc, package=package, say=said.append)
        assert binary == package / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
        return said

    go.binary = package / build.binary_name()
    go.arguments = tmp_path / "a build, ünder" / "arguments.txt"
    return go


# ---- the name of a state of the sources


def test_source_hash_is_of_the_sources(csrc):
    before = source_hash(csrc)
    assert re.fullmatch("[0-9a-f]{16}", before)
    for name in ("README.md", "build.py", "build/tools/pybind11/include/attr.h", "build/build_info.h"):
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text("other")
        assert source_hash(csrc) == before, name
    (csrc / "kernel.cu").write_bytes(b"// kernel.cu\r\n")
    assert source_hash(csrc) == before, "line ends are git's"
    seen = {before}
    for name in ("kernel.cu", "params.h", "bindings.cpp", "instantiations/one mode.cu", "common/new.cuh"):
        (csrc / name).parent.mkdir(exist_ok=True)
        (csrc / name).write_text("changed")
        seen.add(source_hash(csrc))
    (csrc / "kernel.cu").rename(csrc / "other.cu")
    seen.add(source_hash(csrc))
    assert len(seen) == 7


def test_source_hash_without_sources(tmp_path):
    assert source_hash(tmp_path) is None and source_hash(tmp_path / "nowhere") is None
    assert source_hash() == build.source_hash() is not None


# ---- what is built for


@pytest.mark.parametrize(
    "gpus, archs",
    [(["8.9"], ["8.9"]), (["12.1", "8.7", "12.0"], ["8.6", "12.0"]), (["10.3"], ["10.0"]), (["6.1", "9.0"], ["9.0"])],
)
def test_archs_of_this_machine(monkeypatch, gpus, archs):
    monkeypatch.setattr(build, "gpu_archs", lambda: gpus)
    assert build.choose_archs(None) == archs


def test_archs_that_cannot_be(monkeypatch):
    for gpus, words in (([], "--archs"), (["6.1"], "7.5")):
        monkeypatch.setattr(build, "gpu_archs", lambda gpus=gpus: gpus)
        with pytest.raises(BuildError, match=re.escape(words)):
            build.choose_archs(None)
    for asked in ("9.1", "sm_90", "90", ""):
        with pytest.raises(BuildError, match=re.escape(f"{asked!r} is no architecture")) as caught:
            build.choose_archs(["8.9", asked])
        assert "12.0" in str(caught.value)


def test_archs_are_sorted_and_single():
    assert build.choose_archs(["12.0", "8.9", "12.0"]) == ["8.9", "12.0"]


def test_every_arch_that_can_be_built_has_its_modes_chosen():
    assert list(build.ARCHS) == list(dispatch.CUDA_AUTO)


def test_gpus_are_asked_of_the_driver():
    assert all(re.fullmatch(r"\d+\.\d", arch) for arch in build.gpu_archs())


@pytest.mark.parametrize(
    "asked, cores, free, jobs",
    [(None, 8, 64 << 30, 8), (None, 8, 4 << 30, 2), (None, 8, 1 << 20, 1), (None, 4, None, 4), (3, 1, 1 << 20, 3)],
)
def test_jobs_fit_into_memory(asked, cores, free, jobs):
    assert build.bounded_jobs(asked, cores, free) == jobs


def test_what_there_is_of_cores_and_memory():
    assert build.cores() >= 1
    assert build.free_memory() is None or build.free_memory() > 1 << 20
    with pytest.raises(BuildError, match="--jobs is 0"):
        build.bounded_jobs(0, 4, None)


# ---- what is missing


def test_no_nvcc(bare, tmp_path, nvcc, monkeypatch):
    with pytest.raises(BuildError, match="nvcc was not found.*CUDA_HOME.*--nvcc"):
        build.find_nvcc()
    with pytest.raises(BuildError, match="nvcc is not at /nowhere/nvcc"):
        build.find_nvcc("/nowhere/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(BuildError, match="nvcc was not found"):
        build.find_nvcc()
    assert nvcc() == build.find_nvcc()


def test_nvcc_of_cuda_home_comes_before_the_path(bare, tmp_path, nvcc, monkeypatch):
    first = nvcc()
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "cuda" / "bin", other)
    monkeypatch.setenv("PATH", str(other))
    assert build.find_nvcc() == str(other / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert build.find_nvcc() == first
    assert build.find_nvcc(str(other / "nvcc")) == str(other / "nvcc")


def test_nvcc_too_old_for_an_arch(run, nvcc):
    with pytest.raises(BuildError, match=r"CUDA 12.4 and compute capability 12.0 needs 12.8 or newer"):
        run(nvcc=nvcc("12.4"), archs=["8.6", "12.0"])
    assert run(nvcc=nvcc("12.4"), archs=["8.6"])


def test_nvcc_that_is_something_else(tmp_path):
    with pytest.raises(BuildError, match="names no CUDA release"):
        build.cuda_version(shutil.which("true"))
    (tmp_path / "nvcc").write_bytes(b"\x7fELF")
    (tmp_path / "nvcc").chmod(0o755)
    with pytest.raises(BuildError, match="cannot be run"):
        build.cuda_version(str(tmp_path / "nvcc"))


def test_no_host_compiler(bare, monkeypatch):
    with pytest.raises(BuildError, match=r"C\+\+ compiler and g\+\+ was not found: install g\+\+, or set CXX"):
        build.find_host_compiler()
    monkeypatch.setenv("CXX", "clang++-99")
    with pytest.raises(BuildError, match=r"clang\+\+-99 was not found"):
        build.find_host_compiler()


@pytest.fixture
def visual_studio(bare, monkeypatch, tmp_path):
    """vswhere of a made-up Windows, which knows what is put into visual_studio: a range of versions -> a folder."""
    installed = {}

    def run(command, **options):
        assert command[0].endswith("vswhere.exe") and "-latest" in command
        folder = installed.get(command[command.index("-version") + 1], "")
        return subprocess.CompletedProcess(command, 0, stdout=f"{folder}\n")

    monkeypatch.setattr(build, "WINDOWS", True)
    monkeypatch.setattr(build.subprocess, "run", run)
    return installed


def test_cl_of_visual_studio(visual_studio, tmp_path):
    with pytest.raises(BuildError, match="cl was not found: install Visual Studio 2022 or its Build Tools"):
        build.find_host_compiler()
    for studio, versions in (("2026", "[18.0,)"), ("2022", "[16.0,18.0)")):
        visual_studio[versions] = tmp_path / studio
        for version in ("14.9.1", "14.44.35207"):
            cl = tmp_path / studio / "VC" / "Tools" / "MSVC" / version / "bin" / "Hostx64" / "x64" / "cl.exe"
            cl.parent.mkdir(parents=True)
            cl.touch()
        assert build.find_host_compiler() == str(cl), "the newest, of the newest that nvcc surely takes"


def test_cl_without_vswhere(visual_studio, monkeypatch):
    def none(command, **options):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(build.subprocess, "run", none)
    with pytest.raises(BuildError, match="cl was not found"):
        build.find_host_compiler()


def test_no_ninja_and_no_pybind11(bare, monkeypatch):
    for name in ("ninja", "pybind11"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert build.missing_tools() == ["ninja", "pybind11"]
    with pytest.raises(BuildError, match="pip install ninja"):
        build.find_ninja()
    with pytest.raises(BuildError, match="pip install pybind11"):
        build.includes()


def test_no_python_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError, match="Python.h is not in"):
        build.includes()


def test_nothing_is_missing_here():
    assert build.missing_tools() == []
    assert os.access(build.find_ninja(), os.X_OK)
    assert Path(build.includes()[0], "pybind11", "pybind11.h").is_file()


# ---- the build


def test_one_gencode_for_each_arch(run):
    run(archs=["9.0", "8.0", "12.0"])
    *compiled, linked = run.arguments.read_text().splitlines()
    assert len(compiled) == 3
    for line in compiled:
        assert re.findall(r"-gencode=\S+", line) == [
            f"-gencode=arch=compute_{n},code=sm_{n}" for n in ("80", "90a", "120")
        ]
        assert {"-std=c++17", "-O3", "-ccbin", "-Xcompiler=-fPIC"} <= set(line.split())
        assert "fast_math" not in line
    assert "-shared -cudart=static" in linked


def test_an_older_file_of_other_contents_is_compiled(run, csrc):
    """A release unpacked over an old tree: ninja sees no newer file."""
    run()
    before = run.arguments.read_text().count("\n")
    source = csrc / "kernel.cu"
    source.write_text("// other contents")
    os.utime(source, (1, 1))
    run()
    assert "kernel" in "".join(run.arguments.read_text().splitlines(keepends=True)[before:])
    before = run.arguments.read_text().count("\n")
    (csrc / "params.h").write_text("// another header")
    os.utime(csrc / "params.h", (1, 1))
    run()
    assert len(run.arguments.read_text().splitlines()[before:]) >= 4, "everything, and the link"


@pytest.mark.parametrize("kept", [None, "{", "[]", '{"tools": [], "headers": [], "sources": {}}'])
def test_objects_of_unknown_contents_are_compiled(run, kept):
    run()
    state = run.arguments.with_name("state.json")
    assert run() == ["CUDA 13.0, compute capability 8.9, 1 at once"]
    if kept is None:
        state.unlink()
    else:
        state.write_text(kept)
    assert len(run()) == 5, "everything, and the link"


def test_gpus_newer_than_the_kernels_get_ptx(monkeypatch):
    monkeypatch.setattr(build, "gpu_archs", lambda: ["13.0", "8.9"])
    assert build.choose_archs(None) == ["8.9", "12.0+PTX"]


def test_ptx_goes_along_where_it_is_asked_for(run):
    run(archs=["9.0+PTX", "8.0+PTX"])
    for line in run.arguments.read_text().splitlines()[:-1]:
        codes = re.findall(r"arch=(\w+),code=(\w+)", line)
        assert codes == [
            ("compute_80", "sm_80"),
            ("compute_80", "compute_80"),
            ("compute_90a", "sm_90a"),
            ("compute_90", "compute_90"),  # 90a's would be of no use to a newer GPU
        ]


def test_what_the_linker_is_told(run, tmp_path, nvcc):
    def told():
        run(nvcc=nvcc())
        return run.arguments.read_text().splitlines()[-1].split()

    assert "-Xlinker=-s" in told() and not any(word.startswith("-L") for word in told())
    (tmp_path / "cuda" / "lib").mkdir()
    (tmp_path / "cuda" / "lib" / "libcudart_static.a").touch()
    assert f"-L{tmp_path}/cuda/lib" in told(), "PyPI's nvcc does not look there"


def test_the_binary_knows_what_it_is_built_from(run, csrc):
    run(archs=["9.0", "8.0"])
    header = run.arguments.with_name("build_info.h").read_text()
    assert f'SAGE_SOURCE_HASH "{source_hash(csrc)}"' in header and 'SAGE_ARCHS "8.0,9.0"' in header


def test_only_what_changed_is_compiled_again(run, csrc):
    def compiled():
        return sorted(line.split("] ")[1] for line in run() if "] " in line)

    assert compiled() == ["bindings", "instantiations/one mode", "kernel", "link"]
    assert compiled() == []
    (csrc / "kernel.cu").write_text("// changed\n")
    assert compiled() == ["bindings", "kernel", "link"], "bindings.cpp holds the hash"
    (csrc / "params.h").write_text("// the depfiles name it\n")
    assert len(compiled()) == 4
    assert "// changed" in run.binary.read_text()


def test_a_failed_build_leaves_the_old_binary(run, csrc):
    said = run()
    assert said[0] == "CUDA 13.0, compute capability 8.9, 1 at once"
    assert re.fullmatch(r"\[4/4, \d+\.\d+ s\] link", said[-1]), "how far it is, and for how long"
    before = run.binary.read_bytes()
    (csrc / "kernel.cu").write_text("error\n")
    with pytest.raises(BuildError) as caught:
        run()
    log = run.arguments.with_name("build.log")
    assert 'kernel.cu(3): error: identifier "nothing" is undefined' in str(caught.value)
    assert str(log) in str(caught.value) and "1 error detected in the compilation of kernel.cu" in log.read_text()
    assert run.binary.read_bytes() == before and os.listdir(run.binary.parent) == [run.binary.name]
    (csrc / "kernel.cu").write_text("// mended\n")
    run()
    assert "// mended" in run.binary.read_text()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(run):
    run.binary.parent.chmod(0o500)
    try:
        with pytest.raises(BuildError, match="cannot be written"):
            run()
    finally:
        run.binary.parent.chmod(0o700)


def test_a_build_folder_that_is_a_file(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="cannot be written"):
        run(build_dir=tmp_path / "file")


# ---- what the sources say twice


def test_constants_are_those_of_quantize():
    header = (build.CSRC / "params.h").read_text()
    found = dict(re.findall(r"constexpr (?:float|uint32_t|int) (\w+) = ([^;]+);", header))
    for name in ("LARGEST", "TINY", "LOG2E", "MASK_LIMIT"):
        assert float(found[name].rstrip("f")) == getattr(quantize, name), name
    assert int(found["HASH"].rstrip("u"), 16) == quantize.HASH
    for granularity in quantize.GRANULARITIES.values():
        assert granularity.k_block == int(found["PANEL"]) and int(found["BLOCK"]) % granularity.q_block == 0


def test_modes_are_in_the_same_order():
    header = re.search(r"enum class Mode[^{]*{([^}]*)}", (build.CSRC / "params.h").read_text())[1]
    names = [name.strip() for name in header.split(",")]
    assert names == [re.sub("[/+]", "_", mode) for mode in PV_MODES] + ["count"]
    bindings = re.search(r"MODES\[\] = {([^}]*)}", (build.CSRC / "bindings.cpp").read_text())[1]
    assert re.findall('"([^"]+)"', bindings) == list(PV_MODES)
