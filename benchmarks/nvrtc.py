"""Cubins that NVRTC compiles here beside `_C`, which nvcc compiled: benchmarks/results/nvrtc-<gpu>-<date>-<commit>.json.

    python benchmarks/nvrtc.py [--modes int8] [--shapes 1,24,4608,4608,128] [--out FILE]

A row for each mode and shape: ms of a whole call with either, in turns; graph_ms, the same replayed from a CUDA graph, which is
the kernels alone; identical, whether outputs and LSE have the same bits. Then rows with "cpu": microseconds that a call takes
of the host's time, for the four steps alone and for sage_kernels.attention. compile: seconds and bytes of the cubins.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "gpu")]

import torch  # noqa: E402
from bench import graph_ms, machine, save, time_round  # noqa: E402
from inputs import make  # noqa: E402
from with_cubins import served_by  # noqa: E402

import sage_kernels  # noqa: E402
from csrc import build, nvrtc  # noqa: E402
from sage_kernels import AttentionConfig, cubins, cuda  # noqa: E402

SHAPES = ("1,24,4608,4608,128", "1,40,32760,32760,128", "2,10,4096,4096,64", "1,8,8192,8192,256", "1,1,1,2000,64")
TINY = (1, 2, 100, 100, 64)
ROUNDS, CALLS = 3, 100  # fewer calls than a stream's queue holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="", help="comma list; only modes whose name contains one of them")
    parser.add_argument("--shapes", default=";".join(SHAPES), help="B,H,Nq,Nk,D; separated by ;")
    parser.add_argument("--out", default="", help="result file or folder")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("No NVIDIA GPU here, so there is nothing to time.")
        return 2
    binary = cuda.binary()
    if isinstance(binary, (str, cubins.Cubins)):
        print(f"There is no _C to compare with: {binary}")
        return 2
    ours, about = compile_here()
    result = {**machine("cuda"), "compile": about, "nvcc": "%d.%d" % divmod(binary.CUDA_RUNTIME // 10, 100)}
    print(about)
    wanted = [name for name in args.modes.split(",") if name]
    modes = [mode for mode in cuda.modes(torch.device("cuda", 0)) if not wanted or any(name in mode for name in wanted)]
    with torch.inference_mode():
        rows = []
        for shape in args.shapes.split(";"):
            for mode in modes:
                rows.append(compare(tuple(map(int, shape.split(","))), mode, binary, ours))
                print(rows[-1], flush=True)
            save(result, rows, args.out, "nvrtc-")
        rows += host_time(binary, ours)
    print(*rows[-2:], sep="\n")
    print(f"written: {save(result, rows, args.out, 'nvrtc-')}")
    return int(not all(row.get("identical", True) for row in rows))


def compile_here() -> tuple[cubins.Cubins, dict]:
    """From nothing, as install.py does."""
    archs = build.choose_archs(None)
    found = nvrtc.find(archs, None)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        archive = nvrtc.compile_all(found, archs, build_dir=Path(folder), say=lambda line: None)
        seconds = round(time.perf_counter() - begin, 1)
        kept = build.put(archive, Path(tempfile.mkdtemp()) / archive.name)
    jobs = build.bounded_jobs(None, build.cores(), build.free_memory())
    about = {"nvrtc": found.path, "cuda": "%d.%d" % found.version, "archs": archs, "jobs": jobs, "seconds": seconds}
    return cubins.Cubins(kept), {**about, "bytes": kept.stat().st_size}


def compare(shape: tuple[int, ...], mode: str, binary, ours) -> dict:
    b, heads, nq, nk, d = shape
    inputs = make("gauss", b, heads, nq, nk, d)
    config = AttentionConfig(backend="cuda", pv_accum=mode)

    def call(n: int = 0):
        return sage_kernels.attention(*inputs, return_lse=True, config=config)

    modules, results, times, graphs = {"_C": binary, "cubins": ours}, {}, {"_C": [], "cubins": []}, {}
    for name, module in modules.items():
        with served_by(module):
            results[name] = call()
            graphs[name] = graph_ms(name, call)
    for _ in range(ROUNDS):
        for name, module in modules.items():
            with served_by(module):
                times[name].append(time_round(call, "cuda"))
    same = all(torch.equal(x, y) for x, y in zip(results["_C"], results["cubins"], strict=True))
    row = {"shape": list(shape), "mode": mode, "identical": same}
    for name in modules:
        row[f"{name} ms"] = round(statistics.median(times[name]), 4)
        row[f"{name} graph_ms"] = graphs[name] and round(graphs[name], 4)
    return row


def host_time(binary, ours) -> list[dict]:
    """Microseconds of Python and C++ for a call so small that the GPU is never waited for."""
    inputs = make("gauss", *TINY)
    config = sage_kernels.explain(*inputs, config=AttentionConfig(backend="cuda", pv_accum="int8/int32")).config
    (b, heads, nq, d), nk = inputs[0].shape, inputs[1].shape[2]
    views = [cuda._view(x, 0, 1, 2) for x in (*inputs, torch.empty_like(inputs[0]))]
    rows = []
    for name, module in (("_C", binary), ("cubins", ours)):
        with served_by(module):
            stream = torch.cuda.current_stream().cuda_stream
            prepared = cuda._prepare(
                b, heads, heads, nq, nk, d, inputs[0].dtype, False, 0.1, False, config, inputs[0].device, stream
            )

            def steps(prepared=prepared):
                cuda._run(prepared, list(inputs), *views[:3], None, views[3], 0)

            def whole():
                sage_kernels.attention(*inputs, config=config)

            rows.append({"cpu": name, "steps us": host_us(steps), "attention us": host_us(whole)})
    return rows


def host_us(call) -> float:
    taken = []
    for _ in range(30):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        taken.append((time.perf_counter() - begin) / CALLS * 1e6)
    return round(statistics.median(taken), 1)


if __name__ == "__main__":
    sys.exit(main())
