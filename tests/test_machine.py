"""csrc/machine.py: what install.py finds on a machine, and what it decides for machines of every kind."""

import ctypes
import json
import sys
from types import SimpleNamespace

import pytest
from stand_in import ROOT, gpus, made_up

from csrc import build, driver, machine, make_wheel, pypi, wheels
from csrc.machine import Binary, Machine, plan, table
from sage_kernels import dispatch

HASH = "0123456789abcdef"  # made_up's
WHEEL = wheels.Candidate("a.whl", "file:///a.whl", "0" * 64, frozenset(), (13, 0), ("8.9",), HASH)
NO_NVCC = dict(nvcc=None, nvcc_cuda=None, nvcc_problem="nvcc was not found: install the CUDA toolkit")
NO_HOST = dict(host=None, missing=("nvcc needs a C++ compiler and g++ was not found: install g++",))
NO_COMPILER = {**NO_NVCC, **NO_HOST}
WHEEL_8_6 = wheels.Candidate("b.whl", "file:///b.whl", "0" * 64, frozenset(), (13, 0), ("8.6",), HASH)
NO_DRIVER = dict(driver="", driver_cuda=None, driver_problem="no NVIDIA driver was found", gpus=())
NO_GPU = dict(driver_problem="no NVIDIA GPU was found", gpus=())
WINDOWS = dict(system="Windows", platform_tags=["win_amd64"])
MAC = dict(system="Darwin", platform_tags=["macosx_14_0_arm64"], torch="2.9.0", torch_for="cpu", torch_cuda=None)
CPU = dict(torch="2.9.0+cpu", torch_for="cpu", torch_cuda=None)
ROCM = dict(torch="2.9.0+rocm6.4", torch_for="rocm", torch_cuda=None)
CU128 = dict(torch="2.9.0+cu128", torch_cuda=(12, 8))
CUDA_12 = dict(nvcc_cuda=(12, 8))
OLD_DRIVER = dict(driver_cuda=(12, 4))


def here(*archs, **changes):
    return dict(binary=Binary(archs, **{"cuda": (13, 0), "source_hash": HASH, **changes}))


# changes of a machine that can build, what the index says, the plan's kind, words of its sentence
PLANS = [
    # a build, for each GPU
    ({}, None, "build", "for compute capability 8.9 with the nvcc of CUDA 13.0, as no index of wheels is set"),
    (dict(gpus=gpus("7.5")), None, "build", "for compute capability 7.5 with"),
    (dict(gpus=gpus("8.6")), None, "build", "for compute capability 8.6 with"),
    (dict(gpus=gpus("9.0")), None, "build", "for compute capability 9.0 with"),
    (dict(gpus=gpus("12.0")), None, "build", "for compute capability 12.0 with"),
    (dict(gpus=gpus("12.1")), None, "build", "for compute capability 12.0 with"),
    (dict(gpus=gpus("8.6", "12.0")), None, "build", "for compute capability 8.6, 12.0 with"),
    (dict(gpus=gpus("8.9", "8.9")), None, "build", "for compute capability 8.9 with"),
    (dict(gpus=gpus("6.1", "9.0")), None, "build", "for compute capability 9.0 with"),
    (dict(gpus=gpus("13.0")), None, "build", "for compute capability 12.0+PTX with"),
    (dict(driver_cuda=(13, 2)), None, "build", "of CUDA 13.0"),
    ({**CU128, **CUDA_12, **OLD_DRIVER}, None, "build", "of CUDA 12.8"),
    ({**CUDA_12, **OLD_DRIVER, **CU128, "gpus": gpus("8.6")}, None, "build", "for compute capability 8.6"),
    (CU128, None, "build", "of CUDA 13.0"),
    (dict(nvcc_cuda=(12, 4), gpus=gpus("8.6")), None, "build", "of CUDA 12.4"),
    (WINDOWS, None, "build", "of CUDA 13.0"),
    (dict(python="3.10.13"), None, "build", "8.9"),
    (dict(python="3.14.0"), None, "build", "8.9"),
    (dict(triton=None), None, "build", "8.9"),
    (dict(comfyui=None, comfyui_version=None), None, "build", "8.9"),
    ({}, "the 2 wheels are for Windows.", "build", "as the 2 wheels are for Windows."),
    # a wheel
    ({}, WHEEL, "download", "Download a.whl, with CUDA kernels for compute capability 8.9."),
    (NO_NVCC, WHEEL, "download", "a.whl"),
    (dict(missing=("no g++ was found",)), WHEEL, "download", "a.whl"),
    ({**WINDOWS, **NO_NVCC}, WHEEL, "download", "a.whl"),
    (dict(nvcc_cuda=(11, 8)), WHEEL, "download", "a.whl"),
    (here("8.9", source_hash="older"), WHEEL, "download", "a.whl"),
    # nothing to do
    (here("8.9"), WHEEL, "ready", "are here, for compute capability 8.9"),
    ({**here("8.6"), "gpus": gpus("8.7")}, None, "ready", "8.6"),
    ({**here("8.6", "12.0"), "gpus": gpus("8.6", "12.0")}, None, "ready", "8.6, 12.0"),
    ({**here("9.0"), "gpus": gpus("6.1", "9.0")}, None, "ready", "9.0"),
    ({**here("12.0+PTX"), "gpus": gpus("13.0")}, None, "ready", "12.0+PTX"),
    ({**here("8.9", cuda=(13, 2)), **NO_NVCC}, None, "ready", "8.9"),
    ({**here("8.9"), **NO_NVCC}, None, "ready", "8.9"),
    # a binary that is of no use
    (here("8.9", source_hash="older"), None, "build", "8.9"),
    (here("8.9", problem="it cannot be loaded"), None, "build", "8.9"),
    (here("9.0"), None, "build", "8.9"),
    ({**here("8.6"), "gpus": gpus("8.6", "12.0")}, None, "build", "8.6, 12.0"),
    ({**here("12.0+PTX", cuda=(13, 2)), "gpus": gpus("13.0")}, None, "build", "12.0+PTX"),
    ({**here("12.0"), "gpus": gpus("13.0")}, None, "build", "12.0+PTX"),
    ({**here("8.9"), **OLD_DRIVER, **CUDA_12, **CU128}, None, "build", "CUDA 12.8"),
    # better kernels than those of the binary
    (here("8.6"), WHEEL, "download", "a.whl"),
    (here("8.6"), None, "build", "as Card 0 has better ones, for 8.9, and no index of wheels is set"),
    (here("8.0"), WHEEL_8_6, "build", "as Card 0 has better ones, for 8.9, and no wheel has those"),
    ({**here("8.6", "12.0"), "gpus": gpus("8.9", "12.0")}, None, "build", "8.9, 12.0"),
    # with PyPI's nvcc
    (NO_NVCC, None, "build", "8.9 with PyPI's nvcc of CUDA 13.0 (a download of about 101 MB), as no index of wheels is set"),
    (NO_NVCC, None, "build", "; nvcc was not found."),
    ({**NO_NVCC, "nvcc_fetched": True}, None, "build", "with PyPI's nvcc of CUDA 13.0 (it is here), as no index"),
    ({**NO_NVCC, **WINDOWS}, None, "build", "(a download of about 87 MB)"),
    ({**NO_NVCC, "platform_tags": ["manylinux_2_39_aarch64"]}, None, "build", "(a download of about 94 MB)"),
    ({**NO_NVCC, **CU128}, None, "build", "8.9 with PyPI's nvcc"),
    ({**NO_NVCC, "driver_cuda": (14, 1)}, None, "build", "8.9 with PyPI's nvcc"),
    ({**NO_NVCC, "gpus": gpus("13.0")}, None, "build", "12.0+PTX with PyPI's nvcc"),
    (dict(nvcc_cuda=(12, 4)), None, "build", "wheels is set (--index, or SAGE_KERNELS_INDEX); /cuda/bin/nvcc is of CUDA 12.4"),
    (dict(nvcc_cuda=(11, 8), gpus=gpus("8.6")), None, "build", "and compute capability 8.6 needs 12.0 or newer."),
    (dict(nvcc_cuda=(14, 0)), None, "build", "8.9 with PyPI's nvcc"),
    (dict(nvcc_cuda=(13, 1), gpus=gpus("13.0")), None, "build", "knows CUDA 13.0 and needs 13.1 to run what it builds."),
    # nothing to build with
    (NO_HOST, None, "fallback", "The triton backend serves attention, without CUDA kernels: no index of wheels"),
    (NO_COMPILER, None, "fallback", "SAGE_KERNELS_INDEX); nvcc needs a C++ compiler and g++ was not found: install g++."),
    (NO_HOST, "none of the 3 wheels fits", "fallback", "none of the 3 wheels fits; nvcc needs a C++"),
    ({**NO_HOST, **here("8.9", source_hash="older")}, None, "fallback", "g++ was not found"),
    (dict(missing=("no g++", "no Python.h")), None, "fallback", "no g++; no Python.h."),
    ({**NO_NVCC, **OLD_DRIVER, **CU128}, None, "fallback", "nvcc was not found: install the CUDA toolkit; PyPI has whole"),
    ({**NO_NVCC, **OLD_DRIVER, **CU128}, None, "fallback", "driver (to 580 or newer), or install the CUDA toolkit 12.8 or"),
    ({**NO_COMPILER, **OLD_DRIVER, **CU128}, None, "fallback", "toolkit 12.8 or 12.9; nvcc needs a C++ compiler"),
    ({**NO_NVCC, "platform_tags": ["linux_x86_64", "musllinux_1_2_x86_64"]}, None, "fallback", "no nvcc for linux_x86_64"),
    ({**OLD_DRIVER, **CU128}, None, "fallback", "the driver knows CUDA 12.4 and needs 13.0 to run what it builds"),
    # no GPU that they are for, or no torch that uses it
    (NO_DRIVER, WHEEL, "fallback", "The reference backend serves attention, on the CPU, without CUDA kernels: no NVIDIA driver"),
    (NO_GPU, WHEEL, "fallback", "no NVIDIA GPU was found"),
    ({**NO_GPU, **here("8.9")}, None, "fallback", "no NVIDIA GPU was found"),
    ({**NO_DRIVER, **CPU, **NO_NVCC}, None, "fallback", "no NVIDIA driver was found"),
    ({**NO_DRIVER, **ROCM}, None, "fallback", "ComfyUI's own attention stays in use"),
    ({**NO_DRIVER, **MAC}, None, "fallback", "ComfyUI's own attention stays in use, without CUDA kernels: no NVIDIA driver"),
    (dict(gpus=gpus("6.1")), WHEEL, "fallback", "need compute capability 7.5 (RTX 20) or newer, and Card 0 has 6.1"),
    (CPU, WHEEL, "fallback", "this torch (2.9.0+cpu) is made for CPUs only: install the torch for CUDA"),
    (ROCM, WHEEL, "fallback", "is made for AMD GPUs"),
    ({**CPU, **here("8.9")}, None, "fallback", "for CPUs only"),
    (OLD_DRIVER, WHEEL, "fallback", "made for CUDA 13.0 and the driver knows CUDA 12.4, so torch cannot use the GPU"),
    # what serves instead
    ({**NO_HOST, "triton": None}, None, "fallback", "not installed: /python -m pip install triton)"),
    ({**NO_HOST, **WINDOWS, "triton": None}, None, "fallback", "pip install triton-windows)"),
    ({**NO_HOST, "triton": "3.2.0"}, None, "fallback", "3.2.0 is older than 3.3, which comes with torch 2.7"),
    ({**NO_HOST, "triton": "3.10.1"}, None, "fallback", "The triton backend serves"),
    ({**NO_HOST, "gpus": gpus("7.5")}, None, "fallback", "ComfyUI's own attention stays in use, as Triton"),
    ({**NO_HOST, "gpus": gpus("7.5", "8.6")}, None, "fallback", "The triton backend serves"),
    # the wrong Python
    (dict(python="3.9.18"), WHEEL, "fail", "needs Python 3.10 or newer and /python is 3.9.18: run install.py with the Python"),
    (dict(torch=None, torch_for="", torch_cuda=None), WHEEL, "fail", "needs torch and /python has none"),
]  # fmt: skip


@pytest.mark.parametrize("changes, wheel, kind, words", PLANS)
def test_plans(changes, wheel, kind, words):
    of = made_up(**changes)
    asked = []
    made = plan(of, lambda: asked.append(1) or wheel) if wheel else plan(of)
    assert made.kind == kind and words in made.sentence
    assert made.sentence.endswith(".") and "\n" not in made.sentence and ".." not in made.sentence
    assert (made.wheel is not None) == (kind == "download") and bool(made.archs) == (kind == "build")
    if kind in ("ready", "fail"):
        assert not asked, "the network is asked in vain"
    json.dumps([of.as_json(), made.as_json()])


@pytest.mark.parametrize(
    "changes, archs, kind, words",
    [
        ({}, ["12.0", "8.6"], "build", "for compute capability 8.6, 12.0 with the nvcc of CUDA 13.0, as you asked."),
        (here("8.9"), ["8.9"], "build", "8.9"),
        (here("8.9"), None, "build", "8.9"),
        (NO_DRIVER, ["9.0"], "build", "9.0"),
        (NO_DRIVER, None, "fail", "cannot be built: no NVIDIA GPU was found to build for: name architectures"),
        ({**CPU, **NO_GPU}, ["9.0+PTX"], "build", "9.0+PTX"),
        (dict(torch=None, torch_for="", torch_cuda=None), ["8.9"], "build", "8.9"),
        (OLD_DRIVER, ["8.9"], "build", "8.9"),
        (OLD_DRIVER, None, "fail", "update the driver"),
        (
            NO_NVCC,
            ["9.0"],
            "build",
            "9.0 with PyPI's nvcc of CUDA 13.0 (a download of about 101 MB), as you asked; nvcc was",
        ),
        ({**NO_NVCC, **NO_DRIVER}, ["8.9"], "build", "8.9 with PyPI's nvcc"),
        (
            {**NO_NVCC, **OLD_DRIVER},
            ["8.9"],
            "fail",
            "cannot be built: nvcc was not found: install the CUDA toolkit; PyPI has",
        ),
        (
            {**NO_NVCC, "nvcc_given": True},
            ["8.9"],
            "fail",
            "cannot be built: nvcc was not found: install the CUDA toolkit.",
        ),
        (dict(nvcc_cuda=(12, 4), nvcc_given=True), None, "fail", "and compute capability 8.9 needs 12.8"),
        (NO_HOST, ["8.9"], "fail", "cannot be built: nvcc needs a C++ compiler"),
        ({}, ["sm_90"], "fail", "'sm_90' is no architecture of these kernels; there are 7.5, 8.0"),
        (dict(nvcc_cuda=(12, 4)), ["12.0"], "build", "PyPI's nvcc"),
        (dict(gpus=gpus("6.1")), None, "fail", "7.5 or newer and the GPUs here have 6.1"),
        (dict(python="3.9.1"), ["8.9"], "fail", "needs Python 3.10"),
    ],
)
def test_plans_where_a_build_is_asked_for(changes, archs, kind, words):
    made = plan(made_up(**changes), lambda: pytest.fail("a wheel will not do"), archs, must_build=True)
    assert made.kind == kind and words in made.sentence


def test_plans_that_download_nothing():
    assert plan(made_up(), download=False).kind == "build"
    made = plan(made_up(**NO_NVCC), download=False)
    assert (
        made.kind == "fallback" and "nvcc was not found" in made.sentence and "--no-download was given" in made.sentence
    )
    assert plan(made_up(**NO_NVCC, nvcc_fetched=True), download=False).kind == "build"
    made = plan(made_up(missing_tools=("ninja", "pybind11")), download=False)
    assert made.kind == "fallback" and "/python -m pip install ninja pybind11." in made.sentence
    assert plan(made_up(missing_tools=("ninja", "pybind11"))).kind == "build"


def test_which_nvcc_and_how_much_of_it():
    own, fetched = plan(made_up()), plan(made_up(**NO_NVCC))
    assert (own.nvcc, own.fetch_mb) == ("/cuda/bin/nvcc", 0)
    assert (fetched.nvcc, fetched.fetch_mb) == (str(pypi.nvcc_path()), 101)
    assert plan(made_up(**NO_NVCC, nvcc_fetched=True)).fetch_mb == 0
    assert fetched.as_json()["fetch_mb"] == 101


def test_a_lesser_binary_is_better_than_none():
    made = plan(made_up(**here("8.6"), **NO_HOST))
    assert made.kind == "ready" and "are here, for compute capability 8.6, though Card 0 has better" in made.sentence
    assert "g++ was not found" in made.sentence


def test_what_dispatch_says_too():
    assert machine.OLDEST_TRITON == dispatch.OLDEST_TRITON
    assert machine.OLDEST_GPU == next(iter(dispatch.CUDA_AUTO))


# ---- the table


def test_table():
    said = table(made_up(gpus=gpus("8.6", "12.0"), triton=None)).splitlines()
    assert said == [
        "Python        3.12.7 (/python)",
        "OS            Linux-6.1 (linux_x86_64)",
        "torch         2.9.0+cu130 for CUDA 13.0",
        "driver        580.1, knows CUDA 13.0",
        "GPU           Card 0, compute capability 8.6",
        "GPU           Card 1, compute capability 12.0",
        "nvcc          CUDA 13.0 (/cuda/bin/nvcc)",
        "C++ compiler  /g++",
        "Triton        none",
        "ComfyUI       0.3.75 (/ComfyUI)",
        "CUDA binary   none",
    ]


def test_table_of_a_bare_machine():
    said = table(
        made_up(
            **NO_DRIVER, **NO_NVCC, host=None, torch=None, torch_for="", comfyui=None, **here("8.9", problem="broken")
        )
    )
    for row in (
        "torch         none",
        "driver        none",
        "GPU           no NVIDIA driver was found",
        "nvcc          none",
    ):
        assert row in said.splitlines()
    assert "ComfyUI       not above this folder" in said and "CUDA binary   broken" in said


# ---- how it is found


def test_this_machine():
    found = Machine.look()
    version = sys.version_info
    assert found.python_tag.startswith(f"cp{version[0]}{version[1]}") and found.platform_tags and found.torch
    assert found.source_hash == build.source_hash() and found.system_version
    assert found.torch_for in ("cuda", "rocm", "xpu", "cpu") and (found.torch_for == "cuda") == bool(found.torch_cuda)
    assert table(found) and json.dumps(found.as_json())


@pytest.mark.parametrize(
    "version, text, found",
    [
        ("2.9.0", "cuda: Optional[str] = '12.8'\nhip: Optional[str] = None", ("cuda", (12, 8))),
        ("2.9.0", "__version__ = '2.9.0+cu130'\ncuda = '13.0'", ("cuda", (13, 0))),
        ("2.9.0+cu130", None, ("cuda", (13, 0))),
        ("2.9.0+cu128", "", ("cuda", (12, 8))),
        ("2.9.0+cpu", "cuda: Optional[str] = None\nhip: Optional[str] = None", ("cpu", None)),
        ("2.9.0+rocm6.4", "cuda: Optional[str] = None\nhip: Optional[str] = '6.4.43482'", ("rocm", None)),
        ("2.9.0+rocm6.4", None, ("rocm", None)),
        ("2.9.0+xpu", "xpu: Optional[str] = '20250100'", ("xpu", None)),
        ("2.9.0", None, ("cpu", None)),
    ],
)
def test_torch(monkeypatch, tmp_path, version, text, found):
    if text is not None:
        (tmp_path / "version.py").write_text(text)
    monkeypatch.setattr(machine, "_version", lambda *names: version)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: spec)
    assert machine._torch() == (version, *found)


def test_no_torch(monkeypatch):
    monkeypatch.setattr(machine, "_version", lambda *names: None)
    assert machine._torch() == (None, "", None)


def test_triton_has_two_names(monkeypatch):
    def version(name):
        if name != "triton-windows":
            raise machine.importlib.metadata.PackageNotFoundError(name)
        return "3.5.1"

    monkeypatch.setattr(machine.importlib.metadata, "version", version)
    found = Machine.look()
    assert found.triton == "3.5.1" and found.torch is None


def test_comfyui_is_above(monkeypatch, tmp_path):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "ComfyUI" / "custom_nodes" / "pack" / "sage_kernels")
    assert machine._comfyui() is None
    (tmp_path / "ComfyUI" / "comfy").mkdir(parents=True)
    assert machine._comfyui() is None
    (tmp_path / "ComfyUI" / "main.py").touch()
    (tmp_path / "ComfyUI" / "comfyui_version.py").write_text('# generated\n__version__ = "0.3.75"\n')
    assert machine._comfyui() == tmp_path / "ComfyUI"
    assert Machine.look().comfyui_version == "0.3.75"
    monkeypatch.setattr(build, "PACKAGE", ROOT / "sage_kernels")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    if machine._comfyui() is not None:  # a checkout may be in a ComfyUI of its own
        assert (machine._comfyui() / "main.py").is_file()


def test_binaries(tmp_path):
    path = tmp_path / build.binary_name()
    assert machine.read_binary(path) is None
    path.write_text("no ELF")
    assert "cannot be loaded by this Python" in machine.read_binary(path).problem
    own = build.PACKAGE / build.binary_name()
    if own.exists():
        found = machine.read_binary(own)
        assert not found.problem and len(found.source_hash) == 16 and set(found.archs) and found.cuda >= (12, 0)


def test_platform_tags_without_packaging(monkeypatch):
    def none(part):
        raise wheels.WheelError("no pip")

    monkeypatch.setattr(make_wheel, "packaging", none)
    assert len(machine._platform_tags()) == 1


# ---- the driver


class Library:
    """libcuda or NVML: functions that give a number, and what they put behind their pointers."""

    def __init__(self, init=0, gpus=(), version=13000):
        self.cuInit = lambda flags: init
        self.gpus, self.version = gpus, version

    def cuDriverGetVersion(self, to):
        to._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, to):
        to._obj.value = len(self.gpus)
        return 0

    def cuDeviceGetAttribute(self, to, attribute, device):
        to._obj.value = self.gpus[device][1][attribute - 75]
        return 0

    def cuDeviceGetName(self, to, size, device):
        to.value = self.gpus[device][0]
        return 0

    def cuGetErrorName(self, error, to):
        to._obj.value = b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"
        return 0

    def nvmlInit_v2(self):
        return 0

    def nvmlSystemGetDriverVersion(self, to, size):
        to.value = b"580.159.04"
        return 0

    def nvmlShutdown(self):
        return 0


def ask(monkeypatch, library, nvml=True):
    def load(name):
        if library is None or ("ml" in name and not nvml):
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(driver, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": load}))
    return driver.look()


def test_driver_and_gpus(monkeypatch):
    two = Library(gpus=[(b"NVIDIA GeForce RTX 4090", (8, 9)), (b"NVIDIA GeForce RTX 5090", (12, 0))])
    found = ask(monkeypatch, two)
    assert found.version == "580.159.04" and found.cuda == (13, 0) and not found.problem
    assert [(gpu.name, gpu.arch) for gpu in found.gpus] == [
        ("NVIDIA GeForce RTX 4090", "8.9"),
        ("NVIDIA GeForce RTX 5090", "12.0"),
    ]
    assert build.gpu_archs() == ["8.9", "12.0"]
    assert ask(monkeypatch, two, nvml=False).version == ""


def test_no_driver_and_no_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = ask(monkeypatch, None)
    assert found.cuda is None and found.gpus == () and found.problem == "no NVIDIA driver was found"
    for library in (Library(init=driver.NO_DEVICE, version=12080), Library(version=12080)):
        found = ask(monkeypatch, library)
        assert found.cuda == (12, 8) and found.gpus == () and found.problem == "no NVIDIA GPU was found"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in ask(monkeypatch, Library()).problem


def test_a_driver_that_does_not_start(monkeypatch):
    found = ask(monkeypatch, Library(init=803))
    assert (
        "does not start (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH): restart the computer" in found.problem and not found.gpus
    )
