"""The tables of the documents come from a result file, and the committed ones from the newest."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402


def row(backend, mode, ms, **more):
    fixed = {"shape": [1, 2, 1000, 500, 64], "causal": False, "dtype": "bfloat16", "tflops": None, "rel_l2": 0.01,
             "inputs": "gauss", "name": "Wan cross"}  # fmt: skip
    return {**fixed, "backend": backend, "mode": mode, "ms": ms, "tflops": ms and 600 / ms, **more}


def result(date="2026-01-02T00:00:00+00:00", ms=2.0):
    rows = [row("torch", "cudnn bf16", 3.0), row("triton", "fp16/fp32", ms, qk_quant_gran="per_warp", intents=["auto"])]
    rows += [row("peer", "int8", None, error="it fails")]
    rows += [row("reference", "fp8/fp32", None, name="accuracy", inputs=kind) for kind in ("gauss", "peaky")]
    return {"machine": "GPU", "driver": "1", "torch": "2", "commit": "abc", "date": date, "rows": rows}


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/accuracy.md"):
        (tmp_path / name).write_text(f"before\n{tables.BEGIN}\nyesterday\n{tables.END}\nafter\n", encoding="utf-8")
    return tmp_path


def put(tree, name, content):
    (tree / "benchmarks" / "results" / name).write_text(json.dumps(content), encoding="utf-8")


def test_tables_are_written_and_then_up_to_date(tree):
    put(tree, "a.json", result())
    assert tables.update(tree, check=True) == ["README.md", "docs/accuracy.md"]
    assert "yesterday" in (tree / "README.md").read_text(encoding="utf-8"), "--check writes nothing"
    assert tables.update(tree, check=False) == ["README.md", "docs/accuracy.md"]
    text = (tree / "README.md").read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "yesterday" not in text
    assert "| Wan cross: 1,2,1000×500,64 | 200 | **300 (1.50×)** | fails |" in text, "what auto took is bold"
    assert "| **triton** fp16/fp32 per_warp |" in text
    assert "emulation" not in text, "emulations have no speed: they are docs/accuracy.md's"
    assert "benchmarks/results/a.json" in text and "commit abc" in text
    text = (tree / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert "| emulation fp8/fp32 | 0.010 | 0.010 | fails |" in text and "Wan cross" not in text
    assert tables.update(tree, check=True) == []


def test_the_newest_date_counts_not_the_name(tree):
    put(tree, "z.json", result())
    put(tree, "a.json", result("2026-01-03T00:00:00+00:00", ms=1.5))
    tables.update(tree, check=False)
    assert "400 (2.00×)" in (tree / "README.md").read_text(encoding="utf-8")


def test_times_and_errors_may_be_of_two_files(tree):
    """A later run without accuracy rows replaces the times alone, and names its commit beside them."""
    put(tree, "a.json", result())
    later = result("2026-01-03T00:00:00+00:00", ms=1.5)
    times = [line for line in later["rows"] if line["name"] != "accuracy"]
    put(tree, "b.json", {**later, "commit": "def", "rows": times})
    assert tables.update(tree, check=False) == ["README.md", "docs/accuracy.md"]
    text = (tree / "README.md").read_text(encoding="utf-8")
    assert "400 (2.00×)" in text and "300 (1.50×)" not in text and "commit def" in text and "b.json" in text
    text = (tree / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert "| emulation fp8/fp32 | 0.010 |" in text and "commit abc" in text
    assert "a.json" in text and "b.json" not in text


def test_whole_models_have_a_table_of_their_own(tree):
    put(tree, "a.json", result())
    tables.update(tree, check=False)
    before = (tree / "README.md").read_text(encoding="utf-8")
    wan = dict(model="wan", name="Wan", spread=0.01, peak_gib=60.25)
    passed = [{"reason": "cross attention", "calls": 160}]
    taken = dict(taken=[{"backend": "triton", "mode": "fp16/fp32", "calls": 160}], passed=passed)
    videos = dict(model="demo", name="demo", psnr_db=41.25, psnr_min_db=38.5, recognised="10 of 10")
    rows = [row("torch", "cudnn", 9000.0, **wan), row("triton", "fp16/fp32", 7500.0, **wan, **taken)]
    rows += [row("triton", "int8/int32", None, **wan, error="wrong"), row("triton", "fp16/fp32", None, **videos)]
    put(tree, "end-to-end-a.json", {**result("2026-01-04T00:00:00+00:00"), "rows": rows})
    assert tables.newest(tree / "benchmarks" / "results").name == "a.json"
    assert tables.update(tree, check=False) == ["README.md"]
    text = (tree / "README.md").read_text(encoding="utf-8")
    for line in before.split(tables.END)[0].splitlines():
        assert line in text
    assert "| Wan | torch cudnn | 9 | 60.2 | 0.0100 | - |" in text
    assert "| Wan | **triton** fp16/fp32 | 7.5 (1.20×) | 60.2 | 0.0100 | 160 of 320 |" in text
    assert "| Wan | **triton** int8/int32 | fails |" in text and "not served: cross attention." in text
    assert "| demo | **triton** fp16/fp32 | 41.2 | 38.5 | 10 of 10 | - |" in text
    chart = text.split("```mermaid")[1].split("```")[0]
    assert 'x-axis ["torch cudnn", "triton fp16/fp32"]' in chart and "bar [9, 7.5]" in chart and "0 --> 10" in chart
    assert tables.update(tree, check=True) == []


def test_no_markers_and_no_results_are_errors(tree):
    with pytest.raises(ValueError, match="no result file"):
        tables.update(tree, check=True)
    put(tree, "a.json", result())
    (tree / "README.md").write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="README.md must hold"):
        tables.update(tree, check=True)


def test_committed_tables_are_fresh():
    if tables.newest(ROOT / "benchmarks" / "results") is None:
        pytest.skip("no result file is committed yet")
    assert tables.update(ROOT, check=True) == [], "run python benchmarks/tables.py"


def test_committed_results_have_the_agreed_keys():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name.startswith("tests-"):
            assert {"machine", "driver", "torch", "commit", "passed", "failed", "cases"} <= set(content), path
            continue
        if not tables.is_benchmark(content):  # of another script: counters, rates, instructions
            assert {"commit", "date"} < set(content), path
            continue
        assert {"machine", "driver", "torch", "commit", "rows"} <= set(content), path
        for line in content["rows"]:
            assert {"shape", "causal", "dtype", "backend", "mode", "ms", "tflops", "rel_l2"} <= set(line), path
            assert len(line["shape"]) == 5
