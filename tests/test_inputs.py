"""Bad input, one kind at a time: the message names the argument, what was given and what is allowed. And odd good input."""

import pytest
import torch
from checks import close, exact, qkv, relative_l2, same_special, tolerance

import sage_kernels
from sage_kernels import AttentionConfig

REFERENCE = AttentionConfig(backend="reference")
FAMILY = {
    "sageattn": sage_kernels.sageattn,
    "fp16_triton": sage_kernels.sageattn_qk_int8_pv_fp16_triton,
    "fp16_cuda": sage_kernels.sageattn_qk_int8_pv_fp16_cuda,
    "fp8_cuda": sage_kernels.sageattn_qk_int8_pv_fp8_cuda,
    "fp8_sm90": sage_kernels.sageattn_qk_int8_pv_fp8_cuda_sm90,
}


def tensors(shape_q=(1, 2, 8, 64), shape_k=None, shape_v=None, dtype=torch.float32):
    """q, k, v of any shape and dtype, zeros: nothing may compute with them."""
    shape_k = shape_k or shape_q
    return {
        "q": torch.zeros(shape_q, dtype=dtype),
        "k": torch.zeros(shape_k, dtype=dtype),
        "v": torch.zeros(shape_v or shape_k, dtype=dtype),
    }


def but(**changes):
    return {**tensors(), **changes}


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


# name: (arguments, error, what the message must hold: the argument, what was given, what is allowed)
BAD = {
    "int32": (tensors(dtype=torch.int32), TypeError, ("q is torch.int32", "float16", "bfloat16", "float32")),
    "float64": (tensors(dtype=torch.float64), TypeError, ("q is torch.float64", "float16", "bfloat16", "float32")),
    "complex": (tensors(dtype=torch.complex64), TypeError, ("q is torch.complex64", "float32")),
    "fp8": (tensors(dtype=torch.float8_e4m3fn), TypeError, ("q is torch.float8_e4m3fn", "float32")),
    "bool": (tensors(dtype=torch.bool), TypeError, ("q is torch.bool", "float32")),
    "k dtype": (
        but(k=zeros(1, 2, 8, 64, dtype=torch.float16)),
        TypeError,
        ("k is torch.float16", "q is torch.float32"),
    ),
    "v dtype": (but(v=zeros(1, 2, 8, 64, dtype=torch.bfloat16)), TypeError, ("v is torch.bfloat16", "torch.float32")),
    "q list": (but(q=[[1.0]]), TypeError, ("q is a list", "torch.Tensor")),
    "k None": (but(k=None), TypeError, ("k is a NoneType", "torch.Tensor")),
    "v number": (but(v=1.0), TypeError, ("v is a float", "torch.Tensor")),
    "k device": (but(k=zeros(1, 2, 8, 64, device="meta")), ValueError, ("k is on meta", "q is on cpu")),
    "v device": (but(v=zeros(1, 2, 8, 64, device="meta")), ValueError, ("v is on meta", "q is on cpu")),
    "three dimensions": (tensors((2, 8, 64)), ValueError, ("q has", "(2, 8, 64)", "[batch, heads, tokens, head_dim]")),
    "five dimensions": (tensors((1, 1, 2, 8, 64)), ValueError, ("q has", "(1, 1, 2, 8, 64)", "[batch, heads")),
    "batch": (tensors((2, 2, 8, 64), (1, 2, 8, 64)), ValueError, ("k has batch 1", "q has 2")),
    "k and v heads": (tensors(shape_v=(1, 1, 8, 64)), ValueError, ("v has shape (1, 1, 8, 64)", "k has (1, 2, 8, 64)")),
    "k and v tokens": (
        tensors(shape_v=(1, 2, 9, 64)),
        ValueError,
        ("v has shape (1, 2, 9, 64)", "k has (1, 2, 8, 64)"),
    ),
    "k and v head_dim": (tensors(shape_v=(1, 2, 8, 32)), ValueError, ("v has shape (1, 2, 8, 32)", "k has")),
    "not a multiple": (tensors((1, 3, 8, 64), (1, 2, 8, 64)), ValueError, ("q has 3 heads", "k has 2", "multiple")),
    "fewer q heads": (tensors((1, 2, 8, 64), (1, 4, 8, 64)), ValueError, ("q has 2 heads", "k has 4", "multiple")),
    "head_dim 0": (tensors((1, 2, 8, 0)), ValueError, ("head_dim is 0", "1 to 256")),
    "head_dim 257": (tensors((1, 2, 8, 257)), ValueError, ("head_dim is 257", "1 to 256")),
    "head_dim differs": (tensors((1, 2, 8, 64), (1, 2, 8, 32)), ValueError, ("k has head_dim 32", "q has 64")),
    "no queries": (tensors((1, 2, 0, 64), (1, 2, 8, 64)), ValueError, ("q has 0 tokens", "at least 1")),
    "no keys": (tensors((1, 2, 8, 64), (1, 2, 0, 64)), ValueError, ("k has 0 tokens", "at least 1")),
    "no batch": (tensors((0, 2, 8, 64)), ValueError, ("q has shape (0, 2, 8, 64)", "at least 1")),
    "no heads": (tensors((1, 0, 8, 64)), ValueError, ("q has shape (1, 0, 8, 64)", "at least 1")),
    "layout": (but(tensor_layout="HDN"), ValueError, ("tensor_layout is 'HDN'", "'HND'", "'NHD'")),
    "layout None": (but(tensor_layout=None), ValueError, ("tensor_layout is None", "'HND'", "'NHD'")),
    "scale nan": (but(sm_scale=float("nan")), ValueError, ("sm_scale is nan", "finite")),
    "scale inf": (but(sm_scale=float("inf")), ValueError, ("sm_scale is inf", "finite")),
    "scale text": (but(sm_scale="0.1"), TypeError, ("sm_scale is a str", "float")),
    "scale bool": (but(sm_scale=True), TypeError, ("sm_scale is a bool", "float")),
    "scale tensor": (but(sm_scale=torch.tensor(0.1)), TypeError, ("sm_scale is a Tensor", "float")),
    "q last dim": (
        but(q=zeros(1, 2, 64, 8).mT),
        ValueError,
        ("q has stride 8", "head_dim", "must be 1", "contiguous()"),
    ),
    "k last dim": (but(k=zeros(1, 2, 8, 128)[..., ::2]), ValueError, ("k has stride 2", "must be 1", "contiguous()")),
    "v last dim": (but(v=zeros(1, 2, 8, 1).expand(1, 2, 8, 64)), ValueError, ("v has stride 0", "must be 1")),
}
BAD_MASK = {
    "keys": (zeros(1, 1, 1, 7, dtype=torch.bool), ValueError, ("attn_mask has shape (1, 1, 1, 7)", "(1, 2, 8, 8)")),
    "queries": (zeros(1, 2, 5, 8, dtype=torch.bool), ValueError, ("attn_mask has shape (1, 2, 5, 8)", "broadcast")),
    "heads": (zeros(1, 3, 8, 8), ValueError, ("attn_mask has shape (1, 3, 8, 8)", "(1, 2, 8, 8)")),
    "batch": (zeros(2, 1, 8, 8), ValueError, ("attn_mask has shape (2, 1, 8, 8)", "(1, 2, 8, 8)")),
    "five dimensions": (zeros(1, 1, 1, 8, 8), ValueError, ("attn_mask has shape (1, 1, 1, 8, 8)", "broadcast")),
    "int64": (zeros(8, 8, dtype=torch.int64), TypeError, ("attn_mask is torch.int64", "bool", "float32")),
    "uint8": (zeros(8, 8, dtype=torch.uint8), TypeError, ("attn_mask is torch.uint8", "bool", "float32")),
    "float64": (zeros(8, 8, dtype=torch.float64), TypeError, ("attn_mask is torch.float64", "float32")),
    "device": (zeros(8, 8, device="meta"), ValueError, ("attn_mask is on meta", "q is on cpu")),
    "list": ([[True]], TypeError, ("attn_mask is a list", "torch.Tensor", "None")),
}


def refuses(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"
    return str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    arguments, error, parts = BAD[name]
    message = refuses(lambda: sage_kernels.attention(**arguments), error, parts)
    assert sage_kernels.explain(**arguments).refusal == message
    for function in FAMILY.values():
        refuses(lambda function=function: function(**arguments), error, parts)
    qkv_list = [arguments["q"], arguments["k"], arguments["v"]]
    rest = {key: value for key, value in arguments.items() if key not in "qkv"}
    refuses(lambda: sage_kernels.attention_consuming(qkv_list, **rest), error, parts)


@pytest.mark.parametrize("name", BAD_MASK)
def test_bad_mask(name):
    mask, error, parts = BAD_MASK[name]
    message = refuses(lambda: sage_kernels.attention(**tensors(), attn_mask=mask), error, parts)
    assert sage_kernels.explain(**tensors(), attn_mask=mask).refusal == message
    for name in ("sageattn", "fp16_triton"):  # the two that take masks
        refuses(lambda name=name: FAMILY[name](**tensors(), attn_mask=mask), error, parts)


@pytest.mark.parametrize(
    "field, value, parts",
    [
        ("intent", "best", ("intent is 'best'", "'fast'", "'accurate'")),
        ("pv_accum", "fp16", ("pv_accum is 'fp16'", "'fp16/fp32'", "'int8/int32'")),
        ("qk_quant_gran", "per_token", ("qk_quant_gran is 'per_token'", "'per_warp'")),
        ("backend", "cudnn", ("backend is 'cudnn'", "'triton'", "'reference'")),
        ("smooth_k", "on", ("smooth_k is 'on'", "True, False or 'auto'")),
        ("smooth_v", 1, ("smooth_v is 1", "True, False or 'auto'")),
        ("rotate", None, ("rotate is None", "True, False or 'auto'")),
        ("strict", "yes", ("strict is 'yes'", "True or False")),
        ("intent", [], ("intent is []", "'fast'")),
    ],
)
def test_bad_config(field, value, parts):
    refuses(lambda: AttentionConfig(**{field: value}), ValueError, parts)


@pytest.mark.parametrize("config", [None, "fast", {"intent": "fast"}])
def test_config_of_another_type(config):
    parts = ("config", type(config).__name__, "AttentionConfig")
    message = refuses(lambda: sage_kernels.attention(**tensors(), config=config), TypeError, parts)
    assert sage_kernels.explain(**tensors(), config=config).refusal == message


@pytest.mark.parametrize("name", FAMILY)
def test_unknown_argument(name):
    refuses(lambda: FAMILY[name](**tensors(), dropout_p=0.1), TypeError, ("dropout_p",))


@pytest.mark.parametrize("name", ["fp16_cuda", "fp8_cuda", "fp8_sm90"])
def test_bad_family_choice(name):
    refuses(lambda: FAMILY[name](**tensors(), qk_quant_gran="per_token"), ValueError, ("qk_quant_gran is 'per_token'",))
    other = {"fp16_cuda": "fp32+fp32", "fp8_cuda": "fp16", "fp8_sm90": "fp16"}[name]
    refuses(
        lambda: FAMILY[name](**tensors(), pv_accum_dtype=other), ValueError, (f"pv_accum_dtype is {other!r}", "'fp32'")
    )


def test_unknown_quantization_backend():
    refuses(
        lambda: FAMILY["fp16_triton"](**tensors(), quantization_backend="cuda"),
        ValueError,
        ("quantization_backend is 'cuda'", "'triton'"),
    )


CU = torch.tensor([0, 3, 8], dtype=torch.int32)
VARLEN = {
    "four dimensions": ({"q": zeros(1, 8, 2, 64)}, ValueError, ("q has shape (1, 8, 2, 64)", "[total_tokens, heads")),
    "k dtype": ({"k": zeros(8, 2, 64).half()}, TypeError, ("k is torch.float16", "q is torch.float32")),
    "v None": ({"v": None}, TypeError, ("v is a NoneType", "torch.Tensor")),
    "int64 offsets": ({"cu_seqlens_q": CU.long()}, TypeError, ("cu_seqlens_q is torch.int64", "int32")),
    "list offsets": ({"cu_seqlens_k": [0, 8]}, TypeError, ("cu_seqlens_k is list", "int32")),
    "one offset": ({"cu_seqlens_q": CU[:1]}, ValueError, ("cu_seqlens_q has shape (1,)", "sequences + 1")),
    "sequences": ({"cu_seqlens_k": CU[[0, 2]]}, ValueError, ("cu_seqlens_k has 2 entries", "cu_seqlens_q has 3")),
    "offsets' device": ({"cu_seqlens_k": CU.to("meta")}, ValueError, ("cu_seqlens_k is on meta", "q is on cpu")),
    "longest 0": ({"max_seqlen_q": 0}, ValueError, ("max_seqlen_q is 0", "at least 1")),
    "longest float": ({"max_seqlen_k": 5.0}, TypeError, ("max_seqlen_k is a float", "int")),
    "scale": ({"sm_scale": float("nan")}, ValueError, ("sm_scale is nan", "finite")),
}


@pytest.mark.parametrize("name", VARLEN)
def test_bad_varlen(name):
    changes, error, parts = VARLEN[name]
    good = dict(
        q=zeros(8, 2, 64), k=zeros(8, 2, 64), v=zeros(8, 2, 64), cu_seqlens_q=CU, cu_seqlens_k=CU, max_seqlen_q=5,
        max_seqlen_k=5,
    )  # fmt: skip
    refuses(lambda: sage_kernels.sageattn_varlen(**{**good, **changes}), error, parts)


# --- NaN and inf ---------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
CONFIGS = {
    "fp16": AttentionConfig(backend="reference", pv_accum="fp16/fp32"),
    "int8": AttentionConfig(backend="reference", pv_accum="int8/int32", smooth_v=True),
    "fp8": AttentionConfig(backend="reference", pv_accum="fp8/fp32+fp16", rotate=False),
    "triton fp16": AttentionConfig(backend="triton", pv_accum="fp16/fp32"),
    "triton int8": AttentionConfig(backend="triton", pv_accum="int8/int32"),
}


def config_or_skip(name):
    config = CONFIGS[name]
    refusal = sage_kernels.explain(*qkv(), config=config).refusal
    if refusal:
        pytest.skip(refusal)
    return config


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", "qkv")
def test_special_value(which, value, config):
    """One bad element in kv head 1 of 2 (GQA, odd lengths): special values where exact attention has them."""
    x = dict(zip("qkv", qkv(heads=4, kv_heads=2, nq=37, nk=53, d=32), strict=True))
    x[which][0, 2 if which == "q" else 1, 30, 5] = value
    check_special(x, config_or_skip(config))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("which", "kv")
def test_special_value_later_than_causal_queries(which, config):
    """Queries before the bad key do not see it."""
    x = dict(zip("qkv", qkv(heads=2, kv_heads=1, nq=48, nk=48, d=32), strict=True))
    x[which][0, 0, 40, :] = NAN
    out = check_special(x, config_or_skip(config), is_causal=True)
    assert out[:, :, :40].isfinite().all() and out[:, :, 40:].isnan().all()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["bool keys", "bool dense", "additive"])
@pytest.mark.parametrize("which", "kv")
def test_special_value_of_a_hidden_key(which, kind, config):
    x = dict(zip("qkv", qkv(heads=2, nq=19, nk=45, d=32), strict=True))
    x[which][0, :, 11, 3] = INF
    x[which][0, :, 12, :] = NAN
    mask = torch.ones(45, dtype=torch.bool)
    mask[11:13] = False
    mask = {
        "bool keys": mask,
        "bool dense": mask.expand(1, 2, 19, 45).clone(),
        "additive": torch.where(mask, 0.5, -INF).expand(19, 45).clone(),
    }[kind]
    out = check_special(x, config_or_skip(config), attn_mask=mask)
    assert out.isfinite().all()


def check_special(x, config, **options):
    want, want_lse = exact(*x.values(), **options)
    before = {name: t.clone() for name, t in x.items()}
    out, lse = sage_kernels.attention(**x, config=config, return_lse=True, **options)
    same_special(out, want)
    same_special(lse, want_lse)
    if want.isfinite().any():
        assert relative_l2(out, want) < tolerance(config.pv_accum)
    for name, t in before.items():
        assert torch.equal(t.view(torch.int32), x[name].view(torch.int32)), f"{name} was written"
    return out


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("which", "qkv")
def test_huge_but_finite(which, config):
    """The largest fp16 value is an ordinary, if badly quantisable, number: no NaN or inf comes of it."""
    x = dict(zip("qkv", qkv(heads=2, nq=33, d=32, dtype=torch.float16), strict=True))
    x[which][0, 1, 7, 3] = 65504.0
    out = sage_kernels.attention(**x, config=config_or_skip(config))
    assert out.isfinite().all()


@pytest.mark.parametrize("config", CONFIGS)
def test_zeros(config):
    """Scales of all-zero groups divide nothing by zero: q = k = 0 attends equally, v = 0 gives 0."""
    q, k, v = qkv(heads=1, nq=33, d=32)
    out = sage_kernels.attention(q * 0, k * 0, v, config=config_or_skip(config))
    # Every query gets V's mean; what V's rounding leaves of it is small beside V itself.
    assert (out - v.mean(2, keepdim=True)).abs().max() < 0.01 * v.abs().max()
    assert torch.equal(sage_kernels.attention(q, k, v * 0, config=CONFIGS[config]), torch.zeros_like(q))


# --- lengths, layouts and views ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nq, nk", [(20, 50), (50, 20), (1, 9), (9, 1)])
def test_causal_with_different_lengths(nq, nk):
    """Aligned at the first token of both, as torch's is_causal is."""
    q, k, v = qkv(nq=nq, nk=nk)
    out = sage_kernels.attention(q, k, v, is_causal=True, config=REFERENCE)
    torch_out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(out, torch_out, 0.025)
    close(exact(q, k, v, is_causal=True)[0].float(), torch_out, 1e-5)


def test_a_query_that_sees_no_key():
    q, k, v = qkv(nq=5, nk=9)
    for mask in (torch.ones(5, 9, dtype=torch.bool), torch.zeros(5, 9)):
        mask[2] = False if mask.dtype == torch.bool else -INF
        out, lse = sage_kernels.attention(q, k, v, attn_mask=mask, return_lse=True, config=REFERENCE)
        want, want_lse = exact(q, k, v, attn_mask=mask)
        close(out, want, 0.025)
        assert not out[:, :, 2].any() and (lse[:, :, 2] == -INF).all()
        same_special(lse, want_lse)


def triton_runs():
    return not sage_kernels.explain(*qkv(), config=AttentionConfig(backend="triton")).refusal


def same(value, want, backend):
    """Bit for bit on Triton; torch's own sums, which the reference uses, take another order for another layout."""
    assert torch.equal(value, want) if backend == "triton" else relative_l2(value, want) < 2e-3


VIEWS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat([x, x], -1).contiguous()[..., : x.shape[-1]],
    "every other token": lambda x: torch.stack([x, x + 1], 3).flatten(2, 3)[:, :, ::2],
    "batch reversed in memory": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, backend):
    """A view gives what its contiguous copy gives, and nothing is written, not even between its elements."""
    config = AttentionConfig(backend=backend, pv_accum="fp16/fp32")
    if backend == "triton" and not triton_runs():
        pytest.skip("Triton cannot run here")
    plain = qkv(b=2, heads=2, nq=35, d=32, dtype=torch.bfloat16)
    views = [VIEWS[view](x) for x in plain]
    storages = [x.untyped_storage().tolist() for x in views]
    want = sage_kernels.attention(*plain, config=config)
    same(sage_kernels.attention(*views, config=config), want, backend)
    assert storages == [x.untyped_storage().tolist() for x in views]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_expanded_batch(backend):
    """K and V of one batch entry, expanded over the batch without a copy."""
    if backend == "triton" and not triton_runs():
        pytest.skip("Triton cannot run here")
    config = AttentionConfig(backend=backend, pv_accum="fp16/fp32")
    q, k, v = qkv(b=3, heads=2, nq=35, d=32)
    k, v = k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)
    want = sage_kernels.attention(q, k.contiguous(), v.contiguous(), config=config)
    same(sage_kernels.attention(q, k, v, config=config), want, backend)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_layouts_agree(is_causal, backend):
    if backend == "triton" and not triton_runs():
        pytest.skip("Triton cannot run here")
    config = AttentionConfig(backend=backend, pv_accum="fp16/fp32")
    options = dict(is_causal=is_causal, return_lse=True, config=config)
    hnd = qkv(b=2, heads=4, kv_heads=2, nq=21, nk=39, d=40)
    nhd = [x.transpose(1, 2).contiguous() for x in hnd]
    out, lse = sage_kernels.attention(*hnd, **options)
    out_nhd, lse_nhd = sage_kernels.attention(*nhd, tensor_layout="NHD", **options)
    assert out.is_contiguous() and out_nhd.is_contiguous()
    same(out_nhd.transpose(1, 2), out, backend)
    same(lse_nhd, lse, backend)


@pytest.mark.parametrize("d", [1, 7, 40, 96, 255, 256])
def test_head_dims(d):
    x = qkv(nq=41, nk=70, d=d)
    close(sage_kernels.attention(*x, config=REFERENCE), exact(*x)[0], 0.03)


MASKS = {"1": (37,), "2": (21, 37), "3": (4, 21, 37), "keys of a batch": (2, 1, 1, 37), "a head's": (1, 4, 1, 37),
         "queries": (21, 1), "dense": (2, 4, 21, 37), "scalar": ()}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, dtype):
    rng = torch.Generator().manual_seed(3)
    shape = MASKS[kind]
    mask = torch.rand(shape, generator=rng) < 0.7
    mask = mask if dtype == torch.bool else torch.randn(shape, generator=rng).to(dtype).masked_fill(~mask, -INF)
    if kind == "scalar":
        mask = torch.ones((), dtype=dtype)
    x = qkv(b=2, heads=4, kv_heads=2, nq=21, nk=37, d=32)
    before = mask.clone()
    out, lse = sage_kernels.attention(*x, attn_mask=mask, return_lse=True, config=REFERENCE)
    want, want_lse = exact(*x, attn_mask=mask)
    close(out, want, 0.025)
    same_special(lse, want_lse)
    assert relative_l2(lse, want_lse) < 0.01
    assert torch.equal(mask, before)
