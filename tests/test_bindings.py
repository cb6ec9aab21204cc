"""The binary itself, where it is built: its numbers are those of Python, and misuse is a sentence before it is a crash.

Nothing here reaches a kernel, so it needs no GPU.
"""

import math
import re

import numpy as np
import pytest

from sage_kernels import PV_MODES, quantize
from sage_kernels.dispatch import CUDA_AUTO
from sage_kernels.quantize import GRANULARITIES, PV
from sage_kernels.sources import source_hash

_C = pytest.importorskip("sage_kernels._C", reason="the CUDA binary is not built", exc_type=ImportError)

if _C.SOURCE_HASH != source_hash():
    pytest.skip("the CUDA binary is of other sources: run python install.py", allow_module_level=True)

NOWHERE = 10**6  # a device that no machine has: whatever is right about a call ends there
VIEW = (4096, 1, 2, 3)
GOOD = dict(
    batch=2, heads=4, kv_heads=2, nq=300, nk=1100, head_dim=80, dim=128, v_dim=96, mode="int8/int32", dtype="bfloat16",
    q_block=16, q_sub=8, k_sub=4, is_causal=True, smooth_k=True, smooth_v=False, rotate=True, return_lse=True,
    sm_scale=0.1, q_factor=0.144, v_max=127.0, p_max_log2=math.log2(255), cu_q=0, cu_k=0, splits=1, device=NOWHERE,
    stream=0,
)  # fmt: skip


def call(**changes):
    return _C.Call(**{**GOOD, **changes})


def test_constants():
    for name in ("LARGEST", "TINY", "LOG2E", "MASK_LIMIT", "EXACT_P_MAX"):
        assert getattr(_C, name) == np.float32(getattr(quantize, name))
    assert _C.HASH == quantize.HASH
    assert {granularity.k_block for granularity in GRANULARITIES.values()} == {_C.PANEL}
    assert len(_C.SOURCE_HASH) == 16 and _C.CUDA_RUNTIME >= 12000 and _C.driver_version() >= 0


def test_what_a_gpu_runs():
    """Of its major version, at most its minor."""
    for arch in _C.ARCHS:
        major, minor = map(int, arch.split("."))
        assert _C.arch_for(major, minor) == arch
        assert _C.arch_for(major, 9) in {other for other in _C.ARCHS if other.startswith(f"{major}.")}
        assert _C.arch_for(major, minor) != "" and _C.arch_for(5, 0) == ""


def test_modes():
    for arch in _C.ARCHS:
        modes = _C.modes(arch)
        assert {mode for mode, _ in CUDA_AUTO[arch].values()} <= set(modes)
        assert set(modes) <= set(PV_MODES) and "int8/int32" in modes
        assert ("fp8/fp32" in modes) == (float(arch) >= 8.9)
        for mode in modes:
            assert _C.key_tile(mode, 128, arch) in (32, 64, 128)


def test_scratch():
    """A byte per code, two of fp16 V; tokens in whole blocks."""
    stats, q, k, v, partials = call().bytes()
    assert stats > 0 and q > 8 * 384 * 128 and k > 4 * 1152 * 128 and v == 4 * 1152 * 96 and partials == 0
    assert call(mode="fp16/fp32").bytes()[3] == 2 * v
    assert all(size % 256 == 0 for size in call(splits=3).bytes())
    split = call()
    split.splits = 3
    assert split.splits == 3 and split.bytes() == call(splits=3).bytes() and split.bytes()[4] > 3 * 8 * 300 * 96 * 4


WITHOUT_WGMMA = ("fp16/fp16+fp32", "fp16/fp16")


@pytest.mark.parametrize("mode", PV_MODES)
def test_wgmma(mode):
    """Not where there is no GPU; wherever it is asked for, as long as there is a kernel. It takes the same memory."""
    assert _C.WGMMA_KEYS == 128
    for d, dim, v_dim in ((64, 64, 64), (80, 128, 96), (128, 128, 128), (129, 256, 256)):
        shape = dict(mode=mode, head_dim=d, dim=dim, v_dim=v_dim)
        plain = call(**shape)
        assert plain.wgmma is False and call(**shape, wgmma=0).wgmma is False
        if mode in WITHOUT_WGMMA or d > 128:
            with pytest.raises(
                ValueError, match=f"wgmma is 1; there is no kernel .* {re.escape(mode)} at head_dim {d}"
            ):
                call(**shape, wgmma=1)
        else:
            asked = call(**shape, wgmma=1)
            assert asked.wgmma is True and asked.bytes() == plain.bytes()
            with pytest.raises(AttributeError):
                asked.wgmma = False


@pytest.mark.parametrize("head_dim", [1, 63, 64, 65, 96, 97, 128, 129, 256])
def test_dims_are_those_of_python(head_dim):
    dim = quantize.padded_head_dim(head_dim)
    v_dim = 96 if 64 < head_dim <= 96 else dim
    assert call(head_dim=head_dim, dim=dim, v_dim=v_dim)


@pytest.mark.parametrize("name", GRANULARITIES)
def test_granularities_are_those_of_python(name):
    g = GRANULARITIES[name]
    assert call(q_block=g.q_block, q_sub=g.q_sub, k_sub=g.k_sub)


@pytest.mark.parametrize("mode", PV_MODES)
def test_splits_are_within_what_a_call_takes(mode):
    for nk in (1, 64, 1000, 1 << 20):
        for arch in _C.ARCHS:
            made = call(mode=mode, batch=1, heads=1, kv_heads=1, nq=1, nk=nk, p_max_log2=math.log2(PV[mode].p_max))
            made.splits = _C.choose_splits(made, 148, arch)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(head_dim=0), "head_dim is 0; it must be an integer, 1 to 256"),
        (dict(head_dim=257), "head_dim is 257"),
        (dict(dim=64), "dim is 64; for head_dim 80 it must be 128"),
        (dict(v_dim=128), "v_dim is 128; for head_dim 80 it must be 96"),
        (dict(heads=3), "heads is 3; it must be a multiple of kv_heads, 2"),
        (dict(batch=0), "batch is 0"),
        (dict(batch=1.5), "batch is 1.5; it must be an integer"),
        (dict(nq=0), "nq is 0"),
        (dict(nk=-1), "nk is -1"),
        (dict(nk=2**31), "nk is 2147483648"),
        (dict(nq=10**30), "nq is 1000"),
        (dict(batch=2**30, nq=2**30), "larger than any memory"),
        (dict(mode="fp4"), "mode is 'fp4'; it must be one of fp16/fp32"),
        (dict(dtype="float64"), "dtype is 'float64'; it must be one of float16, bfloat16, float32"),
        (dict(q_block=64), "(q_block, q_sub, k_sub) is (64, 8, 4)"),
        (dict(is_causal="yes"), "is_causal is 'yes'"),
        (dict(sm_scale=math.nan), "sm_scale is nan; it must be a finite number"),
        (dict(sm_scale="x"), "sm_scale is 'x'"),
        (dict(q_factor=1e39), "q_factor is 1e+39"),
        (dict(v_max=0), "v_max is 0; it must be above 0"),
        (dict(cu_q=256), "cu_k is 0; packed sequences need both"),
        (dict(splits=0), "splits is 0"),
        (dict(splits=19), "splits is 19; it must be an integer, 1 to 18"),
        (dict(device=-1), "device is -1"),
        (dict(stream=-5), "stream is -5"),
        (dict(wgmma=2), "wgmma is 2; it must be an integer, 0 to 1"),
        (dict(window=5), "Call has no 'window'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_call(changes, words):
    with pytest.raises(ValueError) as caught:
        call(**changes)
    assert words in str(caught.value)


def test_a_call_lacks_something():
    for name in GOOD:
        with pytest.raises(ValueError, match=f"^{name} is missing$"):
            _C.Call(**{key: value for key, value in GOOD.items() if key != name})


MASK = ("bool", 4096, 0, 0, 0, 1)


@pytest.mark.parametrize(
    "step, args, words",
    [
        ("stats", ((0, 1, 1, 1), VIEW, 4096), "k is at address 0"),
        ("stats", (VIEW, (4096, -1, 0, 0), 4096), "v has a stride of -1"),
        ("stats", (VIEW, VIEW, 0), "stats is at address 0; it must have"),
        ("stats", (VIEW, VIEW, 4100), "stats is at an address that is no multiple of 256"),
        ("quantize", (0, VIEW, VIEW, VIEW, 4096, 4096, 4096, 4096), "parts is 0"),
        ("quantize", (8, VIEW, VIEW, VIEW, 4096, 4096, 4096, 4096), "parts is 8"),
        ("quantize", (2, VIEW, VIEW, VIEW, 4096, 4096, 0, 4096), "k_codes is at address 0"),
        ("quantize", (1, (0, 0, 0, 0), VIEW, VIEW, 4096, 4096, 0, 0), "q is at address 0"),
        ("exact", (VIEW, VIEW, VIEW, 5, 4096, VIEW, 4096), "mask is 5; it must be None or"),
        ("exact", (VIEW, VIEW, VIEW, ("int8", *MASK[1:]), 4096, VIEW, 4096), "mask kind is 'int8'"),
        ("exact", (VIEW, VIEW, VIEW, ("bool", 0, 0, 0, 0, 1), 4096, VIEW, 4096), "mask is at address 0"),
        ("exact", (VIEW, VIEW, VIEW, MASK, 4096, (0, 1, 1, 1), 4096), "out is at address 0"),
        ("exact", (VIEW, VIEW, VIEW, MASK, 4096, VIEW, 0), "lse is at address 0, and return_lse"),
        ("attention", (4096, 4096, 4096, 0, None, 0, VIEW, 4096), "v_codes is at address 0"),
        # of a right call, only the device is wrong
        ("stats", (VIEW, VIEW, 4096), f"device is {NOWHERE}"),
        ("quantize", (2, (0, 0, 0, 0), VIEW, (0, 0, 0, 0), 4096, 0, 4096, 0), f"device is {NOWHERE}"),
        ("exact", (VIEW, VIEW, VIEW, MASK, 4096, VIEW, 4096), f"device is {NOWHERE}"),
        ("attention", (4096, 4096, 4096, 4096, None, 0, VIEW, 4096), f"device is {NOWHERE}"),
    ],
)
def test_a_wrong_step(step, args, words):
    with pytest.raises(ValueError) as caught:
        getattr(_C, step)(call(), *args)
    assert words in str(caught.value)


def test_what_is_not_a_tensor():
    with pytest.raises(TypeError, match="tuple"):
        _C.stats(call(), None, VIEW, 4096)


def test_what_the_binary_does_not_have():
    with pytest.raises(ValueError, match="arch is '6.1'; this binary has"):
        _C.modes("6.1")
    with pytest.raises(ValueError, match="mode is 'fp4'"):
        _C.key_tile("fp4", 64, _C.ARCHS[0])
    with pytest.raises(ValueError, match="head_dim is 300"):
        _C.key_tile("fp16/fp32", 300, _C.ARCHS[0])
    with pytest.raises(ValueError, match="multiprocessors is 0"):
        _C.choose_splits(call(), 0, _C.ARCHS[0])
