"""What is measured: our backends and modes, and the peers installed beside them, each as one callable on HND tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from findings import FINDINGS

import sage_kernels
import sage_kernels.reference
from sage_kernels import AttentionConfig, cuda
from sage_kernels.dispatch import INTENTS, TABLE, Request, choose, default_device

OURS = ("cuda", "triton", "reference")
# Modes of the CUDA kernels that are timed on every shape; the others, which nothing picks by itself, on few.
EVERYWHERE = ("int8/int32", "fp16/fp32", "fp8/fp32+fp16")


@dataclass(frozen=True)
class Provider:
    """One line of the tables.

    prepare turns q, k, v [b, h, n, d] into what the peer is used to, outside the timing (its own layout; a copy where it
    writes its inputs); run takes that and causal and returns the result; finish makes it HND again, outside the timing.
    timed: False for emulations, which only have an accuracy.
    everywhere: whether it is timed on every shape, or only on those of --quick.
    details: more keys of its rows.
    """

    backend: str
    mode: str
    run: Callable
    causal: bool = True  # whether it can
    prepare: Callable = lambda q, k, v: (q, k, v)
    finish: Callable = lambda out: out
    timed: bool = True
    everywhere: bool = True
    details: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return title({"backend": self.backend, "mode": self.mode, **self.details})


def title(row: dict) -> str:
    """What a row of a result file, or a provider, is called in the tables."""
    intents = f"({', '.join(row['intents'])})" if row.get("intents") else ""
    return " ".join(part for part in (row["backend"], row["mode"], row.get("qk_quant_gran"), intents) if part)


def ours(config: AttentionConfig, timed: bool = True) -> Provider | None:
    """A provider for `config`, or None with a printed reason if this machine cannot run it as asked."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sample = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    choice = sage_kernels.explain(sample, sample, sample, config=config)
    if choice.refusal:
        print(f"left out: {config.backend} {config.pv_accum}: {choice.refusal}")
        return None
    got = choice.config
    parts = [name for name in ("smooth_k", "smooth_v", "rotate") if getattr(got, name)]
    details = {"qk_quant_gran": got.qk_quant_gran, "with": "+".join(parts)}
    if choice.backend == "cuda" and choice.mode.startswith("fp8") and cuda.arch(device) == "10.0":
        details["note"] = "mma.sync has no fp8 there: the compiler makes it of fp16 instructions, which is slow"

    def run(q, k, v, causal):
        return sage_kernels.attention(q, k, v, is_causal=causal, config=config)

    everywhere = choice.backend != "cuda" or choice.mode in EVERYWHERE
    return Provider(choice.backend, choice.mode, run, timed=timed, everywhere=everywhere, details=details)


def all_ours(modes: list[str], backends: list[str], timed: bool) -> list[Provider]:
    """timed: every kernel that this machine has, with what "auto" picks marked. Otherwise every mode, as the emulation has it.

    modes, backends: only those whose name contains one of `modes`, of one of `backends`; all where empty.
    """
    device = default_device()
    if not timed:
        found = [
            ours(AttentionConfig(backend="reference", pv_accum=mode), timed=False) for mode in sage_kernels.PV_MODES
        ]
        found += [finding(name, *what) for name, what in FINDINGS.items()]
    elif device.type == "cpu":
        found = [ours(AttentionConfig(backend="reference", pv_accum="int8/int32"))]
    else:
        found = []
        for backend in TABLE:
            if reason := backend.blocked(device):
                print(f"left out: {backend.name}: {reason}")
            elif backend.name != "reference":
                found += [ours(AttentionConfig(backend=backend.name, pv_accum=mode)) for mode in backend.modes(device)]
    if timed:  # what an intent comes to is measured once, whoever has it already
        by_kernel = {(p.backend, p.mode, p.details["qk_quant_gran"]): p for p in found if p}
        for intent in INTENTS:
            backend, mode, gran = what_serves(intent)
            if (backend, mode, gran) not in by_kernel and backend:
                config = AttentionConfig(backend=backend, pv_accum=mode, qk_quant_gran=gran)
                by_kernel[backend, mode, gran] = ours(config)
        found = list(by_kernel.values())
    return [
        p for p in found
        if p and (not modes or any(mode in p.name for mode in modes)) and (not backends or p.backend in backends)
    ]  # fmt: skip


def what_serves(intent: str) -> tuple[str, str, str]:
    """Backend, mode and granularity of an intent on this machine."""
    device = default_device()
    config = AttentionConfig(intent=intent, backend="reference" if device.type == "cpu" else "auto")
    choice = choose(Request(config, device))
    return choice.backend, choice.mode, choice.config.qk_quant_gran


def intents_of(provider: Provider) -> list[str]:
    """What a kernel of ours is chosen for."""
    this = provider.backend, provider.mode, provider.details.get("qk_quant_gran")
    return [intent for intent in INTENTS if provider.backend in OURS and what_serves(intent) == this]


class Quantisation:
    """The steps of a CUDA call that come before attention: statistics, then the codes of q, k and v, as the call makes them.

    moved: bytes that must be read and written: q once, k and v twice (their means and scales come first), codes and scales
    once.
    """

    mode = "int8/int32"

    def __init__(self, q, k, v):
        config = AttentionConfig(backend="cuda", pv_accum=self.mode)
        choice = sage_kernels.explain(q, k, v, config=config)
        if choice.refusal:
            raise RuntimeError(choice.refusal)
        self.config = choice.config
        self.moved = q.nbytes + 2 * (k.nbytes + v.nbytes) + sum(self._call(q, k).bytes()[1:4])

    def _call(self, q, k):
        (b, heads, nq, d), (_, kv_heads, nk, _) = q.shape, k.shape
        stream = torch.cuda.current_stream(q.device).cuda_stream
        return cuda._prepare(
            b, heads, kv_heads, nq, nk, d, q.dtype, False, d**-0.5, False, self.config, q.device, stream
        )

    def run(self, q, k, v) -> None:
        call, step = self._call(q, k), cuda.binary()
        views = [cuda._view(x, 0, 1, 2) for x in (q, k, v)]
        scratch = [torch.empty(size, dtype=torch.uint8, device=q.device) for size in call.bytes()[:4]]
        at = [x.data_ptr() for x in scratch]
        step.stats(call, *views[1:], at[0])
        parts = (step.PART_Q, step.PART_K, step.PART_V)
        together = q.nbytes + k.nbytes + v.nbytes < cuda.LARGE
        for part in [sum(parts)] if together else parts:
            step.quantize(call, part, *views, *at)


def finding(name: str, config: AttentionConfig, knobs: dict) -> Provider:
    """One of the emulations that docs/accuracy.md argues with."""

    def run(q, k, v, causal):
        return sage_kernels.reference.emulate(q, k, v, config=config, is_causal=causal, **knobs)[0]

    return Provider("finding", name, run, timed=False)


def peers() -> list[Provider]:
    """Other attention implementations that can be imported and run here; a line is printed for each that cannot."""
    found = []
    for make in (_torch, _flash_attention_3, _comfy_kitchen, _sageattention):
        try:
            found += make()
        except Exception as error:  # whatever somebody else's package raises is the reason it is left out
            print(f"left out: {make.__name__[1:]}: {type(error).__name__}: {error}")
    return found


def _torch() -> list[Provider]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def on(backend):
        def run(q, k, v, causal):
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=causal)

        return run

    if not torch.cuda.is_available():
        return [Provider("torch", "sdpa", on(SDPBackend.MATH))]
    return [
        Provider("torch", "cudnn bf16", on(SDPBackend.CUDNN_ATTENTION)),
        Provider("torch", "flash bf16", on(SDPBackend.FLASH_ATTENTION)),
    ]


def _flash_attention_3() -> list[Provider]:
    from fa3_fwd_interface import flash_attn_func

    if torch.cuda.get_device_capability() != (9, 0):
        raise RuntimeError("FlashAttention-3 needs a Hopper GPU")

    def run(q, k, v, causal):
        out = flash_attn_func(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return [Provider("flash-attention-3", "bf16", run, prepare=_to_nhd, finish=lambda out: out.transpose(1, 2))]


def _comfy_kitchen() -> list[Provider]:
    import comfy_kitchen

    if not comfy_kitchen.int8_attention_is_available():
        raise RuntimeError("int8_attention_is_available() says no")
    return [
        Provider("comfy-kitchen", "int8", lambda q, k, v, causal: comfy_kitchen.int8_attention(q, k, v), causal=False)
    ]


def _sageattention() -> list[Provider]:
    from sageattention import sageattn

    if not torch.cuda.is_available():
        raise RuntimeError("it needs an NVIDIA GPU")
    # It subtracts K's mean in place, so it works on a copy.
    return [
        Provider(
            "thu-ml sageattention 1.0.6", "triton", lambda q, k, v, causal: sageattn(q, k, v, is_causal=causal),
            prepare=lambda q, k, v: (q, k.clone(), v),
        )
    ]  # fmt: skip


def _to_nhd(*tensors):
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)
