"""The demo: its committed weights on the real server, its prompt converter, and what it says when something fails."""

import hashlib
import json
import sys

import pytest
import torch
from runtime import ROOT, PromptError
from safetensors import safe_open

sys.path.insert(0, str(ROOT / "demo"))
import classifier  # noqa: E402
import run  # noqa: E402
from digit_nodes.format import DIGITS, LATENT_SHAPE, conditioning, frames_to_latent, latent_to_frames  # noqa: E402
from prompt import bypass, to_prompt  # noqa: E402

EVALUATION = json.loads((run.MODEL.parent / "evaluation.json").read_text())
STEPS = 4  # enough for a clear digit


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with run.start_server(tmp_path_factory.mktemp("demo")) as running:
        yield running


@pytest.fixture
def workflow():
    return json.loads((ROOT / "workflows" / "demo.json").read_text(encoding="utf-8"))


def by_type(workflow, kind):
    return next(node for node in workflow["nodes"] if node["type"] == kind)


def test_the_weights_are_small_half_precision_and_of_head_dim_128():
    assert run.MODEL.stat().st_size <= 20_000_000
    with safe_open(str(run.MODEL), "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}
        dim = weights.get_slice("blocks.0.self_attn.q.weight").get_shape()[0]
    assert dim // EVALUATION["model"]["heads"] == 128


def test_the_workflow_samples_at_least_1024_tokens(workflow):
    width, height, length, _ = by_type(workflow, "EmptyHunyuanLatentVideo")["widgets_values"]
    latent = (16, (length - 1) // 4 + 1, height // 8, width // 8)
    assert latent == LATENT_SHAPE
    assert latent[1] * (latent[2] // 2) * (latent[3] // 2) >= 1024  # patches of 1x2x2


def test_the_evaluation_is_of_these_weights_and_the_card_states_it(workflow):
    assert hashlib.sha256(run.MODEL.read_bytes()).hexdigest() == EVALUATION["model"]["sha256"]
    first = EVALUATION["evaluation"][0]
    assert first["videos"] == 100 and first["recognised"] >= 80
    _, _, steps, cfg, sampler, scheduler, _ = by_type(workflow, "KSampler")["widgets_values"]
    assert (steps, cfg, sampler, scheduler) == tuple(first[name] for name in ("steps", "cfg", "sampler", "scheduler"))
    card = (ROOT / "demo" / "README.md").read_text()
    for row in EVALUATION["evaluation"]:
        assert f"| {row['steps']} | {row['cfg']} | {row['recognised']} of {row['videos']} |" in card


def test_a_short_sample_with_the_patch_shows_its_digit(server, workflow):
    result = run.sample(server, workflow, "test", classifier.load(), digit="7", steps=STEPS)
    assert result.digit == 7 and result.confidence > 0.8
    calls = EVALUATION["model"]["blocks"] * STEPS  # with and without the digit go through in one call
    assert sum(entry["calls"] for entry in result.report["taken"]) == calls  # min_tokens is 1024
    assert sum(entry["calls"] for entry in result.report["passed"]) == calls  # cross attention
    assert result.report["errors"] == []
    assert result.seconds > 0


def test_bypassed_the_patch_is_gone_and_the_sampler_has_the_loader(server, workflow):
    nodes = server.get("/object_info")
    whole, plain = to_prompt(workflow, nodes), to_prompt(bypass(workflow, run.PATCH), nodes)
    loader, patch = run.only(whole, "UNETLoader"), run.only(whole, run.PATCH)
    sampler = run.only(whole, "KSampler")
    assert whole[sampler]["inputs"]["model"] == [patch, 0]
    assert plain[sampler]["inputs"].pop("model") == [loader, 0]
    del whole[sampler]["inputs"]["model"], whole[patch]
    assert plain == whole
    assert whole[sampler]["inputs"]["steps"] == 20 and whole[sampler]["inputs"]["denoise"] == 1


def test_a_refused_prompt_says_what_the_server_said(server, workflow):
    by_type(workflow, "UNETLoader")["widgets_values"][0] = "absent.safetensors"
    with pytest.raises(PromptError, match="absent.safetensors"):
        run.sample(server, workflow, "test", classifier.load())


def test_a_run_that_fails_says_what_the_node_said(server, workflow):
    with pytest.raises(PromptError, match="DemoDigitConditioning.*digit is 'x'; it must be one of"):
        run.sample(server, workflow, "test", classifier.load(), digit="x")


def test_without_comfyui_the_demo_fails_and_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    assert run.main(["--output", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path) in said and "make demo" in said


def test_the_converter_refuses_what_it_cannot_express(workflow):
    with pytest.raises(ValueError, match="no node"):
        to_prompt(workflow, {})
    with pytest.raises(ValueError, match="has no VAEDecode"):
        bypass(workflow, "VAEDecode")
    node = {"id": 1, "type": "Some", "mode": 0, "inputs": [], "widgets_values": [1, 2]}
    graph = {"nodes": [node], "links": []}
    with pytest.raises(ValueError, match="belong to no input"):
        to_prompt(graph, {"Some": {"input": {"required": {"a": ["INT", {}]}}}})
    shown = {"nodes": [{**node, "widgets_values": [1, "120 calls by ..."]}], "links": []}  # saved after a run
    assert to_prompt(shown, {"Some": {"input": {"required": {"a": ["INT", {}]}}}})["1"]["inputs"] == {"a": 1}
    with pytest.raises(ValueError, match="ends before c"):
        to_prompt(graph, {"Some": {"input": {"required": {name: ["INT", {}] for name in "abc"}}}})


def test_users_do_not_see_the_demo_nodes(comfy):
    nodes = comfy.server.get("/object_info")
    assert run.PATCH in nodes and not [name for name in nodes if name.startswith("DemoDigit")]


def test_frames_survive_the_latent_and_prompts_are_told_apart():
    frames = torch.rand(2, 16, 64, 64)
    latent = frames_to_latent(frames)
    assert latent.shape == (2, *LATENT_SHAPE)
    torch.testing.assert_close(latent_to_frames(latent), frames)
    prompts = conditioning(DIGITS).flatten(1)
    similarity = prompts @ prompts.T / prompts.shape[1]
    assert torch.equal(similarity > 0.5, torch.eye(len(DIGITS), dtype=torch.bool))
    with pytest.raises(ValueError, match="'x'"):
        conditioning(["x"])
    with pytest.raises(ValueError, match="EmptyHunyuanLatentVideo"):
        latent_to_frames(torch.zeros(1, 4, 8, 8))
