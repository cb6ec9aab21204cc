"""Quantised attention: INT8 QK with smoothing and rotation, PV in fp16, fp8 or int8. Works without ComfyUI.

    out = sage_kernels.attention(q, k, v)                       # the best this machine has
    out = sage_kernels.attention(q, k, v, config=AttentionConfig(pv_accum="int8/int32", qk_quant_gran="per_thread"))
    print(sage_kernels.explain(q, k, v))                        # what the call would get, and why

The algorithm is that of SageAttention (arXiv 2410.02367), SageAttention2 (2411.10958) and SageAttention2++ (2505.21136);
docs/algorithm.md says what is different here. Forward only.
"""

from __future__ import annotations

from .api import attention, attention_consuming, explain
from .config import PV_MODES, QK_GRANULARITIES, AttentionConfig
from .convention import (
    sageattn,
    sageattn_qk_int8_pv_fp8_cuda,
    sageattn_qk_int8_pv_fp8_cuda_sm90,
    sageattn_qk_int8_pv_fp16_cuda,
    sageattn_qk_int8_pv_fp16_triton,
    sageattn_varlen,
)
from .dispatch import Choice, availability

__all__ = [
    "PV_MODES",
    "QK_GRANULARITIES",
    "AttentionConfig",
    "Choice",
    "attention",
    "attention_consuming",
    "availability",
    "explain",
    "sageattn",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_varlen",
]
