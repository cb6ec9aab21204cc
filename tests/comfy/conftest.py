"""One real ComfyUI for the session, with tiny random models."""

import os
import subprocess
from pathlib import Path

import pytest
from graphs import PACK, Comfy
from runtime import ROOT, Server, comfyui_dir, comfyui_python


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    if not (comfyui_dir() / "main.py").exists():
        pytest.fail(f"no ComfyUI in {comfyui_dir()}: run python tests/comfy/runtime.py setup, or set COMFYUI_DIR")
    base = tmp_path_factory.mktemp("comfy")
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True)
    script = Path(__file__).with_name("tiny_models.py")
    subprocess.run([comfyui_python(), script, comfyui_dir(), models], check=True)
    packs = {PACK: ROOT, "test_pack": Path(__file__).with_name("pack")}
    port = int(os.environ.get("COMFYUI_TEST_PORT", 0))
    with Server(base, packs=packs, port=port, args=["--cache-none"]) as server:
        yield Comfy(server)
