"""What becomes of an error inside a kernel: never silence, and never more harm than the one call."""

import logging

import torch

# CUDA refuses these launches and goes on working; after any other CUDA error the process cannot use the GPU again.
_HARMLESS = (
    "no kernel image", "invalid configuration argument", "invalid argument", "too many resources requested",
    "out of memory", "invalid device function",
)  # fmt: skip
_CUDA = (
    "CUDA error",
    "Triton Error [CUDA]",
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
)


def poisons_context(error: BaseException) -> bool:
    """Whether, after this error, every further call on the GPU fails too."""
    if not isinstance(error, RuntimeError):  # torch.AcceleratorError is one
        return False
    text = str(error)
    return any(sign in text for sign in _CUDA) and not any(sign in text for sign in _HARMLESS)


def serve_or_raise(error: Exception, kernel: str, report, restored: bool) -> None:
    """Return when the call can be served by the previous attention, after showing why; raise otherwise.

    Out of memory goes to ComfyUI, which frees memory and explains. `kernel`, a backend and mode in words, stays off for
    the rest of the sampling run. `restored` is False when q, k and v are gone.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        raise error
    what = f"{kernel} failed: {type(error).__name__}" + "".join(f": {line}" for line in str(error).splitlines()[:1])
    report.errors.append(what)
    if poisons_context(error):
        raise RuntimeError(
            f"Sage Attention: {what}. This CUDA error leaves the GPU unusable for this process, so no other attention "
            "can take over: restart ComfyUI. If it comes back, set Sage Attention Patch to another mode or bypass it, "
            "and report it with the log."
        ) from error
    if not restored:
        raise RuntimeError(
            f"Sage Attention: {what}, after q, k and v had been freed, so the call cannot be repeated: bypass Sage "
            "Attention Patch or set another mode, and report it with the log."
        ) from error
    report.broken[kernel] = f"{kernel} failed earlier in this run"
    report.passed[f"{kernel} failed in this call"] += 1
    logging.warning(
        "Sage Attention: %s. The previous attention serves this call and the rest of the run.", what, exc_info=error
    )


def raised_by_kernels(error: BaseException) -> bool:
    """Whether the error comes out of sage_kernels: inside a compiled graph nothing can catch it closer."""
    trace = error.__traceback__
    while trace is not None:
        if "sage_kernels" in trace.tb_frame.f_globals.get("__name__", "").split("."):
            return True
        trace = trace.tb_next
    return False
