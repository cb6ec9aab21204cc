"""The Triton kernels on a GPU: against the exact emulation of the same mode, and against float64."""

import pytest
import torch
from cases import all_pairs, name_of
from checks import close, exact, qkv, relative_l2, same_special, tolerance

import sage_kernels
from sage_kernels import AttentionConfig, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

MODES = ("fp16/fp32", "int8/int32")
# Against the emulation: sums in another order, an exp2 of other last bits and so, rarely, a code that rounds the other way.
# The output's own rounding comes on top.
EMULATION = {"fp16/fp32": 0.004, "int8/int32": 0.006}
ROUNDING = {torch.float32: 0.0, torch.float16: 0.0005, torch.bfloat16: 0.003}


def triton(mode="fp16/fp32", **options):
    return AttentionConfig(backend="triton", pv_accum=mode, **options)


def emulated(*x, config, **options):
    """The same call on the reference backend, every choice resolved as Triton resolves it."""
    resolved = sage_kernels.explain(*x, config=config, **options).config
    fields = {name: getattr(resolved, name) for name in ("pv_accum", "qk_quant_gran", "smooth_k", "smooth_v", "rotate")}
    return sage_kernels.attention(*x, config=AttentionConfig(backend="reference", **fields), **options)


def mask_of(kind, b, heads, nq, nk):
    rng = torch.Generator(device="cuda").manual_seed(9)
    shape = {"keys": (b, 1, 1, nk), "dense": (b, heads, nq, nk), "heads": (heads, 1, nk)}[kind.split()[1]]
    seen = torch.rand(shape, generator=rng, device="cuda") < 0.8
    if nk > 1:
        seen[..., 0] = True
    if kind == "bool dense" and nq > 2:
        seen[..., 2, :] = False  # a query that sees nothing
    if kind.startswith("bool"):
        return seen
    values = torch.randn(shape, generator=rng, device="cuda").masked_fill(~seen, float("-inf"))
    return values.bfloat16() if kind == "add keys" else values


def strided(x):
    """The same values with gaps between tokens and between heads."""
    return torch.stack([x, torch.full_like(x, 7.0)], 3).flatten(2, 3)[:, :, ::2]


@pytest.mark.parametrize("case", all_pairs(), ids=name_of)
def test_pairs(case, poisoned, record_property):
    """Every pair of the values of any two factors (cases.py)."""
    (heads, kv_heads), (nq, nk), dtype = case["heads"], case["lengths"], getattr(torch, case["dtype"])
    x = qkv(2, heads, nq, nk, case["d"], kv_heads, dtype, "cuda")
    mask = None if case["mask"] == "none" else mask_of(case["mask"], 2, heads, nq, nk)
    config = triton(
        case["mode"], qk_quant_gran=case["gran"], **{k: case[k] for k in ("smooth_k", "smooth_v", "rotate")}
    )
    given = [strided(t) if case["view"] == "strided" else t for t in x]
    if case["layout"] == "NHD":
        given = [t.transpose(1, 2) if case["view"] == "strided" else t.transpose(1, 2).contiguous() for t in given]
    options = dict(is_causal=case["causal"], attn_mask=mask)
    before = [t.clone() for t in given]
    poisoned()
    result = sage_kernels.attention(
        *given, tensor_layout=case["layout"], return_lse=case["lse"], config=config, **options
    )
    out, lse = result if case["lse"] else (result, None)
    out = out if case["layout"] == "HND" else out.transpose(1, 2)
    assert out.dtype == dtype and all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    want, want_lse = exact(*x, **options)
    twin, twin_lse = emulated(*x, config=config, return_lse=True, **options)
    record_property("exact", round(relative_l2(out, want), 6))
    record_property("emulation", round(relative_l2(out, twin), 6))
    close(out, want, tolerance(case["mode"]) + ROUNDING[dtype])
    close(out, twin, EMULATION[case["mode"]] + ROUNDING[dtype])
    if lse is not None:
        same_special(lse, want_lse)
        seen = want_lse.isfinite()
        assert (lse - want_lse)[seen].abs().max() < 0.15
        assert (lse - twin_lse)[seen].abs().max() < 0.01


@pytest.mark.parametrize("mode", MODES)
def test_long(mode, record_property):
    """Many tiles, as in a model: 5000 odd tokens."""
    x = qkv(1, 2, 5001, 4999, 128, dtype=torch.bfloat16, device="cuda")
    out = sage_kernels.attention(*x, config=triton(mode))
    want, _ = reference.exact_attention(*x)
    twin = emulated(*x, config=triton(mode))
    record_property("exact", round(relative_l2(out, want), 6))
    record_property("emulation", round(relative_l2(out, twin), 6))
    close(out, want, tolerance(mode) + 0.003)
    close(out, twin, EMULATION[mode] + 0.003)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", "qkv")
def test_special_values(which, mode):
    """NaN and inf in one kv head of two, exactly where float64 has them, plain and with causal rule and masked keys."""
    for value in (float("nan"), float("inf"), float("-inf")):
        x = dict(zip("qkv", qkv(2, 4, 100, 100, 64, 2, torch.float16, "cuda"), strict=True))
        x[which][1, 2 if which == "q" else 1, 70, 5] = value
        mask = torch.ones(100, dtype=torch.bool, device="cuda")
        mask[70] = False
        for options in ({}, {"is_causal": True}, {"attn_mask": mask}):
            out = sage_kernels.attention(*x.values(), config=triton(mode), **options)
            want, _ = exact(*x.values(), **options)
            same_special(out, want)
            assert relative_l2(out, want) < tolerance(mode)


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_twice(mode):
    x = qkv(2, 4, 700, 900, 128, 2, torch.bfloat16, "cuda")
    first = sage_kernels.attention(*x, config=triton(mode), return_lse=True)
    for _ in range(3):
        again = sage_kernels.attention(*x, config=triton(mode), return_lse=True)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("mode", MODES)
def test_cuda_graph(mode):
    """Captured once; replays follow the inputs, a NaN among them, and other work on the card in between."""
    static = qkv(1, 4, 300, 500, 64, 2, torch.bfloat16, "cuda")
    mask = torch.rand(500, device="cuda") < 0.9
    options = dict(attn_mask=mask, return_lse=True, config=triton(mode))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sage_kernels.attention(*static, **options)  # compile
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = sage_kernels.attention(*static, **options)
    for seed in (1, 2, 3):
        fresh = qkv(1, 4, 300, 500, 64, 2, torch.bfloat16, "cuda", seed=seed)
        if seed == 2:
            fresh[1][0, 1, 7, 7] = float("nan")
            mask[7] = True
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        want, want_lse = sage_kernels.attention(*fresh, **options)
        same_special(out, want)
        assert torch.equal(out.nan_to_num(), want.nan_to_num()) and torch.equal(lse.nan_to_num(), want_lse.nan_to_num())


@pytest.mark.parametrize("mode", MODES)
def test_side_stream(mode):
    """Inputs that a slow side stream is still to write: work on any other stream would read the old ones."""
    x = qkv(1, 4, 300, 300, 64, None, torch.float16, "cuda")
    want = sage_kernels.attention(*x, config=triton(mode))
    late = [torch.zeros_like(t) for t in x]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        sage_kernels.attention(*late, config=triton(mode))  # so that the stream has its memory
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for t, source in zip(late, x, strict=True):
            t.copy_(source)
        out = sage_kernels.attention(*late, config=triton(mode))
    assert not side.query(), "the call waited for the GPU"
    side.synchronize()
    assert torch.equal(out, want)


@pytest.mark.parametrize("mode", MODES)
def test_compile_with_inductor(mode):
    def block(q, k, v):
        return sage_kernels.attention(q * 2, k.transpose(1, 2), v, config=triton(mode)) + 1

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            q, k, v = qkv(1, 4, 300, 500, 64, None, torch.float16, "cuda", seed=seed)
            k = k.transpose(1, 2).contiguous()
            assert relative_l2(compiled(q, k, v), block(q, k, v)) < 1e-3


def test_consuming_holds_nothing():
    """After the call neither the inputs nor any scratch memory is held, only the result."""
    config = triton()
    shape = (1, 8, 4096, 1024, 128, None, torch.bfloat16, "cuda")
    sage_kernels.attention(*qkv(*shape), config=config)
    base = torch.cuda.memory_allocated()
    tensors = qkv(*shape)
    out = sage_kernels.attention_consuming(tensors, config=config)
    assert tensors == []
    assert torch.cuda.memory_allocated() - base == out.numel() * out.element_size()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_varlen(is_causal, mode, record_property):
    """Packed sequences with a single token and more than one tile among them, each as if alone."""
    q_lengths, k_lengths = [300, 1, 129, 64], [300, 77, 1, 400]
    q_ends, k_ends = (torch.tensor([0, *n], device="cuda").cumsum(0).int() for n in (q_lengths, k_lengths))
    q = torch.randn(sum(q_lengths), 4, 96, device="cuda", dtype=torch.float16)
    k, v = torch.randn(2, sum(k_lengths), 2, 96, device="cuda", dtype=torch.float16)
    out = torch.ops.sage_kernels.attention_varlen(
        q, k, v, q_ends, k_ends, max(q_lengths), max(k_lengths), is_causal, 96**-0.5, triton(mode).encode()
    )
    parts = zip(out.split(q_lengths), q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    for got, *alone in parts:
        alone = [t[None].transpose(1, 2) for t in alone]
        want, _ = exact(*alone, is_causal=is_causal)
        close(got[None].transpose(1, 2), want, tolerance(mode) + 0.01)
        same = sage_kernels.attention(*alone, is_causal=is_causal, config=triton(mode))
        assert relative_l2(got[None].transpose(1, 2), same) < 1e-3


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = qkv(1, 2, 200, 200, 64, None, torch.float16, "cuda:1")
    close(sage_kernels.attention(*x, config=triton()), exact(*x)[0], 0.025)


# --- more than 2**31 elements: each of these reads or writes beyond what a 32-bit offset reaches -------------------------------

BEYOND = 2**31 // 128  # tokens of head_dim 128


def fill(*shape):
    """Normal bfloat16 values without a float32 copy of all of them."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_huge_queries(layout):
    """q and out of 2.2e9 elements: one head with very many tokens, or 33 heads between two tokens."""
    heads = 1 if layout == "HND" else 33
    n = -(-(BEYOND + 40_000) // heads // 128) * 128
    q = fill(1, heads, n, 128) if layout == "HND" else fill(1, n, heads, 128)
    q = q if layout == "HND" else q.transpose(1, 2)
    k, v = fill(1, heads, 64, 128), fill(1, heads, 64, 128)
    assert q.numel() > 2**31
    given = [q, k, v] if layout == "HND" else [t.transpose(1, 2) for t in (q, k, v)]
    out = sage_kernels.attention(*given, tensor_layout=layout, config=triton())
    out = out if layout == "HND" else out.transpose(1, 2)
    for rows in (slice(0, 256), slice(n // 2 // 128 * 128, n // 2 // 128 * 128 + 256), slice(n - 256, n)):
        some = q[:, :, rows].contiguous()
        close(out[:, :, rows], emulated(some, k, v, config=triton()), 0.01)
    del out, q, given
    torch.cuda.empty_cache()


@pytest.mark.parametrize("mode", MODES)
def test_huge_keys(mode):
    """k and v of 2.2e9 elements, one head; the keys that matter stand at the very end."""
    n = BEYOND + 40_000
    q, k, v = fill(1, 1, 128, 128), fill(1, 1, n, 128), fill(1, 1, n, 128)
    direction = torch.randn(128, device="cuda", dtype=torch.bfloat16)
    q += direction
    k[:, :, -64:] += 2 * direction
    out = sage_kernels.attention(q, k, v, config=triton(mode))
    top = torch.full((128, 1), float("-inf"), device="cuda")
    total, acc = torch.zeros(128, 1, device="cuda"), torch.zeros(128, 128, device="cuda")
    for first in range(0, n, 1 << 20):  # exact, in float32
        score = q[0, 0].float() @ k[0, 0, first : first + (1 << 20)].float().T * 128**-0.5
        new = torch.maximum(top, score.amax(1, keepdim=True))
        p = torch.exp(score - new)
        acc = acc * torch.exp(top - new) + p @ v[0, 0, first : first + (1 << 20)].float()
        total, top = total * torch.exp(top - new) + p.sum(1, keepdim=True), new
    close(out[0, 0], acc / total, 0.1)  # few keys and large scores; a wrong offset gives an error near 1
    del k, v
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16])
def test_huge_mask(dtype):
    """A dense mask of 2.2e9 elements."""
    n = 46_464
    q, k, v = fill(1, 1, n, 64), fill(1, 1, n, 64), fill(1, 1, n, 64)
    mask = torch.empty(n, n, dtype=torch.uint8, device="cuda").random_(0, 2).bool()
    assert mask.numel() > 2**31
    if dtype != torch.bool:
        mask = torch.zeros(n, n, dtype=dtype, device="cuda").masked_fill_(~mask, float("-inf"))
    out = sage_kernels.attention(q, k, v, attn_mask=mask, config=triton())
    for rows in (slice(0, 128), slice(n - 128, n)):
        want, _ = reference.exact_attention(q[:, :, rows], k, v, attn_mask=mask[rows])
        close(out[:, :, rows], want, 0.03)
    del mask
    torch.cuda.empty_cache()
