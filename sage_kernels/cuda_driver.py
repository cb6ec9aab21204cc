"""The CUDA driver's own API, as far as cubins.py needs it: devices, code that is loaded, launches. By ctypes, without torch.

csrc/driver.py asks the same library, for install.py: whether it works at all, and in words.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from functools import lru_cache
from typing import Any

MULTIPROCESSOR_COUNT, COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 16, 75, 76  # CU_DEVICE_ATTRIBUTE_...
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_...: loading code is none of a capture's business

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (c_void_p,),
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxGetCurrent": (c_void_p,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (c_void_p,),
    "cuModuleLoadData": (c_void_p, c_char_p),
    "cuModuleGetFunction": (c_void_p, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuThreadExchangeStreamCaptureMode": (c_void_p,),
    "cuMemsetD8Async": (c_void_p, c_ubyte, c_size_t, c_void_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p),
    "cuGetErrorName": (c_int, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The driver, started; None where there is none."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    for name, arguments in SIGNATURES.items():
        getattr(cuda, name).argtypes = arguments
    return None if cuda.cuInit(0) else cuda


def version() -> int:
    """The newest CUDA that the driver knows, as CUDA has it: 13000 of 13.0; 0 without a driver."""
    cuda, value = library(), c_int()
    return value.value if cuda is not None and not cuda.cuDriverGetVersion(byref(value)) else 0


def device_count() -> int:
    cuda, value = library(), c_int()
    return value.value if cuda is not None and not cuda.cuDeviceGetCount(byref(value)) else 0


def capability(device: int) -> tuple[int, int]:
    """Of a device that device_count() counts."""
    cuda, handle, major, minor = library(), c_int(), c_int(), c_int()
    assert cuda is not None
    for error in (
        cuda.cuDeviceGet(byref(handle), device),
        cuda.cuDeviceGetAttribute(byref(major), COMPUTE_CAPABILITY_MAJOR, handle),
        cuda.cuDeviceGetAttribute(byref(minor), COMPUTE_CAPABILITY_MINOR, handle),
    ):
        if error:
            raise RuntimeError(f"device {device} cannot be asked what it is: {said(error)}")
    return major.value, minor.value


def said(error: int) -> str:
    """An error's name and the driver's words for it."""
    cuda, name, text = library(), c_char_p(), c_char_p()
    assert cuda is not None
    cuda.cuGetErrorName(error, byref(name))
    cuda.cuGetErrorString(error, byref(text))
    return f"{(name.value or b'error %d' % error).decode()}, {(text.value or b'unknown').decode()}"


class Function:
    """A kernel that is loaded: its handle, and what a launch of it takes."""

    __slots__ = ("handle", "threads", "shared_bytes")

    def __init__(self, handle: int, threads: int, shared_bytes: int) -> None:
        self.handle, self.threads, self.shared_bytes = handle, threads, shared_bytes


class Device:
    """A device's primary context, the one that torch works in, and the code that has been loaded into it."""

    def __init__(self, index: int) -> None:
        cuda, handle, context, count = library(), c_int(), c_void_p(), c_int()
        assert cuda is not None
        error = (
            cuda.cuDeviceGet(byref(handle), index)
            or cuda.cuDeviceGetAttribute(byref(count), MULTIPROCESSOR_COUNT, handle)
            or cuda.cuDevicePrimaryCtxRetain(byref(context), handle)
        )
        if error or not context.value:
            raise RuntimeError(f"device {index} cannot be used: {said(error)}")
        self.index, self.context, self.multiprocessors = index, context.value, count.value
        self._cuda, self._launch, self._current = cuda, cuda.cuLaunchKernel, cuda.cuCtxGetCurrent
        self._modules: dict[str, int] = {}
        self._lock = threading.Lock()

    def run(self, call: Callable[..., int], *args: Any) -> int:
        """The error of one call of the driver, made with this device's context current; the caller's is current again afterwards."""
        current = c_void_p()
        error = self._current(byref(current))
        if error or current.value == self.context:
            return error or call(*args)
        error = self._cuda.cuCtxPushCurrent_v2(self.context)
        if error:
            return error
        try:
            return call(*args)
        finally:
            self._cuda.cuCtxPopCurrent_v2(byref(current))

    def launch(self, function: Function, blocks: int, stream: int, arguments: Any) -> int:
        """arguments: an array of the arguments' addresses. The driver copies them before it returns."""
        return self.run(
            self._launch, function.handle, blocks, 1, 1, function.threads, 1, 1, function.shared_bytes, stream, arguments, None
        )  # fmt: skip

    def clear(self, address: int, size: int, stream: int) -> int:
        return self.run(self._cuda.cuMemsetD8Async, address, 0, size, stream)

    def load(self, module: str, code: Callable[[], bytes], symbol: str, threads: int, shared_bytes: int) -> Function:
        """The kernel `symbol` of `module`, whose code is asked for when it is first needed."""
        with self._lock:
            mode = c_int(RELAXED)
            self._cuda.cuThreadExchangeStreamCaptureMode(byref(mode))
            try:
                handle = c_void_p()
                if module not in self._modules:
                    self._check(self.run(self._cuda.cuModuleLoadData, byref(handle), code()), f"loading {module}")
                    assert handle.value is not None
                    self._modules[module] = handle.value
                owner = self._modules[module]
                self._check(
                    self.run(self._cuda.cuModuleGetFunction, byref(handle), owner, symbol.encode()),
                    f"{symbol} of {module}",
                )
                # more than 48 KB has to be asked for
                limit = (handle, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
                self._check(self.run(self._cuda.cuFuncSetAttribute, *limit), f"{shared_bytes} bytes for {symbol}")
            finally:
                self._cuda.cuThreadExchangeStreamCaptureMode(byref(mode))
            assert handle.value is not None
            return Function(handle.value, threads, shared_bytes)

    def _check(self, error: int, doing: str) -> None:
        if error:
            raise RuntimeError(f"{doing} failed on device {self.index}: {said(error)}")
