"""install.py: what it does, says and leaves behind, on a made-up machine whose nvcc is a small program."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_in

from csrc import build, lock, machine, pypi, wheels

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nvcc's stand-in is a shell script")

BINARY = build.binary_name()


def there(go):
    """The pack's files: nothing half-installed among them."""
    return {path.name: path.read_text() for path in go.package.iterdir()} if go.package.exists() else {}


def test_builds_once(go):
    assert go() == 0
    assert "GPU           Card 0, compute capability 8.9" in go.said
    assert "Plan:         Build the CUDA kernels for compute capability 8.9" in go.said
    assert f"Built {go.binary}. Restart ComfyUI" in go.said and list(there(go)) == [BINARY]
    before = go.binary.stat()
    assert go() == 0 and "Nothing to do" in go.said and "[" not in go.said
    assert go.binary.stat().st_mtime_ns == before.st_mtime_ns


def test_builds_again_after_an_update(go, csrc):
    go()
    (csrc / "kernel.cu").write_text("// an update\n")
    assert go() == 0 and "built from other sources" in go.said and "Built" in go.said
    assert "an update" in there(go)[BINARY]


@pytest.mark.parametrize("option", ["--check", "--json"])
def test_check_changes_nothing(go, tmp_path, option):
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "package").mkdir()
    assert go(option) == 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "package"])
    if option == "--check":
        assert re.search(r"^nvcc +CUDA 13.0.*^Plan: +Build", go.said, re.MULTILINE | re.DOTALL)
    else:
        told = json.loads(go.said)
        assert told["plan"]["kind"] == "build" and told["plan"]["archs"] == ["8.9"]
        assert told["machine"]["gpus"] == [{"name": "Card 0", "arch": "8.9"}]
        what = "python system torch torch_cuda driver driver_cuda nvcc nvcc_cuda host triton comfyui binary"
        assert set(what.split()) < set(told["machine"]) and {"sentence", "nvcc", "fetch_mb", "wheel"} < set(
            told["plan"]
        )


def test_check_fails_where_the_run_would(go):
    assert go("--check", python="3.9.1") == 1 and "needs Python 3.10" in go.error
    assert go("--json", python="3.9.1") == 1 and json.loads(go.said)["plan"]["kind"] == "fail"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(missing=("g++ was not found: install it",)), "The triton backend serves attention"),
        (dict(gpus=(), driver_problem="no NVIDIA GPU was found"), "The reference backend serves attention"),
        (dict(nvcc_cuda=(12, 4), driver_cuda=(12, 8), torch_cuda=(12, 8)), "needs 12.8"),
        (dict(missing=("Python.h is not in /x: install it",)), "Python.h"),
    ],
)
def test_nothing_to_build_is_no_failure(go, monkeypatch, changes, words):
    monkeypatch.setattr(pypi, "fetch", lambda *given: pytest.fail("pip is run"))
    assert go(**changes) == 0 and words in go.said and "without CUDA kernels" in go.said and not there(go)


def test_a_build_that_was_asked_for_and_cannot_be_is_a_failure(go):
    assert go("--archs", "8.9", missing=("nvcc is not at /x: pass --nvcc the path of the program",)) == 1
    assert "cannot be built: nvcc is not at /x" in go.error
    assert go("--archs", "9.1") == 1 and "'9.1' is no architecture" in go.error
    assert go("--archs", "8.9", "--jobs", "0") == 1 and "--jobs is 0" in go.error and not there(go)


def test_what_a_build_is_given(go, monkeypatch, tmp_path):
    given = []

    def fake(*options, package, **others):
        given.append(options)
        (package / BINARY).write_text("anything")
        return package / BINARY

    monkeypatch.setattr(build, "build", fake)
    options = ["--archs", "8.9, 9.0", "--jobs", "2", "--nvcc", "/x/nvcc", "--build-dir", tmp_path / "there"]
    assert go(*options) == 0 and "Built" in go.said
    assert given == [(("8.9", "9.0"), 2, "/x/nvcc", tmp_path / "there")]


def test_a_failing_compile_leaves_the_old_binary(go, csrc):
    go()
    before = there(go)
    (csrc / "kernel.cu").write_text("error\n")
    assert go() == 1 and 'identifier "nothing" is undefined' in go.error and there(go) == before
    (csrc / "kernel.cu").write_text("// mended\n")
    assert go() == 0 and "mended" in there(go)[BINARY]


def test_a_binary_that_does_not_load_is_not_put_in(go, monkeypatch):
    go.package.mkdir()
    go.binary.write_text("old")

    def fake(*options, package, **others):
        (package / BINARY).write_text("broken")
        return package / BINARY

    monkeypatch.setattr(build, "build", fake)
    assert go() == 1 and "cannot be loaded by this Python" in go.error and there(go) == {BINARY: "old"}


def test_a_full_disk(go, monkeypatch):
    def full(source, target):
        Path(target).write_text("half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(build.shutil, "copy2", full)
    assert go() == 1 and "No space left on device" in go.error and not there(go)


def test_interrupted(go, monkeypatch):
    def stop(*options, **others):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "build", stop)
        assert go() == 130 and "Nothing was installed" in go.error and not there(go)
    (go.package / f"{BINARY}.77.tmp").write_text("half, by a run that was killed")
    assert go() == 0 and list(there(go)) == [BINARY]


# ---- wheels


def test_a_wheel_is_made_and_served(go, tmp_path):
    index = tmp_path / "an index"
    assert go("--archs", "8.9", "--build-wheel", "--index", index) == 0
    assert not there(go), "a wheel for others is not this pack's binary"
    assert (index / "index.html").is_file() and len(list(index.glob("*.whl"))) == 1
    assert go("--index", index, missing=("nvcc was not found: install it",)) == 0
    assert "Plan:         Download sage_kernels" in go.said and f"Downloaded {go.binary}" in go.said
    assert go("--index", index) == 0 and "Nothing to do" in go.said


def test_no_download(go, tmp_path):
    index = tmp_path / "index"
    go("--archs", "8.9", "--build-wheel", "--index", index)
    assert go("--index", index, "--no-download") == 0 and "Built" in go.said and "--no-download" in go.said


def test_out(go, tmp_path):
    assert go("--archs", "8.9", "--build-wheel", "--out", tmp_path / "out") == 0
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".whl"] and not there(go)


def test_an_index_that_lies_about_a_hash(go, tmp_path):
    index = tmp_path / "index"
    go("--archs", "8.9", "--build-wheel", "--index", index)
    page = (index / "index.html").read_text()
    (index / "index.html").write_text(re.sub("sha256=[0-9a-f]{64}", f"sha256={'0' * 64}", page))
    go.binary.write_text("old")
    assert go("--index", index) == 1 and "sha256" in go.error and there(go) == {BINARY: "old"}


def test_an_index_that_cannot_be_read_is_one_without_wheels(go, tmp_path):
    lacks = dict(missing=("g++ was not found: install it",))
    assert (
        go("--index", tmp_path / "nowhere", **lacks) == 0 and not there(go) and "The triton backend serves" in go.said
    )
    assert "without CUDA kernels: the index" in go.said and "nowhere is neither" in go.said and "g++ was not" in go.said
    assert go("--index", tmp_path / "nowhere") == 0 and list(there(go)) == [BINARY]
    assert "Build the CUDA kernels for compute capability 8.9" in go.said and "nowhere is neither" in go.said


def test_the_index_is_asked_once(go, monkeypatch):
    asked = []
    monkeypatch.setattr(wheels, "find", lambda index, machine: asked.append(index) or "it has none")
    assert (
        go("--index", "https://example.org") == 0 and "as it has none" in go.said and asked == ["https://example.org"]
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (["--out", "x"], "give it with --build-wheel"),
        (["--build-wheel", "--out", "x", "--index", "y"], "give one of them"),
        (["--build-wheel", "--index", "https://example.com/x"], "a folder only"),
    ],
)
def test_options_that_contradict(go, capsys, options, words):
    with pytest.raises(SystemExit):
        go(*options)
    assert words in capsys.readouterr().err


# ---- two at once, and killed ones


@pytest.fixture
def start(tmp_path, csrc, nvcc):
    """start(*options): install.py as a process."""
    nvcc()
    (csrc / "bindings.cpp").write_text("// slow\n")
    environment = {key: value for key, value in os.environ.items() if key != "SAGE_KERNELS_INDEX"}
    started = []

    def run(*options, by=()):
        process = subprocess.Popen(
            [*by, sys.executable, stand_in.__file__, tmp_path, *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_for_compiler(folder, process):
    """Until the slow file is being compiled."""
    log = folder / "build" / "arguments.txt"
    for _ in range(600):
        if log.exists() and "bindings.cpp" in log.read_text():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    pytest.fail("no compiler is run")


def test_the_second_waits_and_finds_nothing_to_do(start, tmp_path):
    first = start("--jobs", "1")
    wait_for_compiler(tmp_path, first)
    second = start("--jobs", "1")
    (one, _), (two, _) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert first.returncode == second.returncode == 0, one + two
    assert "Built" in one and "Another install.py" not in one
    assert "Another install.py is at work" in two and "Nothing to do" in two and "Built" not in two
    assert os.listdir(tmp_path / "package") == [BINARY]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_work(start, tmp_path, by):
    """The compiler outlives it, so the next run waits for that, too, and then completes."""
    first = start("--jobs", "1")
    wait_for_compiler(tmp_path, first)
    first.send_signal(by)
    first.wait(timeout=60)
    assert not list((tmp_path / "package").iterdir())
    second = start("--jobs", "1")
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "Built" in said, said
    assert "Another install.py is at work" in said
    assert os.listdir(tmp_path / "package") == [BINARY]


@pytest.mark.parametrize(
    "folder, words", [("package", "as the user whom it belongs to"), ("build", "Permission denied")]
)
def test_a_read_only_folder(start, tmp_path, folder, words):
    """Root may write everywhere, but for what it lets go of."""
    by = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may write everywhere, and setpriv (util-linux) is not here")
        by = ["setpriv", "--bounding-set=-dac_override"]
    (tmp_path / "package").mkdir()
    (tmp_path / "build").mkdir()
    (tmp_path / folder).chmod(0o500)
    process = start(by=by)
    said, _ = process.communicate(timeout=60)
    (tmp_path / folder).chmod(0o700)
    assert process.returncode == 1 and "Nothing was installed" in said and words in said, said
    assert str(tmp_path / folder) in said and "Traceback" not in said
    assert not list((tmp_path / folder).iterdir()) and not (tmp_path / "build" / "arguments.txt").exists()


def test_a_file_system_without_locks(monkeypatch, tmp_path):
    def none(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock, "_lock", none)
    said = []
    with lock.held(tmp_path / "a folder" / "lock", said.append):
        assert "cannot be locked (Operation not supported)" in said[0]


# ---- as a program


def test_runs_as_a_script(tmp_path):
    """As ComfyUI-Manager runs it, and isolated as Windows' portable Python is: nothing on the import path."""
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-I", "install.py"], cwd=stand_in.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Python") and lines[-1].startswith("Plan:") and len(lines) < 20
    assert "nvcc          none" in lines


def test_imports_no_torch():
    code = "import install, sys; from csrc.machine import Machine; Machine.look(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=stand_in.ROOT).returncode == 0


def test_what_is_missing_here_is_said(bare, nvcc, monkeypatch, tmp_path):
    said = machine.Machine.look()
    assert said.nvcc is said.host is None and not said.nvcc_given
    assert "nvcc was not found" in said.nvcc_problem and "C++ compiler" in said.missing[0]
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(Path(nvcc("12.4")).parents[1]))
    monkeypatch.setenv("CXX", shutil.which("sh", path=os.defpath))
    said = machine.Machine.look()
    assert (
        said.nvcc_cuda == (12, 4) and said.host.endswith("sh") and ["Python.h" in why for why in said.missing] == [True]
    )
    said = machine.Machine.look("/x/nvcc")
    assert "not at /x/nvcc" in said.nvcc_problem and said.nvcc_given
