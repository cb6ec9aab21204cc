"""The demo: workflows/demo.json on a real ComfyUI, with Sage Attention Patch and with it bypassed. CPU alone.

    python demo/run.py

Starts ComfyUI, samples the same video twice from the same seed, says what the patch did and how far the videos are
apart, and writes a side-by-side animation and a contact sheet to demo/output. `make demo` installs what it needs first.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import classifier
import torch
from digit_nodes.format import DIGITS, latent_to_frames
from PIL import Image, ImageDraw
from prompt import bypass, to_prompt
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests" / "comfy"))
from runtime import PromptError, Server, comfyui_dir  # noqa: E402

MODEL = HERE / "weights" / "digits_wan.safetensors"
PATCH = "SageAttentionPatch"


@dataclass
class Result:
    frames: torch.Tensor  # [t, h, w] in [0, 1]
    seconds: float  # of the sampler
    digit: int
    confidence: float
    report: dict = field(default_factory=dict)  # of the patch; empty without it


class Progress(threading.Thread):
    """Listens to the server's websocket: prints each step and measures how long the sampler runs."""

    def __init__(self, server: Server, label: str, sampler: str):
        super().__init__(daemon=True)
        self.url, self.label, self.sampler = f"{server.url}/ws?clientId={server.client}", label, sampler
        self.connected, self.stopping = threading.Event(), threading.Event()
        self.started = self.ended = None
        self.error: Exception | None = None

    def __enter__(self):
        self.start()
        if not self.connected.wait(20):
            raise RuntimeError(f"no websocket at {self.url}: {self.error}")
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.join(5)

    def run(self):
        try:
            asyncio.run(self._listen())
        except aiohttp.ClientError as error:  # shown by whoever waits for us
            self.error = error

    async def _listen(self):
        async with aiohttp.ClientSession() as session, session.ws_connect(self.url) as socket:
            self.connected.set()
            while not self.stopping.is_set():
                try:
                    message = await socket.receive(timeout=0.2)
                except asyncio.TimeoutError:
                    continue
                if message.type == aiohttp.WSMsgType.TEXT:
                    self._heard(json.loads(message.data))
                elif message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                    return

    def _heard(self, message: dict):
        data = message.get("data", {})
        if message["type"] == "executing":
            if data.get("node") == self.sampler:
                self.started = time.monotonic()
            elif self.started and not self.ended:
                self.ended = time.monotonic()
        elif message["type"] == "progress" and data.get("node") == self.sampler:
            live = sys.stdout.isatty()
            last = data["value"] == data["max"]
            if live or last or data["value"] % 5 == 0:
                print(f"\r  {self.label}: step {data['value']} of {data['max']}", end="" if live and not last else "\n")
                sys.stdout.flush()

    def seconds(self) -> float:
        if not (self.started and self.ended):
            raise RuntimeError("the server did not say when the sampler ran")
        return self.ended - self.started


def only(prompt: dict, kind: str) -> str:
    """The id of the prompt's one node of this type."""
    found = [number for number, node in prompt.items() if node["class_type"] == kind]
    if len(found) != 1:
        raise ValueError(f"the workflow has {len(found)} {kind}; the demo needs exactly one")
    return found[0]


def start_server(base: Path, port: int = 0) -> Server:
    """A ComfyUI (not yet started) with the pack, the demo's nodes and the demo's model."""
    if not (comfyui_dir() / "main.py").exists():
        raise FileNotFoundError(
            f"no ComfyUI in {comfyui_dir()}: run `make demo`, which installs it, or set COMFYUI_DIR"
        )
    models = Path(base, "models", "diffusion_models")
    models.mkdir(parents=True)
    (models / MODEL.name).symlink_to(MODEL)
    packs = {"sage-attention-patch": ROOT, "sage-attention-demo": HERE / "digit_nodes"}
    return Server(base, packs=packs, port=port, env={"TRITON_INTERPRET": "0"})


def normalised(latent: torch.Tensor) -> torch.Tensor:
    """A stored latent as the model sees it, by ComfyUI's own numbers."""
    if str(comfyui_dir()) not in sys.path:
        sys.path.append(str(comfyui_dir()))
    from comfy.latent_formats import Wan21

    return Wan21().process_in(latent)


def sample(server: Server, workflow: dict, label: str, judge: classifier.Classifier, **changes) -> Result:
    """Run one workflow. changes: inputs of the KSampler to replace, and digit. Raises PromptError."""
    nodes = server.get("/object_info")
    if PATCH not in nodes:
        raise RuntimeError(f"ComfyUI did not load the pack:\n{server.log_tail()}")
    prompt = to_prompt(workflow, nodes)
    sampler = only(prompt, "KSampler")
    digit = changes.pop("digit", None)
    prompt[sampler]["inputs"].update(changes)
    if digit is not None:
        prompt[prompt[sampler]["inputs"]["positive"][0]]["inputs"]["digit"] = str(digit)
    # The numbers come from the latent: the animation that the workflow saves has 8 bits a pixel.
    prompt["measure"] = {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "demo"}}
    earlier = len(server.get("/sage_attention/reports"))
    with Progress(server, label, sampler) as progress:
        outputs = server.run(prompt, seconds=600)
    reports = server.get("/sage_attention/reports")[earlier:]
    saved = outputs["measure"]["latents"][0]
    latent = load_file(str(server.base / "output" / saved["subfolder"] / saved["filename"]))["latent_tensor"]
    frames = latent_to_frames(normalised(latent.float()))
    digits, confidence = judge.recognise(frames)
    return Result(frames[0], progress.seconds(), int(digits[0]), float(confidence[0]), reports[-1] if reports else {})


def distance(plain: torch.Tensor, patched: torch.Tensor) -> tuple[float, float]:
    """(relative L2, PSNR in dB) of two videos in [0, 1]."""
    error = patched - plain
    mean_square = error.square().mean().item()
    psnr = -10 * torch.log10(torch.tensor(mean_square)).item() if mean_square else float("inf")
    return (error.norm() / plain.norm()).item(), psnr


def table(plain: Result, patched: Result) -> str:
    rows = [("", "without", "with the patch")]
    taken = patched.report["taken"]
    rows.append(("attention calls taken", "-", f"{sum(t['calls'] for t in taken)} of {patched.report['calls']}"))
    for entry in taken:
        rows.append(("mode", "-", entry["mode"]))
        rows.append(("backend", "-", entry["backend"]))
    difference, psnr = distance(plain.frames, patched.frames)
    rows.append(("relative L2 of the videos", "-", f"{difference:.4f}"))
    rows.append(("PSNR", "-", f"{psnr:.1f} dB"))
    rows.append(("digit recognised", *(f"{r.digit} ({r.confidence:.0%})" for r in (plain, patched))))
    rows.append(("sampling", *(f"{r.seconds:.1f} s" for r in (plain, patched))))
    lines = [f"{name:<27}{left:>14}{right:>18}" for name, left, right in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines += [f"passed on: {entry['calls']} calls: {entry['reason']}" for entry in patched.report["passed"]]
    lines += [f"note: {note}" for note in patched.report["notes"]]
    if any(entry["backend"] == "reference" for entry in taken):
        lines.append(
            "The CPU emulates the kernels' arithmetic exactly, which takes longer than plain attention; a GPU runs them."
        )
    return "\n".join(lines)


def picture(frames: torch.Tensor, scale: int) -> Image.Image:
    """One frame [h, w] in [0, 1] as a grey picture, scale times as large."""
    image = Image.fromarray((frames * 255).round().to(torch.uint8).numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)


def write_pictures(plain: Result, patched: Result, folder: Path) -> list[Path]:
    """The side-by-side animation and the contact sheet."""
    gain = 20
    error = ((patched.frames - plain.frames).abs() * gain).clamp(0, 1)
    panels = {"without": plain.frames, "with the patch": patched.frames, f"difference x {gain}": error}
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    for i in range(len(plain.frames)):
        canvas = Image.new("L", (3 * 256 + 4 * 8, 256 + 36), 40)
        draw = ImageDraw.Draw(canvas)
        for column, (name, video) in enumerate(panels.items()):
            left = 8 + column * 264
            draw.text((left, 8), name, fill=230)
            canvas.paste(picture(video[i], 4), (left, 28))
        frames.append(canvas)
    animation, sheet_path = folder / "side_by_side.gif", folder / "contact_sheet.png"
    frames[0].save(animation, save_all=True, append_images=frames[1:], duration=125, loop=0)
    sheet = Image.new("L", (len(frames) * 98 + 2, 3 * 116 + 2), 40)
    draw = ImageDraw.Draw(sheet)
    for row, (name, video) in enumerate(panels.items()):
        draw.text((4, row * 116 + 4), name, fill=230)
        for i, frame in enumerate(video):
            sheet.paste(picture(frame, 2).resize((96, 96)), (2 + i * 98, row * 116 + 20))
    sheet.save(sheet_path)
    return [animation, sheet_path]


def write_thumbnail(result: Result, path: Path) -> None:
    """Eight frames of a video as one JPEG."""
    canvas = Image.new("L", (1280, 640))
    for i, frame in enumerate(result.frames[::2]):
        canvas.paste(picture(frame, 5), (i % 4 * 320, i // 4 * 320))
    canvas.save(path, quality=80, optimize=True)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workflow", type=Path, default=ROOT / "workflows" / "demo.json")
    parser.add_argument("--digit", choices=DIGITS[1:], help="another digit than the workflow's")
    parser.add_argument("--seed", type=int, help="another seed than the workflow's")
    parser.add_argument("--steps", type=int, help="other steps than the workflow's")
    parser.add_argument("--output", type=Path, default=HERE / "output")
    parser.add_argument("--port", type=int, default=0, help="of the server; 0 takes a free one")
    parser.add_argument("--thumbnail", type=Path, help="also write frames of the patched video to this JPEG")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the server is stopped
    changes = {name: value for name in ("digit", "seed", "steps") if (value := getattr(options, name)) is not None}
    try:
        workflow = json.loads(options.workflow.read_text(encoding="utf-8"))
        judge = classifier.load()
        with tempfile.TemporaryDirectory() as base:
            print(f"Starting ComfyUI from {comfyui_dir()} ...", flush=True)
            with start_server(Path(base), options.port) as server:
                plain = sample(server, bypass(workflow, PATCH), "without the patch", judge, **changes)
                patched = sample(server, workflow, "with the patch", judge, **changes)
    except (PromptError, RuntimeError, ValueError, OSError) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    report = patched.report
    if not report.get("taken") or report.get("errors"):
        print(
            f"The demo failed: the patch took no call, or had errors:\n{json.dumps(report, indent=2)}", file=sys.stderr
        )
        return 1
    print("\n" + table(plain, patched) + "\n")
    for path in write_pictures(plain, patched, options.output):
        print(f"wrote {path}")
    if options.thumbnail:
        write_thumbnail(patched, options.thumbnail)
    return 0


if __name__ == "__main__":
    sys.exit(main())
