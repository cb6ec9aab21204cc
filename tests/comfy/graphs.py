"""The graphs that the tests run on a real ComfyUI, and the tiny models in them."""

import itertools
from dataclasses import dataclass

PACK = "sage-attention.v1"  # our folder in custom_nodes: no Python identifier, for people name clones as they like
DEFAULTS = dict(
    mode="auto", pv_accum="auto", qk_quant_gran="auto", smooth_k="auto", smooth_v="auto", rotate="auto",
    start_percent=0.0, end_percent=1.0, blocks="all", attention="self", min_tokens=-1,
)  # fmt: skip
VIDEO = {
    "class_type": "EmptyHunyuanLatentVideo",
    "inputs": dict(width=64, height=64, length=5, batch_size=1),
}  # 32 tokens
IMAGE = {"class_type": "EmptySD3LatentImage", "inputs": dict(width=128, height=128, batch_size=1)}  # 64 tokens


def unet(name):
    return {"class_type": "UNETLoader", "inputs": dict(unet_name=name, weight_dtype="default")}


def text(**inputs):
    everything = dict(tokens=16, width=64, pooled=0, hidden_tokens=0, random_seed=0)
    return {"class_type": "TestConditioning", "inputs": {**everything, **inputs}}


@dataclass(frozen=True)
class Tiny:
    loader: dict
    latent: dict
    text: dict
    blocks: int
    calls_a_block: int


MODELS = {
    "wan": Tiny(unet("tiny_wan.safetensors"), VIDEO, text(width=4096), blocks=3, calls_a_block=2),
    "wan22_5b": Tiny(unet("tiny_wan22_5b.safetensors"), VIDEO, text(width=4096), blocks=3, calls_a_block=2),
    "hunyuan": Tiny(unet("tiny_hunyuan_video.safetensors"), VIDEO, text(pooled=768), blocks=5, calls_a_block=1),
    "flux": Tiny({"class_type": "TinyFlux", "inputs": {}}, IMAGE, text(pooled=32), blocks=5, calls_a_block=1),
}


@dataclass
class Result:
    latent: object  # torch tensor
    reports: list  # of the patches in this prompt, in the order their sampling ended
    calls: list  # what RecordCalls nodes saw

    @property
    def report(self):
        assert len(self.reports) == 1, self.reports
        return self.reports[0]

    def seen(self, recorder):
        return [call for call in self.calls if call["recorder"] == recorder]


class Comfy:
    """Runs one sampling on the session's server."""

    def __init__(self, server):
        self.server = server
        self.numbers = itertools.count()
        self.plain: dict = {}

    def graph(self, model, nodes=(), *, text=None, latent=None, **sampler):
        """`nodes`: (class_type, inputs) in a row between loader and sampler, each with the model as its input."""
        tiny = MODELS[model]
        prompt = {"loader": tiny.loader, "text": text or tiny.text, "latent": latent or tiny.latent}
        last = "loader"
        for number, (kind, inputs) in enumerate(nodes):
            prompt[f"{kind}_{number}"] = {"class_type": kind, "inputs": {**inputs, "model": [last, 0]}}
            last = f"{kind}_{number}"
        settings = dict(seed=1, steps=4, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0)
        prompt["sampler"] = {
            "class_type": "KSampler",
            "inputs": {**settings, **sampler, "model": [last, 0], "positive": ["text", 0], "negative": ["text", 0],
                       "latent_image": ["latent", 0]},
        }  # fmt: skip
        prompt["save"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": ["sampler", 0], "filename_prefix": f"t{next(self.numbers)}_"},
        }
        return prompt

    def sample(self, model, nodes=(), **options) -> Result:
        from safetensors.torch import load_file

        before = len(self.server.get("/sage_attention/reports"))
        self.server.get("/test/calls")
        prompt = self.graph(model, nodes, **options)
        saved = self.server.run(prompt)["save"]["latents"][0]
        latent = load_file(self.server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]
        reports = self.server.get("/sage_attention/reports")
        assert before <= len(reports)
        mine = sum(node["class_type"] == "SageAttentionPatch" for node in prompt.values())
        return Result(latent, reports[len(reports) - mine :], self.server.get("/test/calls"))

    def unpatched(self, model, **options):
        """The latent without the patch, sampled once for each set of options."""
        key = repr((model, options))
        if key not in self.plain:
            self.plain[key] = self.sample(model, **options).latent
        return self.plain[key]


def patch(**inputs):
    return "SageAttentionPatch", {**DEFAULTS, "min_tokens": 0, **inputs}


def recorder(name, factor=1.0, clones=0):
    return "RecordCalls", {"name": name, "factor": factor, "clones": clones}


def relative_l2(value, reference) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()
