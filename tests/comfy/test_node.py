"""Sage Attention Patch as users of a real server meet it: its schema, what it refuses, and how it reports."""

import asyncio
import struct
import time

import aiohttp
import pytest
from graphs import DEFAULTS, PACK, patch
from runtime import PromptError


def test_schema(comfy):
    info = comfy.server.get("/object_info/SageAttentionPatch")["SageAttentionPatch"]
    assert info["display_name"] == "Sage Attention Patch"
    assert info["category"] == "model/patch"
    assert info["output"] == ["MODEL"]
    inputs = info["input"]["required"]
    assert list(inputs) == ["model", *DEFAULTS]  # the order that saved workflows rely on
    assert {name: spec[1]["default"] for name, spec in inputs.items() if name != "model"} == DEFAULTS
    assert all(len(spec[1]["tooltip"]) > 20 for spec in inputs.values())
    assert inputs["pv_accum"][1]["options"][0] == "auto" and "fp8/fp32+fp16" in inputs["pv_accum"][1]["options"]
    assert (inputs["min_tokens"][1]["min"], inputs["min_tokens"][1]["max"]) == (-1, 1048576)


def test_help_page_and_locale_are_served(comfy):
    page = comfy.server.get(f"/extensions/{PACK}/docs/SageAttentionPatch.md")
    named = [name for name in DEFAULTS if f"`{name}`" not in page]
    assert not named, f"the help page does not explain {named}"
    node = comfy.server.get("/i18n")["en"]["nodeDefs"]["SageAttentionPatch"]
    info = comfy.server.get("/object_info/SageAttentionPatch")["SageAttentionPatch"]
    inputs = info["input"]["required"]
    assert (node["display_name"], node["description"]) == (info["display_name"], info["description"])
    assert {name: said["tooltip"] for name, said in node["inputs"].items()} == {
        name: spec[1]["tooltip"] for name, spec in inputs.items()
    }


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"blocks": "first"}, 'blocks has "first" in "first": write "all", or a comma list'),
        ({"blocks": ""}, 'blocks has "" in "": write "all", or a comma list'),
        ({"blocks": "5-2"}, 'blocks has the range "5-2", which starts after its end'),
        ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent is 0.8, after end_percent, which is 0.2"),
        ({"end_percent": 1.5}, "end_percent is 1.5; it must be 0 to 1"),
        ({"min_tokens": -2}, "min_tokens"),
    ],
)
def test_bad_input_is_refused_at_validation(comfy, wrong, sentence):
    with pytest.raises(PromptError) as refused:
        comfy.sample("wan", [patch(**wrong)])
    assert list(refused.value.node_errors) == ["SageAttentionPatch_0"]
    assert sentence in str(refused.value)


@pytest.mark.parametrize("name, value", [("mode", "turbo"), ("smooth_v", "yes"), ("attention", "joint")])
def test_a_value_that_is_no_option_is_refused(comfy, name, value):
    with pytest.raises(PromptError, match=f"{name} is '{value}'; it must be one of |Value not in list"):
        comfy.sample("wan", [patch(**{name: value})])


def test_one_log_line_a_run(comfy):
    before = comfy.server.log().count("Sage Attention:")
    comfy.sample("wan", [patch()], steps=2)
    lines = [line for line in comfy.server.log().splitlines() if "Sage Attention:" in line]
    assert len(lines) == before + 1
    assert lines[-1].endswith(
        "Sage Attention: 6 calls by reference fp16/fp32 (blocks 0-2); "
        "6 passed on: cross attention (attention is set to self)"
    )


def test_the_report_shows_on_the_node(comfy):
    async def texts():
        """(node id, text) of the progress texts that a browser gets while one sampling runs."""
        found = []

        async def listen(socket):
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == struct.pack(">I", 3):  # TEXT
                    size = struct.unpack(">I", message.data[4:8])[0]
                    found.append((message.data[8 : 8 + size].decode(), message.data[8 + size :].decode()))

        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{comfy.server.url}/ws?clientId={comfy.server.client}") as socket:
                listener = asyncio.create_task(listen(socket))
                await asyncio.to_thread(comfy.sample, "wan", [patch()], steps=1)
                deadline = time.monotonic() + 10
                while not found and time.monotonic() < deadline:
                    await asyncio.sleep(0.05)
                listener.cancel()
        return found

    assert asyncio.run(texts()) == [
        (
            "SageAttentionPatch_0",
            "3 calls by reference fp16/fp32 (blocks 0-2)\n3 passed on: cross attention (attention is set to self)",
        )
    ]


def test_a_mode_and_switches_reach_the_kernel(comfy):
    inputs = dict(pv_accum="int8/int32", qk_quant_gran="per_warp", smooth_k="off", smooth_v="on", rotate="off")
    (taken,) = comfy.sample("wan", [patch(**inputs)], steps=1).report["taken"]
    assert taken["mode"] == "int8/int32"
    for part in ("qk_quant_gran='per_warp'", "smooth_k=False", "smooth_v=True", "rotate=False"):
        assert part in taken["config"]
