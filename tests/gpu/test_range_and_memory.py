"""What the pairs of test_kernels.py do not reach: values of any size, rows off any alignment, and peak memory."""

import pytest
import torch
from checks import close, exact, qkv, relative_l2, tolerance
from kernels import ONE_EACH, ROUNDING, config_of, each, emulated, ends_of, limit

import sage_kernels


@each()
@pytest.mark.parametrize("dtype,size", [(torch.bfloat16, 1e30), (torch.float32, 1e-30), (torch.float16, 6e4)], ids=str)
def test_values_that_fp16_cannot_hold(kernel, dtype, size):
    q, k, v = qkv(nq=200, nk=300, d=128, dtype=dtype, device="cuda")
    v = (v.float().clamp(-3, 3) / 3 * size).to(dtype)
    out = sage_kernels.attention(q, k, v, config=config_of(kernel))
    assert relative_l2(out, exact(q, k, v)[0]) < tolerance(kernel[1])


@each()
@pytest.mark.parametrize("d", [64, 96, 128])
def test_the_largest_sums(kernel, d):
    """All keys at the maximum, all values at their channel's: what an accumulator must hold without an inf.

    Equal terms are the worst case for fp8/fp32, too: Hopper's wgmma cuts each sum off, and 1,000 keys lose 1.3 %.
    """
    q, k, v = (torch.zeros(1, 2, n, d, device="cuda", dtype=torch.float16) for n in (130, 1000, 1000))
    v += torch.randn(d, device="cuda").sign()
    out = sage_kernels.attention(q, k, v, config=config_of(kernel, smooth_v=False))
    close(out, v[:, :, :1].expand_as(out), 0.02 if kernel[1] == "fp8/fp32" else 0.005)


@each()
@pytest.mark.parametrize("sm_scale", [None, -0.1, 0.0])
def test_scores_that_only_the_scale_keeps_within_float32(kernel, sm_scale):
    """q . k passes 3.4e38 in every row, its product with the scale in none; and what an inf does is the same."""
    q, k, v = (x.cuda() for x in qkv(nq=70, nk=150))
    q, k = q * 3, k * 1e37
    q[0, 1, 5, 3] = float("inf")
    out, lse = sage_kernels.attention(q, k, v, sm_scale=sm_scale, return_lse=True, config=config_of(kernel))
    want, want_lse = exact(q, k, v, sm_scale=sm_scale)
    close(out, want, 1e-4)
    close(lse, want_lse, 1e-4)


@each()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", "kv")
def test_sums_beyond_float32(kernel, which, dtype):
    """600 numbers of 8e35, each of which may be quantised, have no mean in float32. Half of the queries weigh all keys alike."""
    x = dict(zip("qkv", (x.cuda() for x in qkv(nq=70, nk=600, dtype=dtype)), strict=True))
    x[which] = (8e35 * (1 + 0.05 * x[which].float().clamp(-3, 3))).to(dtype)
    if which == "k":
        x["q"] *= 1e-35
    x["q"][:, :, ::2] = 0
    out, lse = sage_kernels.attention(
        *x.values(), return_lse=True, config=config_of(kernel, smooth_k=True, smooth_v=True)
    )
    want, want_lse = exact(*x.values())
    close(out, want, 1e-4 + ROUNDING[dtype])
    close(lse, want_lse, 1e-4)


@each()
def test_rows_that_are_not_aligned(kernel):
    wide = torch.randn(2, 3, 333, 131, device="cuda", dtype=torch.bfloat16)
    x = [wide[..., 1:129], wide[..., 2:130], wide[..., 3:131]]
    out = sage_kernels.attention(*x, config=config_of(kernel))
    close(out, exact(*x)[0], tolerance(kernel[1]))
    close(out, emulated(*x, config=config_of(kernel))[0], limit(kernel, torch.bfloat16))


@each()
def test_many_runs_give_the_same_bits(kernel, poisoned):
    """A race or a read of memory that nothing wrote shows as a difference sooner or later."""
    x = qkv(2, 8, 4097, 4100, 128, None, torch.bfloat16, "cuda")
    config = config_of(kernel)
    first = sage_kernels.attention(*x, config=config)
    for _ in range(30):
        poisoned()
        assert torch.equal(sage_kernels.attention(*x, config=config), first)


@each(ONE_EACH)
def test_peak_memory(kernel):
    """On top of q, k, v: the output (2 bytes an element) and q's codes (1); then each input goes before more comes."""
    config = config_of(kernel)
    tensors = qkv(1, 16, 32768, None, 128, None, torch.bfloat16, "cuda")
    sage_kernels.attention(*tensors, config=config)
    elements = tensors[0].numel()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sage_kernels.attention_consuming(tensors, config=config)
    assert torch.cuda.max_memory_allocated() - before < 3.2 * elements


@each()
def test_more_heads_than_a_grids_second_axis_has(kernel):
    """Temporal attention has one batch entry for each pixel: 65536 rows and more."""
    x = qkv(8193, 8, 16, 16, 64, None, torch.float16, "cuda")
    out = sage_kernels.attention(*x, config=config_of(kernel))
    last = [t[-2:] for t in x]
    close(out[-2:], exact(*last)[0], tolerance(kernel[1]))


@each()
def test_masks_of_a_dtypes_smallest_number(kernel):
    x = qkv(1, 2, 70, 150, 64, None, torch.bfloat16, "cuda")
    mask = torch.zeros(70, 150, dtype=torch.bfloat16, device="cuda")
    mask[:, 100:] = torch.finfo(torch.bfloat16).min
    mask[5] = torch.finfo(torch.bfloat16).min
    out = sage_kernels.attention(*x, attn_mask=mask, config=config_of(kernel))
    close(out, exact(*x, attn_mask=mask)[0], tolerance(kernel[1]))


@each(ONE_EACH)
def test_an_empty_sequence_gives_zeros(kernel):
    """One of three, and all of them."""
    q, k, v = (torch.randn(n, 2, 64, device="cuda", dtype=torch.float16) for n in (30, 20, 20))
    code = config_of(kernel).encode()
    for k_lengths, zeros in (([10, 0, 10], slice(10, 20)), ([0, 0, 0], slice(0, 30))):
        out = torch.ops.sage_kernels.attention_varlen(
            q, k, v, ends_of([10, 10, 10]), ends_of(k_lengths), 10, 10, False, 0.125, code
        )
        assert not out[zeros].any() and bool(out.isfinite().all()) and bool(out.any()) == (zeros.stop == 20)


@each()
@pytest.mark.parametrize("value", [1.0, float("nan")], ids=["quantised", "exact"])
def test_sequences_longer_than_was_said(kernel, value, poisoned):
    """No kernel works on tokens beyond max_seqlen: queries give 0, keys take no part. A negative length is none."""
    q, k, v = (torch.randn(n, 2, 64, device="cuda", dtype=torch.float16) for n in (800, 900, 900))
    v[3, :, 5] = value
    q_ends, k_ends = ends_of([300, 150, 350]), ends_of([600, -100, 400])
    poisoned()
    out = torch.ops.sage_kernels.attention_varlen(
        q, k, v, q_ends, k_ends, 100, 70, False, 0.125, config_of(kernel).encode()
    )
    for first, k_first, keys in ((0, 0, 70), (300, 600, 0), (450, 500, 70)):
        rows, cols = slice(first, first + 100), slice(k_first, k_first + keys)
        alone = [x[None, part].transpose(1, 2) for x, part in ((q, rows), (k, cols), (v, cols))]
        want = exact(*alone)[0][0].transpose(0, 1) if keys else torch.zeros_like(out[rows])
        close(out[rows], want, tolerance(kernel[1]))
        out[rows] = 0
    assert not out.any()
