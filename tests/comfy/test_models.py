"""Wan, HunyuanVideo and Flux through a real server and KSampler: which calls are taken, where, when, and how close."""

import pytest
from graphs import MODELS, patch, recorder, relative_l2

# Of the latent after 4 steps. INT8 Q·K with per-thread scales is off by up to about 2% in one call on random input;
# through the residual stream of these models much less is left.
TOLERANCE = 0.01
REFINER = "outside the model's numbered blocks (a text refiner, for example)"


def passed(report):
    return {entry["reason"]: entry["calls"] for entry in report["passed"]}


@pytest.mark.parametrize("model", MODELS)
def test_every_eligible_call_is_taken_and_the_latent_is_close(comfy, model):
    tiny = MODELS[model]
    result = comfy.sample(model, [recorder("passed on"), patch(attention="both"), recorder("all")], steps=4)

    in_blocks = [call for call in result.seen("all") if call["block"] is not None]
    assert len(in_blocks) == 4 * tiny.blocks * tiny.calls_a_block
    (taken,) = result.report["taken"]
    assert taken["calls"] == len(in_blocks)
    assert taken["blocks"] == list(range(tiny.blocks))
    assert taken["steps"] == [0, 1, 2, 3]
    assert (taken["backend"], taken["mode"]) == ("reference", "fp16/fp32")
    assert result.report["calls"] == len(result.seen("all"))
    assert not result.report["errors"] and not result.report["notes"]
    if model == "hunyuan":
        assert passed(result.report) == {REFINER: 4 * 2}
        assert [call["block"] for call in result.seen("passed on")] == [None] * 8
    else:
        assert not result.report["passed"] and not result.seen("passed on")

    error = relative_l2(result.latent, comfy.unpatched(model, steps=4))
    assert 0 < error < TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_the_block_told_is_the_block_that_runs(comfy, model):
    calls = comfy.sample(model, [patch(), recorder("all")], steps=1).seen("all")
    doubles = {"wan": 3, "wan22_5b": 3, "hunyuan": 2, "flux": 2}[model]
    for call in calls:
        if call["block"] is None:  # the text refiner
            assert call["told"] == [None, None, None]
        elif call["block"] < doubles:
            assert call["told"] == ["double", call["block"], doubles]
        else:
            assert call["told"] == ["single", call["block"] - doubles, 3]
    assert {call["block"] for call in calls} >= set(range(MODELS[model].blocks))


@pytest.mark.parametrize(
    "model, blocks, selected",
    [
        ("wan", "0", {0}),
        ("wan", "!0,!-1", {1}),
        ("wan", "-1", {2}),
        ("hunyuan", "!0,!-1", {1, 2, 3}),
        ("hunyuan", "2-3", {2, 3}),
        ("flux", "1-4, !3", {1, 2, 4}),
    ],
)
def test_blocks(comfy, model, blocks, selected):
    tiny = MODELS[model]
    result = comfy.sample(model, [recorder("passed on"), patch(attention="both", blocks=blocks)], steps=2)
    (taken,) = result.report["taken"]
    assert set(taken["blocks"]) == selected
    assert taken["calls"] == 2 * len(selected) * tiny.calls_a_block
    on = [call["block"] for call in result.seen("passed on") if call["block"] is not None]
    assert sorted(on) == sorted([b for b in range(tiny.blocks) if b not in selected] * 2 * tiny.calls_a_block)
    assert passed(result.report)[f'block not in blocks "{blocks}"'] == len(on)


def test_blocks_beyond_the_model_are_noted(comfy):
    report = comfy.sample("wan", [patch(blocks="2-37")], steps=1).report
    assert report["taken"][0]["blocks"] == [2]
    assert report["notes"] == ['blocks "2-37" names blocks beyond this model\'s 3 (0 to 2)']


@pytest.mark.parametrize("model", MODELS)
def test_steps(comfy, model):
    # Step i of 10 of the simple scheduler starts at i * 10%; both ends belong to the window.
    nodes = [recorder("passed on"), patch(attention="both", start_percent=0.3, end_percent=0.6), recorder("all")]
    result = comfy.sample(model, nodes, steps=10)
    (taken,) = result.report["taken"]
    assert taken["steps"] == [3, 4, 5, 6]
    assert taken["calls"] == 4 * MODELS[model].blocks * MODELS[model].calls_a_block
    assert (result.report["model_calls"], result.report["model_calls_on"]) == (10, 4)
    sigmas = sorted({call["sigma"] for call in result.seen("all")}, reverse=True)
    on = {call["sigma"] for call in result.seen("passed on") if call["block"] is not None}
    assert sorted(on, reverse=True) == sigmas[:3] + sigmas[7:]
    assert passed(result.report)["step outside start_percent 0.3 to end_percent 0.6"] > 0


def test_a_sampler_with_two_model_calls_a_step(comfy):
    report = comfy.sample("wan", [patch(start_percent=0.5)], steps=4, sampler_name="heun").report
    assert report["model_calls"] == 7  # two a step but for the last
    assert report["taken"][0]["steps"] == [2, 3]
    assert report["taken"][0]["calls"] == 4 * 3  # step 1's second call is at step 2's noise: then 2, 2 again, and 3


@pytest.mark.parametrize(
    "attention, taken, reason",
    [
        ("self", 12, "cross attention (attention is set to self)"),
        ("cross", 12, "self attention (attention is set to cross)"),
        ("both", 24, None),
    ],
)
def test_self_and_cross(comfy, attention, taken, reason):
    report = comfy.sample("wan", [patch(attention=attention)], steps=4).report
    assert report["taken"][0]["calls"] == taken
    assert passed(report) == ({reason: 12} if reason else {})


def test_short_calls_are_passed_on_and_change_nothing(comfy):
    result = comfy.sample("wan", [patch(attention="both", min_tokens=1024)], steps=4)
    assert passed(result.report) == {"fewer than 1024 tokens (min_tokens)": 24}
    assert not result.report["taken"]
    assert result.latent.equal(comfy.unpatched("wan", steps=4))


def test_the_defaults_take_the_long_self_attention(comfy):
    latent = {"class_type": "EmptyHunyuanLatentVideo", "inputs": dict(width=256, height=256, length=13, batch_size=1)}
    result = comfy.sample("wan", [patch(min_tokens=1024), recorder("all")], steps=1, latent=latent)
    assert {tuple(call["tokens"]) for call in result.seen("all")} == {(1024, 1024), (1024, 16)}
    assert [entry["calls"] for entry in result.report["taken"]] == [3]
    error = relative_l2(result.latent, comfy.unpatched("wan", steps=1, latent=latent))
    assert 0 < error < TOLERANCE


def test_masks_are_honoured(comfy):
    options = dict(steps=2, text={**MODELS["hunyuan"].text})
    options["text"] = {"class_type": "TestConditioning", "inputs": {**options["text"]["inputs"], "hidden_tokens": 10}}
    result = comfy.sample("hunyuan", [patch(), recorder("all")], **options)
    masks = {tuple(call["mask"]) for call in result.seen("all") if call["block"] is not None}
    assert masks == {(1, 1, 48)}  # 32 tokens of video and 16 of text
    assert result.report["taken"][0]["calls"] == 2 * 5
    plain = comfy.unpatched("hunyuan", **options)
    assert 0 < relative_l2(result.latent, plain) < TOLERANCE
    assert relative_l2(comfy.unpatched("hunyuan", steps=2), plain) > 3 * TOLERANCE  # so a dropped mask would show


def test_guidance_runs_both_branches(comfy):
    result = comfy.sample("wan", [patch(), recorder("all")], steps=2, cfg=3.0)
    assert result.report["taken"][0]["calls"] == len(result.seen("all")) / 2  # the other half is cross attention
    assert 0 < relative_l2(result.latent, comfy.unpatched("wan", steps=2, cfg=3.0)) < TOLERANCE


def test_the_previous_override_serves_what_is_passed_on(comfy):
    halved = [recorder("before", factor=0.5), patch(attention="both", blocks="0")]
    result = comfy.sample("wan", halved, steps=2)
    assert {call["block"] for call in result.seen("before")} == {1, 2}
    assert len(result.seen("before")) == sum(passed(result.report).values()) == 2 * 2 * 2
    whole = comfy.sample("wan", [patch(attention="both", blocks="0")], steps=2)
    assert relative_l2(result.latent, whole.latent) > 3 * TOLERANCE  # its result was used


def test_two_patches_in_a_row(comfy):
    first = patch(attention="both", blocks="0", qk_quant_gran="per_block")
    second = patch(attention="both", blocks="!0", end_percent=0.4)
    result = comfy.sample("wan", [recorder("passed on by both"), first, second], steps=4)
    by_node = {report["node_id"]: report for report in result.reports}
    one, two = by_node["SageAttentionPatch_1"]["taken"], by_node["SageAttentionPatch_2"]["taken"]
    assert [(entry["blocks"], entry["steps"]) for entry in one] == [([0], [0, 1, 2, 3])]
    assert [(entry["blocks"], entry["steps"]) for entry in two] == [([1, 2], [0, 1])]
    assert "per_block" in one[0]["config"] and "per_block" not in two[0]["config"]
    assert len(result.seen("passed on by both")) == 2 * 2 * 2  # blocks 1 and 2 in steps 2 and 3


def test_clones_keep_the_patch(comfy):
    result = comfy.sample("wan", [patch(attention="both"), recorder("all", clones=3)], steps=4)
    assert result.report["taken"][0]["calls"] == len(result.seen("all")) == 24
    assert 0 < relative_l2(result.latent, comfy.unpatched("wan", steps=4)) < TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_compiled(comfy, model):
    """Whole-model torch.compile without a break: one graph inside the window, one outside, whatever the steps."""
    node = patch(attention="both", start_percent=0.3, end_percent=0.6, blocks="!0")
    comfy.server.get("/test/graphs")
    result = comfy.sample(model, [node, ("CompileModel", {})], steps=8)
    ours = (MODELS[model].blocks - 1) * MODELS[model].calls_a_block
    assert sorted(comfy.server.get("/test/graphs")) == [0, ours]
    assert (result.report["model_calls"], result.report["model_calls_on"]) == (8, 2)
    assert result.report["calls"] == 0 and "compiled" in result.report["notes"][0]
    assert relative_l2(result.latent, comfy.sample(model, [node], steps=8).latent) < 1e-4


def test_two_models_in_turn_as_wan22_14b_has_them(comfy):
    """High noise, then low noise: two loaders, two patches with settings of their own, two samplers, two reports."""
    prompt = comfy.graph("wan", [patch(blocks="0")], steps=4)
    advanced = {**prompt["sampler"]["inputs"], "noise_seed": 1}
    for name in ("seed", "denoise"):
        del advanced[name]
    second = {
        "low": {"class_type": "SageAttentionPatch", "inputs": {**patch(blocks="!0")[1], "model": ["loader_low", 0]}},
        "loader_low": prompt["loader"],
        "sampler": {"class_type": "KSamplerAdvanced", "inputs": {
            **advanced, "add_noise": "enable", "start_at_step": 0, "end_at_step": 2,
            "return_with_leftover_noise": "enable"}},
        "sampler_low": {"class_type": "KSamplerAdvanced", "inputs": {
            **advanced, "model": ["low", 0], "latent_image": ["sampler", 0], "add_noise": "disable", "start_at_step": 2,
            "end_at_step": 10000, "return_with_leftover_noise": "disable"}},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sampler_low", 0], "filename_prefix": "two"}},
    }  # fmt: skip
    comfy.server.run({**prompt, **second})
    high, low = comfy.server.get("/sage_attention/reports")[-2:]
    assert high["taken"][0]["blocks"] == [0] and high["taken"][0]["calls"] == 2
    assert low["taken"][0]["blocks"] == [1, 2] and low["taken"][0]["calls"] == 4
    assert {high["node_id"], low["node_id"]} == {"SageAttentionPatch_0", "low"}
