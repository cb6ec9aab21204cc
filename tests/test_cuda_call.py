"""What a call of the CUDA kernels asks of `_C`, step by step, and when it lets go of its inputs: on a stand-in, without a GPU."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from checks import qkv

from sage_kernels import AttentionConfig, cuda
from sage_kernels.dispatch import Request, choose
from sage_kernels.quantize import PV


class Steps:
    """`_C` that notes what it is asked to do, and which of the inputs are still there."""

    ARCHS, PART_Q, PART_K, PART_V = ("8.6",), 1, 2, 4

    def __init__(self):
        self.log, self.inputs = [], []

    def Call(self, **fields):
        return SimpleNamespace(**fields, bytes=lambda: (256, 512, 768, 1024, 0))

    def arch_for(self, major, minor):
        return f"{major}.{minor}"

    def choose_splits(self, call, multiprocessors, arch):
        return 3 if (multiprocessors, arch) == (84, "8.6") else 0

    def _note(self, name, *args):
        self.log.append((name, args[1:], sum(there() is not None for there in self.inputs)))

    def __getattr__(self, name):
        return lambda *args: self._note(name, *args)


@pytest.fixture
def steps(monkeypatch):
    """cuda.py on CPU tensors, as on an RTX 3090."""
    fake = Steps()
    monkeypatch.setattr(cuda, "binary", lambda: fake)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 84)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    for cached in (cuda._prepare, cuda.arch):
        cached.cache_clear()
    yield fake
    for cached in (cuda._prepare, cuda.arch):
        cached.cache_clear()


def call_cuda(steps, layout="HND", mask=None, return_lse=True, **shape):
    config = choose(Request(AttentionConfig(backend="reference", pv_accum="int8/int32"), torch.device("cpu"))).config
    inputs = qkv(**shape, layout=layout)
    steps.inputs = [weakref.ref(x) for x in inputs]
    views = [(x.data_ptr(), *x.stride()[:3]) for x in inputs]
    return *cuda.attention(inputs, mask, layout, False, 0.5, return_lse, config), inputs, views


def test_a_small_call_takes_four_steps(steps):
    out, lse, left, (q, k, v) = call_cuda(steps, nq=9, nk=20, d=64, heads=4, kv_heads=2)
    names = [name for name, _, _ in steps.log]
    assert names == ["stats", "quantize", "exact", "attention"] and left == []
    stats, q_at, k_at, v_at = steps.log[1][1][4:]
    assert steps.log[0][1] == (k, v, stats)
    assert steps.log[1][1] == (7, q, k, v, stats, q_at, k_at, v_at)
    assert [q_at - stats, k_at - q_at, v_at - k_at] == [256, 512, 768], "one allocation"
    to = (out.data_ptr(), *out.stride()[:3])
    assert steps.log[2][1] == (q, k, v, None, stats, to, lse.data_ptr())
    assert steps.log[3][1] == (stats, q_at, k_at, v_at, None, v_at + 1024, to, lse.data_ptr())
    assert lse.shape == (1, 4, 9)


def test_a_large_call_frees_each_input_early(steps, monkeypatch):
    monkeypatch.setattr(cuda, "LARGE", 0)
    *_, left, _ = call_cuda(steps)
    assert [(name, args[0] if name == "quantize" else None, there) for name, args, there in steps.log] == [
        ("stats", None, 3),
        ("quantize", 1, 3),
        ("exact", None, 3),
        ("quantize", 2, 2),
        ("quantize", 4, 1),
        ("attention", None, 0),
    ]
    assert left == []


def test_a_large_call_with_few_keys_takes_four_steps(steps, monkeypatch):
    monkeypatch.setattr(cuda, "LARGE", 200_000)
    *_, left, _ = call_cuda(steps, nq=1000, nk=9, d=64, heads=4, kv_heads=2)  # 1 MB and 9 kB
    assert [name for name, _, _ in steps.log] == ["stats", "quantize", "exact", "attention"] and left == []


def test_cuda_views_of_both_layouts(steps):
    *_, ((address, b, n, h), _, _) = call_cuda(steps, layout="NHD", b=2, nq=9, heads=3, return_lse=False)
    assert steps.log[1][1][1] == (address, b, h, n)


def test_cuda_masks(steps):
    *_, (q, _, _) = call_cuda(steps, mask=torch.ones(1, 20, dtype=torch.bool), nq=9, nk=20)
    assert steps.log[2][1][3][0] == "bool" and steps.log[2][1][3][2:] == (0, 0, 0, 1)
    assert cuda._mask(torch.zeros(2, 1, 9, 20))[2:] == (180, 0, 20, 1)
    assert cuda._mask(torch.zeros(20, 9, dtype=torch.float16).t())[::2] == ("float16", 0, 1)
    assert cuda._mask(torch.zeros(()))[2:] == (0, 0, 0, 0)
    assert cuda._mask(torch.zeros(1, 1, 1, 1).expand(2, 3, 9, 20))[2:] == (0, 0, 0, 0)


def test_a_repeated_shape_is_prepared_once(steps):
    for _ in range(3):
        call_cuda(steps, nq=9, nk=20, d=72)
    assert cuda._prepare.cache_info().misses == 1
    config = choose(Request(AttentionConfig(backend="reference"), torch.device("cpu"))).config
    call = cuda._prepare(1, 4, 2, 9, 20, 72, torch.float16, False, 0.5, True, config, torch.device("cuda", 1), 77)
    assert (call.dim, call.v_dim, call.dtype, call.device, call.stream, call.splits) == (128, 96, "float16", 1, 77, 3)
    assert 2**call.p_max_log2 == pytest.approx(PV[call.mode].p_max) and call.v_max == PV[call.mode].v_max


def test_wgmma_is_up_to_the_gpu_unless_it_is_forced(steps):
    config = choose(Request(AttentionConfig(backend="reference"), torch.device("cpu"))).config

    def given():
        call = cuda._prepare(1, 4, 2, 9, 20, 72, torch.float16, False, 0.5, True, config, torch.device("cuda", 1), 77)
        return getattr(call, "wgmma", None)

    assert given() is None
    with cuda.with_wgmma(False):
        assert given() == 0
        with cuda.with_wgmma(True):
            assert given() == 1
        assert given() == 0
    assert given() is None


def test_cuda_packed_sequences(steps):
    config = choose(Request(AttentionConfig(backend="reference"), torch.device("cpu"))).config
    q, k, v = torch.randn(30, 4, 64), torch.randn(40, 2, 64), torch.randn(40, 2, 64)
    ends = torch.tensor([0, 10, 30], dtype=torch.int32)
    out = cuda.attention_varlen(q, k, v, ends, ends, 20, 20, False, 0.1, config)
    assert out.shape == q.shape and not out.any()
    assert steps.log[2][1][:2] == ((q.data_ptr(), 0, 64, 256), (k.data_ptr(), 0, 64, 128))
    assert cuda._prepare.cache_info().misses == 0
