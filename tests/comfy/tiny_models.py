"""Write tiny random Wan 2.1, Wan 2.2 5B and HunyuanVideo checkpoints that UNETLoader recognises.

usage: python tiny_models.py COMFYUI_DIR MODELS_DIR       (run by conftest.py, in a process of its own)
"""

import sys
from pathlib import Path

WAN = dict(
    image_model="wan2.1", model_type="t2v", patch_size=(1, 2, 2), in_dim=16, dim=256, ffn_dim=512, freq_dim=256,
    text_dim=4096, out_dim=16, num_heads=2, num_layers=3,
)  # fmt: skip
WAN22_5B = {
    **WAN,
    "in_dim": 48,
    "out_dim": 48,
}  # Wan 2.2 5B's 48 latent channels; the 14B models are shaped as Wan 2.1's
HUNYUAN = dict(
    image_model="hunyuan_video", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=64, hidden_size=256,
    mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2],
    qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False, use_cond_type_embedding=False, vision_in_dim=None,
)  # fmt: skip


def random_weights(model, seed: int):
    """A state dict at a scale where activations neither vanish nor explode."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in model.state_dict().items():
        if value.ndim > 1:
            scale = value[0].numel() ** -0.5
            weights[name] = torch.randn(value.shape, generator=generator) * scale
        else:
            ones = "norm" in name and name.endswith(("scale", "weight"))
            weights[name] = torch.ones(value.shape) if ones else torch.zeros(value.shape)
    return weights


def main(comfyui: str, folder: str) -> None:
    sys.path.insert(0, comfyui)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = True
    import comfy.ops
    import torch
    from comfy.ldm.hunyuan_video.model import HunyuanVideo
    from comfy.ldm.wan.model import WanModel
    from safetensors.torch import save_file

    tiny = (
        ("tiny_wan", WanModel, WAN),
        ("tiny_wan22_5b", WanModel, WAN22_5B),
        ("tiny_hunyuan_video", HunyuanVideo, HUNYUAN),
    )
    for name, kind, config in tiny:
        model = kind(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
        save_file(random_weights(model, seed=0), Path(folder, f"{name}.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
