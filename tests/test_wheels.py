"""csrc/wheels.py through the real pip: indexes on loopback and in folders, with what goes wrong in them.

A few bytes stand in for the binary, and what it says of itself is patched; one test has the real one, where it is built.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from index_server import Server
from packaging import tags
from packaging.utils import parse_wheel_filename
from stand_in import PLATFORMS, PYTHON, SOURCE, machine_with

from csrc import build, make_wheel, pypi, wheels
from csrc.wheels import WheelError

BINARY = build.binary_name()
WHOLE = b"the new binary" + bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def what_the_stand_in_says(plain_environment, monkeypatch):
    monkeypatch.setattr(wheels, "binary_info", lambda binary: (["8.9"], 13000, SOURCE))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(archs, ...) puts a wheel into make.folder and lists it in the index there."""

    def go(*archs, cuda=13000, source=SOURCE, name=None, content=WHOLE):
        with monkeypatch.context() as patch:
            patch.setattr(make_wheel, "binary_info", lambda binary: (list(archs or ["8.9"]), cuda, source))
            if name:
                patch.setattr(make_wheel, "_this_python", lambda: name)
            (tmp_path / BINARY).write_bytes(content)
            wheel = wheels.build_wheel(tmp_path / BINARY, None, go.folder, lambda line: None)
        wheels.write_index(go.folder)
        return wheel

    go.folder = tmp_path / "some wheels, ünder"
    return go


@pytest.fixture
def package(tmp_path):
    """A package with an older binary in it."""
    folder = tmp_path / "my päck" / "sage_kernels"
    folder.mkdir(parents=True)
    (folder / BINARY).write_bytes(b"the old binary")
    return folder


def unchanged(package):
    return os.listdir(package) == [BINARY] and (package / BINARY).read_bytes() == b"the old binary"


@pytest.fixture
def server(make):
    make.folder.mkdir(exist_ok=True)
    with Server(make.folder) as running:
        yield running


def installed(index, package):
    said = []
    found = wheels.find(str(index), machine_with())
    assert isinstance(found, wheels.Candidate), found
    assert wheels.install(found, package, said.append) == package / BINARY
    assert (package / BINARY).read_bytes() == WHOLE and os.listdir(package) == [BINARY]
    return said


# ---- making wheels


def test_a_wheel_holds_the_binary_and_says_what_it_fits(make):
    wheel = make("12.0+PTX", "8.9", cuda=12080)
    project, version, tag, fits = parse_wheel_filename(wheel.name)
    assert (project, str(version)) == ("sage-kernels-cuda", make_wheel.pyproject()["project"]["version"])
    assert "".join(map(str, tag)) == f"12.8.sm89.sm120ptx.src{SOURCE}"
    assert fits & set(tags.sys_tags()) and {tag.interpreter for tag in fits} == {tag.abi for tag in fits} == {PYTHON}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.testzip() is None and names == sorted(names)
        assert [name for name in names if ".dist-info/" not in name] == [f"sage_kernels/{BINARY}"]
        assert archive.read(names[0]) == WHOLE
        record = archive.read(next(name for name in names if name.endswith("RECORD"))).decode()
    assert [line.split(",")[0] for line in record.splitlines()] == [*(n for n in names if "RECORD" not in n), names[3]]


def test_same_binary_same_bytes(make, tmp_path):
    first = make().read_bytes()
    os.utime(tmp_path / BINARY, (1, 1))
    (tmp_path / BINARY).chmod(0o777)
    old = os.umask(0o077)
    try:
        assert make().read_bytes() == first
    finally:
        os.umask(old)
    assert make(content=b"another").read_bytes() != first


def test_a_binary_of_other_archs_is_no_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(make_wheel, "binary_info", lambda binary: (["8.9"], 13000, SOURCE))
    with pytest.raises(WheelError, match="built for 8.9 and not for 9.0: build it"):
        wheels.build_wheel(tmp_path / BINARY, ["9.0"], tmp_path)
    with pytest.raises(WheelError, match="cannot be written"):
        wheels.build_wheel(tmp_path / BINARY, ["8.9"], tmp_path)


def test_a_file_that_cannot_be_loaded_is_no_binary(tmp_path):
    (tmp_path / BINARY).write_bytes(b"no ELF")
    with pytest.raises(WheelError, match=f"{re.escape(BINARY)} cannot be loaded by this Python"):
        make_wheel.binary_info(tmp_path / BINARY)


@pytest.mark.skipif(not (build.PACKAGE / BINARY).exists(), reason="the CUDA binary is not built")
def test_the_real_binary(tmp_path, package, monkeypatch):
    monkeypatch.undo()
    binary = build.PACKAGE / BINARY
    archs, cuda, source = make_wheel.binary_info(binary)
    wheel = wheels.build_wheel(binary, archs, tmp_path / "out", lambda line: None)
    wheels.write_index(tmp_path / "out")
    found = wheels.find(str(tmp_path / "out"), machine_with(archs[0].removesuffix("+PTX"), source_hash=source))
    assert found.name == wheel.name and (found.archs, found.cuda[0]) == (tuple(archs), cuda // 1000)
    wheels.install(found, package, lambda line: None)
    assert (package / BINARY).read_bytes() == binary.read_bytes()


# ---- an index


def test_the_index_is_pep_503(make):
    wheel = make()
    make("9.0")
    (make.folder / "other.whl").write_bytes(b"")
    page = (make.folder / "index.html").read_text()
    assert page.count("<a ") == 2 and len(os.listdir(make.folder)) == 4
    assert f'<a href="{wheel.name}#sha256={hashlib.sha256(wheel.read_bytes()).hexdigest()}">{wheel.name}</a>' in page


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_a_failed_write_leaves_the_old_index(make, monkeypatch, fails):
    wheel = make()
    before = (make.folder / "index.html").read_text()
    wheel.unlink()

    def full(path, content):
        Path(path).touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(*((Path, "write_bytes") if fails == "write" else (os, "replace")), full)
    with pytest.raises(WheelError, match="cannot be written: No space left"):
        wheels.write_index(make.folder)
    assert (make.folder / "index.html").read_text() == before and os.listdir(make.folder) == ["index.html"]


def test_which_index(monkeypatch):
    configured = {}
    monkeypatch.setattr(wheels, "pyproject", lambda: {"tool": {"sage_kernels": configured}})
    assert wheels.configured_index(None) is None
    configured["index"] = "dist"
    assert wheels.configured_index(None) == str(wheels.ROOT / "dist")
    configured["index"] = "https://x/index.html"
    assert wheels.configured_index(None) == "https://x/index.html"
    monkeypatch.setenv("SAGE_KERNELS_INDEX", "/environment")
    assert wheels.configured_index(None) == "/environment" and wheels.configured_index("/given") == "/given"
    assert wheels.configured_index("") is None
    monkeypatch.setenv("SAGE_KERNELS_INDEX", "")
    assert wheels.configured_index(None) is None


def test_our_pyproject_names_no_index():
    assert wheels.configured_index(None) is None and wheels.pyproject()["project"]["name"] == "sage-attention-patch"


def test_a_pyproject_that_is_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(make_wheel, "ROOT", tmp_path)
    assert make_wheel.pyproject() == {}
    (tmp_path / "pyproject.toml").write_text("[tool")
    with pytest.raises(WheelError, match="pyproject.toml cannot be read"):
        wheels.configured_index(None)


def test_what_is_no_wheel_of_ours_is_passed_over(make, server):
    wheel = make()
    good = (make.folder / "index.html").read_text()
    (make.folder / "index.html").write_text(re.sub("#sha256=[0-9a-f]+", "", good))
    assert "lists no sage_kernels_cuda wheel" in wheels.find(server.url, machine_with())
    (make.folder / "index.html").write_text(good.replace("<a ", '<a data-yanked="broken" '))
    assert "lists no" in wheels.find(server.url, machine_with())
    other = f'<a href="torch-2.0-cp312-cp312-linux_x86_64.whl#sha256={"0" * 64}">'
    (make.folder / "index.html").write_text(f'<a href=""><a href="{wheel.name}x.zip">{other}{good}')
    assert wheels.find(server.url, machine_with()).name == wheel.name


# ---- from the index to the package


@pytest.mark.parametrize("kind", ["folder", "its index.html", "file address", "server", "page", "root"])
def test_install_from_an_index(make, server, package, kind, tmp_path):
    make()
    make("12.0")
    if kind == "root":
        make.folder.rename(tmp_path / "Sage.Kernels_cuda")
        make.folder.mkdir()
        (tmp_path / "Sage.Kernels_cuda").rename(make.folder / "Sage.Kernels_cuda")
        (make.folder / "index.html").write_text('<a href="torch/">torch</a> <a href="Sage.Kernels_cuda/">x</a>')
    at = {
        "folder": make.folder,
        "its index.html": make.folder / "index.html",
        "file address": make.folder.as_uri(),
        "server": server.url.rstrip("/"),
        "page": server.url + "index.html",
        "root": server.url,
    }
    assert "Downloading sage_kernels_cuda-" in installed(at[kind], package)[0]


def test_a_transfer_that_breaks_is_tried_again(make, server, package):
    wheel = make()
    server.bad[".whl"] = "once"
    installed(server.url, package)
    assert server.seen.count(f"/{wheel.name}") == 2


def test_an_index_page_that_breaks_is_read_again(make, server, package):
    make()
    server.bad["/"] = "once"
    installed(server.url, package)
    assert server.seen.count("/") == 2


def test_a_slow_server(make, server, package):
    make()
    server.bad[".whl"] = "slow"
    threading.Timer(0.5, server.go_on.set).start()
    installed(server.url, package)
    assert server.sending.is_set()


@pytest.mark.parametrize(
    "bad, words", [("truncated", "another sha256|not enough bytes"), ("changed", "another sha256"), ("broken", "500")]
)
def test_a_wheel_that_does_not_arrive_whole(make, server, package, bad, words):
    make()
    server.bad[".whl"] = bad
    found, said = wheels.find(server.url, machine_with()), []
    with pytest.raises(WheelError, match=f"was not installed, after 3 tries: .*({words}).*{server.url}"):
        wheels.install(found, package, said.append)
    assert unchanged(package) and sum("trying again" in line for line in said) == 2


@pytest.mark.parametrize("bad, words", [("truncated", "IncompleteRead"), ("broken", "Internal Server Error")])
def test_an_index_that_cannot_be_read(make, server, bad, words):
    make()
    server.bad["/"] = bad
    with pytest.raises(WheelError, match=f"the index {server.url} cannot be read.*{words}.*check the address"):
        wheels.find(server.url, machine_with())
    assert len(server.seen) == 3
    server.bad.clear()
    with pytest.raises(WheelError, match="cannot be read .Not Found"):
        wheels.find(server.url + "nothing", machine_with())
    assert len(server.seen) == 4, "that does not change by asking again"


def test_no_network():
    with Server(Path()) as closed:
        url = closed.url
    with pytest.raises(WheelError, match="cannot be read .*refused.*check the address, the network and the proxy"):
        wheels.find(url, machine_with())


@pytest.mark.parametrize("index", ["/nowhere/at all", "ftp://x/y", "http://name:secret@127.0.0.1/"])
def test_no_index_there(index):
    with pytest.raises(WheelError, match="neither an http.s. address nor a folder|cannot be read"):
        wheels.find(index, machine_with())


def test_the_proxy_is_used(make, server, package, monkeypatch):
    wheel = make()
    monkeypatch.setenv("http_proxy", server.url)
    installed("http://wheels.invalid/", package)
    assert server.seen == ["http://wheels.invalid/", f"http://wheels.invalid/{wheel.name}"]


@pytest.mark.parametrize(
    "case, words",
    [
        ("two", "holds sage_kernels/.*, sage_kernels/_C.so and this Python needs .* and nothing else"),
        ("none", "holds no binary"),
        ("other Python", "holds .*cpython-3000.* and this Python needs"),
        ("sources", "other sources than its name"),
        ("loads", "cannot be loaded by this Python"),
    ],
)
def test_a_wheel_of_wrong_contents(make, package, monkeypatch, case, words):
    entries = {
        "two": ["sage_kernels/_C.so", f"sage_kernels/{BINARY}"],
        "none": [],
        "other Python": ["sage_kernels/_C.cpython-3000.so"],
    }
    if case in entries:
        pack = make_wheel._zip

        def changed(files, record):
            about = {name: content for name, content in files.items() if ".dist-info/" in name}
            return pack({**about, **dict.fromkeys(entries[case], b"x")}, record)

        monkeypatch.setattr(make_wheel, "_zip", changed)
    elif case == "sources":
        monkeypatch.setattr(wheels, "binary_info", lambda binary: ([], 0, "another"))
    else:
        monkeypatch.setattr(wheels, "binary_info", make_wheel.binary_info)
    make()
    with pytest.raises(WheelError, match=words):
        wheels.install(wheels.find(str(make.folder), machine_with()), package, lambda line: None)
    assert unchanged(package)


@pytest.mark.parametrize(
    "said, words",
    [
        ("/x/python: No module named pip\n", "has no pip; run .* -m ensurepip"),
        ("a\nERROR: first\nb\n", "pip said: ERROR: first"),
        ("ERROR: Exception:\nTraceback\n  x\nRetryError: too many\n", "pip said: RetryError: too many"),
        ("", "pip said: nothing"),
    ],
)
def test_what_pip_says(said, words):
    assert re.search(words, pypi.failure(said.splitlines()))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_package_that_cannot_be_written(make, package):
    make()
    package.chmod(0o500)
    try:
        with pytest.raises(WheelError, match="cannot be written"):
            wheels.install(wheels.find(str(make.folder), machine_with()), package, lambda line: None)
    finally:
        package.chmod(0o700)
    assert unchanged(package)


def test_a_package_that_is_not_there(make, tmp_path):
    make()
    with pytest.raises(WheelError, match="cannot be installed into .*No such file"):
        wheels.install(wheels.find(str(make.folder), machine_with()), tmp_path / "nowhere", lambda line: None)


# ---- killed

INSTALL = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
root, index, package, python, platforms, source, at = sys.argv[1:]
sys.path.insert(0, root)
from csrc import wheels
wheels.binary_info = lambda binary: ([], 0, source)
if at == "replace":
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
gpu = SimpleNamespace(name="GPU", arch="8.9")
machine = SimpleNamespace(
    python_tag=python, platform_tags=platforms.split(), driver_cuda=(13, 0), gpus=(gpu,), source_hash=source
)
wheels.install(wheels.find(index, machine), Path(package))
"""


def install_by(python, server, package, at="", **options):
    """wheels.install in a process of its own."""
    arguments = [build.CSRC.parent, server.url, package, PYTHON, " ".join(PLATFORMS), SOURCE, at]
    return subprocess.Popen([python, "-c", INSTALL, *map(str, arguments)], **options)


@pytest.mark.skipif(sys.platform == "win32", reason="its Python is elsewhere")
def test_in_a_fresh_environment(make, server, package, fresh_python, tmp_path):
    """By its pip; where there is none, by Python, as long as packaging is there."""
    wheel = make()
    server.bad[".whl"] = "once"
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "packaging").symlink_to(Path(tags.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "path"), "PATH": fresh_python[2]}
    running = install_by(fresh_python[1], server, package, env=environment, stdout=subprocess.PIPE, text=True)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert (package / BINARY).read_bytes() == WHOLE and os.listdir(package) == [BINARY]
    assert server.seen.count(f"/{wheel.name}") == 2, "a transfer that breaks is tried again"


@pytest.mark.parametrize(
    "bad, words", [("truncated", "another sha256"), ("changed", "another sha256"), ("broken", "Server")]
)
def test_a_wheel_that_does_not_arrive_whole_without_pip(make, server, package, monkeypatch, bad, words):
    make()
    found = wheels.find(server.url, machine_with())
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    server.bad[".whl"] = bad
    with pytest.raises(WheelError, match=f"was not installed, after 3 tries: .*{words}"):
        wheels.install(found, package, lambda line: None)
    assert unchanged(package)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("at", ["download", "replace"])
def test_killed_while_it_installs(make, server, package, tmp_path, at):
    make()
    if at == "download":
        server.bad[".whl"] = "slow"
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    # a session of its own, so that its pip ends with it
    running = install_by(sys.executable, server, package, at, env=environment, start_new_session=True)
    if at == "download":
        assert server.sending.wait(20)
        os.killpg(running.pid, signal.SIGKILL)
    assert running.wait(20) == -signal.SIGKILL
    assert (package / BINARY).read_bytes() == b"the old binary"
    left = [name for name in os.listdir(package) if name != BINARY]
    assert not any(name.endswith((".so", ".pyd")) for name in left) and (at == "replace" or not left)
    for name in left:
        (package / name).unlink()
    server.bad.clear()
    installed(server.url, package)
