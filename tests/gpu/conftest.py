"""Writes what the GPU tests measured: set GPU_RESULTS to a file or folder.

The file holds {machine, driver, torch, triton, commit, date, passed, failed, skipped, seconds, cases}, where cases has each
test's name, outcome, seconds and what it recorded with record_property (relative L2 against the emulation and exact attention).

NO_WGMMA=1 runs them with the mma.sync kernels where a Hopper GPU would choose wgmma, NVRTC=1 with the cubins that NVRTC
compiles for this GPU in place of the binary.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from sage_kernels import cuda

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]


class Results:
    def __init__(self, path):
        self.path = Path(path)
        self.begin = time.time()
        self.cases = []

    def pytest_runtest_logreport(self, report):
        """Under pytest-xdist this runs where the workers report to."""
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            case = {
                "name": report.nodeid.split("::", 1)[1],
                "outcome": report.outcome,
                "seconds": round(report.duration, 2),
            }
            if report.outcome == "failed":
                case["error"] = str(report.longrepr)[-2000:]
            self.cases.append({**case, **dict(report.user_properties)})

    def pytest_sessionfinish(self):
        from bench import machine

        result = machine("cuda" if torch.cuda.is_available() else "cpu")
        path = self.path
        if path.suffix != ".json":
            gpu = result["machine"].lower().replace(" ", "-")
            path = path / f"tests-{gpu}-{result['date'][:10].replace('-', '')}-{result['commit']}.json"
        for outcome in ("passed", "failed", "skipped"):
            result[outcome] = sum(case["outcome"] == outcome for case in self.cases)
        result["seconds"] = round(time.time() - self.begin, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(json.dumps(case) for case in self.cases)
        path.write_text(f'{json.dumps(result)[:-1]}, "cases": [\n  {lines}\n]}}\n', encoding="utf-8")
        print(f"\nGPU results: {path}")


def pytest_configure(config):
    if os.environ.get("GPU_RESULTS") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(os.environ["GPU_RESULTS"]))


@pytest.fixture(scope="session", autouse=True)
def which_matrix_instruction():
    with cuda.with_wgmma(False) if os.environ.get("NO_WGMMA") else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def which_compiler():
    from with_cubins import compiled, served_by

    with served_by(compiled()) if os.environ.get("NVRTC") else contextlib.nullcontext():
        yield


@pytest.fixture
def poisoned():
    """Memory that the allocator hands out next holds NaN (all bits set), so that what a kernel leaves unwritten shows."""

    def poison():
        torch.cuda.synchronize()
        # three classes of the caching allocator's blocks: below 1 MiB, below 10 MiB, and larger
        blocks = [torch.full((size,), 255, dtype=torch.uint8, device="cuda")
                  for size, count in ((1 << 12, 64), (1 << 18, 64), (1 << 22, 16), (1 << 26, 4)) for _ in range(count)]  # fmt: skip
        del blocks

    poison()
    return poison
