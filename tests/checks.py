"""What the attention tests share: an oracle that owes nothing to sage_kernels, inputs, and the comparison."""

import torch

# Relative L2 against exact attention on unit normal inputs of a few hundred tokens, by what PV is computed in. QK in INT8
# alone gives about 0.015; fp8 has 3 mantissa bits for P and V.
TOLERANCE = {"fp16": 0.025, "int8": 0.035, "fp8": 0.07}


def tolerance(mode: str) -> float:
    return TOLERANCE[mode.split("/")[0]]


def qkv(b=1, heads=2, nq=67, nk=None, d=64, kv_heads=None, dtype=torch.float32, device="cpu", layout="HND", seed=0):
    """Unit normal q [b, heads, nq, d] and k, v [b, kv_heads, nk, d], or tokens before heads for NHD."""
    rng = torch.Generator(device=device).manual_seed(seed)
    nk, kv_heads = nk or nq, kv_heads or heads
    shapes = [(b, heads, nq, d), (b, kv_heads, nk, d), (b, kv_heads, nk, d)]
    made = [torch.randn(shape, generator=rng, device=device, dtype=torch.float32).to(dtype) for shape in shapes]
    return made if layout == "HND" else [x.transpose(1, 2).contiguous() for x in made]


def exact(q, k, v, is_causal=False, sm_scale=None, attn_mask=None):
    """float64 (out [b, heads, nq, d], lse [b, heads, nq]) of HND inputs; a hidden key takes no part whatever it holds.

    Every product p * v is formed by itself, so that NaN and inf spread as IEEE arithmetic says: small inputs only.
    """
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    seen = torch.ones_like(score, dtype=torch.bool)
    if is_causal:
        seen &= torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen &= attn_mask
    elif attn_mask is not None:
        seen &= attn_mask != float("-inf")
        score = score + attn_mask.double()
    score = torch.where(seen, score, float("-inf"))
    nothing = ~seen.any(-1)
    top = torch.where(nothing, 0.0, score.amax(-1))
    p = torch.where(seen, torch.exp(score - top[..., None]), 0.0)
    total = p.sum(-1)
    weighed = torch.where(seen[..., None], p[..., None] * v[..., None, :, :], 0.0).sum(-2)
    out = torch.where(nothing[..., None], 0.0, weighed / total[..., None])
    return out, torch.where(nothing, float("-inf"), top + total.log())


def relative_l2(value, reference) -> float:
    """||value - reference|| / ||reference|| over the elements that are finite in the reference."""
    reference = reference.double()
    keep = reference.isfinite()
    return ((value.double() - reference)[keep].norm() / reference[keep].norm().clamp_min(1e-30)).item()


def same_special(value, reference) -> None:
    """NaN, +inf and -inf stand in the same places."""
    for name, where in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        extra, missing = where(value) & ~where(reference), where(reference) & ~where(value)
        assert not extra.any(), f"{int(extra.sum())} {name} too many, first at {extra.nonzero()[0].tolist()}"
        assert not missing.any(), f"{int(missing.sum())} {name} missing, first at {missing.nonzero()[0].tolist()}"


def close(value, reference, limit: float) -> float:
    """Relative L2 within limit, cosine to match, specials in the same places. Returns the relative L2."""
    assert value.shape == reference.shape
    same_special(value, reference)
    error = relative_l2(value, reference)
    assert error <= limit, f"relative L2 {error:.3g} > {limit}"
    keep = reference.isfinite()
    cosine = torch.nn.functional.cosine_similarity(value.double()[keep], reference.double()[keep], dim=0).item()
    if reference[keep].any():
        assert cosine >= 1 - limit**2, f"cosine {cosine}"
    return error
