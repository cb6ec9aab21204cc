"""What stands in where there is no GPU and no CUDA: a program for nvcc, a machine with made-up hardware, a pack of four files.

Run as a program it is install.py on such a machine: `stand_in.py FOLDER [options of install.py]`.
"""

import os
import shutil
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging import tags

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import install  # noqa: E402
from csrc import build, machine, make_wheel, pypi, wheels  # noqa: E402
from csrc.driver import Gpu  # noqa: E402

# Notes its arguments; a source that says "error" does not compile, one that says "slow" takes a while; an object and a binary are what went into them.
NVCC = r"""
import sys, time
args = sys.argv[1:]
if "--version" in args:
    sys.exit(print("Cuda compilation tools, release RELEASE, V13.0.88"))
out = args[args.index("-o") + 1]
inputs = [a for a in args if a.endswith((".cu", ".cpp", ".o")) and a != out]
text = "".join(open(path).read() for path in inputs)
with open("arguments.txt", "a") as log:
    print(*args, file=log)
if "error" in text:
    print("kernel.cu(3): error: identifier \"nothing\" is undefined\n1 error detected in the compilation of kernel.cu")
    sys.exit(2)
if "slow" in text and "-c" in args:
    time.sleep(2)
if "-MF" in args:
    with open(args[args.index("-MF") + 1], "w") as dependencies:
        names = [name.replace(" ", "\\ ") for name in (inputs[0], *HEADERS[: 1 + inputs[0].endswith("cpp")])]
        print(out.replace(" ", "\\ ") + ":", *names, file=dependencies)
with open(out, "w") as to:
    to.write(text)
"""


@pytest.fixture
def nvcc(tmp_path):
    """nvcc(release): the path of a stand-in that says it is of this CUDA release."""

    return lambda release="13.0": make_nvcc(tmp_path, release)


def make_nvcc(at, release="13.0"):
    folder = at / "cuda" / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    text = NVCC.replace("RELEASE", release).replace("HEADERS", repr([str(at / "csrc" / "params.h"), "build_info.h"]))
    (folder / "nvcc.py").write_text(text)
    (folder / "nvcc").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/nvcc.py" "$@"\n')
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


@pytest.fixture
def csrc(tmp_path):
    folder = tmp_path / "csrc"
    (folder / "instantiations").mkdir(parents=True)
    for name in ("kernel.cu", "instantiations/one mode.cu", "bindings.cpp", "params.h"):
        (folder / name).write_text(f"// {name}\n")
    return folder


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with nothing on its PATH."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def plain_environment(monkeypatch):
    """Neither this machine's proxies nor its settings of pip and uv."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("PIP_", "UV_")) or name == "SAGE_KERNELS_INDEX":
            monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1", "UV_NO_CACHE": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session", params=["pip", "uv"])
def fresh_python(request, tmp_path_factory):
    """A fresh environment's Python: with pip; or without it, and uv on the PATH."""
    at = tmp_path_factory.mktemp("an environment, ünder") / request.param
    venv.create(at, with_pip=request.param == "pip", symlinks=True)
    path = str(at / "bin")
    if request.param == "uv":
        found = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if not found:
            pytest.skip("uv is not installed: pip install uv")
        alone = tmp_path_factory.mktemp("uv") / "uv"  # what lies beside it is not to be found
        alone.symlink_to(found)
        path += os.pathsep + str(alone.parent)
    return request.param, at / "bin" / "python", path


# ---- a machine


def gpus(*archs):
    return tuple(Gpu(f"Card {at}", arch) for at, arch in enumerate(archs))


def made_up(**changes):
    """A machine that can build, with one GPU of 8.9 and no binary yet, but for `changes`."""
    given = dict(
        python="3.12.7", python_tag="cp312", executable="/python", system="Linux", system_version="Linux-6.1",
        platform_tags=["linux_x86_64"], torch="2.9.0+cu130", torch_for="cuda", torch_cuda=(13, 0), driver="580.1",
        driver_cuda=(13, 0), driver_problem="", gpus=gpus("8.9"), nvcc="/cuda/bin/nvcc", nvcc_cuda=(13, 0),
        nvcc_problem="", nvcc_given=False, nvcc_fetched=False, host="/g++", missing=(), missing_tools=(), triton="3.5.0", comfyui="/ComfyUI", comfyui_version="0.3.75", source_hash="0123456789abcdef", binary=None,
    )  # fmt: skip
    return machine.Machine(**{**given, **changes})


def pretend(put, at, **changes):
    """Makes install.py work in `at` alone, on a made-up machine; put: setattr, or monkeypatch.setattr, which undoes it."""
    (at / "package").mkdir(exist_ok=True)
    put(build, "CSRC", at / "csrc")
    put(build, "PACKAGE", at / "package")
    put(build, "BUILD_DIR", at / "build")

    def binary_info(path):
        """A binary is what went into it."""
        if (text := path.read_text(errors="replace")) == "broken":
            raise wheels.WheelError(f"{path.name} cannot be loaded by this Python")
        whole = "".join(source.read_text() for source in build.sources(build.CSRC))
        return ["8.9"], 13000, build.source_hash(build.CSRC) if text == whole else "other"

    def look(nvcc=None):
        version = sys.version_info
        given = dict(
            nvcc=nvcc or str(at / "cuda" / "bin" / "nvcc"),
            python_tag=f"cp{version[0]}{version[1]}",
            platform_tags=list(make_wheel.packaging("tags").platform_tags()),
            source_hash=build.source_hash(build.CSRC),
            nvcc_fetched=pypi.nvcc_path().is_file(),
            binary=machine.read_binary(build.PACKAGE / build.binary_name()),
        )
        return made_up(**{**given, **changes})

    put(make_wheel, "binary_info", binary_info)
    put(wheels, "binary_info", binary_info)
    put(machine.Machine, "look", staticmethod(look))
    put(build, "gpu_archs", lambda: [gpu.arch for gpu in look().gpus])


@pytest.fixture
def go(plain_environment, monkeypatch, capsys, tmp_path, csrc, nvcc):
    """go(*options, **changes of the machine): install.py's exit status; go.said is what it printed."""
    monkeypatch.setattr(wheels, "pyproject", dict)  # whatever index this checkout has
    nvcc()

    def run(*options, **changes):
        with monkeypatch.context() as patch:
            pretend(patch.setattr, tmp_path, **changes)
            status = install.main(["--build-dir", str(tmp_path / "build"), *map(str, options)])
        run.said, run.error = capsys.readouterr()
        return status

    run.package = tmp_path / "package"
    run.binary = run.package / build.binary_name()
    return run


# ---- for wheels

SOURCE = "0123456789abcdef"
PYTHON = f"cp{sys.version_info[0]}{sys.version_info[1]}"
PLATFORMS = list(tags.platform_tags())


def machine_with(*gpus, driver=(13, 0), python=PYTHON, platforms=PLATFORMS, source_hash=SOURCE):
    """What wheels.find reads of a Machine."""
    gpus = tuple(SimpleNamespace(name=f"GPU {at}", arch=arch) for at, arch in enumerate(gpus or ("8.9",)))
    return SimpleNamespace(
        python_tag=python, platform_tags=platforms, driver_cuda=driver, gpus=gpus, source_hash=source_hash
    )


if __name__ == "__main__":
    pretend(setattr, Path(sys.argv[1]))
    sys.exit(install.main(["--build-dir", str(Path(sys.argv[1], "build")), *sys.argv[2:]]))
