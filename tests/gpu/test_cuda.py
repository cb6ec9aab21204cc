"""What only the CUDA kernels have: shared-out keys, quantising in parts, wide and narrow loads, and the binary itself."""

import pytest
import torch
from checks import close, exact, qkv, relative_l2, same_special, tolerance
from kernels import CUDA, ROUNDING, config_of, each, emulated, ends_of, limit, mask_of, parts

import sage_kernels
from sage_kernels import cuda, reference

ONE_EACH = [("cuda", "fp16/fp16+fp32"), ("cuda", "int8/int32"), ("cuda", "fp8/fp32+fp16")]

# nq, nk, heads, kv_heads, head_dim, causal, mask. Keys are shared out where there are few blocks of queries.
SHARED = {
    "one query": (1, 2000, 2, 2, 64, False, None),
    "long": (130, 9000, 2, 1, 128, False, None),
    "keys masked": (17, 4097, 4, 2, 96, False, "bool keys"),
    "mask added": (64, 3000, 1, 1, 256, False, "add dense"),
    "a query sees nothing": (129, 5000, 2, 2, 40, False, "bool dense"),
    "causal": (2100, 2100, 1, 1, 128, True, None),
    "causal, most keys hidden": (130, 2500, 2, 2, 64, True, "add heads"),
}


@each(CUDA)
@pytest.mark.parametrize("shape", SHARED.values(), ids=SHARED)
def test_shared_out_keys(shape, kernel, poisoned, record_property):
    """In as many ranges as usual, in one, and in so many that some are empty."""
    nq, nk, heads, kv_heads, d, causal, masked = shape
    config = config_of(kernel)
    x = qkv(1, heads, nq, nk, d, kv_heads, torch.float32, "cuda")
    options = dict(is_causal=causal, attn_mask=masked and mask_of(masked, 1, heads, nq, nk))
    want, want_lse = reference.exact_attention(*x, **options)
    seen, results = want_lse.isfinite(), {}
    for forced in (1, None, min(-(-nk // 64), 70)):
        poisoned()
        with parts(forced) as found:
            out, lse = sage_kernels.attention(*x, return_lse=True, config=config, **options)
        assert found == [forced] or forced is None and found[0] > 1
        twin, twin_lse = emulated(*x, config=config, ranges=1 if causal else found[0], **options)
        record_property(f"emulation in {found[0]}", round(relative_l2(out, twin), 6))
        close(out, want, tolerance(kernel[1]))
        close(out, twin, limit(kernel, torch.float32, regrouped=causal and found != [1]))
        same_special(lse, want_lse)
        assert (lse - want_lse)[seen].abs().max() < 0.15 and (lse - twin_lse)[seen].abs().max() < 0.01
        results[forced] = out, lse
    for out, lse in results.values():
        close(out, results[1][0], limit(kernel, torch.float32, regrouped=True))
        assert (lse - results[1][1])[seen].abs().max() < 0.002


@each(CUDA)
def test_shared_out_keys_of_packed_sequences(kernel, poisoned):
    """Shared out by the longest, so that of shorter ones most parts are empty; the same bits each time."""
    config = config_of(kernel)
    q_lengths, k_lengths = [1, 64, 5, 130, 3], [3000, 1, 0, 130, 2600]
    q = torch.randn(sum(q_lengths), 2, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, sum(k_lengths), 1, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for _ in range(3):
        poisoned()
        with parts(5):
            out = torch.ops.sage_kernels.attention_varlen(
                q, k, v, ends_of(q_lengths), ends_of(k_lengths), 130, 3000, False, 0.125, config.encode()
            )
        results.append(out)
    assert all(torch.equal(out, results[0]) for out in results)
    sequences = zip(*(x.split(n) for x, n in ((out, q_lengths), (q, q_lengths), (k, k_lengths), (v, k_lengths))))
    for got, *alone in sequences:
        if len(alone[1]) == 0:
            assert not got.any()
            continue
        want, _ = exact(*(t[None].transpose(1, 2) for t in alone))
        close(got[None].transpose(1, 2), want, tolerance(kernel[1]) + 0.01)


@each(CUDA)
@pytest.mark.parametrize("masked", [None, "add dense"])
def test_quantising_in_parts(masked, kernel, monkeypatch, poisoned):
    """Large calls quantise q, k and v one by one: the same bits as in one launch, a NaN in one head among them."""
    config = config_of(kernel)
    x = qkv(2, 4, 300, 700, 96, 2, torch.bfloat16, "cuda")
    x[0][0, 1, 5, 5] = float("nan")
    options = dict(return_lse=True, config=config, attn_mask=masked and mask_of(masked, 2, 4, 300, 700))
    poisoned()
    want, want_lse = sage_kernels.attention(*x, **options)
    monkeypatch.setattr(cuda, "LARGE", 0)
    poisoned()
    out, lse = sage_kernels.attention(*x, **options)
    same_special(out, want)
    assert torch.equal(out.nan_to_num(), want.nan_to_num()) and torch.equal(lse.nan_to_num(), want_lse.nan_to_num())
    out, _ = sage_kernels.attention_consuming(x, **options)
    assert x == [] and torch.equal(out.nan_to_num(), want.nan_to_num())


def misplaced(x, where):
    """x with its first element, or each token, head or batch entry, one element further on than whole words are; NaN between."""
    b, h, n, d = x.shape
    token = d + (where == "token")
    head = n * token + (where == "head")
    batch = h * head + (where == "batch")
    memory = torch.full((b * batch + 1,), float("nan"), dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, (batch, head, token, 1), int(where == "address")).copy_(x)


@each(ONE_EACH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("where", ["address", "token", "head", "batch"])
def test_inputs_off_any_alignment(where, dtype, kernel):
    """Loads of single elements instead of 16 bytes give the same bits."""
    config = config_of(kernel)
    x = qkv(2, 4, 77, 150, 64, 2, dtype, "cuda")
    options = dict(attn_mask=mask_of("bool dense", 2, 4, 77, 150), return_lse=True, config=config)
    want, want_lse = sage_kernels.attention(*x, **options)
    out, lse = sage_kernels.attention(*(misplaced(t, where) for t in x), **options)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


@each(ONE_EACH)
@pytest.mark.parametrize("d", [1, 7, 63, 65, 97, 130, 255])
def test_head_dims_of_no_whole_words(d, kernel):
    config = config_of(kernel)
    for dtype in (torch.bfloat16, torch.float32):
        x = qkv(1, 4, 77, 150, d, 2, dtype, "cuda")
        out = sage_kernels.attention(*x, config=config)
        close(out, exact(*x)[0], tolerance(kernel[1]) + ROUNDING[dtype])
        close(out, emulated(*x, config=config)[0], limit(kernel, dtype))


@each(ONE_EACH)
@pytest.mark.parametrize("kind", ["bool dense", "add keys", "add heads", "add dense"])
def test_masks_off_any_alignment(kind, kernel):
    config = config_of(kernel)
    x = qkv(2, 4, 77, 150, 64, 2, torch.bfloat16, "cuda")
    mask = mask_of(kind, 2, 4, 77, 150)
    odd = mask.new_zeros(*mask.shape[:-1], 301)[..., 1::2].copy_(mask)
    want = sage_kernels.attention(*x, attn_mask=mask, config=config)
    assert torch.equal(sage_kernels.attention(*x, attn_mask=odd, config=config), want)


def test_errors_name_the_shape():
    """What cannot be launched, said by the driver or before it is asked; the next call is served."""
    config_of(("cuda", "int8/int32"))
    module, here = cuda.binary(), torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    at = -(-here.data_ptr() // 256) * 256
    numbers = dict(batch=1 << 15, heads=1 << 15, kv_heads=1 << 15, nk=1, head_dim=64, dim=64, v_dim=64, mode="int8/int32",
                   dtype="float16", q_block=16, q_sub=8, k_sub=4, is_causal=False, smooth_k=False, smooth_v=False,
                   rotate=False, return_lse=False, sm_scale=1.0, q_factor=1.0, v_max=127.0, p_max_log2=8.0, cu_q=0, cu_k=0,
                   splits=1, device=0, stream=torch.cuda.current_stream().cuda_stream)  # fmt: skip
    view = (at, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"quantize_kernel failed for q \[32768, 32768, 1, 64\].*invalid"):
        module.quantize(module.Call(nq=1, **numbers), module.PART_Q, view, view, view, at, at, 0, 0)  # 2^31 programs
    with pytest.raises(ValueError, match=r"too many blocks for one launch: q \[32768, 32768, 300, 64\]"):
        module.attention(module.Call(nq=300, **numbers), at, at, at, at, None, 0, view, 0)
    x = qkv(1, 2, 100, 100, 64, None, torch.float16, "cuda")
    close(sage_kernels.attention(*x, config=config_of(("cuda", "int8/int32"))), exact(*x)[0], tolerance("int8"))
