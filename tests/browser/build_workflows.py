"""Builds workflows/*.json (all but demo.json) in the real frontend, and their thumbnails: `make workflows`.

Each workflow is columns of groups of nodes. A node is (key, type, widgets, links, options): links map an input's name
to the key of the node whose first output feeds it. The frontend creates the nodes, measures them and saves the graph,
so the files are exactly what it saves. With --thumbnails the graphs stay as they are and only the pictures are redrawn.
"""

import argparse
import json
import sys
import tempfile
import uuid
from pathlib import Path

import frontend

ROOT = Path(__file__).resolve().parents[2]
HUB = "https://huggingface.co/"
WAN21 = HUB + "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
WAN22 = HUB + "Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/"
HUNYUAN = HUB + "Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files/"
ENCODERS = HUB + "comfyanonymous/flux_text_encoders/resolve/main/"
TEXT_BOX = {"size": [380, 150]}


def model(url: str, directory: str) -> dict:
    return {"name": url.rsplit("/", 1)[1], "url": url, "directory": directory}


def loader(key: str, kind: str, widget: str, url: str, directory: str, **widgets) -> tuple:
    entry = model(url, directory)
    return (key, kind, {widget: entry["name"], **widgets}, {}, {"models": [entry]})


def patch(key: str, source: str, **options) -> tuple:
    return (key, "SageAttentionPatch", {}, {"model": source}, options)


def text(key: str, title: str, words: str, clip: str = "clip") -> tuple:
    return (key, "CLIPTextEncode", {"text": words}, {"clip": clip}, {"title": title, **TEXT_BOX})


def note(words: str, height: int) -> tuple:
    return ("note", "MarkdownNote", {"": words}, {}, {"title": "About this workflow", "size": [380, height]})


def wan_sampler(key: str, source: str, latent: str, first: bool) -> tuple:
    widgets = {
        "add_noise": "enable" if first else "disable", "noise_seed": 42 if first else 0,
        "control_after_generate": "randomize" if first else "fixed", "steps": 20, "cfg": 3.5,
        "sampler_name": "euler", "scheduler": "simple", "start_at_step": 0 if first else 10,
        "end_at_step": 10 if first else 10000, "return_with_leftover_noise": "enable" if first else "disable",
    }  # fmt: skip
    links = {"model": source, "positive": "positive", "negative": "negative", "latent_image": latent}
    title = "High noise: steps 0 to 10" if first else "Low noise: steps 10 to 20"
    return (key, "KSamplerAdvanced", widgets, links, {"title": title})


WAN_T2V = [
    [
        ("1 - Models", [
            loader("high", "UNETLoader", "unet_name",
                   WAN22 + "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "diffusion_models"),
            loader("low", "UNETLoader", "unet_name",
                   WAN22 + "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", "diffusion_models"),
            loader("clip", "CLIPLoader", "clip_name",
                   WAN21 + "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders", type="wan"),
            loader("vae", "VAELoader", "vae_name", WAN22 + "vae/wan_2.1_vae.safetensors", "vae"),
        ]),
        ("2 - Size", [
            ("latent", "EmptyHunyuanLatentVideo", {"width": 832, "height": 480, "length": 81}, {}, {}),
        ]),
    ],
    [
        ("3 - Sage attention", [
            patch("patch_high", "high", title="Sage Attention Patch (high)"),
            patch("patch_low", "low", title="Sage Attention Patch (low)"),
        ]),
    ],
    [
        ("4 - Prompt", [
            text("positive", "Positive prompt", "A red fox trots along a snowy forest path at dawn. Its breath steams "
                 "in the cold air, snow falls slowly from the branches. The camera follows at its side, shallow depth "
                 "of field, soft golden light."),
            text("negative", "Negative prompt", "overexposed, static, blurred details, subtitles, painting, low "
                 "quality, JPEG artefacts, deformed limbs, walking backwards"),
        ]),
        ("Notes", [
            note("Wan 2.2 text to video, 14B. One **Sage Attention Patch** for each of the two models, both on "
                 "*auto*.\n\n"
                 "After a run the node shows how many attention calls it took, in which mode, and why it passed others "
                 "on.\n\nTo compare with the model as it is: select both patches, Ctrl+B, run again.", 140),
        ]),
    ],
    [
        ("5 - First half", [
            ("shift_high", "ModelSamplingSD3", {"shift": 8}, {"model": "patch_high"}, {}),
            wan_sampler("sample_high", "shift_high", "latent", True),
        ]),
    ],
    [
        ("6 - Second half", [
            ("shift_low", "ModelSamplingSD3", {"shift": 8}, {"model": "patch_low"}, {}),
            wan_sampler("sample_low", "shift_low", "sample_high", False),
        ]),
        ("7 - Video", [
            ("decode", "VAEDecode", {}, {"samples": "sample_low", "vae": "vae"}, {}),
            ("video", "CreateVideo", {"fps": 16}, {"images": "decode"}, {}),
            ("save", "SaveVideo", {"filename_prefix": "video/wan22"}, {"video": "video"}, {"size": [300, 110]}),
        ]),
    ],
]  # fmt: skip

FLUX = [
    [
        ("1 - Models", [
            loader("unet", "UNETLoader", "unet_name", HUB + "Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors",
                   "diffusion_models"),
            ("clip", "DualCLIPLoader",
             {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "flux"}, {},
             {"models": [model(ENCODERS + "clip_l.safetensors", "text_encoders"),
                         model(ENCODERS + "t5xxl_fp16.safetensors", "text_encoders")]}),
            loader("vae", "VAELoader", "vae_name",
                   HUB + "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors", "vae"),
        ]),
        ("2 - Size", [("latent", "EmptySD3LatentImage", {"width": 1024, "height": 1024}, {}, {})]),
    ],
    [
        ("3 - Sage attention", [patch("patch", "unet")]),
    ],
    [
        ("4 - Prompt", [
            text("positive", "Prompt", "A watchmaker's bench by a rainy window, brass gears laid out on dark green "
                 "felt, a half-open pocket watch in the middle, warm lamp light, macro photograph, fine detail."),
            ("guidance", "FluxGuidance", {"guidance": 3.5}, {"conditioning": "positive"}, {}),
            ("negative", "ConditioningZeroOut", {}, {"conditioning": "positive"}, {}),
        ]),
        ("Notes", [
            note("Flux.1 dev with **Sage Attention Patch** on *auto*. At 1024 x 1024 a call has about 4,600 tokens: "
                 "long enough to gain. Much smaller pictures gain little.", 90),
        ]),
    ],
    [
        ("5 - Sampling", [
            ("sample", "KSampler",
             {"seed": 42, "control_after_generate": "randomize", "steps": 20, "cfg": 1, "sampler_name": "euler",
              "scheduler": "simple", "denoise": 1},
             {"model": "patch", "positive": "guidance", "negative": "negative", "latent_image": "latent"}, {}),
        ]),
        ("6 - Image", [
            ("decode", "VAEDecode", {}, {"samples": "sample", "vae": "vae"}, {}),
            ("save", "SaveImage", {"filename_prefix": "flux"}, {"images": "decode"}, {"size": [300, 110]}),
        ]),
    ],
]  # fmt: skip

HUNYUAN_T2V = [
    [
        ("1 - Models", [
            loader("unet", "UNETLoader", "unet_name",
                   HUNYUAN + "diffusion_models/hunyuan_video_t2v_720p_bf16.safetensors", "diffusion_models"),
            ("clip", "DualCLIPLoader",
             {"clip_name1": "clip_l.safetensors", "clip_name2": "llava_llama3_fp8_scaled.safetensors",
              "type": "hunyuan_video"}, {},
             {"models": [model(ENCODERS + "clip_l.safetensors", "text_encoders"),
                         model(HUNYUAN + "text_encoders/llava_llama3_fp8_scaled.safetensors", "text_encoders")]}),
            loader("vae", "VAELoader", "vae_name", HUNYUAN + "vae/hunyuan_video_vae_bf16.safetensors", "vae"),
        ]),
        ("2 - Size", [
            ("latent", "EmptyHunyuanLatentVideo", {"width": 848, "height": 480, "length": 73}, {}, {}),
        ]),
    ],
    [
        ("3 - Sage attention", [patch("patch", "unet")]),
    ],
    [
        ("4 - Prompt", [
            text("positive", "Prompt", "A paper boat drifts down a narrow cobbled street after heavy rain, lanterns "
                 "mirrored in the water, the camera low and close behind it, cinematic, slow motion."),
            ("guidance", "FluxGuidance", {"guidance": 6}, {"conditioning": "positive"}, {}),
        ]),
        ("Notes", [
            note("HunyuanVideo text to video with **Sage Attention Patch** on *auto*. The two calls a step of the text "
                 "refiner are short and belong to no block: the node passes them on and says so.", 90),
        ]),
    ],
    [
        ("5 - Sampling", [
            ("noise", "RandomNoise", {"noise_seed": 42, "control_after_generate": "randomize"}, {}, {}),
            ("shift", "ModelSamplingSD3", {"shift": 7}, {"model": "patch"}, {}),
            ("guider", "BasicGuider", {}, {"model": "shift", "conditioning": "guidance"}, {}),
            ("sampler", "KSamplerSelect", {"sampler_name": "euler"}, {}, {}),
            ("sigmas", "BasicScheduler", {"scheduler": "simple", "steps": 20, "denoise": 1}, {"model": "shift"}, {}),
        ]),
    ],
    [
        ("6 - Video", [
            ("sample", "SamplerCustomAdvanced", {},
             {"noise": "noise", "guider": "guider", "sampler": "sampler", "sigmas": "sigmas", "latent_image": "latent"},
             {}),
            ("decode", "VAEDecodeTiled", {"tile_size": 256, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8},
             {"samples": "sample", "vae": "vae"}, {}),
            ("video", "CreateVideo", {"fps": 24}, {"images": "decode"}, {}),
            ("save", "SaveVideo", {"filename_prefix": "video/hunyuan"}, {"video": "video"}, {"size": [300, 110]}),
        ]),
    ],
]  # fmt: skip

WORKFLOWS = {"wan22_t2v": WAN_T2V, "flux_dev": FLUX, "hunyuanvideo_t2v": HUNYUAN_T2V}

BUILD_JS = """([id, versions, columns]) => {
  const GAP = 50, PAD = 20, TITLE = 30, HEAD = 55;
  const nodes = {}, links = [];
  app.graph.clear();
  app.graph.id = id;
  let x = 0;
  for (const groups of columns) {
    let y = 0, width = 0;
    const made = groups.map(([title, specs]) => [title, specs.map(([key, type, widgets, inputs, options]) => {
      const node = LiteGraph.createNode(type);
      if (!node) throw new Error(`the frontend knows no node ${type}`);
      app.graph.add(node);
      nodes[key] = node;
      if (options.title) node.title = options.title;
      if (type === 'MarkdownNote') node.widgets[0].value = widgets[''];
      else for (const [name, value] of Object.entries(widgets)) {
        const widget = node.widgets.find(w => w.name === name);
        if (!widget) throw new Error(`${type} has no widget ${name}`);
        widget.value = value;
      }
      for (const [name, source] of Object.entries(inputs)) links.push([source, node, name]);
      if (options.models) node.properties.models = options.models;
      const module = node.constructor.nodeData?.python_module ?? '';  // none: a node of the frontend itself
      const pack = module.startsWith('custom_nodes.') ? 'sage-attention-patch' : module ? 'comfy-core' : null;
      if (pack) Object.assign(node.properties, {cnr_id: pack, ver: versions[pack]});
      const least = node.computeSize(), wanted = options.size ?? [280, 0];
      node.setSize([Math.max(least[0], wanted[0]), Math.max(least[1], wanted[1])]);
      width = Math.max(width, node.size[0]);
      return node;
    })]);
    for (const [title, members] of made) {
      const group = new LiteGraph.LGraphGroup(title);
      const top = y;
      y += HEAD + TITLE;
      for (const node of members) {
        node.setSize([width, node.size[1]]);
        node.pos = [x + PAD, y];
        y += node.size[1] + TITLE + PAD;
      }
      y -= TITLE;
      group.pos = [x, top];
      group.size = [width + 2 * PAD, y - top];
      app.graph.add(group);
      y += PAD;
    }
    x += width + 2 * PAD + GAP;
  }
  for (const [source, node, name] of links) {
    const slot = node.findInputSlot(name);
    if (slot < 0 || !nodes[source].connect(0, node, slot)) throw new Error(`no link ${source} to ${node.type}.${name}`);
  }
  app.graph.computeExecutionOrder?.(false);
}"""


def build(page, name: str, columns: list, versions: dict[str, str]) -> None:
    page.evaluate(BUILD_JS, [str(uuid.uuid5(uuid.NAMESPACE_URL, name)), versions, columns])
    page.wait_for_timeout(500)
    page.evaluate(frontend.FIT_JS, [frontend.VIEW["width"], frontend.VIEW["height"]])
    page.wait_for_timeout(300)
    saved = json.dumps(frontend.export(page), indent=1, ensure_ascii=False)
    (ROOT / "workflows" / f"{name}.json").write_text(saved + "\n", encoding="utf-8")


def pack_version() -> str:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version = "))  # tomllib is not in Python 3.10


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--thumbnails", action="store_true", help="redraw the pictures only")
    options = parser.parse_args(arguments)
    chromium = frontend.find_chromium()
    if chromium is None:
        print("No chromium on PATH. Install it (Debian: apt-get install chromium).", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as base, frontend.server(base) as server, frontend.browser(chromium) as chrome:
        versions = {
            "comfy-core": server.get("/system_stats")["system"]["comfyui_version"],
            "sage-attention-patch": pack_version(),
        }
        page, _ = frontend.open_frontend(chrome, server.url)
        for name, columns in WORKFLOWS.items():
            path = ROOT / "workflows" / f"{name}.json"
            if not options.thumbnails:
                build(page, name, columns, versions)
            frontend.load_workflow(page, path)
            frontend.draw_graph(page, path.with_suffix(".jpg"))
            print(f"{path.relative_to(ROOT)}: {path.with_suffix('.jpg').stat().st_size / 1024:.0f} KiB of picture")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
