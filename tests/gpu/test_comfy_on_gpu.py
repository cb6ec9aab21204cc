"""The node in ComfyUI's own sampling on the GPU (comfy_on_gpu.py runs it, in a process of its own)."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sage_kernels import AttentionConfig
from sage_kernels.dispatch import Request, choose

SCRIPT = Path(__file__).with_name("comfy_on_gpu.py")


@pytest.fixture(scope="module")
def runs():
    if not os.environ.get("COMFYUI_DIR"):
        pytest.skip("set COMFYUI_DIR to a ComfyUI whose requirements this Python has")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# "accurate" is asked for with attention "both", but the prompt has fewer tokens than min_tokens.
ASKED = {
    "auto": AttentionConfig(),
    "int8": AttentionConfig(pv_accum="int8/int32"),
    "accurate": AttentionConfig(intent="accurate"),
    "fp8": AttentionConfig(pv_accum="fp8/fp32+fp16"),  # or, without the CUDA kernels, the nearest at least as accurate
}


@pytest.mark.parametrize("name", ASKED)
def test_the_gpu_serves_every_self_attention_call(runs, name, record_property):
    run = runs[name]
    record_property("relative_l2", run["relative_l2"])
    (taken,) = run["report"]["taken"]
    expected = choose(Request(replace(ASKED[name], strict=False), torch.device("cuda", 0)))
    record_property("served by", str(expected))
    assert expected.backend in ("cuda", "triton")
    assert (taken["backend"], taken["mode"], taken["calls"]) == (expected.backend, expected.mode, 6 * 12)
    assert taken["blocks"] == list(range(6)) and taken["steps"] == list(range(12))
    assert not run["report"]["errors"]
    replaced = [note for note in run["report"]["notes"] if "is not available" in note]
    assert bool(replaced) == bool(expected.notes)
    assert 0 < run["relative_l2"] < 0.1


def test_a_compiled_model_runs_on_the_kernels(runs):
    run = runs["compiled"]
    assert 0 < run["relative_l2"] < 0.1
    assert any("12 of 12 model calls ran with the patch on" in note for note in run["report"]["notes"])
    assert not run["report"]["errors"]
