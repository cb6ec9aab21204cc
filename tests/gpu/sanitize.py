"""A few small calls of every mode, for compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --error-exitcode 9 python tests/gpu/sanitize.py

Without the caching allocator each tensor is an allocation of its own, so that a read past its end is seen.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from checks import exact, qkv, relative_l2, tolerance  # noqa: E402

import sage_kernels  # noqa: E402
from sage_kernels import AttentionConfig  # noqa: E402


def main() -> int:
    if not torch.cuda.is_available() and sys.argv[1:] != ["cpu"]:
        print("needs an NVIDIA GPU; the argument cpu runs the same calls in Triton's interpreter")
        return 2
    device = "cpu" if sys.argv[1:] == ["cpu"] else "cuda"
    worst = 0.0
    for mode in ("fp16/fp32", "int8/int32"):
        for d, dtype, causal, masked, bad in (
            (64, torch.float16, False, False, False),
            (40, torch.bfloat16, True, True, False),
            (128, torch.bfloat16, False, True, False),
            (256, torch.float32, True, False, False),
            (64, torch.float16, False, True, True),
        ):
            q, k, v = qkv(1, 4, 131, 193, d, 2, dtype, device)
            if bad:
                k[0, 0, 5, 5] = float("nan")
            mask = torch.ones(131, 193, dtype=torch.bool, device=device).tril(40) if masked else None
            config = AttentionConfig(backend="triton", pv_accum=mode, qk_quant_gran="per_thread")
            options = dict(is_causal=causal, attn_mask=mask)
            out, _ = sage_kernels.attention(q, k, v, return_lse=True, config=config, **options)
            error = relative_l2(out, exact(q, k, v, **options)[0])
            worst = max(worst, error / tolerance(mode))
            print(
                f"{mode} d={d} {dtype} causal={causal} masked={masked} bad={bad}: relative L2 {error:.4f}", flush=True
            )
        ends = torch.tensor([0, 70, 71, 131], dtype=torch.int32, device=device)
        packed = [x[0].transpose(0, 1).contiguous() for x in qkv(1, 2, 131, 131, 64, None, torch.float16, device)]
        code = AttentionConfig(backend="triton", pv_accum=mode).encode()
        torch.ops.sage_kernels.attention_varlen(*packed, ends, ends, 70, 70, True, 0.125, code)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0 if worst <= 1.2 else 1


if __name__ == "__main__":
    sys.exit(main())
