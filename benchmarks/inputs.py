"""Inputs, exact attention on some of the queries, and the error: what the benchmark verifies with (docs/accuracy.md)."""

from __future__ import annotations

import torch

DISTRIBUTIONS = ("gauss", "peaky", "outlier")


def make(kind, b, heads, nq, nk, d, dtype=torch.bfloat16, device="cuda", seed=0):
    """q [b, heads, nq, d], k and v [b, heads, nk, d] of one distribution.

    gauss: all of them N(0, 1).
    peaky: q * 2.5; k + 4 N and v + N, one N for each channel of each head.
    outlier: 4 channels of q and k times 4, then k + 8 N per channel and q * 1.2; v * exp(0.7 N) + 2 N per channel.
    """
    rng = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=rng, device=device)

    q, k, v = normal(b, heads, nq, d), normal(b, heads, nk, d), normal(b, heads, nk, d)
    if kind == "peaky":
        q = q * 2.5
        k = k + 4 * normal(b, heads, 1, d)
        v = v + normal(b, heads, 1, d)
    elif kind == "outlier":
        some = torch.randperm(d, generator=rng, device=device)[:4]
        q[..., some] *= 4
        k[..., some] *= 4
        k = k + 8 * normal(b, heads, 1, d)
        q = q * 1.2
        v = v * torch.exp(0.7 * normal(b, heads, 1, d)) + 2 * normal(b, heads, 1, d)
    elif kind != "gauss":
        raise ValueError(f"distribution {kind!r} is none of {DISTRIBUTIONS}")
    return q.to(dtype), k.to(dtype), v.to(dtype)


def some_rows(nq, count, device="cuda"):
    """`count` query indices spread evenly over 0 .. nq - 1, the first and the last among them."""
    return torch.linspace(0, nq - 1, min(count, nq), dtype=torch.float64, device=device).round().long()


def exact(q, k, v, rows, causal):
    """float64 attention [b, heads, len(rows), d] of the queries `rows`, a head at a time."""
    out = torch.empty(*q.shape[:2], len(rows), q.shape[-1], dtype=torch.float64, device=q.device)
    positions = torch.arange(k.shape[2], device=q.device)
    step = max(1, (1 << 27) // k.shape[2])  # 1 GiB of scores
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            key, value = k[b, h].double(), v[b, h].double()
            for first in range(0, len(rows), step):
                some = rows[first : first + step]
                score = (q[b, h, some].double() * q.shape[-1] ** -0.5) @ key.T
                if causal:
                    score.masked_fill_(positions > some[:, None], float("-inf"))
                out[b, h, first : first + step] = torch.softmax(score, -1) @ value
    return out


def centred_error(out, want):
    """Relative L2 after removing the reference's mean over queries: what attention adds to the mean of V. Also for NaN."""
    centre = want - want.mean(2, keepdim=True)
    return ((out.double() - want).norm() / centre.norm()).item()
