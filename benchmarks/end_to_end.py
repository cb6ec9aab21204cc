"""A sampling step of whole models, by attention: ComfyUI's own, torch's cuDNN, and the node in several modes.

    COMFYUI_DIR=... python benchmarks/end_to_end.py                    # about eight minutes on an H200
    COMFYUI_DIR=... python benchmarks/end_to_end.py --models flux,demo --modes auto
    COMFYUI_DIR=... python benchmarks/end_to_end.py --models wan --blocks 4
    python benchmarks/end_to_end.py --tiny                             # tries the script itself, also without a GPU

wan and flux are ComfyUI's own classes in the sizes of Wan 2.1 14B (720p, 81 frames) and Flux.1 dev (1024 x 1024), with
random bf16 weights made on the GPU. ComfyUI's sampler runs them (euler, cfg 1): one step to warm up, whose model output is
verified, then the timed ones. ms is the median of those, rel_l2 the relative L2 of the model's output against that with
torch's cuDNN attention (what ComfyUI's own has of it is the rounding of bf16 through all layers), peak_gib the most memory
that torch's allocator held, weights included.

demo is the trained model of this repository, which has no speed to speak of: psnr_db is the mean PSNR of ten videos against
those with torch's cuDNN attention, psnr_min_db the least, recognised how many show the digit asked for.

passed: the attention calls that the node passed on, by reason. A row with an error is not timed, or not what it says.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = Path(os.environ.get("COMFYUI_DIR", ROOT / ".comfy" / "ComfyUI"))
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "demo"), str(COMFYUI)]

import torch  # noqa: E402
from bench import machine, save, title  # noqa: E402
from tables import steps as table_of_steps  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

OURS = "auto,fp16/fp32,int8/int32,fp8/fp32+fp16"
# Relative L2 of the model's output above which a mode is wrong, and not timed. One call is off by half of it or less
# (tests/checks.py); between two float kernels only the order of sums differs.
BOUND = {"float": 0.05, "fp16": 0.05, "int8": 0.07, "fp8": 0.14}
KEYS = (
    8  # about so many keys count for each query of a random model; with far more, attention would add next to nothing
)


@dataclass(frozen=True)
class Model:
    title: str
    kind: str  # of comfy.supported_models
    config: dict
    blocks: tuple[str, ...]  # the keys of config that count blocks
    latent: tuple[int, ...]
    text: tuple[int, int]  # tokens, width
    joint: bool  # whether self-attention covers the text too
    heads: int
    pooled: int = 0

    @property
    def tokens(self) -> int:
        return math.prod(self.latent[2:]) // 4 + self.joint * self.text[0]  # 2x2 patches

    @property
    def count(self) -> int:
        return sum(self.config[key] for key in self.blocks)

    def with_blocks(self, count: int) -> Model:
        """The same model with about `count` blocks, of each type in proportion."""
        few = {key: max(1, round(self.config[key] * count / self.count)) for key in self.blocks}
        return replace(self, config={**self.config, **few})


WAN = Model(
    "Wan 2.1 14B, 720p x 81 frames", "WAN21_T2V", dict(
        image_model="wan2.1", model_type="t2v", patch_size=(1, 2, 2), dim=5120, ffn_dim=13824, num_heads=40,
        num_layers=40, in_dim=16, out_dim=16, freq_dim=256, text_dim=4096),
    ("num_layers",), (1, 16, 21, 90, 160), (512, 4096), False, 40,
)  # fmt: skip
FLUX = Model(
    "Flux.1 dev, 1024 x 1024", "Flux", dict(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072,
        mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True),
    ("depth", "depth_single_blocks"), (1, 16, 128, 128), (512, 4096), True, 24, 768,
)  # fmt: skip
MODELS = {"wan": WAN, "flux": FLUX}
TINY = {
    "wan": replace(
        WAN, title="tiny Wan", latent=(1, 16, 3, 16, 16), text=(16, 4096), heads=2,
        config={**WAN.config, "dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2}),
    "flux": replace(
        FLUX, title="tiny Flux", latent=(1, 16, 16, 16), text=(16, 64), heads=2, pooled=32,
        config={**FLUX.config, "hidden_size": 256, "num_heads": 2, "depth": 1, "depth_single_blocks": 2,
                "context_in_dim": 64, "vec_in_dim": 32}),
}  # fmt: skip


def main() -> int:
    args = parse(sys.argv[1:])
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No NVIDIA GPU here, so there is nothing to time. --tiny tries the script itself.")
        return 2
    if not (COMFYUI / "comfy").is_dir():
        print(f"No ComfyUI in {COMFYUI}: make setup installs one, or set COMFYUI_DIR.")
        return 2
    start_comfyui(args.device)
    result = machine(args.device)
    print(f"{result['machine']}, driver {result['driver']}, torch {result['torch']}, commit {result['commit']}")
    rows: list[dict] = []
    with torch.inference_mode():
        for name in args.models:
            measure = demo if name == "demo" else timed
            for line in measure(name, args):
                rows.append(line)
                told = {
                    key: line[key] for key in ("ms", "rel_l2", "psnr_db", "peak_gib", "taken", "passed") if key in line
                }
                print(f"{line['name']}: {title(line)}: {json.dumps(told)} {line.get('error', '')}", flush=True)
                path = save(result, rows, args.out, "end-to-end-")
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print(table_of_steps(rows))
    print(f"written: {path}")
    wrong = [line for line in rows if line.get("error")]
    for line in wrong:
        print(f"FAILED: {line['name']}: {title(line)}: {line['error']}")
    return 1 if wrong else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,flux,wan", help="comma list of demo, flux, wan")
    parser.add_argument("--modes", default=OURS, help=f"comma list of the node's modes: auto or a pv_accum; {OURS}")
    parser.add_argument("--blocks", type=int, default=0, help="about so many transformer blocks instead of all")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed")
    parser.add_argument("--out", default="", help="result file or folder; benchmarks/results/ if not given")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps: measures nothing")
    args = parser.parse_args(argv)
    args.device = "cpu" if args.tiny and not torch.cuda.is_available() else "cuda"
    args.models, args.modes = args.models.split(","), args.modes.split(",")
    if unknown := [name for name in args.models if name not in (*MODELS, "demo")]:
        parser.error(f"--models: {unknown[0]!r} is none of demo, {', '.join(MODELS)}")
    return args


def start_comfyui(device: str) -> None:
    """Import what of ComfyUI is used, as its server does with no arguments (and --cpu)."""
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    import comfy.sample
    import comfy.sd
    import comfy.supported_models  # noqa: F401


def timed(name: str, args: argparse.Namespace):
    """A row for each attention: one model, random weights, its output verified, its steps timed."""
    import comfy.sample
    from comfy.samplers import sampler_object

    whole = (TINY if args.tiny else MODELS)[name]
    spec = whole.with_blocks(args.blocks) if args.blocks else whole
    base = build(spec)
    rng = torch.Generator().manual_seed(1)
    noise, text = torch.randn(spec.latent, generator=rng), torch.randn(1, *spec.text, generator=rng)
    extra = {"pooled_output": torch.randn(1, spec.pooled, generator=rng)} if spec.pooled else {}
    prompt = [[text, extra]]
    sigmas = torch.linspace(1, 0, args.steps + 2)
    shape = [1, spec.heads, spec.tokens, spec.tokens, 128]
    fixed = {"model": name, "blocks": spec.count, "of_blocks": whole.count, "steps": args.steps, "inputs": "random weights",
             "name": spec.title + ("" if spec.count == whole.count else f" ({spec.count} of {whole.count} blocks)"),
             "shape": shape, "causal": False, "dtype": "bfloat16"}  # fmt: skip
    reference = None
    for line, patcher in contenders(base, shape, torch.bfloat16, args):
        line = {**fixed, **line, "ms": None, "tflops": None, "rel_l2": None}
        outputs, marks = [], []

        def callback(step, denoised, x, _total):
            if step == 0:
                out = (x - denoised) / sigmas[0].to(x)  # the model's output: it predicts noise - picture
                outputs.append(out)
                verify(out, reference, line)
            marks.append(mark(args.device))

        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            comfy.sample.sample_custom(
                patcher, noise, 1.0, sampler_object("euler"), sigmas, prompt, prompt, torch.zeros_like(noise),
                callback=callback, disable_pbar=True, seed=0,
            )  # fmt: skip
        except Exception as error:  # whatever is wrong with one attention is its row's error; the others still run
            line["error"] = in_words(error)
        else:
            each = [between(*pair) for pair in zip(marks, marks[1:])]
            line["ms"] = round(statistics.median(each), 2)
            line["spread"] = round((max(each) - min(each)) / line["ms"], 3)
            if args.device == "cuda":
                line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if reference is None and "error" not in line:
            reference = outputs[0]
        count_calls(line, spec.count)
        yield line


def verify(out, reference, line: dict) -> None:
    """Set the row's rel_l2. Raises ValueError for an output that is not to be timed."""
    if not out.isfinite().all():
        raise ValueError("the model's output is not finite")
    if reference is None:
        return
    line["rel_l2"] = round(((out - reference).norm() / reference.norm()).item(), 5)
    bound = BOUND[line["mode"].split("/")[0] if line.get("choice") else "float"]
    if not line["rel_l2"] < bound:
        raise ValueError(f"relative L2 {line['rel_l2']}, above {bound}, so it was not timed")


def mark(device: str):
    """A point in time of the device's work."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    """Milliseconds."""
    if isinstance(start, float):
        return (end - start) * 1e3
    end.synchronize()
    return start.elapsed_time(end)


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def build(spec: Model):
    """A ModelPatcher around ComfyUI's class, its weights made on ComfyUI's device, and never moved from there.

    A matrix is N(0, 1 / fan-in), biases 0 and norms 1, so that every layer keeps the size of what goes in and activations
    stay finite. Scores are then N(0, 1) times the weight of q's norm, s, and of n keys about n exp(-s^2) count.
    """
    import comfy.supported_models
    from comfy.model_management import get_torch_device
    from comfy.model_patcher import ModelPatcher

    device = get_torch_device()
    config = getattr(comfy.supported_models, spec.kind)(spec.config)
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model({}, device=device)
    rng = torch.Generator(device).manual_seed(0)
    for name, weight in model.diffusion_model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=rng)
        elif "norm_q" in name or "query_norm" in name:
            weight.fill_(math.log(spec.tokens / KEYS) ** 0.5)
        else:
            weight.fill_(1.0 if "norm" in name and not name.endswith("bias") else 0.0)
    return ModelPatcher(model, load_device=device, offload_device=device)


def contenders(model, shape, dtype, args):
    """(row, ModelPatcher) for each attention; the first is what the others are compared with."""
    from comfy.ldm.modules import attention

    backend = SDPBackend.MATH if args.device == "cpu" else SDPBackend.CUDNN_ATTENTION

    def forced(_func, *words, **named):
        with sdpa_kernel(backend):
            return attention.attention_pytorch(*words, **named)

    torchs, own = model.clone(), attention.optimized_attention
    torchs.model_options["transformer_options"]["optimized_attention_override"] = forced
    yield {"backend": "torch", "mode": "math" if args.device == "cpu" else "cudnn"}, torchs
    x = torch.empty(*shape[:3], shape[4], dtype=dtype, device=args.device)
    name = own.__name__
    if own is attention.attention_pytorch:
        name += " " + SDPBackend(torch._fused_sdp_choice(x, x, x)).name.lower()
    del x
    yield {"backend": "comfyui", "mode": name}, model.clone()
    yield from ours(model, shape[1], dtype, args)


def ours(model, heads, dtype, args):
    """The node's modes, as its own execute patches them; those that come to the same kernel once."""
    import sage_kernels
    from nodes.patch import SageAttentionPatch

    class Node(SageAttentionPatch):
        hidden = type("Hidden", (), {"unique_id": None})

    inputs = SageAttentionPatch.define_schema().inputs
    defaults = {given.id: given.default for given in inputs if given.id != "model"}
    defaults["min_tokens"] = 0  # also where a call is too short to gain: what it costs is what is measured
    x = torch.zeros(1, heads, 64, 128, dtype=dtype, device=args.device)
    seen: dict = {}
    for mode in args.modes:
        pv_accum = mode if "/" in mode else "auto"
        choice = sage_kernels.explain(x, x, x, config=sage_kernels.AttentionConfig(pv_accum=pv_accum, strict=False))
        if choice.refusal or choice.config in seen:
            print(f"left out: {mode}: {choice.refusal or f'the same kernel as {seen[choice.config]}'}")
            continue
        seen[choice.config] = mode
        line = {
            "backend": choice.backend,
            "mode": choice.mode,
            "qk_quant_gran": choice.config.qk_quant_gran,
            "choice": mode,
        }
        line |= {"intents": ["auto"]} if mode == "auto" else {}
        yield line, Node.execute(model, **{**defaults, "pv_accum": pv_accum}).args[0]


def count_calls(line: dict, blocks: int) -> None:
    """Put into one of the node's rows what its report says, with an error if a self-attention call was not taken."""
    from nodes import report

    if "choice" not in line or not report._recent:  # it has none when sampling failed before it began
        return
    told = report._recent.pop()
    line["taken"] = [{key: taken[key] for key in ("backend", "mode", "calls")} for taken in told["taken"]]
    line |= {key: told[key] for key in ("passed", "notes", "errors") if told[key]}
    wanted = [{"backend": line["backend"], "mode": line["mode"], "calls": blocks * told["model_calls"]}]
    if line["taken"] != wanted and "error" not in line:
        line["error"] = f"{line['taken']} were taken, not {wanted}: {told['passed']} {told['errors']}"


def demo(_name: str, args: argparse.Namespace):
    """A row for each attention: ten videos of the trained model against those with float attention."""
    import classifier
    import comfy.sample
    import comfy.sd
    from comfy.latent_formats import Wan21
    from digit_nodes.format import DIGITS, LATENT_SHAPE, conditioning, latent_to_frames

    base = comfy.sd.load_diffusion_model(str(ROOT / "demo" / "weights" / "digits_wan.safetensors"))
    steps, digits = (2, DIGITS[4:5]) if args.tiny else (20, DIGITS[1:])
    positive, negative = [[conditioning(digits), {}]], [[conditioning(["none"]), {}]]
    latent = torch.zeros(len(digits), *LATENT_SHAPE)
    noise, dtype = comfy.sample.prepare_noise(latent, 7), base.model.get_dtype()
    judge, shape, reference = classifier.load(), [len(digits), 2, 1024, 1024, 128], None
    for line, patcher in contenders(base, shape, dtype, args):
        line = {"model": "demo", "name": "demo's model", "shape": shape, "causal": False, "dtype": str(dtype)[6:],
                "steps": steps, "inputs": "trained", **line, "ms": None, "tflops": None, "rel_l2": None}  # fmt: skip
        try:
            out = comfy.sample.sample(
                patcher, noise, steps, 2.0, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=7
            )
            frames = latent_to_frames(Wan21().process_in(out.float().cpu()))
            if not out.isfinite().all():
                raise ValueError("the latents are not finite")
        except Exception as error:  # as in timed
            line["error"] = in_words(error)
        else:
            reference = frames if reference is None else reference
            line["rel_l2"] = round(((frames - reference).norm() / reference.norm()).item(), 5)
            psnr = -10 * (frames - reference).square().flatten(1).mean(1).clamp_min(1e-12).log10()  # at most 120 dB
            line["psnr_db"], line["psnr_min_db"] = round(psnr.mean().item(), 2), round(psnr.min().item(), 2)
            said = judge.recognise(frames)[0].tolist()
            line["recognised"] = f"{sum(str(a) == b for a, b in zip(said, digits))} of {len(digits)}"
        count_calls(line, base.model.diffusion_model.num_layers)
        yield line


if __name__ == "__main__":
    sys.exit(main())
