"""Settings that hold for every test process."""

import os

import pytest
import torch
from stand_in import bare, csrc, fresh_python, go, nvcc, plain_environment  # noqa: F401 (fixtures)

HAS_GPU = torch.cuda.is_available()

# Triton reads this when it is first imported, so it is set before any test module is. With it Triton's kernels run on
# the CPU, in its interpreter; "auto" still serves CPU tensors by the reference, so only tests that ask for Triton do.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    here = os.path.dirname(os.path.abspath(__file__))
    needs_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.path.is_relative_to(os.path.join(here, "gpu")):
            item.add_marker(pytest.mark.gpu)
            if not HAS_GPU:
                item.add_marker(needs_gpu)
        if item.path.is_relative_to(os.path.join(here, "browser")):
            item.add_marker(pytest.mark.browser)
