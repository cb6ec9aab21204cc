"""The codes and scales of q, k and v, read from the CUDA kernels' scratch memory, against the emulation's."""

import math

import pytest
import torch
from cases import all_pairs
from checks import qkv
from kernels import config_of, each, ends_of

import sage_kernels
from sage_kernels import PV_MODES, cuda, reference
from sage_kernels.quantize import GRANULARITIES, PV, group_index, padded_head_dim, rotate

FACTORS = {
    "mode": PV_MODES,
    "gran": tuple(GRANULARITIES),
    "dtype": (torch.float16, torch.bfloat16, torch.float32),
    "d": (40, 64, 65, 80, 96, 128, 200, 256),
    "lengths": ((1, 1), (200, 333), (129, 64), (64, 130), (300, 1025)),
    "heads": ((4, 2), (3, 3)),
    "smooth_k": (True, False),
    "smooth_v": (True, False),
    "rotate": (True, False),
    "parts": ("together", "one by one"),
}
CODES = {"fp16": torch.float16, "u8": torch.int8, "e4m3": torch.float8_e4m3fn}
UNIT = {"fp16": 2.0**-24, "u8": 1.0, "e4m3": 2.0**-9}  # of Stats.v_sums


def name_of(case):
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in case.values())


class Memory:
    """Reads one scratch buffer as params.h's Carver hands it out: in order, each tensor from a multiple of 256 bytes on."""

    def __init__(self, size):
        self.bytes, self.at = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda"), 0

    def take(self, dtype, *shape):
        size = math.prod(shape) * dtype.itemsize
        first, self.at = self.at, self.at + -(-size // 256) * 256
        return self.bytes[first : first + size].view(dtype).view(shape)


# ---- params.h: where the codes lie, in numbers or tensors of them


def key_position(key, row_keys):
    """Where a row of V codes has a key."""
    return row_keys // 4 * (key % 8 // 2) + 2 * (key // 8) + key % 2


def channel_row(channel):
    """Which row of V codes has a channel."""
    x = channel % 32
    return channel - x + 8 * (x % 8 // 2) + 2 * (x // 8) + x % 2


def wgmma_key_position(key, v_bytes):
    return key if v_bytes == 2 else key // 16 * 16 + 4 * (key % 8 // 2) + 2 * (key // 8 % 2) + key % 2


def swizzled(at, row, row_bytes):
    """Where in its row byte `at` of row `row` lies: wgmma's swizzles of 128 and of 64 bytes."""
    return at ^ (row % 8 if row_bytes == 128 else row // 2 % 4) * 16


def rows_places(padded, dim):
    """Of each code of a head of Q or K, as wgmma reads them: [padded, dim]."""
    token = torch.arange(padded)[:, None]
    return token * dim + swizzled(torch.arange(dim), token, dim)


def k_places(k_padded, dim, wgmma):
    """Of each code of a head of K: [k_padded, dim]."""
    if wgmma:
        return rows_places(k_padded, dim)
    key, channel = torch.arange(k_padded)[:, None], torch.arange(dim)
    return (key // 64 * dim + channel // 64 * 64 + key % 64) * 64 + channel % 64


def v_places(k_padded, v_dim, size, wgmma):
    """Of each code of a head of V, in codes of `size` bytes: [k_padded, v_dim]."""
    key, row, keys = torch.arange(k_padded)[:, None], channel_row(torch.arange(v_dim)), (128 if wgmma else 64) // size
    if wgmma:
        at = swizzled(wgmma_key_position(key % keys, size) * size, row, 128) // size
    else:
        at = key_position(key % keys, keys)
    return (key // keys * v_dim + row) * keys + at


def has_wgmma(mode, d):
    return d <= 128 and mode not in ("fp16/fp16+fp32", "fp16/fp16")


class Quantised:
    """q, k and v [b, h, n, d] after the first two steps of a call, every part in the shape that the emulation has it in.

    wgmma: which of the two layouts K's and V's codes are to have. lengths: of the sequences that q, and k and v, are made of
    if they are packed, b being 1; what lies behind the end of a sequence is then 0 or 0xFF.
    """

    def __init__(self, q, k, v, config, one_by_one=False, wgmma=False, lengths=None):
        (b, heads, nq, d), (_, g, nk, _) = q.shape, k.shape
        ends, batch = [], 0
        if lengths:
            b, nq, nk = len(lengths[0]), *map(max, lengths)
            ends, batch = [ends_of(each) for each in lengths], None
        stream = torch.cuda.current_stream().cuda_stream
        with cuda.with_wgmma(wgmma):
            call = cuda._prepare(
                b, heads, g, nq, nk, d, q.dtype, False, d**-0.5, not lengths, config, q.device, stream,
                *(x.data_ptr() for x in ends),
            )  # fmt: skip
        assert call.wgmma is wgmma
        stats, *codes = (Memory(size) for size in call.bytes()[:4])
        views, step = [cuda._view(x, batch, 1, 2) for x in (q, k, v)], cuda.binary()
        at = [memory.bytes.data_ptr() for memory in (stats, *codes)]
        step.stats(call, *views[1:], at[0])
        every = (step.PART_Q, step.PART_K, step.PART_V)
        for part in every if one_by_one else [sum(every)]:
            step.quantize(call, part, *views, *at)
        torch.cuda.synchronize()
        gran, dim, pv = GRANULARITIES[config.qk_quant_gran], padded_head_dim(d), PV[config.pv_accum]
        v_dim = 96 if 64 < d <= 96 else dim
        q_padded, k_padded = (-(-n // 128) * 128 for n in (nq, nk))

        def scales(memory, rows, padded, block, sub):
            groups = memory.take(torch.float32, b, rows, padded // block * sub)
            return groups[..., group_index(padded, block, sub, q.device)]

        self.bad, _ = stats.take(torch.int32, b, g), stats.take(torch.int32, b, g)
        sums, k_top = stats.take(torch.int64, b, g, dim), stats.take(torch.float32, b, g)
        self.k_mean, v_mean, self.v_scale, self.v_inverse = (stats.take(torch.float32, b, g, dim) for _ in range(4))
        self.put_back = v_mean - (sums.double() * UNIT[pv.p_dtype] / nk).float() * self.v_scale
        q_places = rows_places(q_padded, dim) if wgmma else torch.arange(q_padded * dim).view(q_padded, dim)
        self.q = codes[0].take(torch.int8, b, heads, q_padded * dim)[..., q_places]
        self.q_scale = scales(codes[0], heads, q_padded, gran.q_block, gran.q_sub)
        shifts = config.smooth_k and not lengths
        self.lse_shift = codes[0].take(torch.float32, b, heads, q_padded) if shifts else None
        self.k = codes[1].take(torch.int8, b, g, k_padded * dim)[..., k_places(k_padded, dim, wgmma)]
        self.k_scale = scales(codes[1], g, k_padded, gran.k_block, gran.k_sub)
        assert lengths or torch.equal(k_top.nan_to_num(), self.k_scale.nan_to_num().flatten(2).amax(-1))
        code = CODES[pv.p_dtype]
        bits = codes[2].take(torch.uint8 if code.itemsize == 1 else torch.int16, b, g, k_padded * v_dim)
        self.v = bits[..., v_places(k_padded, v_dim, code.itemsize, wgmma)].view(code).float()
        assert [memory.at for memory in codes] == list(call.bytes()[1:4])


def same_bits(a, b):
    """Two layouts of the same codes."""
    assert vars(a).keys() == vars(b).keys()
    for name, x in vars(a).items():
        y = vars(b)[name]
        assert x is y is None or torch.equal(x.nan_to_num(), y.nan_to_num()), name


def padded(x, to):
    return torch.nn.functional.pad(x, (0, to - x.shape[-1]))


def same_int8(codes, scale, want, want_scale, numbers):
    """codes of the tokens that exist, and of the padding after them; numbers: what is rounded, float64."""
    n, dim = want.shape[-2], codes.shape[-1]
    want, scale, want_scale = padded(want, dim), scale[..., :n, None], want_scale.expand_as(scale[..., :n, None])
    assert not codes[..., n:, :].any()
    assert torch.equal(scale == 0, want_scale == 0)
    torch.testing.assert_close(scale, want_scale, rtol=3e-6, atol=0)
    codes, ratio = codes[..., :n, :].double(), padded(numbers, dim) / scale.double().clamp_min(1e-38)
    assert (codes - ratio).abs().max() <= 0.501  # rounded to a nearest
    differs = codes != want
    assert (codes - want).abs().max() <= 1
    tie = ((ratio - ratio.floor()) - 0.5).abs() < 1e-4  # of short mantissas there are many
    assert (differs & ~tie).double().mean() < 0.001, f"{int(differs.sum())} of {differs.numel()} codes differ"


def same_v(codes, want, numbers, p_dtype):
    """Rounded to a nearest code, and to the emulation's but where a mean of other last bits decides."""
    bits = {"fp16": 10, "u8": 0, "e4m3": 3}[p_dtype]
    step = torch.exp2(torch.floor(torch.log2(numbers.abs())) - bits) if bits else torch.ones_like(numbers)
    away = (codes.double() - numbers).abs() / step.clamp_min(UNIT[p_dtype])
    slack = numbers.abs().max() * 1e-6 / step.clamp_min(UNIT[p_dtype])
    assert (away <= 0.5001 + slack).all()
    share = (codes != want).double().mean()
    assert share < (0.01 if p_dtype == "fp16" else 0.002), f"{share:.2%} of the codes differ"


@pytest.mark.parametrize("case", all_pairs(FACTORS), ids=name_of)
def test_codes_and_scales(case):
    (heads, kv_heads), (nq, nk), d, dtype = case["heads"], case["lengths"], case["d"], case["dtype"]
    config = config_of(
        ("cuda", case["mode"]), qk_quant_gran=case["gran"], **{k: case[k] for k in ("smooth_k", "smooth_v", "rotate")}
    )
    q, k, v = qkv(2, heads, nq, nk, d, kv_heads, dtype, "cuda")
    k += 2 * torch.randn(2, kv_heads, 1, d, device="cuda")
    v *= torch.rand(2, kv_heads, 1, d, device="cuda") + 0.1
    v += torch.randn(2, kv_heads, 1, d, device="cuda")
    v[..., 0] = 0
    config = sage_kernels.explain(q, k, v, config=config).config
    got = Quantised(q, k, v, config, case["parts"] == "one by one")
    if has_wgmma(config.pv_accum, d):
        same_bits(Quantised(q, k, v, config, case["parts"] == "one by one", wgmma=True), got)
    call = reference.Grouped.of(q, k, v, False, None, None)
    scores = reference.QuantisedScores.of(call, config)
    values = reference.QuantisedValues.of(call.v, config, True)
    assert not got.bad.any()

    mean = k.double().mean(-2, keepdim=True) if config.smooth_k else torch.zeros_like(k[:, :, :1]).double()
    torch.testing.assert_close(got.k_mean[..., :d].double(), mean[..., 0, :], rtol=0, atol=3e-6)
    numbers = [padded(x, got.q.shape[-1]) for x in (q.double() * (d**-0.5 * math.log2(math.e)), k.double() - mean)]
    if config.rotate:
        numbers = [rotate(x) for x in numbers]
    q_codes, q_scale = (x.flatten(1, 2) for x in (scores.q, scores.q_scale))
    same_int8(got.q, got.q_scale, q_codes, q_scale, numbers[0])
    same_int8(got.k, got.k_scale, scores.k[:, :, 0], scores.k_scale[:, :, 0], numbers[1])
    if config.smooth_k:
        torch.testing.assert_close(got.lse_shift[..., :nq], scores.lse_shift.flatten(1, 2), rtol=1e-5, atol=1e-5)

    wanted = values.v[:, :, 0]
    torch.testing.assert_close(got.v_scale[..., :d], values.scale[:, :, 0, 0], rtol=3e-6, atol=0)
    assert not got.v_scale[..., d:].any() and not got.v[..., nk:, :].any() and not got.v[..., d:].any()
    mean = v.double().mean(-2, keepdim=True) if config.smooth_v else 0.0
    same_v(got.v[..., :nk, :d], wanted, (v - mean) * got.v_inverse[..., None, :d].double(), PV[config.pv_accum].p_dtype)
    if config.smooth_v:
        mean_of_codes = (got.v[..., :nk, :d].double().mean(-2) * got.v_scale[..., :d]).float()
        torch.testing.assert_close(got.put_back[..., :d], mean[..., 0, :].float() - mean_of_codes, rtol=0, atol=3e-6)


@each([("cuda", mode) for mode in PV_MODES if has_wgmma(mode, 64)])
@pytest.mark.parametrize("d", [64, 80, 128])
def test_layouts_of_packed_sequences(d, kernel):
    """Odd lengths and an empty sequence; whole blocks of 128 keys or none are written."""
    lengths = (130, 7, 64, 300), (333, 1, 0, 190)
    config = config_of(kernel, smooth_v=True)
    q, k, v = qkv(1, 4, sum(lengths[0]), sum(lengths[1]), d, 2, torch.bfloat16, "cuda")
    config = sage_kernels.explain(q, k, v, config=config).config
    plain, got = (Quantised(q, k, v, config, wgmma=wgmma, lengths=lengths) for wgmma in (False, True))
    same_bits(plain, got)
    for b, (one_k, one_v) in enumerate(zip(*(x.split(lengths[1], 2) for x in (k, v)), strict=True)):
        n, whole = one_k.shape[2], -(-one_k.shape[2] // 128) * 128
        assert (got.k[b, :, whole:] == -1).all() and not got.k[b, :, n:whole].any() and not got.v[b, :, n:whole].any()
        if n == 0:
            continue
        numbers = one_v[0].double() - one_v[0].double().mean(-2, keepdim=True)
        numbers = numbers * got.v_inverse[b, :, None, :d].double()
        same_v(got.v[b, :, :n, :d], got.v[b, :, :n, :d], numbers, PV[config.pv_accum].p_dtype)
        scores = reference.QuantisedScores.of(reference.Grouped.of(one_k, one_k, one_v, False, None, None), config)
        numbers = one_k.double() - (one_k.double().mean(-2, keepdim=True) if config.smooth_k else 0.0)
        numbers = padded(numbers, got.k.shape[-1])
        numbers = rotate(numbers) if config.rotate else numbers
        own = slice(b, b + 1), slice(None), slice(0, whole)
        same_int8(got.k[own], got.k_scale[own], scores.k[:, :, 0], scores.k_scale[:, :, 0], numbers)


@pytest.mark.parametrize("which", "qkv")
def test_heads_that_are_computed_exactly(which):
    """Flagged: a kv head with a NaN, an inf or a huge number in it or in a query head of its group."""
    config = config_of(("cuda", "int8/int32"))
    for value in (float("nan"), float("inf"), -1e38):
        x = dict(zip("qkv", qkv(3, 4, 300, 300, 64, 2, torch.bfloat16, "cuda"), strict=True))
        x[which][1, 3 if which == "q" else 1, 299, 63] = value
        config = sage_kernels.explain(*x.values(), config=config).config
        bad = Quantised(*x.values(), config, one_by_one=False).bad
        assert bad.nonzero().tolist() == [[1, 1]]
