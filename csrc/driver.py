"""What the NVIDIA driver says of itself and of its GPUs. Its own libraries are asked: neither torch nor nvidia-smi is needed."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

WINDOWS = sys.platform == "win32"
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str  # its compute capability: "8.9"


@dataclass(frozen=True)
class Driver:
    version: str = ""  # "580.159.04"; "" where it is not told
    cuda: tuple[int, int] | None = None  # the newest CUDA it knows; None without a driver
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""  # where there are no GPUs: why


def look() -> Driver:
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if WINDOWS else "libcuda.so.1")
    except OSError:
        return Driver(problem="no NVIDIA driver was found")
    count, value = ctypes.c_int(), ctypes.c_int()
    known = None
    if not cuda.cuDriverGetVersion(ctypes.byref(value)) and value.value:
        known = (value.value // 1000, value.value % 1000 // 10)
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if error and error != NO_DEVICE:
        problem = (
            f"the NVIDIA driver does not start ({_error_name(cuda, error)}): restart the computer, or install it again"
        )
        return Driver(_version(), known, problem=problem)
    if error or not count.value:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if hidden is None else f", and CUDA_VISIBLE_DEVICES is {hidden!r}"
        return Driver(_version(), known, problem=f"no NVIDIA GPU was found{why}")
    gpus = []
    for device in range(count.value):
        numbers = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        name = ctypes.create_string_buffer(256)
        cuda.cuDeviceGetName(name, len(name), device)
        gpus.append(Gpu(name.value.decode(errors="replace"), "%d.%d" % tuple(numbers)))
    return Driver(_version(), known, tuple(gpus))


def _error_name(cuda: ctypes.CDLL, error: int) -> str:
    name = ctypes.c_char_p()
    cuda.cuGetErrorName(error, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {error}"


def _version() -> str:
    """From NVML, which comes with every driver."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if WINDOWS else "libnvidia-ml.so.1")
    except OSError:
        return ""
    text = ctypes.create_string_buffer(80)
    if nvml.nvmlInit_v2():
        return ""
    failed = nvml.nvmlSystemGetDriverVersion(text, len(text))
    nvml.nvmlShutdown()
    return "" if failed else text.value.decode(errors="replace")
