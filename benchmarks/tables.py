"""Writes the newest result files' tables between the markers of README.md, docs/numbers.md and docs/accuracy.md.

Times are of the newest file that has some, and so are errors: `bench.py --accuracy-only` and `--quick` leave one of them out.

python benchmarks/tables.py            # after `make bench`
python benchmarks/tables.py --check    # exit code 1 if a table is not what the newest result file gives
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def in_readme(row: dict) -> bool:
    """Without the emulations, the steps of a call, what nearly equals another column, and modes that few shapes are timed in."""
    if row["backend"] == "cuda":
        return row["mode"] in ("int8/int32", "fp16/fp32", "fp16/fp16+fp32") and not row.get("step")
    return row["backend"] not in ("reference", "finding") and "flash bf16" not in row["mode"]


DOCUMENTS = {  # which rows of a result file a document shows
    "README.md": in_readme,
    "docs/numbers.md": lambda row: row["backend"] != "finding",
    "docs/accuracy.md": lambda row: row["name"] == "accuracy" and row["backend"] in ("reference", "finding"),
}
OURS = ("cuda", "triton", "reference")
DISTRIBUTIONS = ("gauss", "peaky", "outlier")


WITH_MODELS = ("README.md", "docs/numbers.md")  # that also show end_to_end.py's table, once it has a result file


def is_benchmark(result: dict) -> bool:
    """Whether bench.py wrote it; test runs and hardware counters stand beside its files."""
    return any("rel_l2" in row for row in result.get("rows", ())) and not is_end_to_end(result)


def is_end_to_end(result: dict) -> bool:
    """Whether end_to_end.py wrote it."""
    return any("model" in row for row in result.get("rows", ()))


def has_times(result: dict) -> bool:
    return is_benchmark(result) and any(map(is_timed, result["rows"]))


def has_accuracy(result: dict) -> bool:
    return is_benchmark(result) and any(row["name"] == "accuracy" for row in result["rows"])


def newest(folder: Path, kind=is_benchmark) -> Path | None:
    """The result file of a kind with the latest date in it."""
    files = [path for path in folder.glob("*.json") if kind(json.loads(path.read_text(encoding="utf-8")))]
    return max(files, key=lambda path: json.loads(path.read_text(encoding="utf-8"))["date"], default=None)


def label(row: dict, with_intents: bool = True) -> str:
    """A column's or line's heading."""
    mode = " ".join(part for part in (row["mode"], row.get("qk_quant_gran")) if part)
    if row["backend"] not in OURS:
        return mode if row["backend"] == "finding" else f"{row['backend']} {mode}"
    backend = "emulation" if row["backend"] == "reference" else f"**{row['backend']}**"
    intents = f" ({', '.join(row['intents'])})" if with_intents and row.get("intents") else ""
    return f"{backend} {mode}{intents}"


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def speed(rows: list[dict]) -> str:
    """TFLOPS of a whole call and, for ours, the ratio to torch's cuDNN attention in the same run; a line a shape.

    What auto took in that run is bold.
    """
    timed = [row for row in rows if is_timed(row)]
    names = {label(row, False): row["backend"] for row in timed}
    lines = []
    for key in dict.fromkeys((row["name"], tuple(row["shape"]), row["causal"]) for row in timed):
        name, shape, causal = key
        here = {label(row, False): row for row in timed if (row["name"], tuple(row["shape"]), row["causal"]) == key}
        cudnn = next((row["ms"] for row in here.values() if "cudnn" in row["mode"]), None)
        cells = []
        for column, backend in names.items():
            row = here.get(column)
            if row is None:
                cells.append("-" if backend in OURS else "none")  # not timed here, or not to be had
            elif row["ms"] is None:
                cells.append("fails")
            elif row["backend"] in OURS and cudnn:
                cell = f"{row['tflops']:.0f} ({cudnn / row['ms']:.2f}×)"
                cells.append(f"**{cell}**" if "auto" in row.get("intents", ()) else cell)
            else:
                cells.append(f"{row['tflops']:.0f}")
        lines.append([line_of(name, shape) + (" causal" if causal and "causal" not in name else ""), *cells])
    return markdown(["B,H,N,D", *names], lines)


def is_timed(row: dict) -> bool:
    """Whether it is of a whole call; the others are of accuracy, or of one step."""
    return row["name"] != "accuracy" and not row.get("step")


def line_of(name: str, shape: tuple[int, ...]) -> str:
    b, h, nq, nk, d = shape
    size = f"{b},{h},{nq},{d}" if nq == nk else f"{b},{h},{nq}×{nk},{d}"
    return f"{name}: {size}"


def quantisation(rows: list[dict]) -> str:
    """What the CUDA kernels do before attention, alone; a line a shape."""
    lines = [
        [line_of(row["name"], row["shape"]), f"{row.get('graph_ms') or row['ms']:.3f}", f"{row['moved'] / 1e9:.3f}",
         f"{row['gb_s']:.0f}", f"{row['of_copy']:.0%}", f"{row['of_call']:.1%}"]
        for row in rows if row.get("step")
    ]  # fmt: skip
    return markdown(["B,H,N,D", "ms", "GB", "GB/s", "of a copy's", "of the call"], lines)


def accuracy(rows: list[dict]) -> str:
    """Relative L2 on the three distributions; a line an implementation."""
    errors: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if row["name"] == "accuracy":
            errors.setdefault(label(row), {})[row["inputs"]] = row["rel_l2"]
    cell = {
        name: [f"{by[kind]:.3f}" if by.get(kind) is not None else "fails" for kind in DISTRIBUTIONS]
        for name, by in errors.items()
    }
    return markdown(["", *DISTRIBUTIONS], [[name, *cells] for name, cells in cell.items()])


def steps(rows: list[dict]) -> str:
    """end_to_end.py's rows: seconds a step, memory and error of whole models; then the videos of the demo's model."""
    cudnn = {row["model"]: row["ms"] for row in rows if row["mode"] == "cudnn"}
    lines, videos = [], []
    for row in rows:
        cells = [row["name"], label(row)]
        served = sum(taken["calls"] for taken in row.get("taken", ()))
        calls = served + sum(passed["calls"] for passed in row.get("passed", ()))
        share = f"{served} of {calls}" if calls else "-"
        if row.get("error"):
            (videos if row["model"] == "demo" else lines).append([*cells, "fails", "-", "-", share])
        elif row["model"] == "demo":
            videos.append([*cells, f"{row['psnr_db']:.1f}", f"{row['psnr_min_db']:.1f}", row["recognised"], share])
        else:
            against = cudnn.get(row["model"]) if row["backend"] in OURS else None
            ratio = f" ({against / row['ms']:.2f}×)" if against else ""
            memory = f"{row['peak_gib']:.1f}" if "peak_gib" in row else "-"
            error = "-" if row["rel_l2"] is None else f"{row['rel_l2']:.4f}"
            lines.append([*cells, f"{row['ms'] / 1e3:.3g}{ratio}", memory, error, share])
    tables = [markdown(["model", "attention", "s a step", "GiB", "rel. L2", "calls served"], lines)] if lines else []
    head = ["model", "attention", "PSNR, dB", "least", "recognised", "calls served"]
    return "\n\n".join(tables + ([markdown(head, videos)] if videos else []))


def chart(rows: list[dict]) -> str:
    """Seconds a step of the slowest model, as a chart that GitHub draws; "" without whole models."""
    timed = [row for row in rows if row["model"] != "demo" and row.get("ms")]
    if not timed:
        return ""
    name = max(timed, key=lambda row: row["ms"])["name"]
    bars = {label(row).replace("*", ""): f"{row['ms'] / 1e3:.3g}" for row in timed if row["name"] == name}
    names = ", ".join(f'"{bar}"' for bar in bars)
    return (
        f'```mermaid\nxychart-beta horizontal\n    title "Seconds a step: {name}"\n    x-axis [{names}]\n'
        f'    y-axis "seconds" 0 --> {1.1 * max(map(float, bars.values())):.0f}\n    bar [{", ".join(bars.values())}]\n```'
    )


def end_to_end(result: dict, source: str) -> str:
    """What the documents show of an end_to_end.py result file."""
    reasons = dict.fromkeys(passed["reason"] for row in result["rows"] for passed in row.get("passed", ()))
    return (
        f"Whole models in ComfyUI's sampler, with random bf16 weights ({machine_of(result)}): the time of a step (in brackets: the "
        "ratio to torch's cuDNN attention), the most memory, and the relative L2 of the model's output against that with "
        "cuDNN, of which ComfyUI's own has what rounding alone does. Of the demo's trained model: the PSNR of ten videos "
        "against those with cuDNN."
        + (f" Attention calls not served: {'; '.join(reasons)}." if reasons else "")
        + f" From {source}.\n\n"
        + "\n\n".join(filter(None, (steps(result["rows"]), chart(result["rows"]))))
    )


def machine_of(result: dict) -> str:
    return f"{result['machine']}, driver {result['driver']}, torch {result['torch']}, commit {result['commit']}"


def render(result: dict, source: str) -> str:
    """Everything between the markers, but for whole models."""
    where = machine_of(result)
    parts = []
    if any(map(is_timed, result["rows"])):
        parts.append(
            f"TFLOPS of a whole call, bf16, quantisation included ({where}). In brackets: the ratio to torch's cuDNN "
            "attention; bold: what `auto` took in that run."
        )
        parts.append(speed(result["rows"]))
        notes = dict.fromkeys(
            f"**{row['backend']}** {row['mode']}: {row['note']}." for row in result["rows"] if row.get("note")
        )
        parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    if any(row.get("step") for row in result["rows"]):
        parts.append(
            "Quantisation alone, for **cuda** int8/int32 per_thread: time, bytes that must be read and written (q once, k and v "
            f"twice, the codes once), their rate, what part that is of the {result['copy_gb_s']:.0f} GB/s that a large copy moves in "
            "the same run, and what part of the whole call it takes (short times are those of CUDA graphs)."
        )
        parts.append(quantisation(result["rows"]))
    if any(row["name"] == "accuracy" for row in result["rows"]):
        shape = next(row["shape"] for row in result["rows"] if row["name"] == "accuracy")
        parts.append(
            "Relative L2 against float64 after removing the mean over queries, "
            f"{shape[2]} tokens, head_dim {shape[4]} ({where}):"
        )
        parts.append(accuracy(result["rows"]))
    parts.append(f"From {source}; `make bench` measures again.")
    return "\n\n".join(parts)


def replaced(text: str, table: str, name: str) -> str:
    """`text` with `table` between its markers. Raises ValueError if it has no such pair."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{name} must hold {BEGIN} and then {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def update(root: Path, check: bool) -> list[str]:
    """Write the documents of `root`, or with check only compare; the names of those that were or would be changed."""
    folder = root / "benchmarks" / "results"
    times, errors, models = (newest(folder, kind) for kind in (has_times, has_accuracy, is_end_to_end))
    if times is None and errors is None:
        raise ValueError(f"{folder} holds no result file: run make bench on a machine with a GPU")
    results = {path: json.loads(path.read_text(encoding="utf-8")) for path in (times, errors) if path}
    changed = []
    for name, shown in DOCUMENTS.items():
        path = root / name
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        parts = []
        for source, result in results.items():
            rows = [
                row
                for row in result["rows"]
                if shown(row) and source == (errors if row["name"] == "accuracy" else times)
            ]
            parts += [render({**result, "rows": rows}, source.relative_to(root).as_posix())] if rows else []
        table = "\n\n".join(parts)
        if models and name in WITH_MODELS:
            whole = json.loads(models.read_text(encoding="utf-8"))
            table += "\n\n" + end_to_end(whole, models.relative_to(root).as_posix())
        new = replaced(text, table, name)
        if new != text:
            changed.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    return changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    args = parser.parse_args()
    try:
        changed = update(ROOT, args.check)
    except ValueError as error:
        print(error)
        return 1
    print(("stale: " if args.check else "written: ") + ", ".join(changed) if changed else "up to date")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
