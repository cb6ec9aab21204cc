"""Attention on this machine: every implementation is verified against float64 first, then timed beside its peers.

    python benchmarks/bench.py                      # all shapes, about three minutes on an H200
    python benchmarks/bench.py --quick              # two shapes
    python benchmarks/bench.py --shapes 1,24,4608,4608,128 --modes int8 --out one.json
    python benchmarks/bench.py --accuracy-only

ms is a whole call as a user makes it, quantisation included, on inputs that are not in the L2 cache. tflops counts
4 B H Nq Nk D operations, half of that if causal. rel_l2 is the relative L2 of the output against float64 after removing the
reference's mean over queries, on some of the queries for timed shapes and all of them for accuracy rows (ms null).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from inputs import DISTRIBUTIONS, centred_error, exact, make, some_rows  # noqa: E402
from providers import all_ours, peers, title  # noqa: E402

SHAPES = {  # (B, H, Nq, Nk, D), causal
    "4k": ((4, 32, 4096, 4096, 128), False),
    "16k": ((4, 32, 16384, 16384, 128), False),
    "32k": ((4, 32, 32768, 32768, 128), False),
    "16k causal": ((4, 32, 16384, 16384, 128), True),
    "16k d64": ((4, 32, 16384, 16384, 64), False),
    "Flux 1024²": ((1, 24, 4608, 4608, 128), False),
    "Wan 14B 480p": ((1, 40, 32760, 32760, 128), False),
    "Wan 14B 720p": ((1, 40, 75600, 75600, 128), False),
    "HunyuanVideo 720p": ((1, 24, 119056, 119056, 128), False),
    "Wan cross": ((1, 40, 32760, 512, 128), False),
    "SDXL": ((2, 10, 4096, 4096, 64), False),
}
QUICK = ("16k", "Wan 14B 480p")
ACCURACY = (1, 8, 16384, 16384, 128)
REFUSED = 0.2  # an implementation with a larger error on gauss is wrong, and a wrong result is not timed
ROWS = 128  # queries of each head that a timed shape is verified on
ROUNDS, ROUND_SECONDS = 3, 0.1  # implementations take turns, so that a change of clocks meets them all
CACHE_BYTES = 256 << 20  # inputs are rotated through at least this much memory


def main() -> int:
    args = parse(sys.argv[1:])
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No NVIDIA GPU here, so there is nothing to time. --device cpu tries the script itself on small shapes.")
        return 2
    result = machine(args.device)
    print(f"{result['machine']}, driver {result['driver']}, torch {result['torch']}, commit {result['commit']}")
    rows = []
    others = [] if args.no_peers else peers()
    with torch.inference_mode():
        if not args.accuracy_only:
            contenders = others + all_ours(args.modes, timed=True)
            for name, (shape, causal) in args.shapes.items():
                rows += bench_shape(name, shape, causal, contenders, args.device)
                save(result, rows, args.out)
        contenders = others + all_ours(args.modes, timed=True) + all_ours(args.modes, timed=False)
        accuracy = ACCURACY if args.device == "cuda" else (1, 2, 512, 512, 64)
        rows += accuracy_rows(accuracy, contenders, args.device) if args.accuracy or args.accuracy_only else []
    path = save(result, rows, args.out)
    print_tables(rows)
    print(f"written: {path}")
    wrong = [row for row in rows if row.get("error")]
    for row in wrong:
        print(f"FAILED: {title(row)} at {row['shape']}: {row['error']}")
    return 1 if any(row["backend"] in ("triton", "cuda", "reference") for row in wrong) else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default="", help=f"names ({', '.join(SHAPES)}) or B,H,Nq,Nk,D[,causal]; separated by ;"
    )
    parser.add_argument("--modes", default="", help="comma list; only our modes whose name contains one of them")
    parser.add_argument("--out", default="", help="result file or folder; benchmarks/results/ if not given")
    parser.add_argument("--quick", action="store_true", help="two shapes, and no accuracy rows")
    parser.add_argument("--accuracy-only", action="store_true", help="no timing")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the script, it measures nothing"
    )
    args = parser.parse_args(argv)
    args.accuracy = not args.quick
    args.modes = [mode for mode in args.modes.split(",") if mode]
    wanted = [item.strip() for item in args.shapes.split(";") if item.strip()] or list(QUICK if args.quick else SHAPES)
    if args.device == "cpu" and not args.shapes:
        wanted = ["1,2,300,300,64", "1,2,300,300,64,causal", "1,2,300,77,40"]
    args.shapes = {}
    for item in wanted:
        match = re.fullmatch(r"(\d+),(\d+),(\d+),(\d+),(\d+)(,causal)?", item)
        if item not in SHAPES and not match:
            parser.error(f"--shapes: {item!r} is neither B,H,Nq,Nk,D[,causal] nor one of {', '.join(SHAPES)}")
        args.shapes[item] = SHAPES[item] if item in SHAPES else (tuple(map(int, match.groups()[:5])), bool(match[6]))
    return args


def machine(device: str) -> dict:
    cuda = device == "cuda"
    driver = "none"
    if cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "machine": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit of this checkout, "-dirty" if it has changes; SAGE_COMMIT where there is no .git."""
    if os.environ.get("SAGE_COMMIT"):
        return os.environ["SAGE_COMMIT"]

    def git(*words):
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        head = git("rev-parse", "--short=10", "HEAD")
        changes = git("status", "--porcelain", "--", "sage_kernels", "csrc", "benchmarks/*.py")
    except FileNotFoundError:
        return "unknown"
    return "unknown" if not head else head + ("-dirty" if changes else "")


def save(result: dict, rows: list[dict], out: str) -> Path:
    path = Path(out) if out else ROOT / "benchmarks" / "results"
    if path.suffix != ".json":
        gpu = re.sub(r"[^a-z0-9]+", "-", result["machine"].lower()).strip("-")
        path = path / f"{gpu}-{result['date'][:10].replace('-', '')}-{result['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)  # a row a line, so that diffs can be read
    head = json.dumps(result, ensure_ascii=False)[:-1]
    path.write_text(f'{head}, "rows": [\n  {lines}\n]}}\n', encoding="utf-8")
    return path


def bench_shape(name, shape, causal, contenders, device) -> list[dict]:
    """Verify every contender on one shape, then time those that passed."""
    b, heads, nq, nk, d = shape
    q, k, v = make("gauss", *shape, device=device)
    rows = some_rows(nq, ROWS, device)
    want = exact(q, k, v, rows, causal)
    passed, lines = [], []
    for provider in contenders:
        if causal and not provider.causal:
            continue
        line = row_of(provider, shape, causal, name=name)
        lines.append(line)
        try:
            got = provider.finish(provider.run(*provider.prepare(q, k, v), causal))
            line["rel_l2"] = round(centred_error(got[:, :, rows], want), 5)
            del got
        except Exception as error:  # of somebody else's package or ours: it becomes the row's error, and the exit code
            line["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            continue
        if not line["rel_l2"] < REFUSED:
            line["error"] = f"relative L2 {line['rel_l2']}, so it was not timed"
            continue
        passed.append((provider, line))
    del want
    size = sum(x.numel() * x.element_size() for x in (q, k, v))
    sets = [(q, k, v)] + [tuple(x.clone() for x in (q, k, v)) for _ in range(min(15, CACHE_BYTES // size))]
    samples: dict[int, list[float]] = {i: [] for i in range(len(passed))}
    for _ in range(ROUNDS):
        for i, (provider, _) in enumerate(passed):
            prepared = [provider.prepare(*x) for x in sets]
            samples[i].append(time_round(lambda n, p=provider, x=prepared: p.run(*x[n % len(x)], causal), device))
            del prepared
    operations = 4 * b * heads * nq * nk * d / (2 if causal else 1)
    for i, (provider, line) in enumerate(passed):
        ms = statistics.median(samples[i])
        line["ms"] = round(ms, 4)
        line["tflops"] = round(operations / ms / 1e9, 1 if device == "cuda" else 6)
        line["spread"] = round((max(samples[i]) - min(samples[i])) / ms, 3)
        if ms < 2 and device == "cuda":
            line["graph_ms"] = graph_ms(provider, (q, k, v), causal)
    print(f"{name} {shape}{' causal' if causal else ''}: " + ", ".join(
        f"{title(line)} {line['tflops'] or line.get('error')}" for line in lines), flush=True)  # fmt: skip
    return lines


def row_of(provider, shape, causal, **extra) -> dict:
    fixed = {
        "shape": list(shape),
        "causal": causal,
        "dtype": "bfloat16",
        "backend": provider.backend,
        "mode": provider.mode,
    }
    return {**fixed, "ms": None, "tflops": None, "rel_l2": None, "inputs": "gauss", **provider.details, **extra}


def time_round(call, device) -> float:
    """Median milliseconds of one call, over calls that fill ROUND_SECONDS after a warm-up."""
    if device == "cpu":
        begin = time.perf_counter()
        call(0)
        return (time.perf_counter() - begin) * 1e3
    call(0)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call(1)
    torch.cuda.synchronize()
    count = int(max(2, min(50, ROUND_SECONDS / (time.perf_counter() - begin))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for n, (start, stop) in enumerate(events):
        start.record()
        call(n)
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def graph_ms(provider, tensors, causal) -> float | None:
    """The same call replayed from a CUDA graph, 10 calls in it: the time without Python's launches. None if it has none."""
    prepared = provider.prepare(*tensors)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(10):
                provider.run(*prepared, causal)
    except RuntimeError as error:
        print(f"no graph of {provider.name}: {str(error).splitlines()[0]}")
        return None
    times = []
    for _ in range(5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 10)
    return round(statistics.median(times), 4)


def accuracy_rows(shape, contenders, device) -> list[dict]:
    """Every contender on the three distributions, all queries."""
    lines = []
    for kind in DISTRIBUTIONS:
        q, k, v = make(kind, *shape, device=device, seed=1)
        want = exact(q, k, v, torch.arange(shape[2], device=device), False)
        for provider in contenders:
            line = row_of(provider, shape, False, name="accuracy", inputs=kind)
            try:
                got = provider.finish(provider.run(*provider.prepare(q, k, v), False))
                line["rel_l2"] = round(centred_error(got, want), 5)
            except (
                Exception
            ) as error:  # of somebody else's package or ours: it becomes the row's error, and the exit code
                line["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            lines.append(line)
    return lines


def print_tables(rows: list[dict]) -> None:
    """TFLOPS with the ratio to torch's cuDNN attention, then the errors."""
    print(
        f"\n{'shape':34}{'backend and mode':44}{'ms':>10}{'graph ms':>10}{'TFLOPS':>9}{'/cuDNN':>8}{'spread':>8}{'rel_l2':>9}"
    )
    for row in rows:
        if row["name"] == "accuracy":
            continue
        cudnn = [
            r["ms"] for r in rows if (r["name"], r["causal"]) == (row["name"], row["causal"]) and "cudnn" in r["mode"]
        ]
        ratio = f"{cudnn[0] / row['ms']:.2f}" if cudnn and cudnn[0] and row["ms"] else "-"
        label = row["name"] if row["name"] not in SHAPES else f"{row['name']} {','.join(map(str, row['shape']))}"
        cells = [row["ms"], row.get("graph_ms"), row["tflops"], ratio, row.get("spread"), row["rel_l2"]]
        text = "".join(f"{'-' if c is None else c:>{w}}" for c, w in zip(cells, (10, 10, 9, 8, 8, 9), strict=True))
        print(f"{label[:33]:34}{title(row)[:43]:44}{text}")
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["name"] == "accuracy":
            table.setdefault(title(row), {})[row["inputs"]] = row["rel_l2"]
    if table:
        print(f"\n{'relative L2':48}" + "".join(f"{kind:>10}" for kind in DISTRIBUTIONS))
    for name, errors in table.items():
        print(
            f"{name[:47]:48}"
            + "".join(f"{errors.get(kind) if errors.get(kind) is not None else '-':>10}" for kind in DISTRIBUTIONS)
        )


if __name__ == "__main__":
    sys.exit(main())
