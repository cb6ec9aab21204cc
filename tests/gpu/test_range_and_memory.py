"""What the pairs of test_triton_gpu.py do not reach: values of any size, rows off any alignment, and peak memory."""

import pytest
import torch
from checks import close, exact, qkv, relative_l2, tolerance

import sage_kernels
from sage_kernels import AttentionConfig

MODES = ("fp16/fp32", "int8/int32")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype,size", [(torch.bfloat16, 1e30), (torch.float32, 1e-30), (torch.float16, 6e4)], ids=str)
def test_values_that_fp16_cannot_hold(mode, dtype, size):
    q, k, v = qkv(nq=200, nk=300, d=128, dtype=dtype, device="cuda")
    v = (v.float().clamp(-3, 3) / 3 * size).to(dtype)
    out = sage_kernels.attention(q, k, v, config=AttentionConfig(backend="triton", pv_accum=mode))
    assert relative_l2(out, exact(q, k, v)[0]) < tolerance(mode)


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_not_aligned(mode):
    wide = torch.randn(2, 3, 333, 131, device="cuda", dtype=torch.bfloat16)
    x = [wide[..., 1:129], wide[..., 2:130], wide[..., 3:131]]
    out = sage_kernels.attention(*x, config=AttentionConfig(backend="triton", pv_accum=mode))
    close(out, exact(*x)[0], tolerance(mode))


@pytest.mark.parametrize("mode", MODES)
def test_many_runs_give_the_same_bits(mode, poisoned):
    """A race or a read of memory that nothing wrote shows as a difference sooner or later."""
    x = qkv(2, 8, 4097, 4100, 128, None, torch.bfloat16, "cuda")
    config = AttentionConfig(backend="triton", pv_accum=mode)
    first = sage_kernels.attention(*x, config=config)
    for _ in range(30):
        poisoned()
        assert torch.equal(sage_kernels.attention(*x, config=config), first)


def test_peak_memory():
    """On top of q, k, v: the output (2 bytes an element) and q's codes (1); then each input goes before more comes."""
    tensors = qkv(1, 8, 32768, None, 128, None, torch.bfloat16, "cuda")
    sage_kernels.attention(*tensors)
    elements = tensors[0].numel()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sage_kernels.attention_consuming(tensors)
    assert torch.cuda.max_memory_allocated() - before < 3.2 * elements


def test_more_heads_than_a_grids_second_axis_has():
    """Temporal attention has one batch entry for each pixel: 65536 rows and more."""
    x = qkv(8193, 8, 16, 16, 64, None, torch.float16, "cuda")
    out = sage_kernels.attention(*x, config=AttentionConfig(backend="triton"))
    last = [t[-2:] for t in x]
    close(out[-2:], exact(*last)[0], tolerance("fp16"))


@pytest.mark.parametrize("mode", MODES)
def test_masks_of_a_dtypes_smallest_number(mode):
    x = qkv(1, 2, 70, 150, 64, None, torch.bfloat16, "cuda")
    mask = torch.zeros(70, 150, dtype=torch.bfloat16, device="cuda")
    mask[:, 100:] = torch.finfo(torch.bfloat16).min
    mask[5] = torch.finfo(torch.bfloat16).min
    out = sage_kernels.attention(*x, attn_mask=mask, config=AttentionConfig(backend="triton", pv_accum=mode))
    close(out, exact(*x, attn_mask=mask)[0], tolerance(mode))


def test_an_empty_sequence_gives_zeros():
    q, k, v = (torch.randn(n, 2, 64, device="cuda", dtype=torch.float16) for n in (30, 20, 20))
    ends = [torch.tensor(x, device="cuda", dtype=torch.int32) for x in ([0, 10, 20, 30], [0, 10, 10, 20])]
    out = sage_kernels.sageattn_varlen(q, k, v, *ends, 10, 10)
    assert not out[10:20].any() and bool(out.isfinite().all())
