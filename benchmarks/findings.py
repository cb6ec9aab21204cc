"""The emulations behind docs/accuracy.md: why the modes are as they are. Name -> (config, knobs of reference.emulate)."""

from sage_kernels import AttentionConfig


def mode(pv_accum, gran="per_warp", smooth_v=False, rotate=True):
    return AttentionConfig(
        pv_accum=pv_accum, qk_quant_gran=gran, smooth_k=True, smooth_v=smooth_v, rotate=rotate, backend="reference"
    )


FINDINGS = {
    "fp8 PV, K smoothing alone (SageAttention2)": (mode("fp8/fp32+fp32", rotate=False), {}),
    "fp16 PV, rotation, scales per block": (mode("fp16/fp32", "per_block"), {}),
    "fp16 PV, rotation, scales per warp": (mode("fp16/fp32"), {}),
    "fp16 PV, rotation, scales per thread": (mode("fp16/fp32", "per_thread"), {}),
    "fp16 PV without rotation": (mode("fp16/fp32", rotate=False), {}),
    "int8 PV at the running maximum": (
        mode("int8/int32", smooth_v=True),
        {"p_top": "running", "residual_mean": False},
    ),
    "int8 PV at a tile's maximum, 128 keys": (mode("int8/int32", smooth_v=True), {"residual_mean": False}),
    "the same, 512 keys": (mode("int8/int32", smooth_v=True), {"residual_mean": False, "key_tile": 512}),
    "128 keys, without V smoothing": (mode("int8/int32"), {}),
    "128 keys, the residual mean put back": (mode("int8/int32", smooth_v=True), {}),
    "512 keys, the residual mean put back": (mode("int8/int32", smooth_v=True), {"key_tile": 512}),
}
