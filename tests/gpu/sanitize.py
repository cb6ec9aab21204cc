"""A few small calls of every mode, for compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --error-exitcode 9 python tests/gpu/sanitize.py cuda

The backends to run are arguments, both if none is named; --modes leaves out all modes but some. Without the caching allocator each tensor is an allocation of its
own, so that a read past its end is seen.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from checks import exact, qkv, relative_l2, tolerance  # noqa: E402

import sage_kernels  # noqa: E402
from sage_kernels import PV_MODES, AttentionConfig  # noqa: E402
from sage_kernels.dispatch import Request, choose  # noqa: E402

MODES = {"triton": ("fp16/fp32", "int8/int32"), "cuda": PV_MODES}
# nq, nk, head_dim, dtype, granularity, causal, masked, a NaN in it. Of few queries and many keys CUDA shares out the keys.
CALLS = (
    (131, 193, 64, torch.float16, "per_thread", False, False, False),
    (131, 193, 40, torch.bfloat16, "per_thread", True, True, False),
    (131, 193, 96, torch.bfloat16, "per_warp", True, False, False),
    (131, 193, 128, torch.bfloat16, "per_thread", False, True, False),
    (131, 193, 256, torch.float32, "per_block", True, False, False),
    (131, 193, 64, torch.float16, "per_thread", False, True, True),
    (5, 1100, 128, torch.bfloat16, "per_thread", False, False, False),
    (5, 1100, 96, torch.float16, "per_warp", True, True, False),
    (5, 1100, 256, torch.bfloat16, "per_thread", False, True, False),
)


def run(backend, mode, device) -> float:
    """The largest error as a multiple of what the mode may have."""
    worst = 0.0
    for nq, nk, d, dtype, gran, causal, masked, bad in CALLS:
        q, k, v = qkv(1, 4, nq, nk, d, 2, dtype, device)
        if bad:
            k[0, 0, 5, 5] = float("nan")
        mask = torch.ones(nq, nk, dtype=torch.bool, device=device).tril(40) if masked else None
        config = AttentionConfig(backend=backend, pv_accum=mode, qk_quant_gran=gran)
        options = dict(is_causal=causal, attn_mask=mask)
        out, _ = sage_kernels.attention(q, k, v, return_lse=True, config=config, **options)
        error = relative_l2(out, exact(q, k, v, **options)[0])
        worst = max(worst, error / tolerance(mode) if out.isfinite().all() or bad else float("inf"))
        what = f"{nq}x{nk} d={d} {dtype} {gran} causal={causal} masked={masked} bad={bad}"
        print(f"{backend} {mode} {what}: relative L2 {error:.4f}", flush=True)
    for lengths in ([70, 1, 60], [3, 0, 900]):
        ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        total, longest = sum(lengths), max(lengths)
        packed = [x[0].transpose(0, 1).contiguous() for x in qkv(1, 2, total, None, 64, None, torch.float16, device)]
        code = AttentionConfig(backend=backend, pv_accum=mode).encode()
        torch.ops.sage_kernels.attention_varlen(*packed, ends, ends, longest, longest, True, 0.125, code)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", metavar="backend", help="triton, cuda")
    parser.add_argument("--modes", default="", help="comma list, such as int8/int32; all if not given")
    parser.add_argument("--cpu", action="store_true", help="the calls of triton in its interpreter")
    args = parser.parse_args()
    if unknown := [name for name in args.backends if name not in MODES]:
        parser.error(f"{unknown[0]!r} is neither triton nor cuda")
    wanted = args.modes.split(",") if args.modes else PV_MODES
    if unknown := [mode for mode in wanted if mode not in PV_MODES]:
        parser.error(f"--modes has {unknown[0]!r}; the modes are {', '.join(PV_MODES)}")
    if not torch.cuda.is_available() and not args.cpu:
        print("needs an NVIDIA GPU; --cpu runs Triton's calls in its interpreter")
        return 2
    device = torch.device("cpu") if args.cpu else torch.device("cuda", 0)
    worst, ran = 0.0, 0
    for backend in ["triton"] if args.cpu else args.backends or MODES:
        for mode in (mode for mode in MODES[backend] if mode in wanted):
            choice = choose(Request(AttentionConfig(backend=backend, pv_accum=mode), device))
            if choice.refusal is not None:
                print(f"left out: {backend} {mode}: {choice.rejected[backend]}")
                worst = float("inf") if args.backends else worst  # it was asked for
                continue
            worst, ran = max(worst, run(backend, mode, device)), ran + 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0 if ran and worst <= 1.2 else 1


if __name__ == "__main__":
    sys.exit(main())
