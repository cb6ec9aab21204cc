"""Counts the instructions of the attention loop by pipe and says what bounds it: benchmarks/results/sass-<commit>.json.

    python benchmarks/sass_mix.py            # compiles (no GPU needed), writes the result file and the tables of docs/cuda.md
    python benchmarks/sass_mix.py --tables   # only the tables, from the newest result file

head_dim 128, no mask; the way through the loop that tests/sass.py calls the fast path: a whole tile of keys.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import sass  # noqa: E402
import tables  # noqa: E402
from bench import commit  # noqa: E402

from csrc import build  # noqa: E402
from sage_kernels.config import PV_MODES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "cuda.md"
HEAD_DIM = 128
PARTS = 4  # of a multiprocessor; each issues one instruction of a warp a clock


@dataclass(frozen=True)
class Card:
    """Public numbers of a card. peak: dense T(FL)OPS by matrix instruction; the rest is for one multiprocessor and clock."""

    name: str
    source: str
    multiprocessors: int
    ghz: float
    peak: dict[str, float]
    fma: int  # lanes
    shared: int  # bytes of shared memory that blocks can have


# Results of each pipe that are alike on all of them, for a multiprocessor and clock: CUDA programming guide, arithmetic
# throughput. It has no line for packing two floats; 64 and, for e4m3, 32 instructions' lanes were measured on an H200.
LANES = {"mufu": 16, "alu": 64, "conversion": 64}
SHARED_BYTES = 128
# What an H200 was measured to take for one mma.sync, clocks of a part, where no result of mma_rates.py is at hand.
HOPPER_CLOCKS = {"IMMA": 6.3, "HMMA": 6.3}

CARDS = {
    "8.0": Card("A100", "A100 architecture white paper", 108, 1.41,
                {"IMMA": 624, "HMMA.F32": 312, "HMMA.F16": 312}, 64, 164 << 10),
    "8.6": Card("RTX 3090", "GA102 white paper, table 9", 82, 1.695,
                {"IMMA": 284, "HMMA.F32": 71, "HMMA.F16": 142}, 128, 100 << 10),
    "8.9": Card("RTX 4090", "Ada architecture white paper, table 2", 128, 2.52,
                {"IMMA": 660.6, "QMMA.F16": 660.6, "QMMA.F32": 330.3, "HMMA.F16": 330.3, "HMMA.F32": 165.2}, 128, 100 << 10),
    "9.0": Card("H200", "mma.sync as measured; 1.83 GHz is what NVIDIA's 1,979 TOPS imply", 132, 1.83, {}, 128, 228 << 10),
    "12.0": Card("RTX 5090", "RTX Blackwell white paper", 170, 2.407,
                 {"IMMA": 838, "QMMA.F16": 838, "QMMA.F32": 419, "HMMA.F16": 419, "HMMA.F32": 209.5}, 128, 100 << 10),
}  # fmt: skip

PIPES = {
    "tensor": sass.MATRIX,
    "mufu": ("MUFU",),
    "fma": ("FFMA", "FADD", "FMUL", "IMAD", "HADD2", "HFMA2", "HMUL2"),
    "alu": (
        "FMNMX FMNMX3 IMNMX VIMNMX VIMNMX3 LOP3 PLOP3 PRMT SEL FSEL ISETP FSETP IADD3 VIADD LEA SHF MOV P2R R2P IABS".split()
    ),
    "conversion": ("F2FP", "I2FP", "F2F", "I2F", "F2I"),
    "lsu": ("LDS", "STS", "LDSM", "LDG", "STG", "LDGSTS", "SHFL", "LDL", "STL"),
}
SLOW_CONVERSIONS = ("F2F", "I2F", "F2I")  # of MUFU's unit


def pipe_of(i: sass.Instruction) -> str:
    return next((pipe for pipe, names in PIPES.items() if i.name in names), "other")


def operations(opcode: str) -> int:
    """Multiplications and additions of one matrix instruction: IMMA.16832 is 16 x 8 x 32."""
    m, n, k = {"16832": (16, 8, 32), "16816": (16, 8, 16)}[opcode.split(".")[1]]
    return 2 * m * n * k


def tensor_clocks(opcode: str, arch: str) -> float:
    """Of a multiprocessor's part, for one matrix instruction."""
    name, card = opcode.split(".")[0], CARDS[arch]
    if arch == "9.0":
        return hopper_clocks().get(name + ("." + opcode.split(".")[2] if name == "HMMA" else ""), HOPPER_CLOCKS[name])
    peak = card.peak[name if name == "IMMA" else f"{name}.{opcode.split('.')[2]}"]
    return round(operations(opcode) * card.multiprocessors * PARTS * card.ghz * 1e9 / (peak * 1e12))


def hopper_clocks() -> dict[str, float]:
    """From the newest result of mma_rates.py on a Hopper; {} if there is none."""
    names = {"int8 into int32": "IMMA", "fp16 into fp32": "HMMA.F32", "fp16 into fp16": "HMMA.F16"}
    files = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("mma-nvidia-h*.json")]
    if not files:
        return {}
    rows = max(files, key=lambda file: file["date"])["rows"]
    return {names[row["instruction"]]: row["clocks"] for row in rows if row["fmas"] == 0}


# ---- what is compiled


def tiles(archs: list[str]) -> dict[tuple[str, str], dict]:
    """tiles.h for every architecture and mode, as a compiler reads it."""
    codes = ", ".join(arch.replace(".", "") for arch in archs)
    source = f"""
        #include "tiles.h"
        #include <cstdio>
        #include <initializer_list>
        int main() {{
            for (int arch : {{{codes}}})
                for (int mode = 0; mode < int(sage::Mode::count); ++mode) {{
                    const sage::Tile t = sage::tile_for(sage::Mode(mode), {HEAD_DIM}, {HEAD_DIM}, arch);
                    std::printf("%d %d %d %d %d %d\\n", arch, mode, t.m_tiles, t.warps, t.keys,
                                t.shared_bytes(sage::Mode(mode), {HEAD_DIM}, {HEAD_DIM}, arch));
                }}
        }}"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiles.cpp"
        path.write_text(source, encoding="utf-8")
        program = path.with_suffix("")
        compiler = build.find_host_compiler()
        subprocess.run([compiler, "-std=c++17", f"-I{build.CSRC}", str(path), "-o", str(program)], check=True)
        lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {arch.replace(".", ""): arch for arch in archs}
    found = {}
    for arch, mode, m_tiles, warps, keys, shared in (line.split() for line in lines):
        tile = {"m_tiles": int(m_tiles), "warps": int(warps), "keys": int(keys), "shared_bytes": int(shared)}
        found[names[arch], PV_MODES[int(mode)]] = tile
    return found


def count(kernel: sass.Kernel, arch: str, tile: dict) -> dict:
    """A row of the result file. Clocks are a part's, for 16 queries and 64 keys."""
    (loop,) = kernel.main_loops
    path = loop.fast_path
    pipes = Counter(pipe_of(i) for i in path)
    matrix = Counter(i.opcode for i in path if i.name in sass.MATRIX)
    qk = sum(n * operations(opcode) for opcode, n in matrix.items() if opcode.endswith(".S8.S8"))
    units = qk / (2 * 16 * 64 * HEAD_DIM)  # of 16 queries and 64 keys, once through the loop
    slow = sum(i.name in SLOW_CONVERSIONS for i in path)
    e4m3 = sum(i.name == "F2FP" and "E4M3" in i.opcode for i in path)

    def clocks(instructions: float, lanes: int) -> float:
        return instructions * 32 * PARTS / lanes

    copied = tile["shared_bytes"] / 2 / tile["warps"] * units * 64 / tile["keys"] / tile["m_tiles"]
    by_pipe = {
        "tensor": sum(n * tensor_clocks(opcode, arch) for opcode, n in matrix.items()),
        "mufu": clocks(pipes["mufu"] + slow, LANES["mufu"]),
        "fma": clocks(pipes["fma"], CARDS[arch].fma),
        "alu": clocks(pipes["alu"], LANES["alu"]),
        "conversion": clocks(pipes["conversion"] - slow + e4m3, LANES["conversion"]),
        "shared": (sum(shared_bytes(i) for i in path) + copied) * PARTS / SHARED_BYTES,
        "issue": len(path),
    }
    per_unit = {name: round(value / units, 1) for name, value in by_pipe.items()}
    bound, overlapping = max(per_unit.items(), key=lambda item: item[1])
    in_turn = max(overlapping, round(per_unit["tensor"] + (len(path) - pipes["tensor"]) / units, 1))
    flops = 4 * 16 * 64 * HEAD_DIM * PARTS * CARDS[arch].multiprocessors * CARDS[arch].ghz * 1e9
    registers = (kernel.registers + 7) // 8 * 8 * 32 * tile["warps"]
    return {
        "arch": arch,
        "mode": kernel.template[0],
        "tile": tile,
        "registers": kernel.registers,
        "spilled": kernel.spilled,
        "blocks": min(65536 // registers, CARDS[arch].shared // (tile["shared_bytes"] + 1024)),
        "instructions": len(path),
        "units": units,
        "matrix": dict(matrix),
        "pipes": {pipe: pipes[pipe] for pipe in (*PIPES, "other")},
        "clocks": per_unit,
        "bound": bound,
        "overlapping": overlapping,
        "in_turn": in_turn,
        "tflops": [round(flops / clocks / 1e12) for clocks in (overlapping, in_turn)],
    }


def shared_bytes(i: sass.Instruction) -> int:
    """That a warp's instruction moves to or from shared memory; a shuffle goes the same way. Copies are counted by the tile."""
    if i.name in ("LDS", "STS", "LDSM"):
        return 32 * (16 if ".128" in i.opcode else 8 if ".64" in i.opcode else 4)
    return 32 * 4 if i.name == "SHFL" else 0


def measure() -> dict:
    sources = [path for path in build.sources(build.CSRC) if path.parent.name == "instantiations"]
    jobs = [(source, arch) for arch in CARDS for source in sources]
    with ThreadPoolExecutor(build.bounded_jobs(None, build.cores(), build.free_memory())) as pool:
        cubins = list(pool.map(lambda job: sass.compile_to_cubin(*job), jobs))
    cut = tiles(list(CARDS))
    kernels = []
    for (_, arch), cubin in zip(jobs, cubins):
        for kernel in sass.read(cubin):
            if kernel.template and kernel.template[1:] == (HEAD_DIM, HEAD_DIM, False) and kernel.main_loops:
                kernels.append(count(kernel, arch, cut[arch, kernel.template[0]]))
    kernels.sort(key=lambda row: (list(CARDS).index(row["arch"]), PV_MODES.index(row["mode"])))
    cuda = build.cuda_version(build.find_nvcc())
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cuda": f"{cuda[0]}.{cuda[1]}",
        "head_dim": HEAD_DIM,
        "kernels": kernels,
    }


# ---- the tables


def render(result: dict, source: str) -> str:
    names = [*PIPES, "other"]
    mix, bounds = [], []
    for row in result["kernels"]:
        head = [row["arch"], f"`{row['mode']}`"]
        each = [f"{row['pipes'][pipe] / row['pipes']['tensor']:.2f}" for pipe in names[1:]]
        tile = row["tile"]
        where = f"{16 * tile['m_tiles'] * tile['warps']} x {tile['keys']}"
        usage = [str(row["registers"]), str(row["spilled"]), f"{tile['shared_bytes'] / 1024:.0f}", str(row["blocks"])]
        mix.append([*head, where, str(row["instructions"]), str(row["pipes"]["tensor"]), *each, *usage])
        clocks = [f"{row['clocks'][pipe]:.0f}" for pipe in row["clocks"]]
        card, (best, least) = CARDS[row["arch"]].name, row["tflops"]
        bounds.append([*head, *clocks, row["bound"], f"{row['in_turn']:.0f}", f"{card}: {best} to {least}"])
    usage = ["registers", "spilled bytes", "shared KB", "blocks"]
    columns = list(result["kernels"][0]["clocks"])
    return "\n\n".join(
        [
            f"Once through the loop at head_dim {result['head_dim']} (CUDA {result['cuda']}, commit {result['commit']}): "
            "instructions in all, matrix instructions, and of each other pipe for one matrix instruction. blocks: on a "
            "multiprocessor, as registers and shared memory allow.",
            tables.markdown(["arch", "mode", "queries x keys", "all", "matrix", *names[1:], *usage], mix),
            "Clocks that each pipe of a quarter of a multiprocessor needs for 16 queries and 64 keys; the pipe that needs most; "
            "the clocks if matrix instructions overlap with no other; and the TFLOPS that a card would reach with all of it "
            "overlapping and with that. **Predicted, not measured.**",
            tables.markdown(["arch", "mode", *columns, "bound", "in turn", "predicted"], bounds),
            f"From {source}; `python benchmarks/sass_mix.py` counts again.",
        ]
    )


def newest() -> Path | None:
    files = RESULTS.glob("sass-*.json")
    return max(files, key=lambda path: json.loads(path.read_text(encoding="utf-8"))["date"], default=None)


def with_tables(text: str, path: Path) -> str:
    result = json.loads(path.read_text(encoding="utf-8"))
    return tables.replaced(text, render(result, path.relative_to(ROOT).as_posix()), DOCUMENT.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tables", action="store_true", help="count nothing; write the tables of the newest result file"
    )
    args = parser.parse_args()
    if not args.tables:
        if reason := sass.missing():
            print(reason)
            return 2
        result = measure()
        kernels = ",\n  ".join(json.dumps(row) for row in result.pop("kernels"))
        written = RESULTS / f"sass-{result['commit']}.json"
        written.write_text(f'{json.dumps(result)[:-1]}, "kernels": [\n  {kernels}\n]}}\n', encoding="utf-8")
        print(f"written: {written.relative_to(ROOT)}")
    path = newest()
    if path is None:
        print(f"{RESULTS} holds no result of this script")
        return 1
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), path), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
