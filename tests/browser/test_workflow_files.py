"""workflows/*.json as files: what can be checked without a browser."""

import itertools
import json

import pytest
from frontend import ROOT
from PIL import Image

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
LOADERS = {"UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader"}
TITLE_HEIGHT = 30


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_four_workflows_are_there():
    assert {path.stem for path in WORKFLOWS} == {"demo", "flux_dev", "hunyuanvideo_t2v", "wan22_t2v"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_name_their_pack(path):
    nodes = {node["type"]: node["properties"] for node in read(path)["nodes"]}
    ours = nodes["SageAttentionPatch"]
    assert (ours["cnr_id"], ours["ver"]) == ("sage-attention-patch", "0.1.0")
    for kind, properties in nodes.items():
        if kind in LOADERS:
            assert properties["cnr_id"] == "comfy-core", kind


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path.stem != "demo"], ids=lambda path: path.stem)
def test_every_model_file_says_where_it_comes_from(path):
    loaders = [node for node in read(path)["nodes"] if node["type"] in LOADERS]
    assert loaders
    for node in loaders:
        files = {value for value in node["widgets_values"] if str(value).endswith(".safetensors")}
        models = node["properties"]["models"]
        assert files == {entry["name"] for entry in models}
        for entry in models:
            assert entry["url"].startswith("https://huggingface.co/") and entry["url"].endswith("/" + entry["name"])
            assert entry["directory"] in ("diffusion_models", "text_encoders", "vae")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_node_lies_on_another(path):
    def box(node):
        (x, y), (width, height) = node["pos"], node["size"]
        return x, y - TITLE_HEIGHT, x + width, y + height

    for one, other in itertools.combinations(read(path)["nodes"], 2):
        a, b = box(one), box(other)
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{one['type']} {one['id']} and {other['type']} {other['id']}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_thumbnail(path):
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size <= 300_000
    with Image.open(picture) as image:
        assert image.format == "JPEG" and min(image.size) >= 200
        darkest, brightest = image.convert("L").getextrema()
        assert brightest - darkest > 100  # something is drawn
