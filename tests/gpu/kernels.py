"""What the GPU tests share: which kernels there are, the emulation of each, and how close it must come."""

import contextlib
import math
from unittest import mock

import pytest
import torch

import sage_kernels
from sage_kernels import PV_MODES, AttentionConfig, cuda, reference
from sage_kernels.dispatch import Request, choose
from sage_kernels.quantize import PV

TRITON = [("triton", "fp16/fp32"), ("triton", "int8/int32")]
CUDA = [("cuda", mode) for mode in PV_MODES]
KERNELS = TRITON + CUDA
# One mode for each type of P and V, where only what comes before or after the sums can go wrong.
ONE_EACH = [*TRITON, ("cuda", "fp16/fp16+fp32"), ("cuda", "int8/int32"), ("cuda", "fp8/fp32+fp16")]

# Relative L2 against the emulation: sums in another order, an exp2 of other last bits and so, rarely, a code that rounds the
# other way. An fp16 accumulator rounds at every instruction; the CUDA kernels round P to fp16 on its way to uint8. What fp8's
# accumulator keeps on Hopper nobody says: the emulation's 13 bits are fewer than there are, which adds up over all keys.
EMULATION = {"fp16": 0.001, "fp16/fp16": 0.003, "int8": 0.002, "cuda int8": 0.004, "fp8": 0.005, "fp8/fp32": 0.025}
# The same where the keys of a query are shared out in other ranges than the emulation has: a range rounds P at its own
# maximum, not at that of all keys before it, and starts a new sum in the accumulator. (int8 P is at its tile's maximum.)
REGROUPED = {"fp16": 0.001, "fp16/fp16": 0.005, "int8": 0.004, "fp8": 0.04}
# The output's own rounding, which the emulation has not.
ROUNDING = {torch.float32: 0.0, torch.float16: 0.0003, torch.bfloat16: 0.002}


def limit(kernel, dtype, regrouped=False):
    """How far kernel = (backend, mode) may be from its emulation."""
    backend, mode = kernel
    table = REGROUPED if regrouped else EMULATION
    names = (mode, f"{backend} {mode.split('/')[0]}", mode.split("/")[0])
    return math.hypot(next(table[name] for name in names if name in table), ROUNDING[dtype])


def config_of(kernel, **options):
    """The config that gets this kernel; the test is skipped, with dispatch's reason, where it is not to be had."""
    backend, mode = kernel
    config = AttentionConfig(backend=backend, pv_accum=mode, **options)
    choice = choose(Request(config, torch.device("cuda", 0)))
    if choice.refusal is not None:
        pytest.skip(choice.rejected[backend])
    return config


def each(kernels=KERNELS):
    """A test's argument `kernel`."""
    return pytest.mark.parametrize("kernel", kernels, ids="-".join)


def prepared(q, k, config):
    """The `_C.Call` of HND inputs and a config of explain(), with everything that a call can leave behind."""
    (b, heads, nq, d), (_, kv_heads, nk, _) = q.shape, k.shape
    stream = torch.cuda.current_stream(q.device).cuda_stream
    return cuda._prepare(b, heads, kv_heads, nq, nk, d, q.dtype, False, d**-0.5, True, config, q.device, stream)


def emulated(q, k, v, *, config, ranges=1, **options):
    """(out float32, lse) of HND inputs with the roundings of the kernel that serves `config`.

    ranges: how many the kernel shares out the keys of a query to; each has its own running maximum. 1 for a causal call,
    whose ranges depend on the block of queries.
    """
    choice = sage_kernels.explain(q, k, v, config=config)
    tile = sums = None
    if choice.backend == "cuda":
        module, wgmma = cuda.binary(), prepared(q, k, choice.config).wgmma
        tile = module.WGMMA_KEYS if wgmma else module.key_tile(choice.mode, q.shape[-1], cuda.arch(q.device))
        fp22 = PV[choice.mode].accumulator == "fp22"
        if fp22 and not wgmma and torch.cuda.get_device_capability(q.device)[0] in (9, 10):
            sums = "fp32"  # of fp8, mma.sync is there only as fp16's

    def run():
        return reference.emulate(q, k, v, config=choice.config, key_tile=tile, accumulator=sums, **options)

    if ranges == 1:
        return run()
    every, nk, results = reference.Grouped.tiles, k.shape[2], []
    share = math.ceil(math.ceil(nk / tile) / ranges) * tile
    for first in range(0, nk, share):

        def tiles(call, rows, size, own=range(first, first + share)):
            return (cols for cols in every(call, rows, size) if cols.start in own)

        with mock.patch.object(reference.Grouped, "tiles", tiles):
            results.append(run())
    lse = torch.stack([one for _, one in results])
    total = torch.logsumexp(lse, 0)
    weights = torch.exp(lse - total).nan_to_num()  # NaN: a query that sees nothing
    return sum(weight[..., None] * out for weight, (out, _) in zip(weights, results, strict=True)), total


@contextlib.contextmanager
def parts(forced=None):
    """Within it the CUDA kernels share out a query's keys to `forced` parts, or to as many as usual: the list of how many."""
    module, found = cuda.binary(), []
    if isinstance(module, str):
        yield found
        return
    usual = module.choose_splits

    def choose_splits(*call):
        found.append(forced or usual(*call))
        return found[-1]

    cuda._prepare.cache_clear()
    module.choose_splits = choose_splits
    try:
        yield found
    finally:
        module.choose_splits = usual
        cuda._prepare.cache_clear()


def mask_of(kind, b, heads, nq, nk):
    """A mask named "bool" or "add", then "keys" (of each batch), "dense" or "heads" (of each head); one key in five hidden."""
    rng = torch.Generator(device="cuda").manual_seed(9)
    shape = {"keys": (b, 1, 1, nk), "dense": (b, heads, nq, nk), "heads": (heads, 1, nk)}[kind.split()[1]]
    seen = torch.rand(shape, generator=rng, device="cuda") < 0.8
    if nk > 1:
        seen[..., 0] = True
    if kind == "bool dense" and nq > 2:
        seen[..., 2, :] = False  # a query that sees nothing
    if kind.startswith("bool"):
        return seen
    values = torch.randn(shape, generator=rng, device="cuda").masked_fill(~seen, float("-inf"))
    dtype = {"add keys": torch.bfloat16, "add dense": torch.float32, "add heads": torch.float16}[kind]
    return values.to(dtype)


def strided(x):
    """The same values with gaps between tokens and between heads."""
    return torch.stack([x, torch.full_like(x, 7.0)], 3).flatten(2, 3)[:, :, ::2]


def ends_of(lengths):
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
