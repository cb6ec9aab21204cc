"""The public names: the parameters people already use, right results, and what torch.library and torch.compile ask."""

import inspect
import weakref

import pytest
import torch
from checks import close, exact, qkv, relative_l2, same_special, tolerance

import sage_kernels
from sage_kernels import AttentionConfig

REFERENCE = AttentionConfig(backend="reference")
# The parameters of the papers' package, in its order. A default written as a value must be equal.
REQUIRED = inspect.Parameter.empty
QKV = {"q": REQUIRED, "k": REQUIRED, "v": REQUIRED, "tensor_layout": "HND"}
SIGNATURES = {
    "sageattn": {**QKV, "is_causal": False, "sm_scale": None, "return_lse": False},
    "sageattn_qk_int8_pv_fp16_triton": {
        **QKV, "quantization_backend": "triton", "is_causal": False, "attn_mask": None, "sm_scale": None, "smooth_k": True,
        "return_lse": False,
    },
    "sageattn_qk_int8_pv_fp16_cuda": {
        **QKV, "is_causal": False, "qk_quant_gran": "per_thread", "sm_scale": None, "pv_accum_dtype": "fp32",
        "smooth_k": True, "smooth_v": False, "return_lse": False,
    },
    "sageattn_qk_int8_pv_fp8_cuda": {
        **QKV, "is_causal": False, "qk_quant_gran": "per_thread", "sm_scale": None, "pv_accum_dtype": "fp32+fp16",
        "smooth_k": True, "smooth_v": False, "return_lse": False,
    },
    "sageattn_qk_int8_pv_fp8_cuda_sm90": {
        **QKV, "is_causal": False, "qk_quant_gran": "per_thread", "sm_scale": None, "pv_accum_dtype": "fp32+fp32",
        "smooth_k": True, "return_lse": False,
    },
    "sageattn_varlen": {
        "q": REQUIRED, "k": REQUIRED, "v": REQUIRED, "cu_seqlens_q": REQUIRED, "cu_seqlens_k": REQUIRED,
        "max_seqlen_q": REQUIRED, "max_seqlen_k": REQUIRED, "is_causal": False, "sm_scale": None, "smooth_k": True,
    },
}  # fmt: skip
CALLS = {  # name: arguments beyond q, k, v, and the mode whose tolerance holds
    "sageattn": ({}, "fp8/fp32+fp32"),
    "sageattn_qk_int8_pv_fp16_triton": ({}, "fp16/fp32"),
    "sageattn_qk_int8_pv_fp16_cuda": ({}, "fp16/fp32"),
    "sageattn_qk_int8_pv_fp8_cuda": ({}, "fp8/fp32+fp16"),
    "sageattn_qk_int8_pv_fp8_cuda_sm90": ({}, "fp8/fp32+fp32"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(sage_kernels, name)).parameters
    given = [(p.name, p.default) for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert given[: len(SIGNATURES[name])] == list(SIGNATURES[name].items())
    assert name in sage_kernels.__all__
    assert getattr(sage_kernels, name).__doc__


def test_all_names_exist():
    assert {"attention", "attention_consuming", "explain", "availability", "AttentionConfig"} <= set(
        sage_kernels.__all__
    )
    assert all(hasattr(sage_kernels, name) for name in sage_kernels.__all__)


def run(name, *tensors, **options):
    extra, mode = CALLS[name]
    if name.endswith("triton") and sage_kernels.explain(*tensors, config=AttentionConfig(backend="triton")).refusal:
        pytest.skip("Triton cannot run here")
    return getattr(sage_kernels, name)(*tensors, **extra, **options), tolerance(mode)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_results(name, is_causal, layout):
    """Result and log-sum-exp against float64, GQA, in both layouts, with a scale of one's own."""
    x = qkv(b=2, heads=4, kv_heads=2, nq=75, d=64, dtype=torch.float16)
    given = x if layout == "HND" else [t.transpose(1, 2) for t in x]
    (out, lse), limit = run(name, *given, tensor_layout=layout, is_causal=is_causal, sm_scale=0.1, return_lse=True)
    want, want_lse = exact(*x, is_causal=is_causal, sm_scale=0.1)
    assert out.dtype == torch.float16 and out.shape == given[0].shape
    close(out if layout == "HND" else out.transpose(1, 2), want, limit)
    assert lse.dtype == torch.float32 and lse.shape == (2, 4, 75)
    assert (lse - want_lse).abs().max() < 0.05


@pytest.mark.parametrize("mode", sage_kernels.PV_MODES)
@pytest.mark.parametrize("gran", sage_kernels.QK_GRANULARITIES)
def test_every_mode(mode, gran):
    x = qkv(nq=150, nk=210, d=64)
    config = AttentionConfig(pv_accum=mode, qk_quant_gran=gran)
    close(sage_kernels.attention(*x, config=config), exact(*x)[0], tolerance(mode))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("smooth_k", [False, True])
def test_lse_knows_of_smoothing(smooth_k, is_causal, backend):
    """K with a large common offset: taking it away shifts every score of a query, and the LSE must say so."""
    q, k, v = qkv(heads=4, kv_heads=2, nq=70, nk=130, d=64)
    k = k + 3 * torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(5))
    config = AttentionConfig(backend=backend, pv_accum="fp16/fp32", smooth_k=smooth_k)
    if sage_kernels.explain(q, k, v, config=config).refusal:
        pytest.skip("this backend cannot run here")
    _, lse = sage_kernels.attention(q, k, v, is_causal=is_causal, return_lse=True, config=config)
    want = exact(q, k, v, is_causal=is_causal)[1]
    assert want.abs().max() > 5, "the offset should matter"
    assert (lse - want).abs().max() < (0.05 if smooth_k else 0.3)


def test_lse_of_one_key():
    """The log-sum-exp of a single score is that score."""
    q, k, v = qkv(nq=3, nk=1, d=64)
    out, lse = sage_kernels.attention(q, k, v, sm_scale=0.25, return_lse=True, config=REFERENCE)
    assert (lse - 0.25 * (q @ k.mT)[..., 0]).abs().max() < 1e-4  # smoothing makes K zero and the shift exact
    assert relative_l2(out, v.expand_as(q)) < 1e-3


def test_smooth_k_argument_reaches_the_kernel():
    """With a large offset in K and no smoothing the error is visibly larger."""
    q, k, v = qkv(nq=64, nk=200, d=64)
    k = k + 20 * torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(5))
    want = exact(q, k, v)[0]
    smooth, rough = (
        relative_l2(sage_kernels.sageattn_qk_int8_pv_fp16_cuda(q, k, v, smooth_k=smooth_k), want)
        for smooth_k in (True, False)
    )
    assert smooth < 0.04 < rough


def test_mask_argument_of_sageattn():
    q, k, v = qkv(nq=20, nk=40)
    mask = torch.arange(40) < 25
    close(sage_kernels.sageattn(q, k, v, attn_mask=mask), exact(q, k, v, attn_mask=mask)[0], 0.03)


def cu(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_varlen_is_a_loop(is_causal, smooth_k):
    """Packed sequences of unequal lengths, one of them a single token, each as if alone."""
    q_lengths, k_lengths = [40, 1, 130, 7], [40, 9, 65, 1]
    q = torch.cat([qkv(heads=4, nq=n, d=40, seed=i)[0][0].transpose(0, 1) for i, n in enumerate(q_lengths)])
    kv = [qkv(heads=2, nq=n, d=40, seed=i)[1:] for i, n in enumerate(k_lengths)]
    k, v = (torch.cat([pair[i][0].transpose(0, 1) for pair in kv]) for i in range(2))
    out = sage_kernels.sageattn_varlen(
        q, k, v, cu(q_lengths), cu(k_lengths), max(q_lengths), max(k_lengths), is_causal, 0.2, smooth_k
    )
    assert out.shape == q.shape and out.is_contiguous()
    q_parts, k_parts, v_parts = q.split(q_lengths), k.split(k_lengths), v.split(k_lengths)
    for i, part in enumerate(out.split(q_lengths)):
        alone = [x[i][None].transpose(1, 2) for x in (q_parts, k_parts, v_parts)]
        close(part[None].transpose(1, 2), exact(*alone, is_causal=is_causal, sm_scale=0.2)[0], 0.04)
        same = sage_kernels.sageattn(*alone, is_causal=is_causal, sm_scale=0.2, smooth_k=smooth_k)
        assert relative_l2(part[None].transpose(1, 2), same) < 5e-3


def test_varlen_of_one_sequence_is_sageattn():
    q, k, v = qkv(nq=77, d=64)
    out = sage_kernels.sageattn_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), cu([77]), cu([77]), 77, 77)
    assert relative_l2(out.transpose(0, 1)[None], sage_kernels.sageattn(q, k, v)) < 1e-3


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_attention_consuming(backend):
    """The same result, the list empty, and the tensors gone when nobody else holds them."""
    config = AttentionConfig(backend=backend, pv_accum="fp16/fp32")
    if sage_kernels.explain(*qkv(), config=config).refusal:
        pytest.skip("this backend cannot run here")
    want = sage_kernels.attention(*qkv(nq=50), config=config, return_lse=True)
    tensors = qkv(nq=50)
    alive = [weakref.ref(x) for x in tensors]
    got = sage_kernels.attention_consuming(tensors, config=config, return_lse=True)
    assert tensors == [] and [ref() for ref in alive] == [None] * 3
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_gradients_are_refused_not_wrong():
    """Forward only: a gradient through the result is an error, never silently zero."""
    q, k, v = (x.requires_grad_() for x in qkv(nq=9))
    out = sage_kernels.attention(q, k, v, config=REFERENCE)
    with pytest.raises(RuntimeError):
        out.sum().backward()


# --- torch.library and torch.compile -------------------------------------------------------------------------------------


def op_samples():
    """Sample arguments for every op there is."""
    q, k, v = qkv(heads=4, kv_heads=2, nq=20, nk=33, d=40)
    nhd = [x.transpose(1, 2) for x in (q, k, v)]
    mask = torch.ones(20, 33, dtype=torch.bool).tril()
    code = REFERENCE.encode()
    packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    return {
        "attention": [
            (q, k, v, None, "HND", False, 0.2, False, code),
            (q, k, v, mask, "HND", True, 0.2, True, code),
            (*nhd, None, "NHD", False, 0.2, True, code),
            (q.half(), k.half(), v.half(), mask.half(), "HND", False, 0.2, False, code),
        ],
        "attention_varlen": [(*packed, cu([20]), cu([33]), 20, 33, False, 0.2, code)],
    }


def test_every_op_is_checked():
    ops = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("sage_kernels::")}
    assert {name.split(".")[0] for name in ops} == set(op_samples())


@pytest.mark.parametrize("name, index", [(name, i) for name, calls in op_samples().items() for i in range(len(calls))])
def test_opcheck(name, index):
    torch.library.opcheck(getattr(torch.ops.sage_kernels, name).default, op_samples()[name][index])


@pytest.fixture
def dynamo():
    """No graph may be compiled twice: a recompilation is an error."""
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with dynamo.config.patch(error_on_recompile=True):
        yield counter
    dynamo.reset()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_compile_is_one_graph(dynamo, masked, return_lse):
    config = AttentionConfig(backend="reference", pv_accum="fp16/fp32")

    def block(q, k, v, mask):
        result = sage_kernels.attention(q * 2, k, v, attn_mask=mask, return_lse=return_lse, config=config)
        return (result[0] + 1, result[1]) if return_lse else (result + 1,)

    compiled = torch.compile(block, fullgraph=True, backend=dynamo)
    for seed in (0, 1, 2):  # new values, same shapes
        x = qkv(nq=30, nk=50, seed=seed)
        mask = torch.rand(30, 50, generator=torch.Generator().manual_seed(seed)) < 0.9 if masked else None
        for got, want in zip(compiled(*x, mask), block(*x, mask), strict=True):
            assert torch.equal(got, want)
    assert dynamo.frame_count == 1


def test_compile_with_dynamic_shapes(dynamo):
    def block(q, k, v):
        return sage_kernels.attention(q, k, v, config=REFERENCE)

    compiled = torch.compile(block, fullgraph=True, backend=dynamo, dynamic=True)
    for n in (30, 50, 71):
        x = qkv(nq=n, nk=n + 3)
        assert torch.equal(compiled(*x), block(*x))
    assert dynamo.frame_count == 1


def test_compile_family_and_varlen(dynamo):
    def block(q, k, v, packed, offsets):
        one = sage_kernels.sageattn_qk_int8_pv_fp16_cuda(q, k, v, is_causal=True)
        return one, sage_kernels.sageattn_varlen(packed, packed, packed, offsets, offsets, 12, 12)

    compiled = torch.compile(block, fullgraph=True, backend=dynamo)
    arguments = (*qkv(nq=20), torch.randn(20, 2, 64), cu([8, 12]))
    for _ in range(2):
        for got, want in zip(compiled(*arguments), block(*arguments), strict=True):
            assert torch.equal(got, want)
    assert dynamo.frame_count == 1


def test_compiled_bad_input_is_still_refused(dynamo):
    compiled = torch.compile(lambda q, k, v: sage_kernels.attention(q, k, v), backend=dynamo)
    q, k, v = qkv()
    with pytest.raises(Exception, match="q has 3 heads|multiple of k's"):
        compiled(torch.zeros(1, 3, 8, 64), k[..., :8, :], v[..., :8, :])


def test_same_special_catches():
    """The comparison itself: a NaN too many and an inf of the wrong sign are seen."""
    good = torch.tensor([1.0, float("inf"), float("nan")])
    same_special(good, good.clone())
    for bad in ([float("nan"), float("inf"), float("nan")], [1.0, -float("inf"), float("nan")]):
        with pytest.raises(AssertionError):
            same_special(torch.tensor(bad), good)


def test_compile_with_a_scale_that_changes():
    x = qkv(nq=33, d=64)
    compiled = torch.compile(
        lambda q, k, v, s: sage_kernels.attention(q, k, v, sm_scale=s), fullgraph=True, backend="aot_eager"
    )
    for scale in (0.2, 0.3, 0.4):
        assert torch.equal(compiled(*x, scale), sage_kernels.attention(*x, sm_scale=scale))


def test_consuming_refuses_gradients():
    x = [t.requires_grad_() for t in qkv(nq=33, d=64)]
    with pytest.raises(RuntimeError, match="no backward pass"):
        sage_kernels.attention_consuming(list(x))
    with torch.no_grad():
        assert not sage_kernels.attention_consuming(list(x)).requires_grad


def test_max_seqlen_may_be_rounded_up():
    q, k, v = (x[0].transpose(0, 1) for x in qkv(nq=20, d=64))
    ends = torch.tensor([0, 8, 20], dtype=torch.int32)
    want = sage_kernels.sageattn_varlen(q, k, v, ends, ends, 12, 12)
    assert torch.equal(sage_kernels.sageattn_varlen(q, k, v, ends, ends, 64, 128), want)
