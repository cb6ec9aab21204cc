"""What the tests of the override share: a ComfyUI attention that is exact, calls of it, and what became of one."""

import pytest
import torch
import torch.nn.functional as F

import nodes.override as override_module
from nodes.blocks import parse
from nodes.kernels import AttentionConfig
from nodes.override import Settings, make_override
from nodes.sampling import Patch

HEADS, DIM = 4, 64
TOLERANCE = 0.03  # relative L2 of one call on random input: INT8 Q·K, per-thread scales


def core(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """What ComfyUI's attention means by its arguments, in float64."""
    core.calls += 1
    dim = q.shape[-1] if skip_reshape else q.shape[-1] // heads
    if not skip_reshape:
        q, k, v = (t.view(t.shape[0], t.shape[1], t.shape[-1] // dim, dim).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
        mask = mask if mask.dtype == torch.bool else mask.double()
    extra = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    out = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, **extra).to(q.dtype)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def plain(q, k, v, heads, **_):
    """Attention without options, as torch.compile can trace it."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture(autouse=True)
def count_core():
    core.calls = 0


def make(previous=None, patch=None, **changes):
    """An override and the patch whose report it counts in."""
    patch = patch or Patch()
    given = {"attention": "both", "min_tokens": 0, "blocks": "all", "counts": {}, **changes}
    config = AttentionConfig(strict=False, backend="reference")  # whatever this machine has
    settings = Settings(config, parse(given["blocks"]), given["counts"], given["attention"], given["min_tokens"])
    return make_override(settings, patch, previous), patch


def tensors(
    nq=48, nk=48, batch=2, heads=HEADS, kv_heads=None, dim=DIM, skip_reshape=False, dtype=torch.float32, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(nq, heads)] + [(nk, kv_heads or heads)] * 2
    made = [torch.randn(batch, h, n, dim, generator=generator).to(dtype) for n, h in shapes]
    return made if skip_reshape else [t.transpose(1, 2).flatten(2) for t in made]


def relative_l2(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def check_taken(run, patch, *qkv, **kwargs):
    """The call is taken, close to the exact result, and in the layout that ComfyUI expects."""
    before = [t.clone() for t in qkv]
    out = run(core, *qkv, HEADS, **kwargs)
    assert core.calls == 0 and not patch.report.passed and patch.report.as_dict()["calls"] == 1
    exact = core(*qkv, HEADS, **{name: value for name, value in kwargs.items() if name != "transformer_options"})
    assert out.shape == exact.shape and out.dtype == exact.dtype
    error = relative_l2(out, exact)
    assert 0 < error < TOLERANCE
    assert all(t.equal(b) for t, b in zip(qkv, before)), "the caller's tensors were written"
    return out


def check_passed(run, patch, reason, *qkv, **kwargs):
    """The call is passed on with this reason, to func, with every argument."""
    out = run(core, *qkv, HEADS, **kwargs)
    assert core.calls == 1 and not patch.report.taken
    assert dict(patch.report.passed) == {reason: 1}
    assert out.equal(core(*qkv, HEADS, **kwargs))


def failing(monkeypatch, error):
    """Make the kernels raise, on any call."""
    calls = []

    def attention_consuming(qkv, **_):
        calls.append(len(qkv))
        raise error

    monkeypatch.setattr(override_module, "attention_consuming", attention_consuming)
    return calls
