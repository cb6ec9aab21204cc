"""The rate of mma.sync on this GPU, alone and with multiply-adds between: benchmarks/results/mma-<gpu>-<commit>.json.

    python benchmarks/mma_rates.py [--out FILE]

Built with nvcc for the GPU at hand. docs/cuda.md uses it to say how near to its floor the attention loop is.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from bench import machine  # noqa: E402

KINDS = {
    0: ("int8 into int32", 2 * 16 * 8 * 32),
    1: ("fp16 into fp32", 2 * 16 * 8 * 16),
    2: ("fp16 into fp16", 2 * 16 * 8 * 16),
}
CASES = ((0, 0), (0, 4), (0, 8), (1, 0), (2, 0), (2, 4), (2, 8))  # kind, multiply-adds after each matrix instruction
CHAINS, TURNS = 4, 20000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="", help="result file or folder")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("No NVIDIA GPU here, so there is nothing to measure.")
        return 2
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(0)
    result = {**machine("cuda"), "multiprocessors": properties.multi_processor_count}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "rates.so"
        arch = f"arch=compute_{major}{minor},code=sm_{major}{minor}"
        source = str(ROOT / "benchmarks" / "mma_rates.cu")
        flags = ["-std=c++17", "-O3", "-gencode", arch, "-shared", "-Xcompiler", "-fPIC"]
        subprocess.run(["nvcc", *flags, "-o", str(library), source], check=True)
        rates = ctypes.CDLL(str(library))
        for kind, fmas in CASES:
            rows.append(measure(rates, kind, fmas, properties.multi_processor_count))
            print(rows[-1], flush=True)
    gpu = result["machine"].lower().replace(" ", "-")
    path = Path(args.out or ROOT / "benchmarks" / "results")
    if path.suffix != ".json":
        path = path / f"mma-{gpu}-{result['date'][:10].replace('-', '')}-{result['commit']}.json"
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(result)[:-1]}, "rows": [\n  {lines}\n]}}\n', encoding="utf-8")
    print(f"written: {path}")
    return 0


def measure(rates: ctypes.CDLL, kind: int, fmas: int, multiprocessors: int, warps: int = 8) -> dict:
    """Eight warps a multiprocessor, as the attention kernels have. clocks: of one of its four parts, for each instruction."""
    out = torch.zeros(2, dtype=torch.int64, device="cuda")
    times, clocks = [], []
    for _ in range(6):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        error = rates.run(kind, fmas, multiprocessors, 32 * warps, TURNS, ctypes.c_void_p(out.data_ptr()))
        if error:
            raise RuntimeError(f"kind {kind}, {fmas} multiply-adds: CUDA error {error}")
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
        clocks.append(int(out[0]))
    ms, clock = sorted(times[1:])[2], sorted(clocks[1:])[2]
    name, operations = KINDS[kind]
    instructions = CHAINS * TURNS * warps
    return {
        "instruction": name,
        "fmas": fmas,
        "ms": round(ms, 4),
        "tops": round(instructions * operations * multiprocessors / ms / 1e9, 1),
        "clocks": round(clock / (instructions / 4), 2),
    }


if __name__ == "__main__":
    sys.exit(main())
