"""The node in ComfyUI's own sampling on the GPU (comfy_on_gpu.py runs it, in a process of its own)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("comfy_on_gpu.py")


@pytest.fixture(scope="module")
def runs():
    if not os.environ.get("COMFYUI_DIR"):
        pytest.skip("set COMFYUI_DIR to a ComfyUI whose requirements this Python has")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name,mode,calls",
    [
        ("auto", "fp16/fp32", 6 * 12),
        ("int8", "int8/int32", 6 * 12),
        ("accurate", "fp16/fp32", 6 * 12),  # attention "both", but the prompt has fewer tokens than min_tokens
        ("fp8, not here", "int8/int32", 6 * 12),  # the nearest mode at least as accurate
    ],
)
def test_the_gpu_serves_every_self_attention_call(runs, name, mode, calls, record_property):
    run = runs[name]
    record_property("relative_l2", run["relative_l2"])
    (taken,) = run["report"]["taken"]
    assert (taken["backend"], taken["mode"], taken["calls"]) == ("triton", mode, calls)
    assert taken["blocks"] == list(range(6)) and taken["steps"] == list(range(12))
    assert not run["report"]["errors"]
    assert any("fp8/fp32+fp16 is not available" in note for note in run["report"]["notes"]) == (name == "fp8, not here")
    assert 0 < run["relative_l2"] < 0.1


def test_a_compiled_model_runs_on_the_kernels(runs):
    run = runs["compiled"]
    assert 0 < run["relative_l2"] < 0.1
    assert any("12 of 12 model calls ran with the patch on" in note for note in run["report"]["notes"])
    assert not run["report"]["errors"]
