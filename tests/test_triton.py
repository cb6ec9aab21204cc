"""The Triton kernels in Triton's interpreter against the reference's emulation of the same mode, and their compilation
for every GPU we name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import close, exact, qkv, same_special, tolerance

import sage_kernels
from sage_kernels import AttentionConfig
from sage_kernels.dispatch import interpreting
from sage_kernels.quantize import GRANULARITIES

pytest.importorskip("triton", reason="the triton package is not installed")
needs_interpreter = pytest.mark.skipif(not interpreting(), reason="on a GPU tests/gpu runs these kernels for real")

MODES = ("fp16/fp32", "int8/int32")
# The same roundings in another order of float32 sums: a code here and there falls to the other side.
LIMIT = 1e-3
BF16 = 6e-3  # the interpreter stores bfloat16 by cutting bits off


def both(q, k, v, limit=LIMIT, layout="HND", **options):
    """Triton's (out, lse) after comparing it with the reference's of the same config."""
    options["tensor_layout"] = layout
    parts = {"pv_accum": "fp16/fp32", "qk_quant_gran": "per_warp", **options.pop("config", {})}
    out, lse = sage_kernels.attention(
        q, k, v, return_lse=True, config=AttentionConfig(backend="triton", **parts), **options
    )
    wanted, wanted_lse = sage_kernels.attention(
        q, k, v, return_lse=True, config=AttentionConfig(backend="reference", **parts), **options
    )
    close(out, wanted, limit)
    same_special(lse, wanted_lse)
    seen = wanted_lse.isfinite()
    assert float((lse - wanted_lse)[seen].abs().max()) < 0.02  # absolute: it is a logarithm
    return out, lse


@needs_interpreter
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gran", GRANULARITIES)
def test_modes_and_granularities(mode, gran):
    q, k, v = qkv(b=2, heads=4, kv_heads=2, nq=200, nk=300, d=64)
    out, _ = both(q, k + 1, v + 0.5, config={"pv_accum": mode, "qk_quant_gran": gran})
    assert out.is_contiguous() and out.dtype == q.dtype


@needs_interpreter
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["smooth_k", "smooth_v", "rotate"])
@pytest.mark.parametrize("value", [False, True])
def test_smoothing_and_rotation(mode, part, value):
    q, k, v = qkv(heads=2, nq=130, nk=140, d=64)
    both(q, k + 1, v + 0.5, config={"pv_accum": mode, part: value})


@needs_interpreter
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [1, 17, 64, 96, 128, 200, 256])
def test_head_dims(mode, dim):
    both(*qkv(heads=1, nq=33, nk=129, d=dim), config={"pv_accum": mode})


@needs_interpreter
@pytest.mark.parametrize("dtype,limit", [(torch.float16, 1e-3), (torch.bfloat16, BF16), (torch.float32, LIMIT)])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_dtypes_and_layouts(dtype, limit, layout):
    q, k, v = qkv(b=2, nq=65, nk=130, d=64, dtype=dtype, layout=layout)
    out, _ = both(q, k, v, limit, layout)
    assert out.dtype == dtype and out.shape == q.shape and out.is_contiguous()


MASKS = {
    "causal": {"is_causal": True},
    "padding": {"attn_mask": torch.arange(300)[None, None, None] < torch.tensor([250, 37]).view(2, 1, 1, 1)},
    "dense": {"attn_mask": torch.rand(200, 300, generator=torch.Generator().manual_seed(1)) > 0.7},
    "additive": {"attn_mask": torch.randn(2, 4, 200, 300, generator=torch.Generator().manual_seed(2)) * 3},
    "additive padding": {"attn_mask": torch.where(torch.arange(300) < 250, 0.5, float("-inf"))[None]},
    "half, per head": {"attn_mask": torch.randn(1, 4, 1, 300, generator=torch.Generator().manual_seed(3)).half()},
    "causal and dense": {
        "is_causal": True,
        "attn_mask": torch.rand(2, 1, 200, 300, generator=torch.Generator().manual_seed(4)) > 0.5,
    },
}


@needs_interpreter
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_masks(mode, options):
    q, k, v = qkv(b=2, heads=4, kv_heads=2, nq=200, nk=300, d=64)
    both(q, k, v, config={"pv_accum": mode}, **options)


@needs_interpreter
@pytest.mark.parametrize("mode", MODES)
def test_rows_and_tiles_without_keys(mode):
    mask = torch.ones(200, 300, dtype=torch.bool)
    mask[7] = False
    mask[9, :256] = False  # whole tiles hidden before the first visible key
    out, lse = both(*qkv(nq=200, nk=300), config={"pv_accum": mode}, attn_mask=mask)
    assert not out[:, :, 7].any() and bool((lse[:, :, 7] == float("-inf")).all())


@needs_interpreter
@pytest.mark.parametrize("nq,nk", [(1, 1), (1, 300), (300, 1), (127, 129), (300, 200)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(nq, nk, causal):
    both(*qkv(nq=nq, nk=nk, d=64), is_causal=causal)


@needs_interpreter
def test_strided_views_are_read_in_place_and_not_written():
    packed = torch.randn(2, 150, 3, 4, 64, generator=torch.Generator().manual_seed(0))
    before = packed.clone()
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    out, _ = both(q, k, v)
    plain, _ = both(*(x.contiguous() for x in (q, k, v)))
    assert torch.equal(out, plain) and torch.equal(packed, before)
    one = qkv(b=1, nq=70)
    shared, _ = both(*(x.expand(3, -1, -1, -1) for x in one))
    assert torch.equal(shared[2], both(*one)[0][0])


@needs_interpreter
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"attn_mask": torch.arange(150) != 100}], ids=["plain", "causal", "masked key"]
)
def test_nan_and_inf_stand_where_exact_attention_has_them(name, value, options):
    tensors = dict(zip("qkv", qkv(b=2, heads=4, kv_heads=2, nq=70, nk=150, d=40)))
    tensors[name][1, 1, 60 if name == "q" else 100, 3] = value
    out, lse = sage_kernels.attention(
        **tensors, return_lse=True, config=AttentionConfig(backend="triton", pv_accum="int8/int32"), **options
    )
    wanted, wanted_lse = exact(**tensors, **options)
    close(out, wanted, tolerance("int8/int32"))
    same_special(lse, wanted_lse)


@needs_interpreter
def test_packed_sequences():
    lengths_q, lengths_k = [5, 130, 1, 60, 4], [70, 3, 129, 64, 0]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32) for x in (lengths_q, lengths_k))
    q, k, v = (x[0].transpose(0, 1) for x in qkv(heads=4, kv_heads=2, nq=200, nk=266, d=40))
    config = AttentionConfig(backend="triton").encode()
    for causal in (False, True):
        out = torch.ops.sage_kernels.attention_varlen(q, k, v, cu_q, cu_k, 130, 129, causal, 0.2, config)
        assert not out[-4:].any()  # their sequence has no keys
        for i in range(4):
            rows, cols = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            one = [x[None, part] for x, part in ((q, rows), (k, cols), (v, cols))]
            wanted, _ = both(*one, layout="NHD", is_causal=causal, sm_scale=0.2)
            close(out[rows], wanted[0], LIMIT)


@needs_interpreter
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_of_a_dtypes_smallest_number(backend, mode, dtype):
    """As models build them: finite, so a row that has nothing else is the mean of V; and -inf and +inf stay what they are."""
    q, k, v = qkv(nq=70, nk=150, d=64)
    mask = torch.zeros(70, 150, dtype=dtype)
    mask[:, 100:] = torch.finfo(dtype).min
    mask[5] = torch.finfo(dtype).min
    mask[6, :149] = -torch.inf
    out = sage_kernels.attention(q, k, v, attn_mask=mask, config=AttentionConfig(backend=backend, pv_accum=mode))
    close(out, exact(q, k, v, attn_mask=mask)[0], tolerance(mode))


@needs_interpreter
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name,size", [("k", 1e38), ("v", 1e37), ("q", 1e37)])
def test_huge_numbers_are_served_exactly(backend, name, size):
    tensors = dict(zip("qkv", qkv(nq=20, nk=40, d=64)))
    tensors[name][0, 1, 3] = size * torch.tensor([1.0, -1.0]).repeat(32)  # the sum over channels is 0
    other = {"k": "q", "q": "k", "v": "q"}[name]
    tensors[other] *= 1e-37
    out = sage_kernels.attention(**tensors, config=AttentionConfig(backend=backend))
    close(out, exact(**tensors)[0], tolerance("fp16"))


@pytest.mark.parametrize("arch,shared_memory", [(80, 166912), (89, 101376), (90, 232448), (120, 101376)])
def test_kernels_compile_and_fit_every_gpu(arch, shared_memory, tmp_path):
    """No GPU is needed to compile: each kernel must fit the shared memory a program may have, and run off no stack cliff."""
    script = Path(__file__).with_name("compile_triton.py")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), str(arch), str(shared_memory)]
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stderr[-2000:]
    rows = json.loads(found.stdout.splitlines()[-1])
    assert {row["kernel"] for row in rows} >= {"attention_kernel", "exact_kernel", "quantize_qk_kernel"}
    for row in rows:
        assert row["shared"] <= shared_memory, row
