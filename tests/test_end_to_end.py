"""benchmarks/end_to_end.py on the CPU with tiny models: everything but the speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = Path(os.environ.get("COMFYUI_DIR", ROOT / ".comfy" / "ComfyUI"))
BLOCKS, CALLS = {"wan": 2, "flux": 3}, 2  # a step to warm up and a timed one


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    if not (COMFYUI / "comfy").is_dir():
        pytest.skip(f"no ComfyUI in {COMFYUI}: make setup installs one, or set COMFYUI_DIR")
    out = tmp_path_factory.mktemp("end_to_end") / "out.json"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    command = [sys.executable, ROOT / "benchmarks" / "end_to_end.py", "--tiny", "--models", "wan,flux", "--steps", "1"]
    command += ["--modes", "auto,fp16/fp32,int8/int32", "--out", out]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "left out: fp16/fp32: the same kernel as auto" in done.stdout
    return json.loads(out.read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("model", BLOCKS)
def test_every_attention_is_verified_and_timed(rows, model):
    mine = [row for row in rows if row["model"] == model]
    assert [row["backend"] for row in mine] == ["torch", "comfyui", "reference", "reference"]
    assert [row["mode"] for row in mine][2:] == ["fp16/fp32", "int8/int32"]
    assert all(row["ms"] > 0 and "error" not in row for row in mine)
    errors = [row["rel_l2"] for row in mine]
    assert errors[0] is None and 0 < errors[1] < 0.02
    assert len(set(errors)) == 4 and all(0 < error < 0.03 for error in errors[1:]), "each ran, and none is far off"


@pytest.mark.parametrize("model", BLOCKS)
def test_calls_that_were_passed_on_are_told_with_their_reason(rows, model):
    passed = [{"reason": "cross attention (attention is set to self)", "calls": BLOCKS[model] * CALLS}]
    for row in rows:
        if row["model"] == model and row["backend"] == "reference":
            assert row["taken"] == [{"backend": "reference", "mode": row["mode"], "calls": BLOCKS[model] * CALLS}]
            assert row.get("passed") == (passed if model == "wan" else None)
