"""The real ComfyUI frontend in the system's Chromium, driven through Playwright."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "comfy"))
from runtime import Server  # noqa: E402

CHROMIUM_ARGS = (
    "--no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-quic"
).split()
VIEW = {"width": 1600, "height": 900}
THUMBNAIL = (1280, 720)
# What the user's settings file must hold: the first start would open a tour over the canvas.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}

READY_JS = "() => window.app?.graph && window.app?.extensionManager && window.LiteGraph?.registered_node_types?.[%r]"
FIT_JS = """([width, height]) => {
  const boxes = [...app.graph._nodes.map(n => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30]),
                 ...app.graph._groups.map(g => [g.pos[0], g.pos[1], g.size[0], g.size[1]])];
  const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
  const w = Math.max(...boxes.map(b => b[0] + b[2])) - left, h = Math.max(...boxes.map(b => b[1] + b[3])) - top;
  const ds = app.canvas.ds;
  ds.scale = Math.min(1, (width - 40) / w, (height - 40) / h);
  ds.offset[0] = width / ds.scale / 2 - left - w / 2;
  ds.offset[1] = height / ds.scale / 2 - top - h / 2;
  app.canvas.setDirty(true, true);
}"""
# Only the canvas and the text boxes that lie on it are the graph; everything else is the window around it.
HIDE_CSS = """body * { visibility: hidden !important; }
canvas#graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important; }"""


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine, or None."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def server(base, **more_packs) -> Server:
    """A ComfyUI, not yet started, with the pack (and more_packs: folder name = path) and the user settings above."""
    user = Path(base, "user", "default")
    user.mkdir(parents=True)
    (user / "comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    packs = {"sage-attention-patch": ROOT, **more_packs}
    # The tests' own setting for Triton's interpreter is no part of what a user runs.
    return Server(base, packs=packs, env={"TRITON_INTERPRET": "0"})


@contextlib.contextmanager
def browser(chromium: str):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=chromium, headless=True, args=CHROMIUM_ARGS) as chrome:
            yield chrome


def open_frontend(chrome, url: str, node_type: str = "SageAttentionPatch"):
    """A page with the frontend loaded, the pack's node registered and an empty graph. Returns (page, errors): errors
    gathers what the page throws."""
    page = chrome.new_page(viewport=VIEW)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_function(READY_JS % node_type, timeout=120_000)
    page.wait_for_selector("canvas#graph-canvas", timeout=60_000)
    return page, errors


def load_workflow(page, path: Path) -> None:
    """Opens a workflow as File > Open does, and waits until it is drawn."""
    page.evaluate("() => app.graph.clear()")
    page.set_input_files("input#comfy-file-input", str(path))
    page.wait_for_function("() => app.graph._nodes.length > 0", timeout=30_000)
    page.wait_for_timeout(1000)


def export(page) -> dict:
    """The workflow as File > Export writes it."""
    return page.evaluate("async () => JSON.parse(JSON.stringify((await app.graphToPrompt()).workflow))")


def toasts(page) -> list[str]:
    return page.evaluate("() => [...document.querySelectorAll('.p-toast-message')].map(e => e.innerText)")


def dialogs(page) -> list[str]:
    return page.evaluate("() => [...document.querySelectorAll('.p-dialog')].map(e => e.innerText)")


def clear_overlays(page) -> None:
    """Closes dialogs and toasts, which otherwise take the next click."""
    for _ in range(5):
        if not page.locator(".p-dialog").count():
            break
        page.keyboard.press("Escape")
        page.wait_for_timeout(300)
    for button in page.locator(".p-toast-close-button").all():
        button.click(timeout=2000)


def draw_graph(page, path: Path) -> None:
    """Writes the whole graph, as the frontend draws it and without the window around it, as a JPEG thumbnail."""
    clear_overlays(page)
    style = page.add_style_tag(content=HIDE_CSS)
    page.mouse.move(5, VIEW["height"] - 5)
    page.evaluate(FIT_JS, [VIEW["width"], VIEW["height"]])
    page.wait_for_timeout(700)
    png = page.screenshot(clip={"x": 0, "y": 0, **VIEW})
    style.evaluate("e => e.remove()")
    Image.open(io.BytesIO(png)).convert("RGB").resize(THUMBNAIL, Image.Resampling.LANCZOS).save(
        path, quality=80, optimize=True
    )
