"""The demo's model through ComfyUI's own loader and sampler on the GPU, without a server: one JSON line.

COMFYUI_DIR=... python tests/gpu/comfy_on_gpu.py [cpu]. It samples one video as it is, patched, and patched and compiled,
and says what each run's report was, how far the latents are apart, and how long a run took.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
on_cpu = sys.argv[1:] == ["cpu"]
sys.argv = sys.argv[:1]
sys.path.insert(0, os.environ["COMFYUI_DIR"])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args  # noqa: E402

args.cpu = on_cpu
args.use_pytorch_cross_attention = True

import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402


def package(name: str, folder: Path):
    """Import a folder under a name of its own, as ComfyUI imports custom nodes."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


package("sage_pack", ROOT)
package("digits", ROOT / "demo" / "digit_nodes")
from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: E402
from digits.format import LATENT_SHAPE, conditioning  # noqa: E402
from sage_pack.nodes import report  # noqa: E402
from sage_pack.nodes.patch import SageAttentionPatch  # noqa: E402


def sample(model, steps: int = 12):
    latent = torch.zeros(1, *LATENT_SHAPE)
    noise = comfy.sample.prepare_noise(latent, 7)
    positive, negative = ([[conditioning([digit]), {}]] for digit in ("3", "none"))
    begin = time.perf_counter()
    out = comfy.sample.sample(
        model, noise, steps, 2.0, "euler", "simple", positive, negative, latent, denoise=1.0, seed=7
    )
    return out.float(), time.perf_counter() - begin


def patched(model, **choices):
    values = {
        "mode": "auto", "pv_accum": "auto", "qk_quant_gran": "auto", "smooth_k": "auto", "smooth_v": "auto",
        "rotate": "auto", "start_percent": 0.0, "end_percent": 1.0, "blocks": "all", "attention": "self",
        "min_tokens": 1024, **choices,
    }  # fmt: skip

    class Node(SageAttentionPatch):
        hidden = type("Hidden", (), {"unique_id": "1"})

    return Node.execute(model, **values).args[0]


def main() -> None:
    model = comfy.sd.load_diffusion_model(str(ROOT / "demo" / "weights" / "digits_wan.safetensors"))
    plain, _ = sample(model)
    plain, seconds = sample(model)
    found = {"plain": {"seconds": round(seconds, 3), "dtype": str(model.model.get_dtype())}}
    cases = {"auto": {}, "int8": {"pv_accum": "int8/int32"}, "accurate": {"mode": "accurate", "attention": "both"},
             "fp8": {"pv_accum": "fp8/fp32+fp16"}}  # fmt: skip
    for name, choices in cases.items():
        changed = patched(model, **choices)
        sample(changed, 2)  # Triton compiles
        latent, seconds = sample(changed)
        off = float((latent - plain).norm() / plain.norm())
        found[name] = {"seconds": round(seconds, 3), "relative_l2": round(off, 5), "report": report._recent[-1]}
    if not on_cpu:
        compiled = patched(model)
        set_torch_compile_wrapper(compiled, backend="inductor", fullgraph=True)
        sample(compiled, 2)
        latent, seconds = sample(compiled)
        off = float((latent - plain).norm() / plain.norm())
        found["compiled"] = {"seconds": round(seconds, 3), "relative_l2": round(off, 5), "report": report._recent[-1]}
    print(json.dumps(found))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
