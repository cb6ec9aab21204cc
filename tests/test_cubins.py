"""cubins.py answers what `_C` answers: the same numbers for the same calls, the same sentences to nonsense.

Both are asked; nothing here reaches a kernel, so it needs no GPU. NVRTC compiles one small kernel, for the numbers beside it.
"""

import math
import random

import pytest
import test_bindings
from small_cubins import compiler, small_cubins  # noqa: F401 (fixtures)
from test_bindings import _C, GOOD, NOWHERE, VIEW

from sage_kernels import PV_MODES, cubin_call, cubin_layout, quantize
from sage_kernels.config import QK_GRANULARITIES
from sage_kernels.quantize import GRANULARITIES, PV


def cases_of(test):
    """What a test of test_bindings.py is parametrised with."""
    return next(mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")


def answer(function, *args, **fields):
    """Its result, or the error with its words."""
    try:
        return function(*args, **fields)
    except (ValueError, TypeError) as error:
        return type(error), str(error)


@pytest.fixture(scope="module")
def ours(small_cubins):  # noqa: F811
    return small_cubins(_C.ARCHS)


def test_constants(ours):
    names = [name for name in dir(_C) if name.isupper() and name not in ("ARCHS", "CUDA_RUNTIME")]
    assert {"BLOCK", "LARGEST", "PART_V", "SOURCE_HASH", "WGMMA_KEYS"} <= set(names)
    assert {name: getattr(ours, name) for name in names} == {name: getattr(_C, name) for name in names}
    assert ours.ARCHS == _C.ARCHS and ours.CUDA_RUNTIME >= 12000


def test_names_are_in_the_same_order():
    assert cubin_call.MODES == PV_MODES
    assert set(cubin_call.GRANULARITIES) == {
        (g.q_block, g.q_sub, g.k_sub) for g in map(GRANULARITIES.get, QK_GRANULARITIES)
    }
    for head_dim in range(1, 257):
        assert cubin_call.padded_head_dim(head_dim) == quantize.padded_head_dim(head_dim)
        assert cubin_layout.DIMS[cubin_call.padded_v_dim(head_dim)] == cubin_call.padded_head_dim(head_dim)


def test_what_a_gpu_runs(ours):
    for major in range(5, 14):
        for minor in range(10):
            assert ours.arch_for(major, minor) == _C.arch_for(major, minor)
    for arch in _C.ARCHS:
        assert ours.modes(arch) == _C.modes(arch)
        for mode in PV_MODES:
            for head_dim in (0, 1, 64, 65, 96, 97, 128, 129, 256, 257):
                assert answer(ours.key_tile, mode, head_dim, arch) == answer(_C.key_tile, mode, head_dim, arch)
    assert answer(ours.modes, "6.1") == answer(_C.modes, "6.1")
    assert answer(ours.key_tile, "fp4", 64, _C.ARCHS[0]) == answer(_C.key_tile, "fp4", 64, _C.ARCHS[0])


def some_call(rng):
    kv_heads, d = rng.choice((1, 2, 5)), rng.choice((1, 40, 64, 72, 96, 128, 160, 256))
    mode, granularity = rng.choice(PV_MODES), GRANULARITIES[rng.choice(QK_GRANULARITIES)]
    return dict(
        batch=rng.choice((1, 2, 7)), heads=kv_heads * rng.choice((1, 3, 8)), kv_heads=kv_heads,
        nq=rng.choice((1, 127, 128, 129, rng.randrange(1, 100_000))), nk=rng.choice((1, 64, 65, rng.randrange(1, 300_000))),
        head_dim=d, dim=quantize.padded_head_dim(d), v_dim=96 if 64 < d <= 96 else quantize.padded_head_dim(d), mode=mode,
        dtype=rng.choice(("float16", "bfloat16", "float32")), q_block=granularity.q_block, q_sub=granularity.q_sub,
        k_sub=granularity.k_sub, sm_scale=0.1, q_factor=0.144, v_max=127.0, p_max_log2=math.log2(PV[mode].p_max), cu_q=0,
        cu_k=0, splits=1, device=NOWHERE, stream=0,
        **{name: rng.random() < 0.5 for name in ("is_causal", "smooth_k", "smooth_v", "rotate", "return_lse")},
    )  # fmt: skip


def test_random_calls_take_the_same_memory(ours):
    rng = random.Random(0)
    for _ in range(500):
        fields = some_call(rng) | rng.choice(({}, {}, {"wgmma": 0}, {"wgmma": 1}))
        theirs, mine = answer(_C.Call, **fields), answer(ours.Call, **fields)
        if isinstance(theirs, tuple):
            assert mine == theirs
            continue
        assert repr(mine) == repr(theirs) and mine.wgmma == theirs.wgmma and mine.bytes() == theirs.bytes()
        for arch in _C.ARCHS:
            splits = _C.choose_splits(theirs, 132, arch)
            assert ours.choose_splits(mine, 132, arch) == splits
        for parts in (splits, 3, 5000):
            said = [answer(setattr, call, "splits", parts) for call in (mine, theirs)]
            assert said[0] == said[1] and mine.bytes() == theirs.bytes() and mine.splits == theirs.splits


@pytest.mark.parametrize("changes, words", cases_of(test_bindings.test_a_wrong_call))
def test_a_wrong_call_is_told_the_same(ours, changes, words):
    fields = {**GOOD, **changes}
    said = answer(ours.Call, **fields)
    assert said == answer(_C.Call, **fields) and words in said[1]


def test_a_call_lacks_something(ours):
    for name in GOOD:
        fields = {key: value for key, value in GOOD.items() if key != name}
        assert answer(ours.Call, **fields) == (ValueError, f"{name} is missing")


@pytest.mark.parametrize("step, args, words", cases_of(test_bindings.test_a_wrong_step))
def test_a_wrong_step_is_told_the_same(ours, step, args, words):
    said = answer(getattr(ours, step), ours.Call(**GOOD), *args)
    assert said == answer(getattr(_C, step), _C.Call(**GOOD), *args) and words in said[1]


def test_what_is_not_a_tensor(ours):
    for wrong in (None, 5, (1, 2), (4096, "x", 1, 1), (4096.5, 1, 1, 1)):
        with pytest.raises(TypeError):
            ours.stats(ours.Call(**GOOD), wrong, VIEW, 4096)
    with pytest.raises(ValueError, match="multiprocessors is 0"):
        ours.choose_splits(ours.Call(**GOOD), 0, _C.ARCHS[0])


def test_division_by_multiplication():
    """Divider's operator / and %, for all that a kernel divides."""
    rng = random.Random(1)
    for divisor in (1, 2, 3, 7, 128, 641, *(rng.randrange(1, 1 << 31) for _ in range(500))):
        d = cubin_call.divider(divisor)
        for n in (0, 1, divisor - 1, divisor, divisor + 1, (1 << 31) - 1, *(rng.randrange(1 << 31) for _ in range(20))):
            if n < 1 << 31:
                assert ((n * d.factor >> 32) + n & 0xFFFFFFFF) >> d.shift == n // divisor
