"""Hardware counters of the CUDA kernels, read with Nsight Compute: benchmarks/results/counters-<gpu>-<commit>.json.

    python benchmarks/counters.py [--out FILE]     # needs ncu on the PATH and the right to read counters

A row for each kernel of one call: bank conflicts of shared-memory loads, which pipe is busiest, instructions a clock. The
kernels run at the card's own clocks.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

METRICS = {
    "shared_load_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum",
    "shared_load_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "local_loads": "smsp__inst_executed_op_local_ld.sum",
    "local_stores": "smsp__inst_executed_op_local_st.sum",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "tensor_percent": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "microseconds": "gpu__time_duration.sum",
}
CALLS = (("int8/int32", 128), ("int8/int32", 64), ("fp16/fp32", 128), ("fp16/fp16+fp32", 128), ("int8/int32", 256))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="", help="result file or folder")
    parser.add_argument("--call", nargs=2, metavar=("MODE", "HEAD_DIM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        return one_call(args.call[0], int(args.call[1]))
    ncu = shutil.which("ncu")
    if ncu is None:
        print("ncu is not on the PATH: it comes with Nsight Compute")
        return 2
    from bench import machine

    result = machine("cuda")
    rows = [row for mode, head_dim in CALLS for row in measure(ncu, mode, head_dim)]
    path = Path(args.out or ROOT / "benchmarks" / "results")
    if path.suffix != ".json":
        gpu = result["machine"].lower().replace(" ", "-")
        path = path / f"counters-{gpu}-{result['date'][:10].replace('-', '')}-{result['commit']}.json"
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(result)[:-1]}, "rows": [\n  {lines}\n]}}\n', encoding="utf-8")
    print(f"written: {path}")
    return 0


def one_call(mode: str, head_dim: int) -> int:
    """What ncu watches: one call, everything of it compiled and loaded before."""
    import torch

    import sage_kernels

    q, k, v = torch.randn(3, 1, 32, 8192, head_dim, device="cuda", dtype=torch.bfloat16)
    sage_kernels.attention(q, k, v, config=sage_kernels.AttentionConfig(backend="cuda", pv_accum=mode))
    torch.cuda.synchronize()
    return 0


def measure(ncu: str, mode: str, head_dim: int) -> list[dict]:
    watch = [ncu, "--csv", "--clock-control", "none", "--kernel-name-base", "demangled", "--kernel-name", "regex:sage::",
             "--metrics", ",".join(METRICS.values())]  # fmt: skip
    run = [sys.executable, __file__, "--call", mode, str(head_dim)]
    done = subprocess.run([*watch, *run], capture_output=True, text=True)
    start = done.stdout.find('"ID"')
    if done.returncode or start < 0:
        raise RuntimeError(f"ncu said: {(done.stdout + done.stderr)[-500:]}")
    names = {metric: name for name, metric in METRICS.items()}
    rows: dict[str, dict] = {}
    for line in csv.DictReader(io.StringIO(done.stdout[start:])):
        kernel = re.sub(r".*?(\w+)(<.*|\(.*)", r"\1", line["Kernel Name"].replace("(anonymous namespace)::", ""))
        row = rows.setdefault(line["ID"], {"mode": mode, "head_dim": head_dim, "kernel": kernel})
        value = float(line["Metric Value"].replace(",", ""))
        if line["Metric Unit"] in ("nsecond", "ns"):
            value /= 1000
        row[names[line["Metric Name"]]] = round(value, 2)
    for row in rows.values():
        print(row, flush=True)
    return list(rows.values())


if __name__ == "__main__":
    sys.exit(main())
