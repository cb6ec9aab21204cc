"""csrc/pypi.py: what a build takes from PyPI, by the real pip and uv in fresh environments, from an index on loopback.

Small packages stand in for NVIDIA's. With SAGE_PYPI_NVCC=1 a build with those of PyPI is made, too: 100 MB and a minute.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
import zipfile

import pytest
from index_server import Server
from stand_in import NVCC, ROOT

from csrc import pypi

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nvcc's stand-in is a script")
NO_NVCC = dict(nvcc=None, nvcc_cuda=None, nvcc_problem="nvcc was not found: install the CUDA toolkit")


def package(folder, requirement, files):
    """A wheel in an index: files are name -> (text, mode)."""
    project, _, version = requirement.partition("==")
    name, version = project.replace("-", "_"), version or "1.0"
    page = folder / project
    page.mkdir(parents=True)
    wheel = page / f"{name}-{version}-py3-none-any.whl"
    about = {
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name}-{version}.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, (text, mode) in {**files, **{path: (text, 0o644) for path, text in about.items()}}.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (0o100000 | mode) << 16
            archive.writestr(entry, text)
        archive.writestr(record, "".join(f"{path},,\n" for path in (*files, *about, record)))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (page / "index.html").write_text(f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>')


@pytest.fixture
def index(tmp_path, plain_environment, monkeypatch):
    """PyPI, as far as these tests see it."""
    folder = tmp_path / "PyPI"
    nvcc = NVCC.replace("RELEASE", "13.0").replace(
        "HEADERS", repr([str(tmp_path / "csrc" / "params.h"), "build_info.h"])
    )
    for requirement in pypi.NVCC:
        files = {f"nvidia/cu13/include/{requirement}.h": ("", 0o644)}
        if "nvcc" in requirement:
            files["nvidia/cu13/bin/nvcc"] = f"#!{sys.executable}\n{nvcc}", 0o755
        package(folder, requirement, files)
    package(folder, "pybind11", {"pybind11/__init__.py": ("", 0o644)})
    program = ("#!/bin/sh\n", 0o755)
    package(folder, "ninja", {"ninja/__init__.py": ('BIN_DIR = ""', 0o644), "ninja-1.0.data/scripts/ninja": program})
    with Server(folder) as server:
        for name, value in {"PIP_INDEX_URL": server.url, "UV_DEFAULT_INDEX": server.url}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("UV_HTTP_RETRIES", "0")
        yield server


FETCH = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from csrc import build, pypi
build.BUILD_DIR = Path(sys.argv[2])
build.TOOLS = build.BUILD_DIR / "tools"
sys.path.append(str(build.TOOLS))
try:
    getattr(pypi, sys.argv[3])(print)
except build.BuildError as reason:
    sys.exit(f"{type(reason).__name__}: {reason}")
print("then", build.missing_tools(), pypi.nvcc_path())
"""


def fetch(fresh_python, folder, what="fetch_nvcc", **options):
    _, executable, path = fresh_python
    return subprocess.Popen(
        [executable, "-c", FETCH, ROOT, folder, what], env={**os.environ, "PATH": path}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True, **options,
    )  # fmt: skip


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ---- by pip and by uv


def test_nvcc_comes_whole_and_once(index, fresh_python, tmp_path):
    folder, environment = tmp_path / "a build, ünder", fresh_python[1].parents[1]
    before = files(environment)
    for once in (True, False):
        asked = len(index.seen)
        said, _ = (process := fetch(fresh_python, folder)).communicate(timeout=60)
        nvcc = folder / "nvcc-13.0.88" / "nvidia" / "cu13" / "bin" / "nvcc"
        assert process.returncode == 0 and f"then ['ninja', 'pybind11'] {nvcc}" in said, said
        assert os.access(nvcc, os.X_OK) and len(list(nvcc.parents[1].glob("include/*.h"))) == len(pypi.NVCC)
        assert (len(index.seen) > asked) == once and ("Fetching nvidia-cuda-nvcc==13.0.88, " in said) == once
    assert os.listdir(folder) == ["nvcc-13.0.88"]
    assert [name for name in files(environment) if not name.endswith(".pyc")] == [n for n in before if ".pyc" not in n]


def test_tools_come(index, fresh_python, tmp_path):
    (tmp_path / "build" / "tools" / "half of something").mkdir(parents=True)
    said, _ = (process := fetch(fresh_python, tmp_path / "build", "fetch_tools")).communicate(timeout=60)
    assert process.returncode == 0 and "Fetching ninja, pybind11" in said and "then []" in said, said
    assert "half of something" not in os.listdir(tmp_path / "build" / "tools")


@pytest.mark.parametrize(
    "bad, words",
    [
        (
            "none",
            "NothingToBuild: nvidia-cuda-nvcc==13.0.88, .*cannot be had from PyPI: .*check the network and the proxy",
        ),
        ("lies", "BuildError: .*cannot be had from PyPI"),
        ("broken", "NothingToBuild: .*cannot be had from PyPI: .*500"),
        ("locked", "NothingToBuild: .*cannot be had from PyPI: "),
    ],
)
def test_packages_that_do_not_come(index, fresh_python, tmp_path, monkeypatch, bad, words):
    index.bad[".whl"] = bad
    if bad == "lies":
        index.bad.clear()
        for page in index.folder.rglob("index.html"):
            page.write_text(re.sub("sha256=[0-9a-f]{64}", f"sha256={'0' * 64}", page.read_text()))
    if bad == "none":
        for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"):
            monkeypatch.setenv(name, "http://127.0.0.1:9/")
    said, _ = (process := fetch(fresh_python, tmp_path / "build")).communicate(timeout=60)
    assert process.returncode == 1 and re.search(words, said), said
    assert f"{fresh_python[0]} said: " in said and "Traceback" not in said
    assert not (tmp_path / "build").exists() or os.listdir(tmp_path / "build") == []


def test_killed_while_it_fetches(index, fresh_python, tmp_path):
    index.bad[".whl"] = "slow"
    process = fetch(fresh_python, tmp_path / "build")
    assert index.sending.wait(30)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert not (tmp_path / "build" / "nvcc-13.0.88").exists()
    index.bad.clear()
    (tmp_path / "build" / "nvcc-13.0.88.new" / "half of something").mkdir(parents=True, exist_ok=True)
    said, _ = (process := fetch(fresh_python, tmp_path / "build")).communicate(timeout=60)
    assert process.returncode == 0 and os.listdir(tmp_path / "build") == ["nvcc-13.0.88"], said
    assert not (tmp_path / "build" / "nvcc-13.0.88" / "half of something").exists()


def test_neither_pip_nor_uv(monkeypatch):
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pypi.shutil, "which", lambda name: None)
    assert pypi.installer()[0] == "pip"
    assert "has no pip; run" in pypi.failure(["/x/python: No module named pip"])
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: name == "uv" or None)
    assert pypi.installer()[1][:5] == [sys.executable, "-m", "uv", "pip", "install"]


# ---- in install.py


def test_a_build_without_nvcc(go, index, csrc):
    assert go("--check", **NO_NVCC) == 0 and "with PyPI's nvcc of CUDA 13.0 (a download of about" in go.said
    assert not index.seen, "--check asks nobody"
    assert go(**NO_NVCC) == 0 and "Fetching nvidia-cuda-nvcc==13.0.88" in go.said and f"Built {go.binary}" in go.said
    asked = len(index.seen)
    (csrc / "kernel.cu").write_text("// an update\n")
    assert go(**NO_NVCC) == 0 and "PyPI's nvcc of CUDA 13.0 (it is here)" in go.said and "Fetching" not in go.said
    assert "an update" in go.binary.read_text() and len(index.seen) == asked


def test_no_network(go, index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    assert go(**NO_NVCC) == 0 and not go.binary.exists()
    plans = [line for line in go.said.splitlines() if line.startswith("Plan: ")]
    assert "Build the CUDA kernels" in plans[0] and "The triton backend serves attention, without CUDA" in plans[1]
    assert "cannot be had from PyPI: pip said: ERROR: No matching distribution" in plans[1]
    assert go("--archs", "8.9", **NO_NVCC) == 1 and "Nothing was installed: nvidia-cuda-nvcc" in go.error
    assert go("--no-download", **NO_NVCC) == 0 and "as --no-download was given" in go.said and "Fetching" not in go.said


def test_a_full_disk_is_a_failure(go, index, monkeypatch):
    code = "import sys; sys.exit('ERROR: Could not install packages: [Errno 28] No space left on device')"
    monkeypatch.setattr(pypi, "installer", lambda: ("pip", [sys.executable, "-c", code]))
    assert go(**NO_NVCC) == 1 and "No space left" in go.error and not go.binary.exists()


# ---- the real one


@pytest.mark.skipif(
    "SAGE_PYPI_NVCC" not in os.environ, reason="SAGE_PYPI_NVCC=1 downloads 100 MB and builds for a minute"
)
def test_a_build_with_the_nvcc_of_pypi(tmp_path):
    """The whole way in a fresh environment, with nothing of CUDA on the PATH."""
    pack = tmp_path / "a päck"
    shutil.copytree(ROOT / "csrc", pack / "csrc", ignore=shutil.ignore_patterns("build", "__pycache__"))
    shutil.copytree(ROOT / "sage_kernels", pack / "sage_kernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in ("install.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, pack)
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    environment["PATH"] = str(tmp_path / "bin")
    (tmp_path / "bin").mkdir()
    for program in ("g++", "gcc", "as", "ld", "sh"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program))
    python = tmp_path / "env" / "bin" / "python"
    done = subprocess.run(
        [python, "install.py", "--archs", "8.0"], cwd=pack, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0 and "nvcc          none" in done.stdout and "Fetching nvidia-cuda-nvcc" in done.stdout
    ask = "import _C; print(_C.ARCHS, _C.CUDA_RUNTIME)"
    done = subprocess.run([python, "-c", ask], cwd=pack / "sage_kernels", capture_output=True, text=True)
    assert done.stdout.split() == ["('8.0',)", "13000"], done.stderr
