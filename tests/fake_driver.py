"""A CUDA driver that notes what it is asked, for cuda_driver.library() where there is no GPU."""

import ctypes

CONTEXTS = 0x1000  # device i's primary context is CONTEXTS + i
ILLEGAL_ADDRESS = 700


class FakeDriver:
    def __init__(self, capabilities=((9, 0),), version=13000):
        self.capabilities, self.version = capabilities, version
        self.current = CONTEXTS  # the caller's context
        self.log = []  # (what, context that was current, ...)
        self.fail = {}  # what -> the error it gives

    def __getattr__(self, name):
        """What is not below is noted and succeeds."""
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *args: self._note(name, *args)

    def _note(self, name, *args):
        self.log.append((name, self.current, *args))
        return self.fail.get(name, 0)

    def launches(self):
        return [entry for entry in self.log if entry[0] == "cuLaunchKernel"]

    def cuDriverGetVersion(self, out):
        out._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, out):
        out._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, out, index):
        out._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, out, attribute, device):
        multiprocessors, major, minor = 16, 75, 76
        known = {multiprocessors: 132, **dict(zip((major, minor), self.capabilities[device.value], strict=True))}
        out._obj.value = known[attribute]
        return 0

    def cuDevicePrimaryCtxRetain(self, out, device):
        out._obj.value = CONTEXTS + device.value
        return 0

    def cuCtxGetCurrent(self, out):
        out._obj.value = self.current
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.pushed, self.current = self.current, context
        return 0

    def cuCtxPopCurrent_v2(self, out):
        self.current = self.pushed
        return 0

    def cuModuleLoadData(self, out, code):
        out._obj.value = 0x2000 + len(self.log)
        return self._note("cuModuleLoadData", code)

    def cuModuleGetFunction(self, out, module, symbol):
        out._obj.value = 0x3000 + len(self.log)
        return self._note("cuModuleGetFunction", module, symbol, out._obj.value)

    def cuGetErrorName(self, error, out):
        out._obj.value = b"CUDA_ERROR_ILLEGAL_ADDRESS" if error == ILLEGAL_ADDRESS else b"CUDA_ERROR_OTHER"
        return 0

    def cuGetErrorString(self, error, out):
        out._obj.value = b"an illegal memory access was encountered"
        return 0

    def cuLaunchKernel(self, function, x, y, z, threads, ty, tz, shared_bytes, stream, arguments, extra):
        assert (y, z, ty, tz, extra) == (1, 1, 1, 1, None)
        return self._note("cuLaunchKernel", function, x, threads, shared_bytes, stream, list(arguments))


def argument(address, struct):
    """The argument at an address that a launch was given, while it is alive."""
    return struct.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(struct)))
