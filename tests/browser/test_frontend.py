"""Each workflow in the real frontend: it opens whole, keeps its values, and the demo runs from the Run button."""

import json
import time
from pathlib import Path

import frontend
import pytest
from frontend import ROOT

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
EACH = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
RUN_SECONDS = 480
# One value other than the default for each widget of the node.
CHANGED = {
    "mode": "accurate", "pv_accum": "int8/int32", "qk_quant_gran": "per_warp", "smooth_k": "on", "smooth_v": "off",
    "rotate": "on", "start_percent": 0.25, "end_percent": 0.75, "blocks": "2-5,!-1", "attention": "both",
    "min_tokens": 77,
}  # fmt: skip
OPTIONS = {
    "mode": ["auto", "fast", "balanced", "accurate"],
    "pv_accum": ["auto", "fp16/fp32", "fp16/fp16+fp32", "fp16/fp16", "int8/int32", "fp8/fp32+fp32", "fp8/fp32+fp16",
                 "fp8/fp32"],
    "qk_quant_gran": ["auto", "per_block", "per_warp", "per_thread"],
    "smooth_k": ["auto", "on", "off"], "smooth_v": ["auto", "on", "off"], "rotate": ["auto", "on", "off"],
    "attention": ["self", "cross", "both"],
}  # fmt: skip
OURS_JS = "app.graph._nodes.filter(n => n.type === 'SageAttentionPatch')"
VALUES_JS = f"() => {OURS_JS}.map(n => Object.fromEntries(n.widgets.map(w => [w.name, w.value])))"


def complaints(page) -> list[str]:
    """What the frontend holds against the workflow that it has just opened. That models are not there is no complaint:
    nobody has 50 GB of weights in a test."""
    unknown = page.evaluate(
        "() => app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => 'no node ' + n.type)"
    )
    shown = [text for text in frontend.dialogs(page) if not text.startswith("Missing Models")]
    return unknown + shown + frontend.toasts(page)


def comparable(workflow: dict) -> dict:
    """What a workflow says, by node: type, mode, widgets, and where each input comes from."""
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    return {
        node["id"]: {
            "type": node["type"],
            "mode": node["mode"],
            "values": node.get("widgets_values") or [],
            "inputs": {slot["name"]: links.get(slot.get("link")) for slot in node.get("inputs", [])},
            "properties": {name: node["properties"].get(name) for name in ("cnr_id", "ver", "models")},
        }
        for node in workflow["nodes"]
    }


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def broken(tmp_path: Path, **change) -> Path:
    """A workflow file with a fault in its patch node."""
    workflow = read(ROOT / "workflows" / "flux_dev.json")
    next(node for node in workflow["nodes"] if node["type"] == "SageAttentionPatch").update(change)
    target = tmp_path / "broken.json"
    target.write_text(json.dumps(workflow), encoding="utf-8")
    return target


@EACH
def test_opens_without_complaint(page, path):
    frontend.load_workflow(page, path)
    assert complaints(page) == []
    assert page.evaluate("() => app.graph._nodes.length") == len(read(path)["nodes"])


def test_a_missing_node_is_a_complaint(page, tmp_path):
    frontend.load_workflow(page, broken(tmp_path, type="NoSuchNode"))
    assert any("NoSuchNode" in text for text in complaints(page))


def test_a_bad_schema_is_a_complaint(page, tmp_path):
    frontend.load_workflow(page, broken(tmp_path, pos="nowhere"))
    assert any("Invalid workflow against zod schema" in text for text in complaints(page))


@EACH
def test_saved_again_it_says_the_same(page, path):
    frontend.load_workflow(page, path)
    assert comparable(frontend.export(page)) == comparable(read(path))


@EACH
def test_changed_values_survive_save_and_reload(page, path, tmp_path):
    frontend.load_workflow(page, path)
    patches = page.evaluate(f"() => {OURS_JS}.length")
    assert patches >= 1
    for values in page.evaluate(VALUES_JS):
        assert list(values) == list(CHANGED)
        assert all(values[name] != CHANGED[name] for name in CHANGED)
    page.evaluate(
        f"changed => {OURS_JS}.forEach(n => n.widgets.forEach(w => {{ w.value = changed[w.name] }}))", CHANGED
    )
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(frontend.export(page)), encoding="utf-8")
    frontend.load_workflow(page, path)
    assert page.evaluate(VALUES_JS) != [CHANGED] * patches
    frontend.load_workflow(page, saved)
    assert complaints(page) == []
    assert page.evaluate(VALUES_JS) == [CHANGED] * patches
    assert comparable(frontend.export(page)) == comparable(read(saved))


def test_the_combos_offer_their_choices(page):
    frontend.load_workflow(page, ROOT / "workflows" / "flux_dev.json")
    combos = page.evaluate(
        f"() => {OURS_JS}[0].widgets.filter(w => w.type === 'combo').map(w => [w.name, w.options.values])"
    )
    assert dict(combos) == OPTIONS


def test_every_input_shows_its_tooltip(page, server):
    frontend.load_workflow(page, ROOT / "workflows" / "flux_dev.json")
    frontend.clear_overlays(page)
    page.evaluate(frontend.FIT_JS, [frontend.VIEW["width"], frontend.VIEW["height"]])
    inputs = server.get("/object_info/SageAttentionPatch")["SageAttentionPatch"]["input"]["required"]
    assert list(inputs) == ["model", *CHANGED]
    seen = {}
    for name in CHANGED:
        x, y = page.evaluate(
            f"""name => {{
              const node = {OURS_JS}[0], widget = node.widgets.find(w => w.name === name);
              return app.canvas.ds.convertOffsetToCanvas([node.pos[0] + 90, node.pos[1] + widget.last_y + 10]);
            }}""",
            name,
        )
        page.mouse.move(x, y)
        page.mouse.move(x + 2, y)
        page.wait_for_selector(".node-tooltip", timeout=5000)
        seen[name] = page.inner_text(".node-tooltip")
        page.mouse.move(5, 500)  # off the node, which takes the tooltip away
        page.wait_for_selector(".node-tooltip", state="detached", timeout=5000)
    assert seen == {name: inputs[name][1]["tooltip"] for name in CHANGED}


def test_the_help_page_opens_from_the_node(page):
    frontend.load_workflow(page, ROOT / "workflows" / "flux_dev.json")
    frontend.clear_overlays(page)
    page.evaluate(f"() => app.canvas.selectNode({OURS_JS}[0])")
    # Not a real click: where the node stands, the tab bar may lie over its toolbox.
    page.locator("[data-testid='info-button']").first.dispatch_event("click")
    page.wait_for_function("() => document.querySelector('.node-help-content')?.innerText.includes('the report')")
    shown = page.inner_text(".node-help-content")
    assert all(name in shown for name in CHANGED)


def test_the_template_browser_lists_them(server):
    names = server.get("/workflow_templates")["sage-attention-patch"]
    assert set(names) == {path.stem for path in WORKFLOWS}


def run_by_click(page, server, seconds: float) -> dict | None:
    """Clicks Run; the new history entry when the run has ended, or None when nothing was queued."""
    before = set(server.get("/history"))
    page.locator("[data-testid='queue-button']").first.click()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if new := set(server.get("/history")) - before:
            return server.get("/history")[new.pop()]
        page.wait_for_timeout(300)
    return None


def test_a_bad_blocks_string_is_refused_with_the_grammar(page, server):
    frontend.load_workflow(page, ROOT / "workflows" / "demo.json")
    frontend.clear_overlays(page)
    page.evaluate(f"() => {{ {OURS_JS}[0].widgets.find(w => w.name === 'blocks').value = '3-' }}")
    assert run_by_click(page, server, 5) is None
    said = "\n".join(frontend.dialogs(page) + frontend.toasts(page))
    assert "blocks" in said and "2-37" in said


def test_the_demo_runs_by_clicking_run(page, server, tmp_path):
    frontend.load_workflow(page, ROOT / "workflows" / "demo.json")
    frontend.clear_overlays(page)
    [before] = page.evaluate(VALUES_JS)
    earlier = len(server.get("/sage_attention/reports"))
    entry = run_by_click(page, server, RUN_SECONDS)
    assert entry is not None, f"the demo did not end in {RUN_SECONDS} s:\n{server.log_tail()}"
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    files = [
        Path(server.base, item["type"], item["subfolder"], item["filename"])
        for output in entry["outputs"].values()
        for kind in output.values()
        for item in kind
        if isinstance(item, dict) and "filename" in item
    ]
    assert files and all(file.stat().st_size > 0 for file in files)
    reports = server.get("/sage_attention/reports")[earlier:]
    assert reports and sum(taken["calls"] for taken in reports[-1]["taken"]) > 0
    assert reports[-1]["errors"] == []
    assert frontend.toasts(page) == []
    shown = page.evaluate(f"() => {OURS_JS}[0].widgets.map(w => String(w.value)).at(-1)")
    assert "calls by" in shown  # the report, on the node
    # Saved now, the file carries that text behind the node's values; it must not shift them when it is opened again.
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(frontend.export(page)), encoding="utf-8")
    frontend.load_workflow(page, saved)
    assert complaints(page) == []
    assert page.evaluate(VALUES_JS) == [before]
