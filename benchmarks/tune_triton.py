"""Time the Triton attention kernel with other tile sizes: python benchmarks/tune_triton.py [--dims 128] [--modes fp16/fp32].

Every candidate's error on a small shape stands beside its time. The rows go into benchmarks/results/tune; the choice goes into
launch.TILES by hand.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from bench import machine, save  # noqa: E402
from triton.testing import do_bench  # noqa: E402

import sage_kernels  # noqa: E402
from sage_kernels.triton import launch  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "tune"


def tflops(shape: tuple[int, ...], ms: float) -> float:
    b, h, n, d = shape
    return 4 * b * h * n * n * d / ms * 1e-9


def error(config: sage_kernels.AttentionConfig, dim: int) -> float:
    q, k, v = (torch.randn(1, 2, 1000, dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    wanted = sage_kernels.reference.exact_attention(q, k, v)[0]
    return float((sage_kernels.attention(q, k, v, config=config).double() - wanted).norm() / wanted.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", default="64,128,256")
    parser.add_argument("--modes", default="fp16/fp32,int8/int32")
    parser.add_argument("--grans", default="per_warp")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--shape", default="4,32,16384", help="batch,heads,tokens")
    parser.add_argument("--out", default="", help="result file; or folder; benchmarks/results/tune if not given")
    args = parser.parse_args()
    result, rows = machine("cuda"), []
    b, h, n = map(int, args.shape.split(","))
    print(
        f"{'dim':>4} {'mode':10} {'gran':10} {'m':>4} {'n':>4} {'warps':>5} {'stages':>6} {'ms':>8} {'TFLOPS':>7} {'error':>8}"
    )
    for dim, mode, gran in itertools.product(
        map(int, args.dims.split(",")), args.modes.split(","), args.grans.split(",")
    ):
        config = sage_kernels.AttentionConfig(pv_accum=mode, qk_quant_gran=gran, backend="triton")
        key = (dim, mode == "int8/int32")
        q, k, v = (torch.randn(b, h, n, dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        block_n = (128,) if key[1] else (32, 64) if dim == 256 else (64, 128)
        for tiles in itertools.starmap(launch.Tiles, itertools.product((64, 128), block_n, (4, 8), (1, 2, 3, 4))):
            launch.TILES[key] = tiles
            fits = launch.tiles_for(dim, key[1], 0, launch._shared_memory(q.device)) == tiles
            if not fits or (tiles.block_m == 64 and tiles.warps == 8):
                continue
            row = {
                "shape": [b, h, n, n, dim],
                "causal": args.causal,
                "mode": mode,
                "qk_quant_gran": gran,
                **asdict(tiles),
            }
            try:
                off = error(config, dim)
                ms = do_bench(
                    lambda: sage_kernels.attention(q, k, v, is_causal=args.causal, config=config),
                    warmup=20,
                    rep=60,
                    return_mode="median",
                )
            except Exception as reason:  # a tile that does not fit this GPU is a result, not a failure
                rows.append(row | {"error": f"{type(reason).__name__}: {reason}"[:200]})
                print(f"{dim:4} {mode:10} {gran:10} {tiles} {type(reason).__name__}: {str(reason)[:60]}", flush=True)
                continue
            rows.append(row | {"ms": round(ms, 4), "rel_l2": round(off, 5)})
            print(
                f"{dim:4} {mode:10} {gran:10} {tiles.block_m:4} {tiles.block_n:4} {tiles.warps:5} {tiles.stages:6} "
                f"{ms:8.3f} {tflops((b, h, n, dim), ms) / (1 + args.causal):7.1f} {off:8.5f}",
                flush=True,
            )
    print(f"written: {save(result, rows, args.out or str(RESULTS))}")


if __name__ == "__main__":
    main()
