"""Cubins that NVRTC compiles here give the bits of `_C`: every mode, head_dim, mask and layout, and what a call can be."""

from functools import partial

import pytest
import torch
from cases import FACTORS, all_pairs, name_of
from checks import qkv
from kernels import CUDA, config_of, each, ends_of, mask_of, parts, strided
from with_cubins import compiled, served_by

import sage_kernels
from csrc.build import BuildError
from sage_kernels import cuda

PAIRS = all_pairs({**FACTORS, "kernel": tuple(CUDA)})


@pytest.fixture(scope="session")
def both():
    """`_C` and the cubins; a test is skipped where one of them cannot be had."""
    binary = cuda._compiled()
    if isinstance(binary, str):
        pytest.skip(binary)
    try:
        return binary, compiled()
    except BuildError as reason:
        pytest.skip(str(reason))


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same_bits(both, poisoned, call):
    """call() gives the same tensors, NaN and all, whoever serves it."""
    results = []
    for module in both:
        poisoned()
        with served_by(module):
            result = call()
        results.append(result if isinstance(result, tuple) else (result,))
    for one, other in zip(*results, strict=True):
        assert torch.equal(bits(one), bits(other))
    return results[1]


@pytest.mark.parametrize("case", PAIRS, ids=name_of)
def test_pairs(case, both, poisoned):
    (heads, kv_heads), (nq, nk), dtype = case["heads"], case["lengths"], getattr(torch, case["dtype"])
    flags = {key: case[key] for key in ("smooth_k", "smooth_v", "rotate")}
    config = config_of(case["kernel"], qk_quant_gran=case["gran"], **flags)
    given = qkv(2, heads, nq, nk, case["d"], kv_heads, dtype, "cuda")
    if case["view"] == "strided":
        given = [strided(x) for x in given]
    if case["layout"] == "NHD":
        given = [x.transpose(1, 2) for x in given]
    mask = None if case["mask"] == "none" else mask_of(case["mask"], 2, heads, nq, nk)
    options = dict(is_causal=case["causal"], attn_mask=mask, return_lse=case["lse"], tensor_layout=case["layout"])
    same_bits(both, poisoned, lambda: sage_kernels.attention(*given, config=config, **options))


@each(CUDA)
@pytest.mark.parametrize("wgmma", [False, True], ids=["mma", "wgmma"])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_every_kernel(d, wgmma, kernel, both, poisoned):
    """With and without a mask, long enough for many tiles, a NaN in one head."""
    config = config_of(kernel)
    if wgmma and (torch.cuda.get_device_capability() != (9, 0) or d > 128 or kernel[1].startswith("fp16/fp16")):
        pytest.skip("there is no such kernel")
    q, k, v = qkv(1, 3, 1100, 1300, d, 3, torch.bfloat16, "cuda")
    k[0, 1, 5, 7] = float("nan")
    with cuda.with_wgmma(wgmma):
        for mask in (None, mask_of("add keys", 1, 3, 1100, 1300)):
            for causal in (False, True):
                same_bits(
                    both,
                    poisoned,
                    lambda mask=mask, causal=causal: sage_kernels.attention(
                        q, k, v, attn_mask=mask, is_causal=causal, return_lse=True, config=config
                    ),
                )


@each(CUDA)
def test_shared_out_keys(kernel, both, poisoned):
    config = config_of(kernel)
    q, k, v = qkv(1, 2, 130, 5000, 96, 1, torch.float32, "cuda")
    chosen = []

    def call(forced):
        with parts(forced) as found:
            result = sage_kernels.attention(q, k, v, return_lse=True, config=config)
        chosen.append(found)
        return result

    for forced in (None, 1, 7, 64):
        same_bits(both, poisoned, partial(call, forced))
        assert chosen[-1] == chosen[-2] != []


@each(CUDA)
def test_packed_sequences(kernel, both, poisoned):
    config = config_of(kernel)
    q_lengths, k_lengths = [300, 1, 129, 64, 0, 5, 70], [300, 77, 1, 400, 9, 0, 2500]
    q = torch.randn(sum(q_lengths), 4, 96, device="cuda", dtype=torch.float16)
    k, v = torch.randn(2, sum(k_lengths), 2, 96, device="cuda", dtype=torch.float16)
    given = (
        q,
        k,
        v,
        ends_of(q_lengths),
        ends_of(k_lengths),
        max(q_lengths),
        max(k_lengths),
        True,
        0.1,
        config.encode(),
    )
    same_bits(both, poisoned, lambda: torch.ops.sage_kernels.attention_varlen(*given))


@each(CUDA)
def test_a_large_call_in_parts(kernel, both, poisoned, monkeypatch):
    """q, k and v quantised one by one."""
    monkeypatch.setattr(cuda, "LARGE", 0)
    config = config_of(kernel, qk_quant_gran="per_block", smooth_v=True)
    x = qkv(2, 4, 700, 900, 128, 2, torch.float16, "cuda")
    same_bits(both, poisoned, lambda: sage_kernels.attention(*x, config=config))


@each(CUDA)
def test_cuda_graph_and_side_stream(kernel, both):
    """Captured on a stream of its own by cubins that have not been loaded before, and replayed with other inputs."""
    binary, ours = both
    fresh = type(ours)(ours.path)
    config = config_of(kernel)
    x, others = (qkv(1, 4, 500, 3000, 64, 2, torch.bfloat16, "cuda") for _ in range(2))
    others = [t * 1.5 for t in others]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with served_by(fresh):
        with torch.cuda.graph(graph, stream=stream):
            out = sage_kernels.attention(*x, config=config)
    for inputs in (x, others):
        for to, value in zip(x, inputs, strict=True):
            to.copy_(value)
        graph.replay()
        with served_by(binary):
            assert torch.equal(bits(out), bits(sage_kernels.attention(*x, config=config)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device(both, poisoned):
    config = config_of(("cuda", "int8/int32"))
    x = qkv(1, 2, 100, 1500, 64, None, torch.float16, "cuda:1")
    torch.cuda.synchronize("cuda:1")
    same_bits(both, poisoned, lambda: sage_kernels.attention(*x, config=config, return_lse=True))
    assert torch.cuda.current_device() == 0
