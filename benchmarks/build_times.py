"""How long the CUDA kernels take to build, and how large they are, for each architecture: benchmarks/results/build-<commit>.json.

python benchmarks/build_times.py [--out FILE]      # about five minutes on two cores; prints the table of docs/cuda.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench import commit  # noqa: E402

from csrc import build  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="", help="result file")
    args = parser.parse_args()
    nvcc = build.find_nvcc()
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "cuda": "%d.%d" % build.cuda_version(nvcc),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rows": [measure(nvcc, arch) for arch in build.ARCHS],
    }
    path = Path(args.out or ROOT / "benchmarks" / "results" / f"build-{result['commit']}.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for cells in (
        ["", *(row["arch"] for row in result["rows"])],
        ["---"] * (1 + len(result["rows"])),
        ["seconds", *(f"{row['seconds']:.0f}" for row in result["rows"])],
        ["binary, MB", *(f"{row['bytes'] / 1e6:.1f}" for row in result["rows"])],
    ):
        print(f"| {' | '.join(cells)} |")
    print(f"written: {path}")
    return 0


def measure(nvcc: str, arch: str) -> dict:
    """From nothing to a binary, as many compilers at once as build.py lets run."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "package")
        package.mkdir()
        begin = time.perf_counter()
        binary = build.build([arch], nvcc=nvcc, build_dir=Path(folder, "build"), package=package, say=lambda line: None)
        return {"arch": arch, "seconds": round(time.perf_counter() - begin, 1), "bytes": binary.stat().st_size}


if __name__ == "__main__":
    sys.exit(main())
