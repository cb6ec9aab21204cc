"""What ComfyUI-Manager does with the pack after it has cloned it: its own `cm-cli post-install`, from its wheel on PyPI."""

import os
import re
import shutil
import subprocess
import sysconfig
import venv

import pytest
from runtime import ROOT, comfyui_dir

MANAGER = "comfyui-manager==4.3"
COMFYUI = ("main.py", "comfyui_version.py", "folder_paths.py", "comfy", "utils")
PACK = (
    "__init__.py",
    "install.py",
    "requirements.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "nodes",
    "csrc",
    "sage_kernels",
)


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """An environment of its own for the Manager, which sees this one's packages and cannot change them."""
    environment = tmp_path_factory.mktemp("manager") / "env"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    with open(os.path.join(theirs, "ours.pth"), "w", encoding="utf-8") as file:
        file.write(sysconfig.get_path("purelib"))
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", MANAGER], check=True)
    return environment / "bin" / "cm-cli"


@pytest.fixture
def pack(tmp_path):
    """The pack as it is cloned, nothing built, in as much of a ComfyUI as the Manager looks at."""
    comfyui = tmp_path / "a ComfyUI, ünder"
    copy(comfyui_dir(), COMFYUI, comfyui)
    copy(ROOT, PACK, comfyui / "custom_nodes" / "sage päck")
    return comfyui / "custom_nodes" / "sage päck"


def copy(folder, names, to):
    to.mkdir(parents=True)
    for name in names:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, to / name, ignore=shutil.ignore_patterns("build", "_C*", "__pycache__"))
        else:
            shutil.copy(folder / name, to)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_post_install_without_a_gpu(manager, pack):
    before = files(pack)
    environment = {name: value for name, value in os.environ.items() if name != "SAGE_KERNELS_INDEX"}
    environment |= {
        "COMFYUI_PATH": str(pack.parents[1]),
        "CUDA_VISIBLE_DEVICES": "",  # a machine with a GPU has none here
        "COLUMNS": "1000",  # it folds what it says
    }
    done = subprocess.run(
        [manager, "post-install", pack], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "EXECUTE" in done.stdout and "install.py" in done.stdout, "it does not run install.py any more"
    assert re.search(rf"^ComfyUI       [0-9.]+ \({re.escape(str(pack.parents[1]))}\)$", done.stdout, re.MULTILINE)
    plans = [line for line in done.stdout.splitlines() if line.startswith("Plan: ")]
    assert len(plans) == 1 and "serves attention, on the CPU, without CUDA kernels: no NVIDIA" in plans[0], done.stdout
    assert "error" not in done.stdout.lower() and files(pack) == before
