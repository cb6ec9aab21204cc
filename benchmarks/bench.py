"""Attention on this machine: every implementation is verified against float64 first, then timed beside its peers.

    python benchmarks/bench.py                      # all shapes, about five minutes on an H200
    python benchmarks/bench.py --quick              # two shapes
    python benchmarks/bench.py --shapes 1,24,4608,4608,128 --backend cuda --modes int8 --out one.json
    python benchmarks/bench.py --accuracy-only

ms is a whole call as a user makes it, quantisation included, on inputs that are not in the L2 cache. tflops counts
4 B H Nq Nk D operations, half of that if causal. rel_l2 is the relative L2 of the output against float64 after removing the
reference's mean over queries, on some of the queries for timed shapes and all of them for accuracy rows (ms null).

Rows with "step": "quantisation" time what a CUDA call does before attention, alone: moved is the bytes that it must read and
write, of_copy those bytes a second over what a large torch copy_ reads and writes in this run, of_call its share of the whole
call. Short times are those of CUDA graphs.
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
from providers import OURS, Quantisation, all_ours, intents_of, peers, title  # noqa: E402

SHAPES = {  # (B, H, Nq, Nk, D), causal
    "3.5k": ((1, 24, 3584, 3584, 128), False),
    "4k": ((4, 32, 4096, 4096, 128), False),
    "16k": ((4, 32, 16384, 16384, 128), False),
    "32k": ((4, 32, 32768, 32768, 128), False),
    "16k causal": ((4, 32, 16384, 16384, 128), True),
    "8k d64": ((1, 24, 8192, 8192, 64), False),
    "16k d64": ((4, 32, 16384, 16384, 64), False),
    "Flux 1024²": ((1, 24, 4608, 4608, 128), False),
    "Wan 14B 480p": ((1, 40, 32760, 32760, 128), False),
    "Wan 14B 720p": ((1, 40, 75600, 75600, 128), False),
    "HunyuanVideo 720p": ((1, 24, 119056, 119056, 128), False),
    "Wan cross": ((1, 40, 32760, 512, 128), False),
    "cross, 1.5k keys": ((1, 40, 32760, 1536, 128), False),
    "SD3.5 medium": ((2, 24, 4250, 4250, 64), False),
    "SDXL": ((2, 10, 4096, 4096, 64), False),
}
QUICK = ("16k", "Wan 14B 480p")
ACCURACY = (1, 8, 16384, 16384, 128)
REFUSED = 0.2  # an implementation with a larger error on gauss is wrong, and a wrong result is not timed
ROWS = 128  # queries of each head that a timed shape is verified on
SHORT_MS = 2  # calls shorter than this are also timed from a CUDA graph
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
    with torch.inference_mode():
        contenders = ([] if args.no_peers else peers()) + all_ours(args.modes, args.backend, timed=True)
        if args.device == "cuda":
            result["copy_gb_s"] = copy_bandwidth()
            print(f"a large copy moves {result['copy_gb_s']} GB/s")
        if not args.accuracy_only:
            for name, (shape, causal) in args.shapes.items():
                few = name in SHAPES and name not in QUICK and not args.modes
                some = [provider for provider in contenders if provider.everywhere or not few]
                rows += bench_shape(name, shape, causal, some, args.device, result.get("copy_gb_s"))
                save(result, rows, args.out)
        contenders += all_ours(args.modes, args.backend, timed=False)
        accuracy = ACCURACY if args.device == "cuda" else (1, 2, 512, 512, 64)
        rows += accuracy_rows(accuracy, contenders, args.device) if args.accuracy or args.accuracy_only else []
    path = save(result, rows, args.out)
    print_tables(rows)
    print(f"written: {path}")
    wrong = [row for row in rows if row.get("error")]
    for row in wrong:
        print(f"FAILED: {title(row)} at {row['shape']}: {row['error']}")
    return 1 if any(row["backend"] in OURS for row in wrong) else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default="", help=f"names ({', '.join(SHAPES)}) or B,H,Nq,Nk,D[,causal]; separated by ;"
    )
    parser.add_argument("--modes", default="", help="comma list; only our modes whose name contains one of them")
    parser.add_argument("--backend", default="", help=f"comma list of {', '.join(OURS)}; only these of ours")
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
    args.backend = [name for name in args.backend.split(",") if name]
    if unknown := [name for name in args.backend if name not in OURS]:
        parser.error(f"--backend: {unknown[0]!r} is none of {', '.join(OURS)}")
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


def save(result: dict, rows: list[dict], out: str, prefix: str = "") -> Path:
    path = Path(out) if out else ROOT / "benchmarks" / "results"
    if path.suffix != ".json":
        gpu = re.sub(r"[^a-z0-9]+", "-", result["machine"].lower()).strip("-")
        path = path / f"{prefix}{gpu}-{result['date'][:10].replace('-', '')}-{result['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)  # a row a line, so that diffs can be read
    head = json.dumps(result, ensure_ascii=False)[:-1]
    path.write_text(f'{head}, "rows": [\n  {lines}\n]}}\n', encoding="utf-8")
    return path


def bench_shape(name, shape, causal, contenders, device, copy_gb_s=None) -> list[dict]:
    """Verify every contender on one shape, then time those that passed, and the quantisation of the CUDA kernels alone."""
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
        if ms < SHORT_MS and device == "cuda":
            prepared = [provider.prepare(*x) for x in sets]
            line["graph_ms"] = graph_ms(provider.name, lambda n, p=provider, x=prepared: p.run(*x[n % len(x)], causal))
            del prepared
    call = next((line for provider, line in passed if quantises(line)), None)
    if call and not causal:  # quantisation does not depend on it
        lines.append(quantisation_row(call, sets, copy_gb_s))
    print(f"{name} {shape}{' causal' if causal else ''}: " + ", ".join(
        f"{title(line)} {line['tflops'] or line.get('of_call') or line.get('error')}" for line in lines), flush=True)  # fmt: skip
    return lines


def row_of(provider, shape, causal, **extra) -> dict:
    fixed = {
        "shape": list(shape),
        "causal": causal,
        "dtype": "bfloat16",
        "backend": provider.backend,
        "mode": provider.mode,
    }
    measured = {"ms": None, "tflops": None, "rel_l2": None, "inputs": "gauss"}
    intents = intents_of(provider)
    return {**fixed, **measured, **provider.details, **({"intents": intents} if intents else {}), **extra}


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


def graph_ms(name, call) -> float | None:
    """call(0), call(1), ... replayed from a CUDA graph of 10: the time without Python's launches. None if it has none."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for n in range(10):
                call(n)
    except RuntimeError as error:
        print(f"no graph of {name}: {str(error).splitlines()[0]}")
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


def copy_bandwidth() -> float:
    """GB/s that a large copy on the GPU reads and writes."""
    size = min(2 << 30, torch.cuda.mem_get_info()[0] // 4)
    source, to = torch.zeros(2, size, dtype=torch.uint8, device="cuda")
    ms = min(time_round(lambda n: to.copy_(source), "cuda") for _ in range(ROUNDS))
    return round(2 * size / ms / 1e6, 1)


def quantises(row: dict) -> bool:
    """Whether this is a call whose first steps Quantisation is."""
    return (row["backend"], row["mode"], row.get("qk_quant_gran")) == ("cuda", Quantisation.mode, "per_thread")


def quantisation_row(call: dict, sets, copy_gb_s) -> dict:
    """`call`: the row of the whole call, timed already."""
    steps = Quantisation(*sets[0])
    line = {
        key: call[key] for key in ("shape", "causal", "dtype", "backend", "mode", "inputs", "qk_quant_gran", "name")
    }
    line |= {"step": "quantisation", "tflops": None, "rel_l2": None, "moved": steps.moved}

    def one(n):
        steps.run(*sets[n % len(sets)])

    samples = [time_round(one, "cuda") for _ in range(ROUNDS)]
    ms = statistics.median(samples)
    line |= {"ms": round(ms, 4), "spread": round((max(samples) - min(samples)) / ms, 3)}
    if ms < SHORT_MS and (in_graph := graph_ms("quantisation", one)):
        line["graph_ms"] = ms = in_graph
    whole = call.get("graph_ms") or call["ms"]
    line["gb_s"] = round(steps.moved / ms / 1e6, 1)
    line["of_copy"], line["of_call"] = round(line["gb_s"] / copy_gb_s, 3), round(ms / whole, 3)
    return line


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
        if row["name"] == "accuracy" or row.get("step"):
            continue
        cudnn = [
            r["ms"] for r in rows if (r["name"], r["causal"]) == (row["name"], row["causal"]) and "cudnn" in r["mode"]
        ]
        ratio = f"{cudnn[0] / row['ms']:.2f}" if cudnn and cudnn[0] and row["ms"] else "-"
        label = row["name"] if row["name"] not in SHAPES else f"{row['name']} {','.join(map(str, row['shape']))}"
        cells = [row["ms"], row.get("graph_ms"), row["tflops"], ratio, row.get("spread"), row["rel_l2"]]
        text = "".join(f"{'-' if c is None else c:>{w}}" for c, w in zip(cells, (10, 10, 9, 8, 8, 9), strict=True))
        print(f"{label[:33]:34}{title(row)[:43]:44}{text}")
    for note in dict.fromkeys(f"{row['backend']} {row['mode']}: {row['note']}" for row in rows if row.get("note")):
        print(note)
    steps = [row for row in rows if row.get("step")]
    if steps:
        print(f"\n{'quantisation alone':34}{'ms':>10}{'graph ms':>10}{'GB':>8}{'GB/s':>8}{'of copy':>9}{'of call':>9}")
    for row in steps:
        cells = [
            row["ms"],
            row.get("graph_ms") or "-",
            round(row["moved"] / 1e9, 3),
            row["gb_s"],
            row["of_copy"],
            row["of_call"],
        ]
        text = "".join(f"{cell:>{width}}" for cell, width in zip(cells, (10, 10, 8, 8, 9, 9), strict=True))
        print(f"{row['name'][:33]:34}{text}")
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
