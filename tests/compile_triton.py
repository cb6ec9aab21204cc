"""Compile the Triton kernels for a GPU that is not here: python compile_triton.py ARCH SHARED_MEMORY -> JSON rows.

The launcher runs as it is; only the driver that says which GPU there is, and the launch itself, are replaced.
"""

import json
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
arch, shared_memory = int(sys.argv[1]), int(sys.argv[2])


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


rows = []


def compile_only(kernel, grid):
    def launch(*args, **options):
        built = kernel.warmup(*args, grid=grid, **options)
        rows.append({"kernel": kernel.__name__, "shared": built.metadata.shared, "case": case})

    return launch


driver.set_active(Driver())
jit.JITFunction.__getitem__ = compile_only

from sage_kernels.config import AttentionConfig  # noqa: E402
from sage_kernels.triton import launch  # noqa: E402

launch._shared_memory = lambda device: shared_memory
CASES = [(128, "fp16/fp32", False, None), (64, "int8/int32", True, None), (96, "int8/int32", False, None)]
CASES += [(256, mode, True, torch.zeros(300, 300)) for mode in ("fp16/fp32", "int8/int32")]  # the largest tiles
for dim, mode, causal, mask in CASES:
    case = f"{dim} {mode} causal={causal} mask={mask is not None}"
    config = AttentionConfig(
        pv_accum=mode, qk_quant_gran="per_warp", smooth_k=True, smooth_v=mode != "fp16/fp32", rotate=dim != 96
    )
    tensors = [torch.empty(1, 2, 300, dim, dtype=torch.bfloat16) for _ in range(3)]
    launch.attention(tensors, mask, "HND", causal, 0.1, True, config)
print(json.dumps(rows))
